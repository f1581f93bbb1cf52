"""Which sessions of a stage are to be looked at, and when: those for which something came, or is due. Pure.

So a step costs what happens in it, and not what is open.
"""

from __future__ import annotations

from heapq import heappop, heappush

from graph.chunk import SessionId


class Schedule:
    """Looks that are due at once, in the order in which they were asked for, and one planned look per session."""

    def __init__(self) -> None:
        self._touched: dict[SessionId, None] = {}
        self._planned: dict[SessionId, int] = {}
        self._looks: list[tuple[int, SessionId]] = []  # a heap; of a session only the planned one counts

    def touch(self, session: SessionId) -> None:
        """Look at it in the next step."""
        self._touched[session] = None

    def plan(self, session: SessionId, at_ns: int | None) -> None:
        """Look at it then, and not when it was planned before; None: when something comes."""
        if at_ns == self._planned.get(session):
            return
        if at_ns is None:
            del self._planned[session]
            return
        self._planned[session] = at_ns
        heappush(self._looks, (at_ns, session))

    def forget(self, session: SessionId) -> None:
        """It is not looked at any more."""
        self._touched.pop(session, None)
        self._planned.pop(session, None)

    def due(self, now_ns: int) -> list[SessionId]:
        """Those to look at now; each is then planned anew."""
        while self._looks and self._looks[0][0] <= now_ns:
            at_ns, session = heappop(self._looks)
            if self._planned.get(session) == at_ns:
                del self._planned[session]
                self.touch(session)
        touched, self._touched = list(self._touched), {}
        return touched

    @property
    def is_empty(self) -> bool:
        return not self._touched and not self._planned

    @property
    def next_ns(self) -> int | None:
        """When the next planned look is; None: there is none."""
        while self._looks and self._planned.get(self._looks[0][1]) != self._looks[0][0]:
            heappop(self._looks)
        return self._looks[0][0] if self._looks else None
