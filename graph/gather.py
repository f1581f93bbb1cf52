"""Which units a stage takes next, and whether they wait for more: batches over sessions, earliest deadline first.

Rule: gathering is decided in this file and nowhere else. Pure: times in, sessions out. All times are ns on one clock
of the process, not on a session's axis.

A unit that is ready waits for peers at most δ, which follows from its slack, the time that is left until its deadline:
who has much left may wait as long as the stage is told, who has little waits less, and who is late waits for nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from graph.chunk import SessionId
from graph.value import value

# Five stages and six edges lie on a window's way. If each spends a fiftieth of what is left, a tenth goes into waiting.
SLACK_SHARE = 50


@value
class Waiting:
    """A unit that is ready.

    since_ns: since when; end_ns: of its window; deadline_ns: until when it is on time, None in virtual time.
    """

    session: SessionId
    since_ns: int
    end_ns: int
    deadline_ns: int | None


class Gathering:
    """How one stage replica makes batches.

    max_units: a batch takes so many. wait_ns: δ is never longer.
    """

    def __init__(self, max_units: int, wait_ns: int) -> None:
        self._max_units = max_units
        self._wait_ns = wait_ns

    def batch(self, ready: Sequence[Waiting], next_ends_ns: Iterable[int], now_ns: int) -> list[SessionId]:
        """The sessions whose units go now, the most urgent ones; none while it is worth waiting for peers.

        ready: at most one unit of each session. next_ends_ns: of the sessions without one, when their next window ends.
        """
        urgent = sorted(ready, key=lambda unit: unit.end_ns)  # the earliest deadline first
        if not urgent or (len(urgent) < self._max_units and self._shall_wait(urgent, next_ends_ns, now_ns)):
            return []
        return [unit.session for unit in urgent[: self._max_units]]

    def _shall_wait(self, urgent: Sequence[Waiting], next_ends_ns: Iterable[int], now_ns: int) -> bool:
        """Has nobody waited long enough, and is there a peer whose next window ends when the first one's does, or
        before? (One that ends later is not worth it.)"""
        if any(now_ns >= self.until_ns(unit) for unit in urgent):
            return False
        return any(end_ns <= urgent[0].end_ns + self._wait_ns for end_ns in next_ends_ns)

    def until_ns(self, unit: Waiting) -> int:
        """Until when a unit waits for peers."""
        if unit.deadline_ns is None:
            return unit.since_ns + self._wait_ns
        slack_ns = max(unit.deadline_ns - unit.since_ns, 0)
        return unit.since_ns + min(self._wait_ns, slack_ns // SLACK_SHARE)
