"""Functions of fixed structure as one program, where launching their many small parts would cost more than they do.

On a CPU a step of a decoder over one to four sessions is some 150 operations of a few microseconds each: traced and
frozen by torch.jit, which torch has on every machine and needs no compiler for, it takes half the time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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
