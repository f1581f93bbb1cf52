"""Where stages are found, and what is said of a class that can't be one."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from graph.stage_type import StageTypeError
from stages.api import Stage, StageOptions
from stages.catalog import StageCatalog

IN_NS = "it is in whole nanoseconds, of {} to 60s: write"
FROM_OPTIONS = "read options from self.options, in open_session() or process()"
IMPORTS = "from stages.api import *\n"
GATE = """
class Gate(Stage):
    '''Lets a picture through.

    Or not.
    '''
    frames = In(FRAMES)
    moving = Out(FRAMES)
    class Options(StageOptions):
        threshold: float = 0.02
        batch: int = 4
    def process(self, units):
        return []
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Of a pipeline.yaml; nothing of it is left behind."""
    path, modules = list(sys.path), set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in sys.modules.keys() - modules:
        del sys.modules[name]


def refusal(folder: Path, text: str, use: str = "zoo:Gate") -> str:
    """What is said of a class in zoo.py."""
    (folder / "zoo.py").write_text(IMPORTS + text)
    with pytest.raises(StageTypeError) as error:
        StageCatalog(folder).find(use)
    return str(error.value)


def declared(*lines: str) -> str:
    return "class Gate(Stage):\n" + "".join(f"    {line}\n" for line in lines)


def test_a_class_beside_the_description_is_found(folder: Path):
    (folder / "zoo.py").write_text(IMPORTS + GATE)
    stage_type = StageCatalog(folder).find("zoo:Gate")
    assert (stage_type.use, stage_type.about) == ("zoo:Gate", "Lets a picture through.")
    assert list(stage_type.inputs) == ["frames"] and list(stage_type.outputs) == ["moving"]
    assert stage_type.options(threshold=0.5).batch == 4, "an option of every stage may have another default"


def test_an_installed_module_goes_before_one_beside_the_description(folder: Path):
    (folder / "json.py").write_text(IMPORTS + GATE)
    with pytest.raises(
        StageTypeError, match="module json has no 'Gate'; another module has the name of the file"
    ) as said:
        StageCatalog(folder).find("json:Gate")
    assert str(said.value).endswith("json/__init__.py): rename yours")


def test_a_stage_of_an_installed_package_is_found_by_its_name():
    assert StageCatalog().find("census").use == "omni_outside.census:Census"


@pytest.mark.parametrize(
    ("text", "use", "message"),
    [
        ("", "zoo.py:Gate", "zoo.py:Gate: a module is written without .py: zoo:Gate"),
        ("", "zo:Gate", "there is no module 'zo' (of zo:Gate); install it, or put it beside the pipeline.yaml"),
        (GATE, "zoo:Gat", "module zoo has no 'Gat'; did you mean 'Gate'?"),
        (
            "import no_such",
            "zoo:Gate",
            "zoo:Gate can't be imported: it needs 'no_such', which is not installed",
        ),
        ("def f(:", "zoo:Gate", "zoo:Gate can't be imported: SyntaxError: invalid syntax (zoo.py, line 2)"),
        ("raise OSError('no licence')", "zoo:Gate", "zoo:Gate can't be imported: OSError: no licence"),
        ("class Gate: ...", "zoo:Gate", "zoo:Gate is no Stage; derive it from stages.api.Stage"),
    ],
)
def test_a_class_that_cannot_be_had_is_said_with_its_reason(folder: Path, text: str, use: str, message: str):
    assert refusal(folder, text, use) == message


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["..."], "zoo:Gate has no ports; write some in the class, like `frames = In(FRAMES)`"),
        (["frames = In('frames')"], "zoo:Gate: frames is of kind 'frames'; give it a Kind, like FRAMES"),
        (["frames = In(FRAMES, many=True)"], "zoo:Gate: frames: windows come from one source; many=True is for events"),
        (
            ["frames, events = In(FRAMES), In(EVENTS)"],
            "zoo:Gate: some inputs come in windows and some do not; make two stages of it",
        ),
        (
            ["frames, moving = In(FRAMES), Out(FRAMES, many=True)"],
            "zoo:Gate: moving: many=True is for sources; here all views leave on one stream",
        ),
        (
            ["frames = In(FRAMES)", "class Options: ..."],
            "zoo:Gate: its Options are no StageOptions; write `class Options(StageOptions):`",
        ),
        (
            ["frames = In(FRAMES)", "scope = 'global'"],
            "zoo:Gate: scope is 'global'; it must be 'session' or 'pipeline'",
        ),
        (
            ["frames = In(FRAMES)", "class Options(StageOptions):", "    limit: int"],
            "zoo:Gate: Options.limit has no default; give it one",
        ),
        *(
            (
                ["frames = In(FRAMES)", "class Options(StageOptions):", f"    {option}"],
                f"zoo:Gate: Options.limit: its default is {what}",
            )
            for option, what in (
                ("limit: float = 'much'", "'much'; it must be of type float"),
                ("limit: Duration = '40ms'", "'40ms'; it must be of type int"),
                (
                    "limit: float = __import__('pydantic').Field(default=7, le=1)",
                    "7: it must be less than or equal to 1",
                ),
            )
        ),
        *(
            (
                [f"frames = In(FRAMES, window_ns={value})"],
                f"zoo:Gate: frames: window_ns is {value}; {IN_NS.format('10ms')} window_ns=2 * NS_PER_S",
            )
            for value in ("'2s'", "2", "2000000000.0", "True")
        ),
        (
            ["frames = In(FRAMES, lateness_ns='300ms')"],
            f"zoo:Gate: frames: lateness_ns is '300ms'; {IN_NS.format('0s')} lateness_ns=300 * NS_PER_MS",
        ),
        (["frames = In(FRAMES, late='soon')"], "zoo:Gate: frames: late is 'soon'; it must be 'drop' or 'carry'"),
        (
            ["frames = In(FRAMES)", "def __init__(self, threshold): ...", "def process(self, units): return []"],
            f"zoo:Gate: __init__ takes threshold, but a stage is made without arguments: {FROM_OPTIONS}",
        ),
    ],
)
def test_a_class_that_declares_what_cannot_be_is_refused(folder: Path, lines: list[str], message: str):
    assert refusal(folder, declared(*lines)) == message


def test_what_is_made_by_a_load_of_its_own_may_take_arguments(folder: Path):
    lines = ["frames = In(FRAMES)", "def __init__(self, net): ...", "def process(self, units): return []"]
    load = ["@classmethod", "def load(cls, options, site): return cls(1)"]
    (folder / "zoo.py").write_text(IMPORTS + declared(*lines, *load))
    assert StageCatalog(folder).find("zoo:Gate").use == "zoo:Gate"


def test_of_an_option_that_is_misspelt_in_the_code_it_is_said_what_was_meant():
    class Options(StageOptions):
        threshold: float = 0.1

    with pytest.raises(AttributeError, match="there is no option 'treshold'; did you mean 'threshold'"):
        _ = Options().treshold  # type: ignore[attr-defined]
    assert not hasattr(Options(), "_private")


def test_a_class_that_does_nothing_is_refused_with_what_was_meant(folder: Path):
    text = declared("frames = In(FRAMES)", "def proces(self, units): return []")
    assert refusal(folder, text) == "zoo:Gate has no process(); did you mean 'proces'?"


@pytest.mark.parametrize("name", [name for name in (*vars(Stage), "options") if not name.startswith("_")])
def test_a_port_takes_no_name_that_every_stage_has(folder: Path, name: str):
    message = f"zoo:Gate: a port can't be called {name}: every stage has that; give it another name"
    assert refusal(folder, declared("frames = In(FRAMES)", f"{name} = Out(EVENTS)")) == message


@pytest.mark.parametrize("name", StageOptions.model_fields)
def test_an_option_takes_neither_name_nor_key_that_every_stage_has(folder: Path, name: str):
    lines = ["frames = In(FRAMES)", "class Options(StageOptions):", f"    {name}: bytes = b''"]
    assert f"Options.{name} is an option of every stage" in refusal(folder, declared(*lines))
    key = StageOptions.model_fields[name].alias or name
    lines[-1] = f"    mine: bytes = __import__('pydantic').Field(default=b'', alias={key!r})"
    sys.modules.pop("zoo")
    assert "Options.mine is an option of every stage" in refusal(folder, declared(*lines))
