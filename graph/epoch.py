"""Barge-in's fence: what belongs to an older epoch of its session is stale, wherever it is.

Only what is said is fenced. What is seen and heard goes on through a barge-in and stays in epoch 0.
"""

from __future__ import annotations

from typing import Any

from graph.chunk import Chunk
from graph.kinds import Kind


class EpochFence:
    """The epoch of one session, as one actor knows it. It never moves back."""

    def __init__(self) -> None:
        self.epoch = 0

    def raise_to(self, epoch: int) -> bool:
        """True when this is news."""
        if epoch <= self.epoch:
            return False
        self.epoch = epoch
        return True

    def is_stale(self, chunk: Chunk, kind: Kind[Any]) -> bool:
        """True for something said before the barge-in that this actor knows of. kind: of its stream."""
        return chunk.epoch < self.epoch and not chunk.is_control and kind.is_fenced

    def epoch_of(self, kind: Kind[Any]) -> int:
        """The epoch that a chunk of this kind made now belongs to."""
        return self.epoch if kind.is_fenced else 0
