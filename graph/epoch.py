"""Barge-in's fence: what belongs to an older epoch of its session is stale, wherever it is."""

from __future__ import annotations

from graph.chunk import Chunk

FENCED_STREAMS = frozenset({"text", "codes", "speech"})
"""The streams of what is said. What is seen and heard goes on through a barge-in and stays in epoch 0."""


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

    def is_stale(self, chunk: Chunk) -> bool:
        """True for something said before the barge-in that this actor knows of."""
        return chunk.stream in FENCED_STREAMS and not chunk.is_control and chunk.epoch < self.epoch

    def epoch_of(self, stream: str) -> int:
        """The epoch that a chunk of `stream` made now belongs to."""
        return self.epoch if stream in FENCED_STREAMS else 0
