"""The time, as what decides about it is told: on the machine's clock, or on one that a test or a simulation moves."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """monotonic_ns never goes back, and knows nothing of the time of day, which may be set at any moment; in ns."""

    def monotonic_ns(self) -> int: ...


class SystemClock:
    """This machine's."""

    def monotonic_ns(self) -> int:
        return time.monotonic_ns()
