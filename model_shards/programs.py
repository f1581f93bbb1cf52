"""Functions of fixed structure as one program, where launching their many small parts would cost more than they do.

On a CPU a step of a decoder over one to four sessions is some 150 operations of a few microseconds each: traced and
frozen by torch.jit, which torch has on every machine and needs no compiler for, it takes half the time.
On a GPU the same step is some hundred kernels, each shorter than its launch: captured as a CUDA graph, they are
launched at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor

from model_shards.errors import ModelError

LADDER: Final = (1, 2, 4, 8, 16, 32, 64)
"""Batch sizes for which a graph is captured. Doubling them leaves less than half of a batch empty."""
Pool = Any  # a handle of torch to memory that graphs share

NUM_WARM_UP_CALLS: Final = 3  # before a capture: libraries choose their kernels and take their memory at first calls


def frozen(function: Callable[..., Tensor], examples: Sequence[Tensor]) -> Callable[..., Tensor]:
    """The function as one program, whose weights can't change any more.

    function: of tensors, without branches that depend on them. It may be called with any sizes of the same number of
    dimensions. examples: arguments to trace it with, sizes of 2 or more; they are written to where it writes.
    """

    class Traced(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return function(*args)

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.jit is to go one day: then there is nothing to do here but to call it
        traced = torch.jit.trace(Traced().eval(), tuple(examples), check_trace=False)  # type: ignore[no-untyped-call]
        program: Callable[..., Tensor] = torch.jit.freeze(traced).forward
    return program


def ladder_to(largest: int, ladder: Sequence[int] = LADDER) -> tuple[int, ...]:
    """Batch sizes of programs that take `largest` rows and no more."""
    return (*(size for size in ladder if size < largest), largest)


class Captured:
    """A function, captured once per batch size of a ladder; a smaller batch is filled up with blank rows.

    Not on a GPU it is called as it is, on the same fixed inputs and into the same fixed outputs, so that a test without
    a GPU sees what the graph will be given, and what becomes of its results.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        blank: Callable[[int], tuple[Tensor, ...]],
        ladder: Sequence[int] = LADDER,
    ) -> None:
        """function: of tensors whose first dimension is the batch, to such. It neither looks at their values on the
        host nor draws random numbers; other tensors that it reads or writes, as a cache, must stay where they are.
        blank: so many rows of its arguments which do no harm. ladder: batch sizes, the smallest first.
        """
        self.ladder = tuple(ladder)
        self._function = function
        self._blank = blank
        self._of_size: dict[int, _OfSize] = {}
        self._pool: Pool | None = None  # one piece of memory for the graphs of all sizes

    def capture(self) -> None:
        """Capture all sizes now, the largest first, so that the smaller ones find room in its memory."""
        for size in reversed(self.ladder):
            self._size(size)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the function gives for these rows, at most as many as the ladder's last size.

        The results lie in memory of the program: the next call overwrites them.
        """
        num_rows = len(inputs[0])
        if num_rows > self.ladder[-1]:
            raise ModelError(f"a batch of {num_rows} rows; programs were made for at most {self.ladder[-1]}")
        program = self._size(next(size for size in self.ladder if size >= num_rows))
        return tuple(output[:num_rows] for output in program(inputs))

    def _size(self, size: int) -> _OfSize:
        program = self._of_size.get(size)
        if program is None:
            program = self._of_size[size] = _OfSize(self._function, self._blank(size), self._pool)
            self._pool = program.pool
        return program


class _OfSize:
    """A function for one batch size, with the memory of its inputs and outputs."""

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        blank: tuple[Tensor, ...],
        pool: Pool | None,
    ) -> None:
        self._function = function
        self._blank = blank
        self._inputs = tuple(tensor.clone() for tensor in blank)
        self._num_rows = 0  # not blank
        self._graph: torch.cuda.CUDAGraph | None = None
        if self._inputs[0].is_cuda:
            self._graph, self._outputs = _capture(lambda: function(*self._inputs), pool)
            pool = self._graph.pool()
        else:
            self._outputs = tuple(output.clone() for output in function(*self._inputs))
        self.pool = pool

    def __call__(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        num_rows = len(inputs[0])
        for kept, new, blank in zip(self._inputs, inputs, self._blank, strict=True):
            kept[:num_rows].copy_(new, non_blocking=True)
            if num_rows < self._num_rows:
                kept[num_rows : self._num_rows].copy_(blank[num_rows : self._num_rows])
        self._num_rows = num_rows
        if self._graph is not None:
            self._graph.replay()
        else:
            for kept, new in zip(self._outputs, self._function(*self._inputs), strict=True):
                kept.copy_(new)
        return self._outputs


def _capture(
    call: Callable[[], tuple[Tensor, ...]], pool: Pool | None
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """The kernels of a call as a graph, and the tensors it fills."""
    stream = _side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(NUM_WARM_UP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        outputs = call()
    return graph, outputs


@lru_cache
def _side_stream() -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps 32 MiB for each stream that it has ever computed on."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]
