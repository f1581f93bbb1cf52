"""Turns as the talker is given them: words second by second, and the codes it answers with.

Rule: a unit is a second. Its words are those whose speech starts in it; the unit in which the speech ends closes the
turn with <|turn_eos|>. A model's own sense of time is rougher than that, so turns are also drawn with words that come
early, words that come a unit late (then there is a pause before them) and ends that come a unit late. Some turns are
cut short: the voice of the last word promises more, no more words come, and the talker must not make them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from model_shards.nano.speech_sizes import CODES_PER_UNIT

_CODES_PER_S: Final = 25
_AT_ONCE, _EARLY, _LATE, _LATE_END, _CUT_SHORT = 0.06, 0.34, 0.10, 0.15, 0.25  # parts of all turns
_MOST_EARLY: Final = 3  # words
_SILENT_END: Final = 3  # codes


@dataclass(frozen=True, slots=True)
class SpokenUnit:
    """words: what the talker is given; codes: what it says to it, 25 unless it is the last unit."""

    words: tuple[str, ...]
    codes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SpokenTurn:
    """A sentence and its codes. starts: the code with which each word begins."""

    words: tuple[str, ...]
    starts: tuple[int, ...]
    codes: tuple[int, ...]


def turn_of(words: Sequence[str], starts_s: Sequence[float], codes: Sequence[int]) -> SpokenTurn:
    return SpokenTurn(tuple(words), tuple(int(start * _CODES_PER_S) for start in starts_s), tuple(codes))


def on_time(turn: SpokenTurn) -> list[SpokenUnit]:
    """Every word in the second in which its speech starts; the last unit closes the turn."""
    return _in_units(turn, [start // CODES_PER_UNIT for start in turn.starts])


def some_pacing(turn: SpokenTurn, silence: int, random: Random) -> list[SpokenUnit]:
    """The turn as a model which keeps time less well might pace it. silence: the code to fill pauses with."""
    if random.random() < _CUT_SHORT:
        turn = _cut_short(turn, silence, random)
    if random.random() < _LATE_END:
        turn = _ended_late(turn, silence)
    kind = random.random()
    if kind < _AT_ONCE:
        return _in_units(turn, [0] * len(turn.words))
    if kind < _AT_ONCE + _EARLY:
        lead = random.randint(1, _MOST_EARLY)
        earlier = [*[turn.starts[0]] * lead, *turn.starts][: len(turn.words)]
        return _in_units(turn, [start // CODES_PER_UNIT for start in earlier])
    if kind < _AT_ONCE + _EARLY + _LATE:
        turn = _paused(turn, silence, random)
    return on_time(turn)


def _in_units(turn: SpokenTurn, unit_of_word: Sequence[int]) -> list[SpokenUnit]:
    num_units = max(-(-len(turn.codes) // CODES_PER_UNIT), unit_of_word[-1] + 1)
    return [
        SpokenUnit(
            tuple(word for word, own in zip(turn.words, unit_of_word, strict=True) if own == unit),
            turn.codes[unit * CODES_PER_UNIT : (unit + 1) * CODES_PER_UNIT],
        )
        for unit in range(num_units)
    ]


def _cut_short(turn: SpokenTurn, silence: int, random: Random) -> SpokenTurn:
    """The first words only, then a little silence."""
    kept = random.randint(1, len(turn.words))
    if kept == len(turn.words) or turn.starts[kept] == turn.starts[kept - 1]:  # the two are one to the teacher
        return turn
    codes = (*turn.codes[: turn.starts[kept]], *[silence] * _SILENT_END)
    return SpokenTurn(turn.words[:kept], turn.starts[:kept], codes)


def _ended_late(turn: SpokenTurn, silence: int) -> SpokenTurn:
    """Silence to the end of the unit and one code more, so that another unit closes the turn."""
    missing = -len(turn.codes) % CODES_PER_UNIT + 1
    return SpokenTurn(turn.words, turn.starts, (*turn.codes, *[silence] * missing))


def _paused(turn: SpokenTurn, silence: int, random: Random) -> SpokenTurn:
    """The words of some unit and all after them come a unit late: silence until then."""
    later = [index for index, start in enumerate(turn.starts) if start >= CODES_PER_UNIT]
    if not later:
        return turn
    first = random.choice(later)
    cut = turn.starts[first]
    pause = -cut % CODES_PER_UNIT
    starts = (*turn.starts[:first], *(start + pause for start in turn.starts[first:]))
    return SpokenTurn(turn.words, starts, (*turn.codes[:cut], *[silence] * pause, *turn.codes[cut:]))
