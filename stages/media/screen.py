"""Which pictures become frames: those which are on the screen at the sampling instants. Pure.

Rule: frame i is the last picture at or before (i + 0.8) / fps, as a player would show it then; 0.2 periods before the
period's end, so that it is encoded when its window closes. One picture per instant; none is made up, and one that is
held over says how old it is.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Generic, TypeVar

from graph.chunk import NS_PER_MS, NS_PER_S
from stages.media.wire import FOREVER_NS

MIN_TRUST_NS: Final = 2 * NS_PER_S  # a picture which nothing vouches for stands so long, or TRUST_PERIODS
TRUST_PERIODS: Final = 3  # usual distances: of a camera with a picture every 3 s two may be late
MAX_GRACE_NS: Final = 100 * NS_PER_MS  # Wi-Fi delivers nearly all pictures within 80 ms

P = TypeVar("P")


class FrameGrid:
    """The sampling instants, (i + 0.8) / fps, and the periods [i / fps, (i + 1) / fps) which they lie in.

    window_ns: length of the session's windows; a frame lies in the window of its instant.
    """

    def __init__(self, fps: float, window_ns: int = NS_PER_S) -> None:
        rate = Fraction(fps).limit_denominator(1000)
        self._num, self._den = rate.numerator, rate.denominator  # frames per second
        self._window_ns = window_ns

    @property
    def grace_ns(self) -> int:
        """So long after an instant its picture may still come, and be encoded before the window closes."""
        return min(MAX_GRACE_NS, NS_PER_S * self._den // (10 * self._num))

    def instant_ns(self, index: int) -> int:
        return (10 * index + 8) * NS_PER_S * self._den // (10 * self._num)

    def index_at(self, time_ns: int) -> int:
        """The period which this time lies in."""
        return self._num * time_ns // (self._den * NS_PER_S)

    def first_index(self, time_ns: int) -> int:
        """Of the first instant which is not before this time."""
        index = self.index_at(time_ns)
        return index + (self.instant_ns(index) < time_ns)

    def first_ns(self, index: int) -> int:
        """The earliest time which frame `index` may have: its period's begin, or that of its instant's window."""
        period_ns = -(-index * NS_PER_S * self._den // self._num)
        return max(period_ns, self.instant_ns(index) // self._window_ns * self._window_ns)


@dataclass(frozen=True, slots=True)
class Shot(Generic[P]):
    """One frame to be: the picture on the screen at instant_ns, which came there at shown_ns.

    start_ns: the picture's own time where that lies in the frame's period and window, else the instant.
    """

    start_ns: int
    instant_ns: int
    shown_ns: int
    picture: P

    @property
    def age_ns(self) -> int:
        return self.instant_ns - self.shown_ns


class Screen(Generic[P]):
    """What is on the screen, and what of it is sampled.

    A picture stands until the next one. Where nothing vouches for that, as with a live camera, or behind damage
    (`doubt()`), it is trusted for `trust_ns` only; the instants behind have no picture.

    start_ns, until_ns: nothing is shown before, and no instant is sampled from then on. live: nothing vouches for a
    picture. usual_ns: the distance between pictures by the source's own account; 0: it has none.
    """

    def __init__(
        self,
        grid: FrameGrid,
        start_ns: int = 0,
        *,
        until_ns: int = FOREVER_NS,
        live: bool = False,
        usual_ns: int = 0,
    ) -> None:
        self._grid = grid
        self._until_ns = until_ns
        self._index = grid.index_at(start_ns)
        self._start_ns = start_ns
        self._live = live
        self._held: tuple[int, P] | None = None
        self._doubted = live
        self._vouched_ns = start_ns  # until then the source went on, though nothing newer is shown
        self._has_sampled = False
        self._distances = deque([usual_ns] if usual_ns else [], maxlen=9)

    @property
    def next_ns(self) -> int:
        """The next sampling instant."""
        return self._grid.instant_ns(self._index)

    @property
    def position_ns(self) -> int:
        """No frame will be earlier."""
        held_ns = self._start_ns if self._held is None else self._held[0]
        return max(self._grid.first_ns(self._index), min(held_ns, self.next_ns))

    @property
    def usual_ns(self) -> int:
        """The usual distance between two pictures; 0 when there was one at most."""
        return sorted(self._distances)[len(self._distances) // 2] if self._distances else 0

    @property
    def trust_ns(self) -> int:
        return max(MIN_TRUST_NS, TRUST_PERIODS * self.usual_ns)

    def show(self, time_ns: int, picture: P) -> list[Shot[P]]:
        """The next picture comes on the screen: what was due before it, and at its time. Times must not go back."""
        shots = self.stand(time_ns - 1)
        self._index = max(self._index, self._grid.first_index(time_ns))
        if self._held is not None:
            self._distances.append(time_ns - self._held[0])
        self._held = (time_ns, picture)
        self._doubted = self._live
        return shots + self.stand(time_ns)

    def doubt(self) -> None:
        """The picture which should come next is lost: what is on the screen is no longer what would be there."""
        self._doubted = True

    def vouch(self, time_ns: int) -> None:
        """A picture has come that is not shown: what is on the screen was all there is until then."""
        self._vouched_ns = time_ns

    def stand(self, until_ns: int) -> list[Shot[P]]:
        """What is on the screen stays there until then, as far as it is trusted; the frames that makes."""
        if self._held is None:
            return []
        time_ns, picture = self._held
        until_ns = min(until_ns, self._until_ns - 1)
        trusted_ns = max(time_ns, self._vouched_ns) + self.trust_ns
        until_ns = min(until_ns, trusted_ns) if self._doubted else until_ns
        shots = []
        while self.next_ns <= until_ns:
            start_ns = time_ns if time_ns >= self._grid.first_ns(self._index) else self.next_ns
            shots.append(Shot(start_ns, self.next_ns, time_ns, picture))
            self._index += 1
        self._has_sampled |= bool(shots)
        return shots

    def end(self, duration_ns: int, media_end_ns: int | None) -> list[Shot[P]]:
        """No more pictures come: what the last one makes, which stands until last_ns()."""
        return self.stand(self.last_ns(duration_ns, media_end_ns))

    def last_ns(self, duration_ns: int, media_end_ns: int | None) -> int:
        """Until when the last picture stands: for its duration or a usual one, not beyond the end of the media.

        Of a film that is over before any of its pictures was sampled, the last one stands until the next instant: it
        is in one frame, as a picture that moves as shortly is.

        media_end_ns: None where the source does not say it.
        """
        if self._held is None:
            return self._start_ns
        shown_ns, _ = self._held
        until_ns = self._standing_end_ns(shown_ns, duration_ns, media_end_ns) - 1
        return until_ns if self._live or self._has_sampled else max(until_ns, self.next_ns)

    def _standing_end_ns(self, shown_ns: int, duration_ns: int, media_end_ns: int | None) -> int:
        usual_end_ns = shown_ns + max(duration_ns, self.usual_ns)
        known_end_ns = FOREVER_NS if media_end_ns is None else max(media_end_ns, shown_ns + duration_ns)
        return min(usual_end_ns, known_end_ns)
