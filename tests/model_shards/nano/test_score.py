"""How an episode is judged: what is true, what is missed, what is let go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_shards.nano.phrases import sentences
from model_shards.nano.score import NS_PER_S, Due, Kind, Mistake, Score, Truth, Utterance, score, summary

DOG = "a dog came in"
CAT = "a cat came in"
PROMISE = "as you asked a dog came in"


def due(kind: Kind, name: str, window: int, *texts: str, last: int | None = None, half: str = "") -> Due:
    last_window = window + 2 if last is None else last
    return Due(kind, name, window * NS_PER_S, texts, window, last_window, (half,) if half else ())


def said(window: int, text: str, *, at_once: int = 3, ended: bool = True) -> Utterance:
    """`text` at so many words a window, heard 300 ms after the first window's end."""
    words = text.split()
    parts = [" ".join(words[start : start + at_once]) for start in range(0, len(words), at_once)]
    spoken = tuple((window + index, part) for index, part in enumerate(parts))
    return Utterance(spoken, (window + 1) * NS_PER_S + 300_000_000, spoken[-1][0], ended)


def truth(*dues: Due, stops: tuple[int, ...] = (), num_windows: int = 60) -> Truth:
    return Truth(dues, stops, num_windows, first_window=3)


DOG_IN = due("scene", "dog_in", 10, DOG)


def test_a_remark_in_time_is_a_hit_and_its_reaction_is_until_the_first_word_sounds() -> None:
    totals = summary([score(truth(DOG_IN), [said(10, DOG)])])
    assert (totals["recall"], totals["precision"], totals["reaction_p95_s"]) == (1.0, 1.0, 1.3)


def test_a_remark_too_late_is_missed_and_false() -> None:
    judged = score(truth(DOG_IN), [said(13, DOG)])
    assert (judged.hit("scene"), judged.false_remarks) == (0, 1)


def test_a_remark_before_its_cause_is_false() -> None:
    assert score(truth(DOG_IN), [said(9, DOG)]).false_remarks == 1


def test_the_same_remark_twice_is_once_true_and_once_false() -> None:
    judged = score(truth(DOG_IN), [said(10, DOG), said(12, DOG)])
    assert (judged.true_remarks, judged.false_remarks) == (1, 1)


def test_two_events_alike_want_two_remarks() -> None:
    again = due("sound", "bark", 11, "i hear a bark")
    first = due("sound", "bark", 10, "i hear a bark")
    assert score(truth(first, again), [said(10, "i hear a bark"), said(12, "i hear a bark")]).hit("sound") == 2


def test_half_a_sentence_is_a_false_remark() -> None:
    assert score(truth(DOG_IN), [said(10, "a dog came")]).false_remarks == 1


def test_what_the_end_of_the_episode_cuts_off_is_neither_met_nor_missed() -> None:
    late = due("scene", "dog_in", 58, DOG)
    judged = score(truth(late), [said(59, "a dog", ended=False)])
    assert (judged.total("scene"), judged.false_remarks, judged.true_remarks) == (0, 0, 0)


def test_what_is_not_due_before_the_end_is_not_missed() -> None:
    assert score(truth(due("scene", "dog_in", 59, DOG)), []).total("scene") == 0


def test_a_wrong_answer_uses_the_question_up_and_is_no_false_remark() -> None:
    question = due("question", "how_many", 20, "two people")
    judged = score(truth(question), [said(20, "one person"), said(22, "two people")])
    assert (judged.hit("question"), judged.total("question"), judged.false_remarks) == (0, 1, 1)
    assert judged.mistakes[0] == Mistake("question", "how_many", 20, "two people", "one person")


def test_an_answer_that_nobody_asked_for_is_a_false_remark() -> None:
    totals = summary([score(truth(), [said(20, "two people")])])
    assert totals["precision"] == 0.0
    assert totals["question_accuracy"] is None


def test_a_remark_instead_of_the_promised_one_is_true_and_remarked_but_does_not_honour_the_request() -> None:
    promise = due("standing", "dog_in", 30, PROMISE, half=DOG)
    half = summary([score(truth(promise), [said(30, DOG)])])
    whole = summary([score(truth(promise), [said(30, PROMISE)])])
    assert (half["recall"], half["precision"], half["standing_honoured"]) == (1.0, 1.0, 0.0)
    assert (whole["recall"], whole["precision"], whole["standing_honoured"]) == (1.0, 1.0, 1.0)


def test_stop_is_obeyed_when_no_word_comes_in_a_later_window_and_its_sentence_is_let_go() -> None:
    promise = due("standing", "dog_in", 30, PROMISE, half=DOG)
    obeyed = Utterance(((30, "as you asked"),), 31 * NS_PER_S, last_window=31)
    judged = score(truth(promise, stops=(31,)), [obeyed])
    assert (judged.stops, judged.stops_obeyed, judged.total("standing"), judged.false_remarks) == (1, 1, 0, 0)


def test_who_goes_on_after_stop_has_not_obeyed() -> None:
    promise = due("standing", "dog_in", 30, PROMISE, half=DOG)
    judged = score(truth(promise, stops=(31,)), [said(30, PROMISE, at_once=2)])
    assert (judged.stops, judged.stops_obeyed, judged.hit("standing")) == (1, 0, 1)
    assert judged.mistakes == (Mistake("stop", "stop", 31, "", PROMISE),)


def test_stop_in_silence_and_after_the_last_word_does_not_count() -> None:
    ended = Utterance(((10, DOG),), 11 * NS_PER_S, last_window=11)
    judged = score(truth(DOG_IN, stops=(11, 20)), [ended])
    assert (judged.stops, judged.hit("scene")) == (0, 1)


def test_only_false_speech_in_quiet_windows_counts_as_such() -> None:
    judged = score(truth(DOG_IN), [said(11, CAT), said(40, CAT)])
    assert (judged.quiet_windows, judged.quiet_false, judged.false_remarks) == (60 - 3 - 3, 1, 2)
    assert summary([judged])["false_per_10min"] == pytest.approx(600 / 54)


def test_what_was_said_instead_is_told() -> None:
    judged = score(truth(DOG_IN), [said(11, CAT)])
    assert judged.mistakes == (Mistake("scene", "dog_in", 10, DOG, CAT),)


def test_kinds_are_told_apart() -> None:
    bark = due("sound", "bark", 20, "i hear a bark")
    table = summary([score(truth(DOG_IN, bark), [said(10, DOG)])])["by_kind"]
    assert table == {
        "scene": {"dog_in": {"said": 1, "due": 1}},
        "sound": {"bark": {"said": 0, "due": 1}},
        "standing": {},
        "question": {},
        "okay": {},
    }


TEXTS = st.sampled_from(sentences()[:12])
DUES = st.lists(
    st.builds(
        lambda kind, window, text, length: due(kind, f"{kind}_it", window, text, last=window + length),
        st.sampled_from(("scene", "sound", "standing", "question", "okay")),
        st.integers(3, 59),
        TEXTS,
        st.integers(0, 4),
    ),
    max_size=12,
)
STOPS = st.lists(st.integers(3, 59), max_size=3).map(tuple)
SAID = st.lists(st.tuples(st.integers(0, 59), TEXTS, st.booleans()), max_size=12).map(
    lambda rows: [said(window, text, ended=ended) for window, text, ended in sorted(rows)]
)


@given(DUES, STOPS, SAID)
def test_everything_said_is_true_false_wrong_or_let_go_once(
    dues: list[Due], stops: tuple[int, ...], spoken: list[Utterance]
) -> None:
    judged = score(truth(*dues, stops=stops), spoken)
    num_hits = sum(judged.hits.values())
    assert judged.true_remarks + judged.false_remarks <= len(spoken)
    assert num_hits <= min(len(spoken), sum(judged.totals.values()))
    assert all(judged.hits[cause] <= judged.totals[cause] for cause in judged.hits)
    assert judged.quiet_false <= judged.false_remarks
    assert judged.stops_obeyed <= judged.stops <= len(spoken)
    assert len(judged.reactions_ns) == judged.true_remarks


@given(st.sets(st.integers(0, 18), max_size=12), st.data())
def test_who_says_what_is_due_when_it_is_due_makes_no_mistake(slots: set[int], data: st.DataObject) -> None:
    dues = [due("scene", "it", 3 + 3 * slot, data.draw(TEXTS)) for slot in sorted(slots)]
    spoken = [said(one.first_window + data.draw(st.integers(0, 2)), one.sentences[0], at_once=9) for one in dues]
    judged = score(truth(*dues), spoken)
    assert (judged.hit("scene"), judged.total("scene"), judged.mistakes) == (len(dues), len(dues), ())


@given(DUES, STOPS)
def test_silence_meets_nothing_and_is_never_false(dues: list[Due], stops: tuple[int, ...]) -> None:
    judged = score(truth(*dues, stops=stops), [])
    assert (judged.hits, judged.false_remarks, judged.stops) == ({}, 0, 0)
    assert sum(judged.totals.values()) == sum(one.last_window < 60 for one in dues)


@given(DUES, STOPS, SAID)
def test_scores_add_up(dues: list[Due], stops: tuple[int, ...], spoken: list[Utterance]) -> None:
    one = score(truth(*dues, stops=stops), spoken)
    assert one + Score() == one
    assert summary([one, one])["recall"] == summary([one])["recall"]
    assert (one + one).quiet_windows == 2 * one.quiet_windows
