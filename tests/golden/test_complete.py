"""Nothing of the folder is left out: every file is as listed, every list entry has a case, every tensor is looked at.

Runs after all other tests (conftest.py sorts it to the end). What needs the whole of tests/golden is skipped where only
a part of it was asked for.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from tests.support import golden
from tests.support.golden import LOOKED_AT, cases, read_json

MANIFEST = "manifest.json"
IN_A_PROCESS_OF_THEIR_OWN = {"test_another_folder.py", "test_compact.py"}
"""Tests that run the others on another folder: here they look at nothing."""
NUMPY_NAMES = {"float32": "F32", "int32": "I32", "int64": "I64"}


def listed() -> dict[str, Any]:
    return read_json(MANIFEST)


def tensors_of(file: str) -> dict[str, list[Any]]:
    """Name to [dtype, *shape], as the manifest tells."""
    return listed()[file].get("tensors") or listed()[file].get("arrays") or {}


def tensor_files() -> list[str]:
    return [file for file in listed() if tensors_of(file)]


def part_of_the_suite(session: pytest.Session) -> str | None:
    """Why this run can't say what the whole suite looks at; None when it can."""
    here = Path(__file__).parent
    present = {item.path.name for item in session.items} | {name for name, _ in golden.LEFT_OUT}
    absent = {path.name for path in here.glob("test_*.py")} - present - IN_A_PROCESS_OF_THEIR_OWN
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if hasattr(session.config, "workerinput"):
        return "the suite is spread over several processes"
    if absent:
        return f"only a part of tests/golden was run: without {', '.join(sorted(absent))}"
    deselected = reporter.stats.get("deselected", []) if reporter else []
    if any("::" in arg for arg in session.config.args) or any(item.path.parent == here for item in deselected):
        return "only a part of tests/golden was run: some tests were deselected"
    return None


@pytest.fixture
def whole_suite(request: pytest.FixtureRequest) -> pytest.Session:
    reason = part_of_the_suite(request.session)
    if reason:
        pytest.skip(reason)
    return request.session


@cases(MANIFEST, listed())
def test_a_file_is_as_listed(case: str) -> None:
    content = (golden.FOLDER / case).read_bytes()
    assert len(content) == listed()[case]["bytes"]
    assert hashlib.sha256(content).hexdigest() == listed()[case]["sha256"]


@cases(MANIFEST, (f"the tensors of {file}" for file in tensor_files()))
def test_a_file_holds_the_listed_tensors(case: str) -> None:
    file = case.removeprefix("the tensors of ")
    read = read_npz if file.endswith(".npz") else read_header
    assert read(golden.FOLDER / file) == {name: spelled(entry) for name, entry in tensors_of(file).items()}


@cases(MANIFEST, ["the folder"])
def test_the_folder_holds_nothing_else(case: str) -> None:
    files = {path.name for path in golden.FOLDER.iterdir() if path.suffix != ".md"}
    assert files == {MANIFEST, *listed()}


def read_header(file: Path) -> dict[str, list[Any]]:
    with safe_open(file, framework="np") as opened:
        parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        return {name: [part.get_dtype(), *part.get_shape()] for name, part in parts.items()}


def read_npz(file: Path) -> dict[str, list[Any]]:
    with np.load(file, allow_pickle=False) as opened:
        return {name: spelled([str(opened[name].dtype), *opened[name].shape]) for name in opened.files}


def spelled(entry: list[Any]) -> list[Any]:
    return [NUMPY_NAMES.get(entry[0], entry[0]), *entry[1:]]


@pytest.mark.parametrize("file", tensor_files())
def test_every_tensor_was_looked_at(file: str, whole_suite: pytest.Session) -> None:
    missed = [name for name in tensors_of(file) if (file, name) not in LOOKED_AT]
    assert not missed, f"{file}: no test asked for {len(missed)} of {len(tensors_of(file))}: {', '.join(missed)}"


@pytest.mark.parametrize("file", [file for file in listed() if file.endswith(".json")])
def test_every_entry_has_a_case(file: str, whole_suite: pytest.Session) -> None:
    markers = (item.get_closest_marker("golden") for item in whole_suite.items)
    num_cases = Counter(marker.args[0] for marker in markers if marker)[file]
    expected = max(1, golden.num_records(read_json(file)))
    assert num_cases >= expected, f"{file}: {num_cases} cases, but {expected} entries in its lists"
