"""The shedding ladder: what a session gives up, step by step, while its windows come late, and gets back.

Rule: when a session goes a step down or up, and which pictures and windows that is about, is decided in this file and
nowhere else. Pure.

    fewer_frames    every second picture
    vision_off      all pictures
    merged_windows  while it listens, the LLM works in every second window only, on both
    listen_only     no new turn begins; the one that is open is said to its end

Sound is never shed, and no session is closed. Each session goes by its own windows: a step down where some were late,
or nearly; a step up where all were early. Between two moves are 5 s at least, before a step up 10 s, and 80 s where
windows are on time but not early, so that there may be no room. A step up that had to be taken back makes the session
wait twice as long with the next one. Where so many sessions have gone that a level is known to be enough for the
others, they go there at once. A new session begins where the others are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import Final, Literal, TypeAlias, get_args
from zlib import crc32

from graph.chunk import NS_PER_S, SessionId

Step: TypeAlias = Literal["fewer_frames", "vision_off", "merged_windows", "listen_only"]
STEPS: Final[tuple[Step, ...]] = get_args(Step)
OF_PICTURES: Final[frozenset[Step]] = frozenset({"fewer_frames", "vision_off"})

HOLD_NS: Final = 5 * NS_PER_S
LEAST_PATIENCE_NS: Final = 2 * HOLD_NS
MOST_PATIENCE_NS: Final = 16 * HOLD_NS
STRAINED: Final = 0.65  # of a window
CALM: Final = 0.45
FEWER: Final = 0.75
NUM_RECENT: Final = 4  # windows
MAX_HELD: Final = 4  # windows, so that a session which is always late still decides
NUM_STRAINED: Final = 2  # of them; a single one may be anything


class Ladder:
    """How far down one session is, decided where its windows come to their end."""

    def __init__(self, steps: Sequence[Step], window_ns: int, level: int = 0) -> None:
        """steps: which there are for it, in order. level: how many of them are taken from the start."""
        self.steps = tuple(steps)
        self.level = min(level, len(steps))
        self._window_ns = window_ns
        self._recent: deque[float] = deque(maxlen=NUM_RECENT)
        self._moved_ns: int | None = None
        self._went_up = False
        self._patience_ns = LEAST_PATIENCE_NS
        self._too_many: dict[int, int] = {}  # by level: the number of sessions for which it was not enough

    def window(self, now_ns: int, latency_ns: int, num_sessions: int) -> bool:
        """A window has come to its end, `latency_ns` after its own end. Returns whether the level is another now.

        num_sessions: that share what there is with this one, and itself.
        """
        self._recent.append(latency_ns / self._window_ns)
        if self._moved_ns is None:
            self._moved_ns = now_ns - HOLD_NS  # the first move need not wait
        stayed_ns = now_ns - self._moved_ns
        if stayed_ns < HOLD_NS:
            return False
        if self._is_strained() and self.level < len(self.steps):
            if self._went_up and stayed_ns < 2 * self._patience_ns:
                self._patience_ns = min(2 * self._patience_ns, MOST_PATIENCE_NS)
            self._too_many[self.level] = num_sessions
            return self._move(now_ns, 1)
        if not self.level or len(self._recent) < NUM_RECENT or max(self._recent) > STRAINED:
            return False
        is_calm = max(self._recent) <= CALM
        if is_calm and (enough := self._enough_for(num_sessions)) < self.level:
            return self._move(now_ns, enough - self.level)
        if stayed_ns >= (self._patience_ns if is_calm else MOST_PATIENCE_NS):
            if self._went_up:  # and that went well
                self._patience_ns = max(self._patience_ns // 2, LEAST_PATIENCE_NS)
            return self._move(now_ns, -1)
        return False

    def _is_strained(self) -> bool:
        """Some windows were nearly late; or each takes longer than the one before, and soon one will be late."""
        recent = list(self._recent)
        if sum(part > STRAINED for part in recent) >= NUM_STRAINED:
            return True
        grows = len(recent) == NUM_RECENT and all(a < b for a, b in pairwise(recent))
        return grows and 2 * recent[-1] - recent[0] > 1

    def _enough_for(self, num_sessions: int) -> int:
        """The first level that was left for clearly more sessions than these."""
        levels = range(self.level)
        return next((k for k in levels if num_sessions <= FEWER * self._too_many.get(k, 0)), self.level)

    def _move(self, now_ns: int, by: int) -> bool:
        self.level += by
        self._moved_ns, self._went_up = now_ns, by < 0
        self._recent.clear()
        return True


class Level:
    """How far down a session is, as its sink tells the other stages; the newest word counts, in any order."""

    def __init__(self) -> None:
        self.num_steps = 0
        self._as_of_ns = -1

    def update(self, at_ns: int, num_steps: int) -> None:
        """num_steps: that were taken as of event time `at_ns`."""
        if at_ns >= self._as_of_ns:
            self._as_of_ns, self.num_steps = at_ns, num_steps


def sheds_picture(taken: Sequence[Step], session: SessionId, seq: int) -> bool:
    """Whether the picture of that number is shed where these steps are taken."""
    return "vision_off" in taken or ("fewer_frames" in taken and _has_turn(session, seq))


def holds_window(taken: Sequence[Step], session: SessionId, index: int, *, num_held: int, overdue: bool) -> bool:
    """Whether this window of a session that listens is to wait for the next one where these steps are taken.

    One that comes too late for its listener is, a few in a row at most; of others, where windows are merged, every
    second one. num_held: windows that wait already.
    """
    if overdue:
        return num_held < MAX_HELD
    return not num_held and "merged_windows" in taken and _has_turn(session, index)


def _has_turn(session: SessionId, number: int) -> bool:
    """One half of the sessions and the other take turns, so that the work is even."""
    return (number + crc32(session.encode())) % 2 == 1
