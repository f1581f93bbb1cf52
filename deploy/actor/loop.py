"""One turn of an actor process after the other, for the stages that live in it."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from deploy.actor.runner import StageRunner
from graph.chunk import ChunkType
from graph.edge import Arrival


class ActorLoop:
    """One turn of an actor process after the other, for the stages that live in it."""

    def __init__(self, runners: list[StageRunner]) -> None:
        self._runners = runners
        self._runner_of = {edge: runner for runner in runners for edge in runner.incoming}
        self._has_more = False

    def due_in_ns(self) -> int | None:
        """How long this may sleep if nothing comes; None: as long as nothing comes."""
        if self._has_more:
            return 0
        due_ns = [due for runner in self._runners if (due := runner.due_in_ns()) is not None]
        return min(due_ns, default=None)

    def files(self) -> frozenset[int]:
        """File descriptors that become readable when there is something to do."""
        return frozenset(descriptor for runner in self._runners for descriptor in runner.files())

    def turn(self, arrivals: Iterable[Arrival], woken: Collection[int] = ()) -> None:
        """Take what has come, and do what is due: a batch per stage, so that one which falls behind still takes what
        comes, and its actor what it is told. woken: the descriptors that are readable."""
        if woken:
            for runner in self._runners:
                runner.wake(woken)
        queued: list[Arrival] = []
        for arrival in arrivals:
            if arrival.chunk.type >= ChunkType.PLAYBACK:  # what overtakes, overtakes
                self._runner_of[arrival.edge].take(arrival)
            else:
                queued.append(arrival)
        for arrival in queued:
            self._runner_of[arrival.edge].take(arrival)
        more = [runner.step() for runner in self._runners]  # each takes its step
        self._has_more = any(more)
