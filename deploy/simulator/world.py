"""Virtual time: what happens in its order, hosts with their clocks, devices that compute, networks that delay.

Rule: nothing here decides anything about order, credit or playback; that is what is being tried. Time is
`World.now_ns`; an actor that works moves it ahead for itself, and it goes back when its turn is over.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final, Protocol

from graph.chunk import NS_PER_S

PPM: Final = 1_000_000


class WorldOver(BaseException):
    """Nothing happens any more: whoever waits, waits no longer. No Exception, so that nobody handles it."""


class World:
    """What happens, in the order of time.

    error: what was raised by what happened; then the world is over.
    """

    def __init__(self) -> None:
        self.now_ns = 0
        self.is_over = False
        self.error: Exception | None = None
        self._num_events = 0
        self._events: list[tuple[int, int, Callable[[], None]]] = []

    def at(self, time_ns: int, action: Callable[[], None]) -> None:
        """Let something happen. What is past happens now."""
        self._num_events += 1
        heapq.heappush(self._events, (max(time_ns, self.now_ns), self._num_events, action))

    def after(self, delay_ns: int, action: Callable[[], None]) -> None:
        """Let something happen so long from now."""
        self.at(self.now_ns + delay_ns, action)

    def run(self, until_ns: int) -> None:
        """Let time pass until nothing is left to happen, or it is over."""
        self._pass(until_ns)

    def wait(self, until_ns: int, is_there: Callable[[], bool] = lambda: False) -> None:
        """Let time pass while one that happens now waits for another: until it is there, until then at most.

        Raises WorldOver when nothing more happens.
        """
        self._pass(until_ns, is_there)
        if self.is_over:
            raise WorldOver
        if not is_there():
            self.now_ns = max(self.now_ns, until_ns)

    def _pass(self, until_ns: int, is_enough: Callable[[], bool] | None = None) -> None:
        events = self._events
        try:
            while events and events[0][0] <= until_ns and not self.is_over and not (is_enough and is_enough()):
                self.now_ns, _, action = heapq.heappop(events)
                action()
        except Exception as error:
            self.error = self.error or error
            self.is_over = True


class HostClock:
    """A host's clocks: the monotonic one drifts, and begins where it likes; the other one tells the time of day, and is
    set by whoever likes."""

    def __init__(self, world: World, *, drift_ppm: int = 0, begun_ns: int = 0, day_ns: int = 0) -> None:
        """begun_ns, day_ns: what they say at the world's 0."""
        self._world = world
        self._drift_ppm = drift_ppm
        self._begun_ns = begun_ns
        self._day_ns = day_ns

    def monotonic_ns(self) -> int:
        now_ns = self._world.now_ns
        return now_ns + now_ns * self._drift_ppm // PPM + self._begun_ns

    def monotonic_s(self) -> float:
        return self.monotonic_ns() / NS_PER_S

    def wall_ns(self) -> int:
        return self.monotonic_ns() - self._begun_ns + self._day_ns

    def cpu_ns(self) -> int:
        return 0  # nothing computes in virtual time

    def step(self, by_ns: int) -> None:
        """Somebody sets the time of day."""
        self._day_ns += by_ns

    def ahead_ns(self) -> int:
        """How far its monotonic clock is ahead of the world's, now."""
        return self.monotonic_ns() - self._world.now_ns


class Computer(Protocol):
    """What computes."""

    def work(self, cost_ns: int) -> None:
        """Work as the actor whose turn it is: for it, time moves on."""


class Device:
    """What computes: so many things at once, the others wait in the order in which they came."""

    def __init__(self, world: World, num_at_once: int) -> None:
        self._world = world
        self._free_ns = [0] * num_at_once
        self.busy_ns = 0

    def work(self, cost_ns: int) -> None:
        """Work as the actor whose turn it is: for it, time moves on."""
        begin_ns = max(self._world.now_ns, self._free_ns[0])
        heapq.heapreplace(self._free_ns, begin_ns + cost_ns)
        self.busy_ns += cost_ns
        self._world.now_ns = begin_ns + cost_ns


@dataclass(frozen=True, slots=True)
class Network:
    """How long a message takes: at least latency, and up to jitter more. lost, doubled: parts of the messages.
    refused: how often the link is full, and takes none for now."""

    latency_ns: int = 100_000
    jitter_ns: int = 200_000
    lost: float = 0.0
    doubled: float = 0.0
    refused: float = 0.0

    def delay_ns(self, rng: Random) -> int:
        """After how long a message arrives."""
        return self.latency_ns + int(rng.random() * self.jitter_ns)

    def arrivals_ns(self, rng: Random) -> list[int]:
        """The same for each copy; there may be several, or none."""
        if not (self.lost or self.doubled):
            return [self.latency_ns + int(rng.random() * self.jitter_ns)]
        if self.lost and rng.random() < self.lost:
            return []
        copies = 2 if self.doubled and rng.random() < self.doubled else 1
        return [self.latency_ns + int(rng.random() * self.jitter_ns) for _ in range(copies)]
