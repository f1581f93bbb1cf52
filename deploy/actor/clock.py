"""Clocks of other machines, which differ from ours: event time is one for all stages of a session.

Rule: origins and durations are of monotonic clocks. Each machine's begins where it likes, so that another one's is
ahead of ours by anything; but nobody sets it, so that a session's origin stays where it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from graph.chunk import NS_PER_MS, NS_PER_S

NUM_CLOCK_QUESTIONS = 8
CLOCK_TIMEOUT_NS = 500 * NS_PER_MS  # for all of them; a machine that answers none keeps the difference that was known


def clock_ahead_ns(ask: Callable[[], int], now_ns: Callable[[], int] = time.monotonic_ns, *, num_questions: int) -> int:
    """How far another machine's clock is ahead of ours, ns; wrong by at most half of the quickest answer's way.

    ask: returns the other one's time, after whatever the network takes; raises TimeoutError where it takes too long,
    which is this function's only where no answer has come.
    """
    answers: list[tuple[int, int]] = []
    for _ in range(num_questions):
        sent_ns = now_ns()
        try:
            theirs_ns = ask()
        except TimeoutError:
            if not answers:
                raise
            break
        answered_ns = now_ns()
        answers.append((answered_ns - sent_ns, theirs_ns - (sent_ns + answered_ns) // 2))
    return min(answers)[1]


class NodeClocks:
    """How far the clocks of the cluster's machines are ahead of ours. here: our node."""

    def __init__(self, here: str, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._ahead_ns = {here: 0}
        self._here = here
        self._now_ns = now_ns

    def read(self, node: str, ask: Callable[[float], int]) -> None:
        """Ask a machine for its time, once more. ask: waits at most so many seconds, else raises TimeoutError.

        Raises TimeoutError only where nothing was known before.
        """
        if node == self._here:
            return
        until_ns = self._now_ns() + CLOCK_TIMEOUT_NS
        try:
            self._ahead_ns[node] = clock_ahead_ns(
                lambda: ask(max(until_ns - self._now_ns(), 0) / NS_PER_S),
                self._now_ns,
                num_questions=NUM_CLOCK_QUESTIONS,
            )
        except TimeoutError:
            if node not in self._ahead_ns:
                raise

    def ahead_ns(self, node: str) -> int:
        return self._ahead_ns[node]
