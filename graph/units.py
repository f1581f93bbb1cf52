"""Durations and sizes as people write them, converted once, at the door: "150ms" -> 150_000_000 ns, "512MiB" -> bytes.

Rule: a number without a unit is refused. `lateness: 150` could be milliseconds or seconds, and both run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Final

_NS_PER: Final[Mapping[str, int]] = {
    "h": 3_600_000_000_000,
    "m": 60_000_000_000,
    "s": 1_000_000_000,
    "ms": 1_000_000,
    "us": 1_000,
    "ns": 1,
}
_BYTES_PER: Final[Mapping[str, int]] = {
    "TiB": 1 << 40,
    "TB": 10**12,
    "GiB": 1 << 30,
    "GB": 10**9,
    "MiB": 1 << 20,
    "MB": 10**6,
    "KiB": 1 << 10,
    "kB": 10**3,
    "B": 1,
}
# 18 digits of ns are 31 years; the cap keeps a hostile number from costing time.
_QUANTITY: Final = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]+)\s*")


def parse_duration(text: str) -> int:
    """Nanoseconds of "1s", "150ms", "1.5h". ValueError says what a duration looks like."""
    return _parse(text, _NS_PER, "a duration like 1s, 150ms or 2m")


def parse_bytes(text: str) -> int:
    """Bytes of "512MiB", "1.5GB". ValueError says what a size looks like."""
    return _parse(text, _BYTES_PER, "a size like 512MiB or 2GB")


def format_duration(duration_ns: int) -> str:
    """The shortest exact spelling; `parse_duration` reads it back."""
    return _format(duration_ns, _NS_PER, "s")


def format_bytes(num_bytes: int) -> str:
    """The shortest exact spelling; `parse_bytes` reads it back."""
    return _format(num_bytes, _BYTES_PER, "B")


def _parse(text: str, factors: Mapping[str, int], expected: str) -> int:
    match = _QUANTITY.fullmatch(text)
    factor = match and factors.get(match[2])
    if not match or not factor:
        raise ValueError(f"must be {expected}, not {text!r}")
    amount = Decimal(match[1]) * factor
    if amount != int(amount):
        raise ValueError(f"must be {expected}, a whole number of {list(factors)[-1]}, not {text!r}")
    return int(amount)


def _format(amount: int, factors: Mapping[str, int], unit_of_zero: str) -> str:
    if amount == 0:
        return f"0{unit_of_zero}"
    candidates = (f"{amount // factor}{unit}" for unit, factor in factors.items() if amount % factor == 0)
    return min(candidates, key=len)
