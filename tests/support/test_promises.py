"""What every test keeps to: whoever skips says why, and how busy the machine is decides nothing."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py"))


def skips_without_reason(text: str) -> list[int]:
    """The lines of calls to skip or skipif, of pytest or as a mark, that give no words."""
    return [call.lineno for call in calls(text) if not has_reason(call)]


def calls(text: str) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("skip", "skipif"):
            yield node


def has_reason(call: ast.Call) -> bool:
    assert isinstance(call.func, ast.Attribute)
    given = [keyword.value for keyword in call.keywords if keyword.arg in ("reason", "msg")]
    given += call.args[:1] if call.func.attr == "skip" else []
    return any(not isinstance(value, ast.Constant) or bool(value.value) for value in given)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("pytest.skip()", [1]),
        ("pytest.skip('')", [1]),
        ("x = 1\npytest.mark.skipif(True)", [2]),
        ("pytest.skip('no GPU')", []),
        ("pytest.skip(reason)", []),
        ("pytest.mark.skip(reason='no GPU')", []),
        ("pytest.mark.skipif(x, reason=f'no {x}')", []),
    ],
)
def test_a_skip_without_a_reason_is_seen(text: str, lines: list[int]) -> None:
    assert skips_without_reason(text) == lines


@pytest.mark.parametrize("file", FILES)
def test_every_skip_says_why(file: str) -> None:
    assert skips_without_reason((ROOT / file).read_text(encoding="utf-8")) == []


def test_the_reasons_of_skips_are_printed() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert "-ra" in options["addopts"].split()


def test_no_example_has_a_deadline() -> None:
    assert settings().deadline is None
