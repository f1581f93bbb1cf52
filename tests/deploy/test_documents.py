"""README and the folders' READMEs: short for a newcomer, and true."""

import ast
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import stages.events
from deploy.cli.app import app
from graph.kinds import Kind
from stages import kinds

ROOT = Path(__file__).parent.parent.parent
GROUPS = ("camera", "shards", "nano")
DOCUMENTS = ["README.md", "stages/README.md", "deploy/README.md", "model_shards/README.md"]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose_of(name: str) -> str:
    """Without blocks of code."""
    text = re.sub(r"^```.*?^```\n", "", text_of(name), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^    .*\n", "\n", text, flags=re.MULTILINE)


def code_of(name: str, behind: str, language: str) -> str:
    """The first block of code of a language behind these words."""
    match = re.search(rf"^```{language}\n(.*?)^```", text_of(name).partition(behind)[2], re.MULTILINE | re.DOTALL)
    assert match is not None, f"{name} has no {language} behind {behind!r}"
    return match[1]


def paragraphs_of(name: str) -> list[str]:
    parts = re.split(r"\n\s*\n|\n(?=[-#|] ?)", prose_of(name))
    return [part for part in parts if not part.startswith("|")]


def words(cell: str) -> int:
    return len(cell.split())


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_the_readme_has_at_most_150_lines():
    assert len(text_of("README.md").splitlines()) <= 150


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_paragraph_is_longer_than_five_lines(name: str):
    assert [part for part in paragraphs_of(name) if len(part.strip().splitlines()) > 5] == []


@pytest.mark.parametrize("name", [*DOCUMENTS, "ARCHITECTURE.md"])
def test_no_table_cell_has_more_than_25_words(name: str):
    rows = [line for line in text_of(name).splitlines() if line.startswith("|")]
    cells = [cell for row in rows for cell in re.split(r"(?<!\\)\|", row)]
    assert [cell for cell in cells if words(cell) > 25] == []


@pytest.mark.parametrize("name", [*DOCUMENTS, "ARCHITECTURE.md"])
def test_every_link_leads_somewhere(name: str):
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text_of(name))
    assert links or name == "ARCHITECTURE.md"
    for path, anchor in links:
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{path}#{anchor}"


def test_every_file_and_function_of_the_architecture_is_there():
    text = text_of("ARCHITECTURE.md")
    files = re.findall(r"`([a-z_/]+/[a-z_]+\.py)`", text)
    assert files and [path for path in files if not (ROOT / path).is_file()] == []
    packages = ("graph", "stages", "deploy", "model_shards")
    code = "\n".join(path.read_text() for package in packages for path in (ROOT / package).rglob("*.py"))
    defined = set(re.findall(r"^ *(?:def|class) (\w+)", code, re.MULTILINE))
    functions = re.findall(r"`(?:\w+\.)?(\w+)\(\)`", text)
    assert functions and [name for name in functions if name not in defined] == []


def test_the_table_of_kinds_is_what_the_kinds_are():
    rows = dict(re.findall(r"^\| `([A-Z]+)` \|.*\| ([^|]*) \|$", text_of("stages/README.md"), re.MULTILINE))
    built_in = {name: kind for name, kind in vars(kinds).items() if isinstance(kind, Kind)}
    assert rows.keys() == built_in.keys()
    for name, kind in built_in.items():
        for array, shape in (kind.arrays or {}).items():
            assert f"`{array}` {shape}" in rows[name]


# Of what makes an event, the place of its type among the arguments.
TYPE_AT = {"event": 2, "_event": 2, "Notice": 0, "OutputEvent": 0, "_interrupt": 2, "announce": 1, "tell": 3}


def types_made(path: Path) -> set[str]:
    """The types of the events that this file's code makes, where they are written out."""
    made: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        written: list[ast.expr | None] = []
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            written = [*node.args[TYPE_AT[name] : TYPE_AT[name] + 1]] if name in TYPE_AT else []
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            written = [value for key, value in pairs if isinstance(key, ast.Constant) and key.value == "type"]
        for expression in written:
            made |= {getattr(stages.events, each.id, "") for each in ast.walk(expression) if isinstance(each, ast.Name)}
            made |= {each.value for each in ast.walk(expression) if isinstance(each, ast.Constant)}
    return {name for name in made if isinstance(name, str) and name}


def test_every_type_of_event_is_in_the_table_of_events():
    table = text_of("deploy/README.md").partition("### Events\n")[2].partition("\n### ")[0]
    listed = set(re.findall(r"`([a-z_]+)`", " ".join(re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE)))) - {"type"}
    files = [*(ROOT / "stages").rglob("*.py"), *(ROOT / "deploy" / "actor").rglob("*.py")]
    files += (ROOT / "deploy" / "control").rglob("*.py")
    assert listed - {"listener_pause", "listener_resume"} == set().union(*map(types_made, files)) - {
        "window",
        "listener_",
    }


def listed_commands() -> list[tuple[list[str], list[str]]]:
    """The commands in deploy/README.md, each with the options that stand behind it."""
    block = text_of("deploy/README.md").partition("## Commands\n\n")[2].partition("\n\n")[0]
    commands = []
    for line in re.sub(r"\n {8,}", " ", block).splitlines():
        first = line.split()[1]
        group = [first] if first in GROUPS else []
        for each in line.split(maxsplit=1 + len(group))[-1].split(" | "):
            commands.append(([*group, each.split()[0]], re.findall(r"(?<!\w)--?[a-z][a-z-]*", each)))
    return commands


def described_options(command: list[str]) -> list[str]:
    """The lines of `--help`, one per option."""
    shown = CliRunner().invoke(app, [*command, "--help"]).stdout.partition("Options:\n")[2]
    return re.sub(r"\n {10,}", "  ", shown).splitlines()


@pytest.mark.parametrize(("command", "options"), listed_commands(), ids=" ".join)
def test_every_command_is_listed_with_all_its_options(command: list[str], options: list[str]):
    described = [re.match(r"  (?:(-[a-z]), )?(--[a-z-]+)", line) for line in described_options(command)]
    assert sorted([*options, "--help"]) == sorted(match[1] or match[2] for match in described if match)


@pytest.mark.parametrize("command", [command for command, _ in listed_commands()], ids=" ".join)
def test_help_says_what_each_option_does(command: list[str]):
    assert [line for line in described_options(command) if not re.fullmatch(r"  -\S.*? {2,}\S.*", line)] == []


def test_the_example_of_testing_a_stage_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "motion.py").write_text(code_of("README.md", "## A stage of your own", "python"))
    monkeypatch.syspath_prepend(tmp_path)
    example: dict[str, object] = {}
    exec(code_of("stages/README.md", "### Testing a stage", "python"), example)  # as pytest would
    test = example["test_a_picture_passes_when_something_has_moved"]
    assert callable(test)
    test()
