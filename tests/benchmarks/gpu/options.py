"""What a run is told, checked before anything is measured; the same however it is started."""

from __future__ import annotations

import math
from typing import Final

from deploy.evaluate.bench import BenchUsageError
from tests.benchmarks.gpu.parts import PARTS

NAMES: Final = tuple(part.name for part in PARTS)
CHOICES: Final = {"size": ("full", "tiny"), "device": ("cuda", "cpu"), "parts": NAMES}


def check_options(minutes: str, size: str, device: str, parts: str) -> None:
    """As they were written; "" is not given. Raises BenchUsageError."""
    if minutes and not _is_time(minutes):
        raise BenchUsageError(f"minutes: {minutes} is no time to measure in; give a number above 0, such as 8")
    named = [part for part in parts.split(",") if part]
    if parts and not named:
        raise BenchUsageError(f"parts: none is named; there are {', '.join(NAMES)}")
    given = [("size", size), ("device", device), *(("parts", part) for part in named)]
    for name, value in given:
        if value and value not in CHOICES[name]:
            raise BenchUsageError(f"{name}: {value!r} is none of {', '.join(CHOICES[name])}")


def _is_time(minutes: str) -> bool:
    try:
        return 0 < float(minutes) < math.inf
    except ValueError:
        return False
