"""A simulated stage that computes: what a batch costs on a device, where it raises, and that units come in order."""

from __future__ import annotations

from random import Random

from deploy.simulator.world import Computer
from graph.chunk import Chunk, SessionId
from graph.costs import StageCost
from graph.window import Unit
from stages.session import Session
from stages.stage import Stage


class OutOfOrder(AssertionError):
    """A unit came twice, or not after the one before it; or its pictures are in disorder."""


class Spoilt(ValueError):
    """A unit at which its stage raises."""


class Costly(Stage):
    """A stage that computes on a device, and sees that units come as 0, 1, 2 …"""

    def __init__(self, cost: StageCost, device: Computer, rng: Random) -> None:
        self._cost, self.device, self._rng = cost, device, rng
        self._next: dict[SessionId, int | None] = {}  # None: any
        self.slow_down = 1.0
        self.spoils = 0.0  # how likely a unit is one at which it raises
        self.worked_ns = 0  # on the device
        self.unsaid: list[SessionId] = []  # sessions that were closed with something left to say

    def open_session(self, session: Session) -> None:
        self._next[session.id] = 0

    def begin_anywhere(self, session: SessionId) -> None:
        """The session goes on here in the place of a replica that has died."""
        self._next[session] = None

    def close_session(self, session: SessionId) -> None:
        if self._next.pop(session, 0) and self.has_more_to_say(session):
            self.unsaid.append(session)

    def process(self, units: list[Unit]) -> list[Chunk]:
        if spoilt := [unit for unit in units if self._is_spoilt(unit)]:
            self._spoil(spoilt, units)
        for unit in units:
            awaited = self._next[unit.session]
            if awaited is not None and unit.index != awaited:
                raise OutOfOrder(f"{unit.session}: unit {unit.index} where {awaited} was to come")
            self._next[unit.session] = unit.index + 1
        made = [chunk for unit in units for chunk in self.make(unit)]
        if num_items := self.num_items(units, made):
            cost_ns = self._cost.batch_ns(num_items) + self._cost.aged_ns(unit.index for unit in units)
            self._work(round(cost_ns * self._ratio() * self.slow_down))
        return made

    def _work(self, cost_ns: int) -> None:
        self.device.work(cost_ns)
        self.worked_ns += cost_ns

    def _ratio(self) -> float:
        if self._cost.ratios:
            return self._rng.choice(self._cost.ratios)
        return 1 + self._cost.spread * self._rng.random()

    def _is_spoilt(self, unit: Unit) -> bool:
        """The same each time that it is tried."""
        return self.spoils > 0 and Random(f"{type(self).__name__} {unit.session} {unit.index}").random() < self.spoils

    def _spoil(self, spoilt: list[Unit], units: list[Unit]) -> None:
        if spoilt == units:  # else those beside it are tried again
            for unit in spoilt:
                self._next[unit.session] = unit.index + 1
        raise Spoilt(f"{spoilt[0].session}: unit {spoilt[0].index}")

    def make(self, unit: Unit) -> list[Chunk]:
        return []

    def num_items(self, units: list[Unit], made: list[Chunk]) -> int:
        """How much there was to do."""
        return len(units)
