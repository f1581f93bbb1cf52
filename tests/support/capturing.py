"""What no CUDA graph may do, found on a CPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
LOOKS = (
    aten.item,
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.is_nonzero,
    aten._unique2,
    aten.equal,
)
"""Operations whose result the host has to wait for: a value, or a size that depends on values."""
MADE_ON_THE_HOST = (aten.lift_fresh, aten.lift_fresh_copy)
"""torch.tensor(…): on a GPU, a copy from the host's memory, which may be gone when the graph is replayed."""
RANDOM = (aten.randn, aten.rand, aten.normal_, aten.uniform_, aten.bernoulli_, aten.multinomial, aten.exponential_)


class Capturable(TorchDispatchMode):
    """Raises at what a graph can't do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (*LOOKS, *MADE_ON_THE_HOST, *RANDOM):
            raise AssertionError(f"{func}: no CUDA graph can do this")
        return func(*args, **(kwargs or {}))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, as far as a graph can do what it does."""

    def call(*args: Any) -> Any:
        with Capturable():
            return function(*args)

    return call
