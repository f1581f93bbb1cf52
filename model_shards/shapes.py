"""A function of several shapes, of which some come often: those are programs, captured per shape and batch size."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch
from torch import Tensor

from model_shards.programs import Captured

Key = tuple[Hashable, tuple[torch.Size, ...]]


class ByShape:
    """Calls a function as it is, but for the common shapes: those by a program each (`Captured`), made when one comes
    for the first time. Results of a program lie in its memory: the next call of the same shapes overwrites them.
    """

    def __init__(
        self, function: Callable[..., tuple[Tensor, ...]], is_common: Callable[..., bool], ladder: Sequence[int]
    ) -> None:
        """function: of a constant, which is part of the shape, and of tensors, as `Captured` takes it.
        is_common: of the same. ladder: batch sizes; a batch larger than the last is no common shape.
        """
        self._function = function
        self._is_common = is_common
        self._ladder = ladder
        self._programs: dict[Key, Captured] = {}

    def __call__(self, constant: Hashable, *inputs: Tensor) -> tuple[Tensor, ...]:
        if len(inputs[0]) > self._ladder[-1] or not self._is_common(constant, *inputs):
            return self._function(constant, *inputs)
        key = constant, tuple(tensor.shape[1:] for tensor in inputs)
        program = self._programs.get(key)
        if program is None:
            blank = partial(_zeros, [torch.zeros_like(tensor[:1]) for tensor in inputs])
            program = self._programs[key] = Captured(partial(self._function, constant), blank, self._ladder)
        return program(*inputs)


def _zeros(like: Sequence[Tensor], num_rows: int) -> tuple[Tensor, ...]:
    return tuple(tensor.new_zeros(num_rows, *tensor.shape[1:]) for tensor in like)
