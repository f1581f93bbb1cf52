"""What nano was heard to say in a run of the pipeline: its utterances, from the events and the sound that the run left.

Needs no torch. Times are int nanoseconds of the session; sound is float32 at 24 kHz on the session's axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from model_shards.nano.phrases import sentences
from model_shards.nano.recogniser import Recogniser, word_errors
from model_shards.nano.score import NS_PER_S, Utterance
from model_shards.nano.teacher import RATE_HZ, Teacher

Samples = npt.NDArray[np.float32]
Event = Mapping[str, Any]

AUDIBLE: Final = 0.02  # of full scale; a voice is ten times as loud
LONGEST_END_NS: Final = 2 * NS_PER_S  # of speech after the last words of a turn have begun to sound


@dataclass(frozen=True, slots=True)
class Spoken:
    """One utterance and its sound, up to the next one's."""

    utterance: Utterance
    samples: Samples


@dataclass(frozen=True, slots=True)
class WordErrors:
    """Of how many words of nano's whole sentences so many were heard wrong: from nano, and from its teacher.

    None: nobody was there to hear, or no teacher.
    """

    words: int = 0
    nano: int | None = None
    teacher: int | None = None

    @property
    def rate(self) -> float | None:
        return None if self.nano is None or not self.words else self.nano / self.words

    @property
    def teacher_rate(self) -> float | None:
        return None if self.teacher is None or not self.words else self.teacher / self.words


def listen(events: Iterable[Event], samples: Samples) -> list[Spoken]:
    """One session's utterances in order. events: the rows of its events.jsonl."""
    rows = list(events)
    turns = _turns([row for row in rows if row["type"] == "said"])
    starts = iter(_starts_ns(turns, [row for row in rows if row["type"] == "heard"]))
    heard_ns = [[next(starts) for row in turn if row["text"]] for turn in turns]
    return [
        _spoken(turn, times, _first(heard_ns[index + 1 :]), samples)
        for index, (turn, times) in enumerate(zip(turns, heard_ns, strict=True))
        if times
    ]


def count_errors(sounds: Iterable[Spoken], ear: Recogniser, teacher: Teacher | None) -> WordErrors:
    """Let an independent recogniser hear all that is a whole sentence, and the teacher say the same."""
    known = frozenset(sentences())
    whole = [spoken for spoken in sounds if spoken.utterance.ended and spoken.utterance.text in known]
    texts = [spoken.utterance.text for spoken in whole]
    nano = sum(word_errors(spoken.utterance.text, ear.hear(spoken.samples)) for spoken in whole)
    taught: dict[str, int] = {}
    if teacher is not None:
        taught = {text: word_errors(text, ear.hear(teacher.say(text).samples)) for text in sorted(set(texts))}
    by_teacher = None if teacher is None else sum(taught[text] for text in texts)
    return WordErrors(sum(len(text.split()) for text in texts), nano, by_teacher)


def _turns(said: Iterable[Event]) -> list[list[Event]]:
    """What was said, by turns; the last one may be unfinished."""
    turns: list[list[Event]] = [[]]
    for row in said:
        turns[-1].append(row)
        if row["end_of_turn"]:
            turns.append([])
    return [turn for turn in turns if turn]


def _starts_ns(turns: Iterable[Sequence[Event]], heard: Sequence[Event]) -> list[int | None]:
    """When each unit's words began to sound. Words of several units may have come in one piece of speech."""
    starts: list[int | None] = []
    pieces = iter(heard)
    text, start_ns = "", None
    for said in (row["text"] for turn in turns for row in turn if row["text"]):
        if not text:
            piece = next(pieces, None)
            text, start_ns = ("", None) if piece is None else (piece["text"], round(piece["time_s"] * NS_PER_S))
        starts.append(start_ns)
        text = text.removeprefix(said)
    return starts


def _first(times: Iterable[Sequence[int | None]]) -> int | None:
    return next((start for turn in times for start in turn if start is not None), None)


def _spoken(turn: Sequence[Event], starts_ns: Sequence[int | None], next_ns: int | None, samples: Samples) -> Spoken:
    """next_ns: when the next utterance begins to sound."""
    sounding = [start for start in starts_ns if start is not None]
    piece = samples[:0]
    heard_ns = None
    if sounding:
        end_ns = sounding[-1] + NS_PER_S + LONGEST_END_NS
        piece = samples[_sample_at(sounding[0]) : _sample_at(end_ns if next_ns is None else min(end_ns, next_ns))]
        audible = np.flatnonzero(np.abs(piece) > AUDIBLE)
        heard_ns = sounding[0] + int(audible[0]) * NS_PER_S // RATE_HZ if len(audible) else None
    words = tuple((int(row["window"]), str(row["text"])) for row in turn if row["text"])
    return Spoken(Utterance(words, heard_ns, int(turn[-1]["window"]), bool(turn[-1]["end_of_turn"])), piece)


def _sample_at(time_ns: int) -> int:
    return time_ns * RATE_HZ // NS_PER_S
