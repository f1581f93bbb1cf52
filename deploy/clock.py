"""Clocks of other machines, which differ from ours: event time is one for all stages of a session.

Rule: origins and durations are of monotonic clocks. Each machine's begins where it likes, so that another one's is
ahead of ours by anything; but nobody sets it, so that a session's origin stays where it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable


def clock_ahead_ns(ask: Callable[[], int], now_ns: Callable[[], int] = time.monotonic_ns, *, num_questions: int) -> int:
    """How far another machine's clock is ahead of ours, ns; wrong by at most half of the quickest answer's way.

    ask: returns the other one's time, after whatever the network takes.
    """
    answers = []
    for _ in range(num_questions):
        asked_ns = now_ns()
        theirs_ns = ask()
        answered_ns = now_ns()
        answers.append((answered_ns - asked_ns, theirs_ns - (asked_ns + answered_ns) // 2))
    return min(answers)[1]
