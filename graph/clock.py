"""The time, as what decides about it is told: on the machine's clock, or on one that a test or a simulation moves.

Rule: whatever decides goes by `monotonic_ns`. The time of day is for people and for dashboards; it is read here, and
the simulator sets it on its hosts to see that nothing changes (deploy/simulator/faults.py).
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """In ns. monotonic_ns never goes back; wall_ns, since 1970, may be set at any moment. cpu_ns: what this thread has
    used of its processor."""

    def monotonic_ns(self) -> int: ...
    def wall_ns(self) -> int: ...
    def cpu_ns(self) -> int: ...


class SystemClock:
    """This machine's."""

    def monotonic_ns(self) -> int:
        return time.monotonic_ns()

    def wall_ns(self) -> int:
        return time.time_ns()

    def cpu_ns(self) -> int:
        return time.thread_time_ns()
