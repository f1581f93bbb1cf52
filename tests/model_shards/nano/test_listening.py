"""From what a run left to what was heard: when, in which words, and how clearly."""

import numpy as np
import pytest

from model_shards.nano.listening import Event, Samples, WordErrors, count_errors, listen
from model_shards.nano.recogniser import Recogniser
from model_shards.nano.score import NS_PER_S, Utterance
from model_shards.nano.teacher import RATE_HZ

QUIET_S = 0.1


def said(window: int, text: str, *, end: bool = False) -> Event:
    return {"type": "said", "time_s": window + 1.0, "window": window, "text": text, "end_of_turn": end}


def heard(at_s: float, text: str) -> Event:
    return {"type": "heard", "time_s": at_s, "text": text, "seconds": 1.0}


def sound(*pieces_s: tuple[float, float], length_s: float = 30.0) -> Samples:
    """A voice from each start to its end; the first tenth of a second of each piece is silent."""
    samples = np.zeros(round(length_s * RATE_HZ), np.float32)
    for start_s, end_s in pieces_s:
        samples[round((start_s + QUIET_S) * RATE_HZ) : round(end_s * RATE_HZ)] = 0.2
    return samples


def test_a_turn_is_one_utterance_heard_from_its_first_audible_sample() -> None:
    events = [
        said(5, " a dog"),
        heard(6.3, " a dog"),
        said(6, " came in"),
        heard(7.3, " came in"),
        said(7, "", end=True),
    ]
    (spoken,) = listen(events, sound((6.3, 8.0)))
    at_ns = round((6.3 + QUIET_S) * NS_PER_S)
    assert spoken.utterance == Utterance(((5, " a dog"), (6, " came in")), at_ns, 7)
    assert spoken.utterance.text == "a dog came in"


def test_words_of_two_units_may_sound_in_one_piece() -> None:
    events = [
        said(5, " a"),
        said(6, " dog came in", end=True),
        heard(7.3, " a dog came in"),
        said(9, " one person", end=True),
    ]
    first, second = listen([*events, heard(10.3, " one person")], sound((7.3, 9.0), (10.3, 11.0)))
    assert first.utterance.heard_ns == round(7.4 * NS_PER_S)
    assert second.utterance.heard_ns == round(10.4 * NS_PER_S)


def test_the_sound_of_an_utterance_ends_where_the_next_one_begins() -> None:
    events = [said(5, " a dog came in", end=True), heard(6.3, " a dog came in"), said(7, " one person", end=True)]
    first, second = listen([*events, heard(8.3, " one person")], sound((6.3, 8.0), (8.3, 9.5)))
    assert len(first.samples) == 2 * RATE_HZ
    assert len(second.samples) == 3 * RATE_HZ


def test_what_never_sounded_was_never_heard() -> None:
    silent = listen([said(5, " a dog", end=True), heard(6.3, " a dog")], sound())
    lost = listen([said(5, " a dog", end=True)], sound())
    assert [one.utterance.heard_ns for one in (*silent, *lost)] == [None, None]


def test_a_turn_without_words_is_nothing_and_one_without_end_is_cut() -> None:
    (spoken,) = listen(
        [said(4, "", end=True), said(59, " a dog"), heard(60.3, " a dog")], sound((60.3, 61), length_s=62)
    )
    assert not spoken.utterance.ended


def test_word_errors_are_of_whole_sentences_only() -> None:
    class Ear(Recogniser):
        def __init__(self) -> None: ...
        def hear(self, samples: Samples) -> str:
            return "a cat came in"

    events = [said(5, " a dog came in", end=True), said(9, " a dog dog", end=True)]
    counted = count_errors(listen(events, sound()), Ear(), None)
    assert counted == WordErrors(words=4, nano=1)
    assert counted.rate == pytest.approx(0.25)
    assert counted.teacher_rate is None
