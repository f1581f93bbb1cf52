"""The decision rule on a device: what it decides without asking the host is what it decides when it does."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_shards.decoding import Choice, DecisionRule, SamplingConfig, keep_likeliest
from model_shards.errors import ModelError
from model_shards.noise import uniform, waits
from model_shards.tokenizer import SpecialTokens

VOCAB, WINDOW = 40, 12
CHUNK_EOS, LISTEN = 10, 13
SPECIAL = cast(
    SpecialTokens, SimpleNamespace(chunk_eos=CHUNK_EOS, turn_eos=11, tts_pad=12, listen=LISTEN, im_end=LISTEN)
)


def rule(**changes: Any) -> DecisionRule:
    return DecisionRule(SamplingConfig(repetition_window=WINDOW, **changes), SPECIAL, [15])


def logits_of(seed: int, num: int, coarse: bool = False) -> Tensor:
    """coarse: many are equal."""
    logits = torch.randn(num, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    return logits.round() if coarse else logits


def rows_of(decisions: DecisionRule, recent: list[list[int]]) -> Tensor:
    rows = np.empty((len(recent), WINDOW), dtype=np.int64)
    for tokens, row in zip(recent, rows, strict=True):
        decisions.recent_row(tokens, row)
    return torch.from_numpy(rows)


def decide(decisions: DecisionRule, logits: Tensor, recent: list[list[int]], draws: list[int]) -> list[Choice]:
    """Session k has seed k."""
    seeds = torch.arange(len(logits))
    return decisions.choices(decisions.decide(logits, seeds, torch.tensor(draws), rows_of(decisions, recent)))


def by_hand(decisions: DecisionRule, logits: Tensor, recent: list[int], seed: int, num_draws: int) -> Choice:
    """One session, sampled: the questions one after the other, over the whole vocabulary."""
    config, own = decisions.config, (torch.tensor([seed]), torch.tensor([num_draws]))
    end = logits.softmax(-1)[CHUNK_EOS]
    if uniform(*own, torch.tensor([VOCAB]))[0, 0] < end:
        return Choice(CHUNK_EOS, counts=False)
    shaped = decisions.shape(logits[None], [recent])
    if config.listen_top_k is not None and int((shaped > shaped[0, LISTEN]).sum()) < config.listen_top_k:
        return Choice(LISTEN, counts=False)
    probs = keep_likeliest(shaped / config.temperature, config.top_k, config.top_p).softmax(-1)
    return Choice(int((probs / waits(*own, torch.arange(VOCAB))).argmax()), counts=True)


histories = st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=2 * WINDOW), min_size=1, max_size=5)


@settings(max_examples=60)
@given(st.integers(0, 10_000), histories, st.sampled_from([None, 1, 3]))
def test_the_likeliest_token_is_that_of_the_host(seed: int, recent: list[list[int]], listen_top_k: int | None) -> None:
    decisions = rule(mode="greedy", listen_top_k=listen_top_k, repetition_penalty=1.5)
    logits = logits_of(seed, len(recent))
    generators = [torch.Generator() for _ in recent]
    assert decide(decisions, logits, recent, [0] * len(recent)) == decisions.choose(logits, recent, generators)


@settings(max_examples=100)
@given(
    st.integers(0, 10_000),
    histories,
    st.sampled_from([None, 2]),
    st.sampled_from([(20, 0.8), (5, 0.0), (0, 0.9), (0, 0.0), (1, 0.5), (200, 0.8)]),
    st.booleans(),
)
def test_a_session_draws_in_any_company_what_it_draws_alone_question_by_question(
    seed: int, recent: list[list[int]], listen_top_k: int | None, narrow: tuple[int, float], coarse: bool
) -> None:
    decisions = rule(listen_top_k=listen_top_k, top_k=narrow[0], top_p=narrow[1], temperature=1.5)
    logits, draws = logits_of(seed, len(recent), coarse), [seed + row for row in range(len(recent))]
    if coarse and narrow[1]:  # which of equal tokens pass top-p is the sort's to say
        decisions = rule(listen_top_k=listen_top_k, top_k=narrow[0], top_p=0.0, temperature=1.5)
    alone = [by_hand(decisions, logits[k], tokens, k, draws[k]) for k, tokens in enumerate(recent)]
    assert decide(decisions, logits, recent, draws) == alone


def test_tokens_are_drawn_with_the_chances_of_the_host() -> None:
    num = 20_000
    logits, decisions = logits_of(1, 1)[0], rule(temperature=2.0)
    logits[CHUNK_EOS] = logits.max()
    end = float(logits.softmax(-1)[CHUNK_EOS])
    probs = keep_likeliest(decisions.shape(logits[None], [[]]) / 2.0, 20, 0.8).softmax(-1)[0] * (1 - end)
    probs[CHUNK_EOS] = end
    rows = rows_of(decisions, [[]]).expand(num, -1)
    decided = decisions.decide(logits.expand(num, -1), torch.full((num,), 3), torch.arange(num), rows)
    drawn = torch.tensor([choice.token for choice in decisions.choices(decided)])
    torch.testing.assert_close(torch.bincount(drawn, minlength=VOCAB) / num, probs, rtol=0, atol=0.0177)  # 5 sigmas


@pytest.mark.parametrize("mode", ["sampling"])
def test_what_is_no_number_is_refused(mode: Any) -> None:
    logits = logits_of(1, 2)
    logits[1, 3] = torch.nan
    with pytest.raises(ModelError, match="no numbers"):
        decide(rule(mode=mode), logits, [[], []], [0, 0])
