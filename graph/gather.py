"""Which units a stage takes next, and whether they wait for more: batches over sessions, earliest deadline first.

Rule: gathering is decided in this file and nowhere else. Pure: times in, sessions out. All times are ns on one clock
of the process, not on a session's axis.

A unit that is ready waits for peers at most δ, which follows from its slack, the time that is left until its deadline:
who has much left may wait as long as the stage is told, who has little waits less, and who is late waits for nobody.

A piece of speech that goes on with a turn may be held for longer, for the next pieces of others: until its listener
would run dry, less what a piece has lately taken from here to its listener. Pieces that begin or end a turn are never
held, and take those along that are. Where held pieces come late all the same, nothing is held for a while.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

from graph.chunk import NS_PER_MS, NS_PER_S, SessionId
from graph.value import value

# Five stages and six edges lie on a window's way. If each spends a fiftieth of what is left, a tenth goes into waiting.
SLACK_SHARE: Final = 50

MARGIN_NS: Final = 50 * NS_PER_MS  # of a held piece: hops, and what others on the same device take
NUM_WAYS: Final = 32  # pieces of which the slowest is what the next one may take
NUM_HELD: Final = 50
MOST_LATE: Final = NUM_HELD // 10  # of them
PAUSE_NS: Final = 10 * NS_PER_S


@value
class Waiting:
    """A unit that is ready.

    since_ns: since when; end_ns: of its window; deadline_ns: until when it is on time, None in virtual time.
    dry_ns: when its listener has heard all that has come to it; None where nothing is being heard. may_hold: the unit
    goes on with what is being said.
    """

    session: SessionId
    since_ns: int
    end_ns: int
    deadline_ns: int | None
    dry_ns: int | None = None
    may_hold: bool = False


@value
class Peer:
    """A session without a unit that is ready. end_ns: of its next window. speaks: its last unit was said aloud."""

    end_ns: int
    speaks: bool = False


class Holding:
    """Until when pieces of speech may be held at one stage replica, by how long they take from there to their listener.

    most_ns: none is held for longer.
    """

    def __init__(self, most_ns: int) -> None:
        self._most_ns = most_ns
        self._ways_ns: deque[int] = deque(maxlen=NUM_WAYS)
        self._were_late: deque[bool] = deque(maxlen=NUM_HELD)
        self._resumes_ns = 0

    def until_ns(self, unit: Waiting) -> int:
        """In time for its listener, and so early for its window that no ladder takes that for a strain; when it became
        ready where it is not to be held."""
        is_held = unit.may_hold and unit.since_ns >= self._resumes_ns and len(self._ways_ns) == NUM_WAYS
        if not is_held or unit.dry_ns is None or unit.deadline_ns is None:
            return unit.since_ns
        early_ns = (unit.end_ns + unit.deadline_ns) // 2
        leaves_ns = min(unit.dry_ns, early_ns) - max(self._ways_ns) - MARGIN_NS
        return max(min(leaves_ns, unit.since_ns + self._most_ns), unit.since_ns)

    def arrived(self, way_ns: int, now_ns: int, *, was_late: bool | None) -> None:
        """A piece has come to its listener, so long after work on it began here. was_late: of one that was held,
        whether that was after he had run dry; None: it was not."""
        self._ways_ns.append(way_ns)
        if was_late is None:
            return
        self._were_late.append(was_late)
        if sum(self._were_late) > MOST_LATE:
            self._were_late.clear()
            self._resumes_ns = now_ns + PAUSE_NS


class Gathering:
    """How one stage replica makes batches.

    max_units: a batch takes so many. wait_ns: δ is never longer. hold_ns: a piece of speech is held for so long, at
    most.
    """

    def __init__(self, max_units: int, wait_ns: int, hold_ns: int = 0) -> None:
        self._max_units = max_units
        self._wait_ns = wait_ns
        self.holding = Holding(hold_ns)

    def batch(self, ready: Sequence[Waiting], peers: Iterable[Peer], now_ns: int) -> list[SessionId]:
        """The sessions whose units go now, the most urgent ones; none while it is worth waiting for peers.

        ready: at most one unit of each session. peers: the sessions without one.
        """
        urgent = sorted(ready, key=_urgency)
        if not urgent or (len(urgent) < self._max_units and self._shall_wait(urgent, peers, now_ns)):
            return []
        return [unit.session for unit in urgent[: self._max_units]]

    def _shall_wait(self, urgent: Sequence[Waiting], peers: Iterable[Peer], now_ns: int) -> bool:
        """Has nobody waited long enough, and is there a peer that is worth it: whose next window ends when the first
        one's does, or before; or, for those that are held, one who speaks and will be here while they are?"""
        if any(now_ns >= self.until_ns(unit) for unit in urgent):
            return False
        is_fresh = all(now_ns < self._gathers_until_ns(unit) for unit in urgent)
        last_ns = urgent[0].end_ns + self._wait_ns if is_fresh else 0
        is_held = all(now_ns < self.holding.until_ns(unit) for unit in urgent)
        takes_ns = max(unit.since_ns - unit.end_ns for unit in urgent)  # from a window's end to here
        until_ns = min(self.holding.until_ns(unit) for unit in urgent) - takes_ns if is_held else 0
        return any(peer.end_ns <= last_ns or (peer.speaks and peer.end_ns <= until_ns) for peer in peers)

    def until_ns(self, unit: Waiting) -> int:
        """Until when a unit waits for peers."""
        return max(self._gathers_until_ns(unit), self.holding.until_ns(unit))

    def is_held(self, unit: Waiting, now_ns: int) -> bool:
        """Has it waited for longer than others would?"""
        return unit.may_hold and now_ns > self._gathers_until_ns(unit)

    def _gathers_until_ns(self, unit: Waiting) -> int:
        if unit.deadline_ns is None:
            return unit.since_ns + self._wait_ns
        slack_ns = max(unit.deadline_ns - unit.since_ns, 0)
        return unit.since_ns + min(self._wait_ns, slack_ns // SLACK_SHARE)


def _urgency(unit: Waiting) -> tuple[int, bool, int]:
    """The window that ended first; of several, who runs dry first: a break is worse than a turn that begins late."""
    return unit.end_ns, unit.dry_ns is None, unit.dry_ns or 0
