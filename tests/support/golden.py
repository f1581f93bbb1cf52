"""The recordings of the official code (`OMNI_GOLDEN`, default ../shared/golden): found, read, and counted.

Rules: nothing about seeds, sizes, chunkings or lengths is known here or in the tests: all is read from the folder.
Every tensor that a test asks for is noted, so that what nobody looked at can be named (tests/golden/test_complete.py).
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

FOLDER = Path(
    os.environ.get("OMNI_GOLDEN") or Path(__file__).resolve().parents[2] / ".." / "shared" / "golden"
).resolve()
PRESENT = (FOLDER / "manifest.json").is_file()
REASON = f"the golden folder is absent: {FOLDER} (set OMNI_GOLDEN)"

LOOKED_AT: set[tuple[str, str]] = set()
"""(file, tensor) that some test has asked for, in this process."""


@functools.cache
def read_json(name: str) -> Any:
    """A JSON file of the folder."""
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


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
        found = []
        while f"{prefix}{len(found)}" in self._keys:
            found.append(self[f"{prefix}{len(found)}"])
        return found


@functools.cache
def read_tensors(name: str) -> Tensors:
    """A tensor file of the folder."""
    return Tensors(name)


def cases(file: str, ids: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrise a test over the cases of one golden file: one test per case, counted under `file` in the summary."""
    params = (
        [pytest.param(case, id=f"{file}:{case}", marks=pytest.mark.golden(file)) for case in ids] if PRESENT else []
    )
    return pytest.mark.parametrize("case", params)


def close(actual: Tensor, expected: Tensor, *, rtol: float = 1e-4, atol: float = 1e-4) -> None:
    """Equal in shape and, within the README's tolerance for module outputs, in value."""
    assert tuple(actual.shape) == tuple(expected.shape)
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=rtol, atol=atol)
