"""The decision rule, quirk by quirk, and for many sessions as for one."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_shards.decoding import Choice, DecisionRule, SamplingConfig, keep_likeliest
from model_shards.errors import ModelError
from model_shards.tokenizer import SpecialTokens

VOCAB = 20
CHUNK_EOS, TURN_EOS, TTS_PAD, LISTEN, IM_END, BAD = 10, 11, 12, 13, 14, 15
SPECIAL = cast(
    SpecialTokens,
    SimpleNamespace(chunk_eos=CHUNK_EOS, turn_eos=TURN_EOS, tts_pad=TTS_PAD, listen=LISTEN, im_end=IM_END),
)


def rule(mode: str = "greedy", **changes: Any) -> DecisionRule:
    return DecisionRule(SamplingConfig(mode=cast(Any, mode), **changes), SPECIAL, [BAD])


def logits(**values: float) -> Tensor:
    """Logits of -9, save for the tokens named t3=…"""
    row = torch.full((1, VOCAB), -9.0)
    for name, value in values.items():
        row[0, int(name[1:])] = value
    return row


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def choose(decisions: DecisionRule, row: Tensor, recent: list[int] | None = None) -> Choice:
    return decisions.choose(row, [recent or []], [generator()])[0]


def test_the_end_of_a_chunk_is_taken_from_the_raw_logits():
    assert choose(rule(), logits(t10=2.0, t3=1.0)) == Choice(CHUNK_EOS, counts=False)


def test_the_end_of_a_chunk_is_not_chosen_once_it_was_not_drawn():
    drawn = [rule("sampling").choose(logits(t10=0.0, t3=0.0), [[]], [generator(seed)])[0] for seed in range(50)]
    assert set(drawn) == {Choice(CHUNK_EOS, counts=False), Choice(3, counts=True)}


def test_forbidden_tokens_are_never_chosen():
    row = logits(t3=1.0)
    row[0, [TTS_PAD, BAD]] = 5.0
    assert choose(rule(), row) == Choice(3, counts=True)


def test_the_repetition_penalty_makes_a_positive_logit_smaller():
    assert choose(rule(repetition_penalty=1.5), logits(t3=3.0, t4=2.5), [3]).token == 4


def test_the_repetition_penalty_makes_a_negative_logit_larger():
    assert choose(rule(repetition_penalty=1.5), logits(t3=-3.0, t4=-2.5), [3]).token == 3


def test_the_repetition_penalty_counts_a_token_once():
    assert rule(repetition_penalty=2.0).shape(logits(t3=3.0), [[3, 3, 3]])[0, 3] == 1.5


def test_the_repetition_penalty_forgets_what_lies_before_its_window():
    shaped = rule(repetition_penalty=2.0, repetition_window=2).shape(logits(t3=3.0, t4=3.0), [[3, 4, 5]])
    assert shaped[0, [3, 4]].tolist() == [3.0, 1.5]


@pytest.mark.parametrize(("logit", "shaped"), [(3.0, 2.0), (-3.0, -4.5)])
def test_the_length_penalty_keeps_a_turn_open_whatever_the_sign(logit: float, shaped: float):
    assert rule(length_penalty=1.5).shape(logits(t11=logit), [[]])[0, TURN_EOS] == shaped


def test_listen_settings_act_on_im_end_as_officially():
    decisions = rule(listen_top_k=2, listen_prob_scale=2.0)
    assert choose(decisions, logits(t3=3.0, t14=1.0)) == Choice(IM_END, counts=False)
    assert decisions.shape(logits(t13=1.0, t14=1.0), [[]])[0, [LISTEN, IM_END]].tolist() == [1.0, 2.0]


def test_listen_settings_act_on_listen_where_wanted():
    decisions = rule(listen_top_k=2, listen_means_im_end=False)
    assert choose(decisions, logits(t3=3.0, t13=1.0, t14=2.0)) == Choice(3, counts=True)
    assert choose(decisions, logits(t3=3.0, t13=2.0, t14=1.0)) == Choice(LISTEN, counts=False)


def test_top_k_keeps_all_that_equal_its_last():
    kept = keep_likeliest(logits(t1=3.0, t2=2.0, t3=2.0, t4=1.0), top_k=2, top_p=0.0)
    assert kept.isfinite().nonzero()[:, 1].tolist() == [1, 2, 3]


def test_top_p_keeps_the_token_that_passes_it():
    row = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert keep_likeliest(row, top_k=0, top_p=0.6).isfinite().tolist() == [[True, True, False, False]]


def test_top_p_keeps_at_least_one():
    assert keep_likeliest(logits(t5=9.0), top_k=0, top_p=0.01).isfinite().sum() == 1


def test_the_given_logits_stay_as_they_are():
    row = logits(t3=3.0, t11=1.0)
    before = row.clone()
    choose(rule("sampling"), row, [3])
    assert torch.equal(row, before)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    mode=st.sampled_from(["greedy", "sampling"]),
    top_k=st.sampled_from([0, 3, 20]),
    top_p=st.sampled_from([0.0, 0.8]),
    listen_top_k=st.sampled_from([None, 4]),
)
def test_a_session_draws_the_same_alone_and_in_any_batch(
    seed: int, mode: str, top_k: int, top_p: float, listen_top_k: int | None
):
    decisions = rule(mode, top_k=top_k, top_p=top_p, listen_top_k=listen_top_k)
    rows = torch.randn(5, VOCAB, generator=generator(seed)) * 3
    recent = [list(range(row * 3)) for row in range(5)]
    together, alone = [generator(row) for row in range(5)], [generator(row) for row in range(5)]
    for _ in range(3):
        batched = decisions.choose(rows, recent, together)
        single = [decisions.choose(rows[row : row + 1], [recent[row]], [alone[row]])[0] for row in range(5)]
        assert batched == single


@pytest.mark.parametrize("wrong", [{"mode": "beam"}, {"temperature": 0.0}, {"repetition_window": 0}])
def test_settings_without_a_meaning_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ModelError, match=next(iter(wrong))):
        SamplingConfig(**wrong)
