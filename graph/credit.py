"""Credit: how much may be under way on one edge for one session, in chunks and in media time.

Grants travel as running totals ("in all you may have sent N chunks and M ns"), so that a lost or doubled grant heals
itself with the next one. Both ends are pure; the bus carries the grants.
"""

from __future__ import annotations

from dataclasses import dataclass

from graph.value import value


@dataclass(frozen=True, slots=True)
class Limit:
    """What an edge may have in flight per session. duration_ns None: chunks only."""

    chunks: int
    duration_ns: int | None = None


@value
class Grant:
    """Totals since the session began."""

    chunks: int
    duration_ns: int


class SendCredit:
    """The sender's end. Invariant: what was sent and not yet released never exceeds the limit."""

    def __init__(self, limit: Limit) -> None:
        self._limit = limit
        self._granted_chunks, self._granted_ns = limit.chunks, limit.duration_ns or 0
        self._sent_chunks = self._sent_ns = 0

    def fits(self, duration_ns: int) -> bool:
        """True when one chunk of `duration_ns` may be sent now."""
        if self._sent_chunks >= self._granted_chunks:
            return False
        if self._limit.duration_ns is None or self.in_flight == 0:  # a chunk longer than the limit travels alone
            return True
        return self._sent_ns + duration_ns <= self._granted_ns

    def take(self, duration_ns: int) -> bool:
        """Spend credit for one chunk; False when it has to wait."""
        if not self.fits(duration_ns):
            return False
        self._sent_chunks += 1
        self._sent_ns += duration_ns
        return True

    def grant(self, grant: Grant) -> None:
        """Take a grant in any order, any number of times."""
        self._granted_chunks = max(self._granted_chunks, grant.chunks)
        self._granted_ns = max(self._granted_ns, grant.duration_ns)

    @property
    def in_flight(self) -> int:
        """Chunks sent and, as far as is known here, not released."""
        return self._sent_chunks - (self._granted_chunks - self._limit.chunks)


class ReceiveCredit:
    """The receiver's end: what it releases may be sent anew."""

    def __init__(self, limit: Limit) -> None:
        self._limit = limit
        self._num_released = self._released_ns = 0

    def release(self, duration_ns: int) -> None:
        """One chunk was used up or dropped."""
        self._num_released += 1
        self._released_ns += duration_ns

    def grant(self) -> Grant:
        """The running totals to send back."""
        return Grant(self._num_released + self._limit.chunks, self._released_ns + (self._limit.duration_ns or 0))
