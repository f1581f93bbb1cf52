"""The recordings of the official code: found, unpacked, read, and counted.

The folder is the one that `OMNI_GOLDEN` names; else ../shared/golden where that is; else the compact part in the
repository, tests/golden/data, which tests/support/golden_subset.py makes of the whole.

Rules: nothing about seeds, sizes, chunkings or lengths is known here or in the tests: all is read from the folder.
Every tensor that a test asks for is noted, so that what nobody looked at can be named (tests/golden/test_complete.py).
A test that has no case in the folder is left out of the run, by name, and is no skip.
"""

from __future__ import annotations

import functools
import json
import lzma
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

_REPOSITORY = Path(__file__).resolve().parents[2]
COMPACT = _REPOSITORY / "tests" / "golden" / "data"
MANIFEST = "manifest.json"


def source(environ: Mapping[str, str], beside: Path) -> Path:
    """The folder to read: the named one, else the one beside the repository, else the compact part.

    Raises FileNotFoundError when the named one holds no recordings: a whole that isn't there is no reason to pass on
    a part of it.
    """
    if named := environ.get("OMNI_GOLDEN"):
        if not (Path(named) / MANIFEST).is_file():
            raise FileNotFoundError(f"OMNI_GOLDEN={named}: there is no {MANIFEST}; unset it for {COMPACT}")
        return Path(named).resolve()
    return beside.resolve() if (beside / MANIFEST).is_file() else COMPACT


def unpacked(folder: Path, into: Path) -> Path:
    """The folder itself where its files lie plain; else `into`, filled with what its .xz files hold."""
    packed = sorted(folder.glob("*.xz"))
    if not packed:
        return folder
    (into / MANIFEST).write_bytes((folder / MANIFEST).read_bytes())
    for file in packed:
        (into / file.stem).write_bytes(lzma.decompress(file.read_bytes()))
    return into


_SCRATCH = tempfile.TemporaryDirectory(prefix="omni-golden-")  # removed as the process ends
SOURCE = source(os.environ, _REPOSITORY.parent / "shared" / "golden")
FOLDER = unpacked(SOURCE, Path(_SCRATCH.name))

LOOKED_AT: set[tuple[str, str]] = set()
"""(file, tensor) that some test has asked for, in this process."""

LEFT_OUT: list[tuple[str, str]] = []
"""(test file, golden file) of each test that has no case in the folder."""


@functools.cache
def read_json(name: str) -> Any:
    """A JSON file of the folder."""
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def held() -> dict[str, str]:
    """Per file of a compact part how much of the whole it holds, in words; nothing for the whole itself."""
    words = {}
    for file, entry in read_json(MANIFEST).items():
        if "whole" in entry:
            kind = "records" if file.endswith(".json") else "tensors"
            num = num_records(read_json(file)) if kind == "records" else len(entry.get("tensors") or entry["arrays"])
            words[file] = f"holds {num} of {entry['whole'][kind]} {kind}" if entry["whole"][kind] else ""
    return words


def num_records(value: Any) -> int:
    """How many records a JSON file has: the objects in its lists, but not those within another record, and the lists in
    its tables of numbers.

    A list of `…feeds` tells the calls of a single step, so it is part of that step and no list of records.
    """
    if isinstance(value, list):
        return sum(isinstance(entry, dict) for entry in value)
    if not isinstance(value, dict):
        return 0
    if len(value) > 1 and all(_is_numbers(inner) for inner in value.values()):
        return len(value)
    return sum(num_records(inner) for key, inner in value.items() if not key.endswith("feeds"))


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, int | float) for entry in value)


class Tensors(Mapping[str, Tensor]):
    """The tensors of a .safetensors or .npz file, read one by one; asking for one notes that it was looked at."""

    def __init__(self, name: str) -> None:
        self.name = name
        if name.endswith(".npz"):
            self._arrays: Any = np.load(FOLDER / name, allow_pickle=False)
            self._keys = tuple(self._arrays.files)
        else:
            self._arrays = safe_open(FOLDER / name, framework="pt")
            self._keys = tuple(self._arrays.keys())

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(f"{self.name} has no tensor {key!r}")
        LOOKED_AT.add((self.name, key))
        if self.name.endswith(".npz"):
            return torch.from_numpy(self._arrays[key])
        return self._arrays.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def numbered(self, prefix: str) -> list[Tensor]:
        """`prefix0`, `prefix1`, … as far as there are."""
        tensors = []
        while f"{prefix}{len(tensors)}" in self._keys:
            tensors.append(self[f"{prefix}{len(tensors)}"])
        return tensors


@functools.cache
def read_tensors(name: str) -> Tensors:
    """A tensor file of the folder."""
    return Tensors(name)


def cases(file: str, ids: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrise a test over the cases of one golden file: one test per case, counted under `file` in the summary."""
    params = [pytest.param(case, id=f"{file}:{case}", marks=pytest.mark.golden(file)) for case in ids]
    return pytest.mark.parametrize("case", params or [pytest.param("", id=file, marks=pytest.mark.left_out(file))])


def close(actual: Tensor, expected: Tensor, *, rtol: float = 1e-4, atol: float = 1e-4) -> None:
    """Equal in shape and, within the README's tolerance for module outputs, in value."""
    assert tuple(actual.shape) == tuple(expected.shape)
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=rtol, atol=atol)
