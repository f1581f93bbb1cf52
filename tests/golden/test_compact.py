"""The compact part in the repository is small, whole in itself, cut from the recordings, and passes."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import golden
from tests.support.golden import COMPACT, MANIFEST, cases, read_json
from tests.support.golden_subset import Cut, content_of, cut, entry

MAX_BYTES = 6_000_000
HERE = Path(__file__).parent
SUITE = sorted(
    str(file) for file in HERE.glob("test_*.py") if file.name not in {"test_another_folder.py", "test_compact.py"}
)


def listed() -> dict[str, Any]:
    return json.loads((COMPACT / MANIFEST).read_text(encoding="utf-8"))


def stored(file: str) -> bytes:
    return lzma.decompress((COMPACT / f"{file}.xz").read_bytes())


def cut_from_here() -> list[str]:
    """The files, where the folder in use is the one that the compact part was cut from."""
    whole = {file: entry["whole"]["sha256"] for file, entry in listed().items()}
    here = {file: entry["sha256"] for file, entry in read_json(MANIFEST).items()}
    return list(whole) if here == whole else []


@pytest.fixture(scope="module")
def kept() -> Cut:
    return cut(golden.FOLDER)


def test_the_compact_part_is_small() -> None:
    assert sum(file.stat().st_size for file in COMPACT.iterdir()) <= MAX_BYTES


def test_nothing_lies_beside_what_is_listed() -> None:
    files = {file.name for file in COMPACT.iterdir()} - {MANIFEST, "README.md"}
    assert files == {f"{file}.xz" for file in listed()}


@pytest.mark.parametrize("file", listed())
def test_a_file_of_the_compact_part_is_as_listed(file: str) -> None:
    content = stored(file)
    assert (len(content), hashlib.sha256(content).hexdigest()) == (listed()[file]["bytes"], listed()[file]["sha256"])


@pytest.mark.parametrize("file", [file for file, row in listed().items() if "tensors" in row["whole"]])
def test_of_every_file_there_is_a_tensor(file: str) -> None:
    assert listed()[file].get("tensors") or listed()[file].get("arrays")


def test_a_named_folder_goes_before_the_one_beside_the_repository(tmp_path: Path) -> None:
    named, beside = folder(tmp_path / "named"), folder(tmp_path / "beside")
    assert golden.source({"OMNI_GOLDEN": str(named)}, beside) == named


def test_the_folder_beside_the_repository_goes_before_the_compact_part(tmp_path: Path) -> None:
    beside = folder(tmp_path / "beside")
    assert golden.source({}, beside) == beside
    assert golden.source({"OMNI_GOLDEN": ""}, beside) == beside


def test_without_a_folder_the_compact_part_is_read(tmp_path: Path) -> None:
    assert golden.source({}, tmp_path / "absent") == COMPACT


def test_a_named_folder_without_recordings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"OMNI_GOLDEN=.*there is no manifest\.json"):
        golden.source({"OMNI_GOLDEN": str(tmp_path)}, folder(tmp_path / "beside"))


def folder(path: Path) -> Path:
    path.mkdir()
    (path / MANIFEST).write_text("{}")
    return path.resolve()


@cases(MANIFEST, cut_from_here())
def test_a_file_is_cut_from_the_recordings(case: str, kept: Cut) -> None:
    assert content_of(kept, case) == stored(case)
    assert entry(kept, case, read_json(MANIFEST)[case]) == listed()[case]


@cases(MANIFEST, ["the compact part"] if golden.SOURCE != COMPACT else [])
def test_the_compact_part_passes(case: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SUITE],
        env=os.environ | {"OMNI_GOLDEN": str(COMPACT)},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
    assert "compact part of the recordings" in done.stdout
