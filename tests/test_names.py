"""Nobody tells of the stages twice: what runs them, wires them and simulates them names none of them, and no stream."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.catalog import CATALOG
from tests.support.streams import EVERY

ROOT = Path(__file__).parents[1]
FOLDERS = ("graph", "deploy/actor", "deploy/control", "deploy/simulator")
PORTS = {name for each in CATALOG.built_in.values() for name in (*each.inputs, *each.outputs)}
NAMES = {*CATALOG.built_in, *PORTS, *(kind.name for kind in EVERY), "mic", "camera/"}
# A label of the metrics, the tracks of a source, a key of a camera: words of what is watched, not of what runs. Names
# of arrays.
NO_STAGES = {
    ("graph/metrics.py", "camera"),
    ("graph/metrics.py", "audio"),
    ("graph/spec_check.py", "microphone"),
    ("deploy/actor/measure.py", "audio"),
    ("deploy/simulator/comings.py", "camera"),
    ("deploy/simulator/speech.py", "codes"),
    ("deploy/simulator/sources.py", "image"),
    ("deploy/simulator/shrink.py", "events"),
}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Every text of a module that is no docstring, with its line."""
    tree = ast.parse(path.read_text())
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docs = {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.lineno, node.value


def named(text: str) -> bool:
    """Whether it is a stage, a port or a stream, or an edge or a setting of one."""
    parts = {part for end in text.split("->") for part in end.split(".")} if " " not in text else set()
    return text in NAMES or ("." in text and bool(parts & NAMES)) or text.startswith("camera/")


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_stage_and_no_stream_is_quoted_where_all_are_run(folder: str) -> None:
    quoted = [
        f"{path.relative_to(ROOT)}:{line}: {text!r}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, text in texts(path)
        if named(text) and (str(path.relative_to(ROOT)), text) not in NO_STAGES
    ]
    assert quoted == []


def test_the_test_would_see_one(tmp_path: Path) -> None:
    (tmp_path / "leak.py").write_text('"""llm"""\nif name == "llm":\n    edge = "llm.text->tts.text"\n')
    assert [line for line, text in texts(tmp_path / "leak.py") if named(text)] == [2, 3]
