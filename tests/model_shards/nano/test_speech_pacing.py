from random import Random

from hypothesis import given
from hypothesis import strategies as st

from model_shards.nano.speech_pacing import SpokenTurn, on_time, some_pacing, turn_of

SILENCE = 7


@st.composite
def turns(draw: st.DrawFn) -> SpokenTurn:
    lengths = draw(st.lists(st.integers(3, 20), min_size=1, max_size=8))
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    codes = range(100, 100 + sum(lengths) + 3)
    return SpokenTurn(tuple("abcdefgh"[: len(lengths)]), tuple(starts), tuple(codes))


def test_a_word_is_in_the_unit_in_which_its_speech_starts():
    turn = turn_of(["a", "dog", "left"], [0.0, 0.3, 1.02], range(40))
    units = on_time(turn)
    assert [unit.words for unit in units] == [("a", "dog"), ("left",)]
    assert [len(unit.codes) for unit in units] == [25, 15]


def test_a_turn_whose_speech_ends_later_has_a_last_unit_without_words():
    units = on_time(turn_of(["knock"], [0.0], range(26)))
    assert [unit.words for unit in units] == [("knock",), ()]
    assert units[-1].codes == (25,)


@given(turns(), st.integers())
def test_pacing_keeps_the_order_and_says_what_is_given(turn: SpokenTurn, seed: int):
    """A turn may be cut short: then neither the words nor their codes come."""
    units = some_pacing(turn, SILENCE, Random(seed))
    said = [code for unit in units for code in unit.codes if code != SILENCE]
    words = [word for unit in units for word in unit.words]
    assert words == list(turn.words[: len(words)])
    assert said == list(turn.codes[: len(said)])
    assert len(said) == (turn.starts[len(words)] if len(words) < len(turn.words) else len(turn.codes))


@given(turns(), st.integers())
def test_every_unit_but_the_last_is_full(turn: SpokenTurn, seed: int):
    *full, last = some_pacing(turn, SILENCE, Random(seed))
    assert all(len(unit.codes) == 25 for unit in full)
    assert len(last.codes) <= 25


@given(turns(), st.integers())
def test_no_word_comes_after_its_speech_has_begun(turn: SpokenTurn, seed: int):
    units = some_pacing(turn, SILENCE, Random(seed))
    said = [code for unit in units for code in unit.codes]
    given_in = [index for index, unit in enumerate(units) for _ in unit.words]
    for start, unit in zip(turn.starts, given_in, strict=False):
        assert said.index(100 + start) >= unit * 25
