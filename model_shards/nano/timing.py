"""When each word of nano's sentences is spoken, and so in which unit it is given out. Needs no torch, no espeak-ng.

The times are the teacher's, measured once for every sentence: `python -m model_shards.nano.train timing`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Final

FILE: Final = Path(__file__).with_name("timings.json")
UNIT_MS: Final = 1000


@dataclass(frozen=True, slots=True)
class SpokenTimes:
    """starts_ms: of each word, from the utterance's first sample. end_ms: of its end, a whole number of codes."""

    starts_ms: tuple[int, ...]
    end_ms: int


@cache
def timings() -> Mapping[str, SpokenTimes]:
    """Of every sentence that nano says."""
    rows = json.loads(FILE.read_text(encoding="utf-8"))
    return MappingProxyType({said: SpokenTimes(tuple(row[:-1]), row[-1]) for said, row in rows.items()})


@cache
def words_by_unit(sentence: str) -> tuple[tuple[str, ...], ...]:
    """The words whose speech begins in the first second, in the second one, and so on.

    The last unit is the one in which the speech ends: it has no words when only the end of the last word is in it.
    """
    times = timings()[sentence]
    units: list[list[str]] = [[] for _ in range(-(-times.end_ms // UNIT_MS))]
    for word, start_ms in zip(sentence.split(), times.starts_ms, strict=True):
        units[start_ms // UNIT_MS].append(word)
    return tuple(map(tuple, units))


def num_units(sentence: str) -> int:
    """How many windows its speech takes."""
    return len(words_by_unit(sentence))
