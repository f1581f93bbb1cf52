"""Weights as inference takes them: what depends on the weights alone is computed once, not in every call.

Rule: a folded module gives what it gave before, but for rounding. It can't be trained or given other weights any more.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn
from torch.nn.utils import parametrize


@runtime_checkable
class Foldable(Protocol):
    """A module that knows how its own weights, and those below it, are folded."""

    def fold(self) -> None: ...


def fold(module: nn.Module) -> None:
    """Fold a module that has its weights, and all that it is made of: weight norms become plain weights."""
    if isinstance(module, Foldable):
        module.fold()
        return
    if parametrize.is_parametrized(module, "weight"):
        parametrize.remove_parametrizations(module, "weight")
    for child in module.children():
        fold(child)
