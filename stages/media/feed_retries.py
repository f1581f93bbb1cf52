"""When a live camera is opened again: pure, time is a parameter."""

from __future__ import annotations

from graph.chunk import NS_PER_S
from graph.window import FOREVER_NS

FIRST_RETRY_NS, LAST_RETRY_NS = NS_PER_S, 30 * NS_PER_S  # a camera that is gone is looked for again, ever less often
FIRST_RENEWAL_NS, LAST_RENEWAL_NS = 60 * NS_PER_S, 3600 * NS_PER_S


class Retries:
    """Of one camera: after a loss, and for a track which stopped while the other one goes on.

    A connection that delivers is given up for the sake of a track ever less often: a camera may have lost it for good.
    """

    def __init__(self) -> None:
        self._wait_ns = FIRST_RETRY_NS
        self._at_ns = -FOREVER_NS  # at once, before event time 0
        self._renewal_ns = FIRST_RENEWAL_NS
        self._renewed_ns = -FOREVER_NS

    def is_due(self, now_ns: int) -> bool:
        return now_ns >= self._at_ns

    def lost(self, now_ns: int) -> None:
        self._at_ns = now_ns + self._wait_ns
        self._wait_ns = min(self._wait_ns * 2, LAST_RETRY_NS)

    def delivers(self) -> None:
        self._wait_ns = FIRST_RETRY_NS

    def may_renew(self, now_ns: int) -> bool:
        """Whether a track that stopped now is worth a new connection; then it is counted as made."""
        if now_ns < self._renewed_ns + self._renewal_ns:
            return False
        is_long_ago = now_ns >= self._renewed_ns + 2 * LAST_RENEWAL_NS
        self._renewal_ns = FIRST_RENEWAL_NS if is_long_ago else min(self._renewal_ns * 2, LAST_RENEWAL_NS)
        self._renewed_ns = now_ns
        return True
