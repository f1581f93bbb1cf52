"""Decode steps as programs of fixed shapes, against the model that is asked step by step."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from model_shards.attention import KERNELS, PAGE_SIZES, Kernel, choose_attention, gathered
from model_shards.config import LlmConfig
from model_shards.decode_steps import Decider, DecodeSteps, Fed, Question
from model_shards.decoding import Choice, DecisionRule, SamplingConfig
from model_shards.errors import ModelError
from model_shards.kv_cache import KvCache, KvCacheFull, KvSequence, KvShape
from model_shards.llm import LanguageModel, SequenceInput
from model_shards.tokenizer import SpecialTokens
from tests.support.kernels import reference_kernel, shapes_only

CONFIG = LlmConfig(
    vocab_size=40,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)
SPECIAL = cast(SpecialTokens, SimpleNamespace(chunk_eos=10, turn_eos=11, tts_pad=12, listen=13, im_end=14))
RULE = SamplingConfig("greedy", repetition_window=8)


def model_of(dtype: torch.dtype = torch.float32, device: str = "cpu") -> LanguageModel:
    torch.manual_seed(3)
    return LanguageModel(CONFIG).requires_grad_(False).eval().to(device, dtype)


class Desk:
    """Three sequences of 5, 40 and 1 tokens in a cache of their own."""

    def __init__(self, model: LanguageModel, page_size: int, dtype: torch.dtype = torch.float32) -> None:
        self.model = model
        device = model.get_parameter("llm.lm_head.weight").device
        self.cache = KvCache(KvShape.of(CONFIG), 30, page_size, dtype, device)
        self.rule = DecisionRule(RULE, SPECIAL, [15], self.cache.device)
        self.sequences = [KvSequence() for _ in range(3)]
        rows = torch.randn(46, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
        parts = torch.split(rows.to(self.cache.device, dtype), [5, 40, 1])
        model(self.cache, [SequenceInput(s, part) for s, part in zip(self.sequences, parts, strict=True)])

    def steps(self, kernel: Kernel, num_pages: int = 4) -> DecodeSteps:
        decider = Decider(self.model, self.rule, self.cache.device)
        return DecodeSteps(self.model, self.cache, decider, num_pages, (1, 2, 4), kernel)

    def feed(self, which: list[int], tokens: list[int]) -> Tensor:
        embeds = self.model.embed(torch.tensor(tokens, device=self.cache.device))
        fed = [SequenceInput(self.sequences[k], row[None]) for k, row in zip(which, embeds, strict=True)]
        return torch.cat(self.model(self.cache, fed))


WORK = [([0, 1, 2], [1, 2, 3]), ([0, 2], [4, 5]), ([1], [6]), ([2, 1, 0], [7, 7, 8])]
"""Which sequences go together, and what they are fed."""


def follow(ours: Desk, steps: DecodeSteps, theirs: Desk) -> list[tuple[Tensor, Tensor]]:
    """Feed both; gives the hidden states, and holds the choices against those of the host."""
    states = []
    for which, tokens in WORK:
        questions = [Question(k, 0, [*range(20, 20 + 3 * k)]) for k in which]
        fed = [Fed(ours.sequences[k], token, q) for k, token, q in zip(which, tokens, questions, strict=True)]
        hidden, choices = steps(fed)
        states.append((hidden, theirs.feed(which, tokens)))
        logits, generators = theirs.model.logits(hidden), [torch.Generator(hidden.device) for _ in which]
        assert choices == theirs.rule.choose(logits, [q.recent for q in questions], generators)
    return states


@torch.inference_mode()
def test_a_step_gives_what_the_model_and_the_rule_give_one_by_one() -> None:
    model = model_of()
    ours, theirs = Desk(model, 16), Desk(model, 16)
    for one, other in follow(ours, ours.steps(reference_kernel), theirs):
        torch.testing.assert_close(one, other)
    for mine, plain in zip(ours.sequences, theirs.sequences, strict=True):
        assert mine.length == plain.length
        torch.testing.assert_close(ours.cache.read(mine, 1), theirs.cache.read(plain, 1))


@torch.inference_mode()
def test_a_token_that_does_not_count_is_told_as_such() -> None:
    desk, end = Desk(model_of(), 16), SPECIAL.chunk_eos
    decider, head = Decider(desk.model, desk.rule, desk.cache.device), desk.model.get_parameter("llm.lm_head.weight")
    head[end] = 100.0
    liked, disliked = torch.ones(1, CONFIG.hidden_size), -torch.ones(1, CONFIG.hidden_size)
    ended, chosen = decider(torch.cat([liked, disliked]), [Question(0, 0, [])] * 2)
    assert ended == Choice(end, counts=False)
    assert chosen.counts and chosen.token != end


@torch.inference_mode()
def test_longer_sequences_and_larger_batches_than_it_was_made_for_are_refused() -> None:
    desk = Desk(model_of(), 16)
    steps = desk.steps(reference_kernel, num_pages=2)
    with pytest.raises(ModelError, match="a sequence of 3 pages; decode steps were made for at most 2"):
        steps([Fed(desk.sequences[1], 1, Question(0, 0, []))])
    with pytest.raises(ModelError, match="5 rows; programs were made for at most 4"):
        steps([Fed(KvSequence(), 1, Question(0, 0, [])) for _ in range(5)])


@pytest.mark.parametrize("kernel", [shapes_only, gathered])
@pytest.mark.parametrize("mode", ["greedy", "sampling"])
@torch.inference_mode()
def test_a_program_looks_at_no_value_and_brings_none_from_the_host(mode: Any, kernel: Any) -> None:
    """As what a GPU captures must not; made where tensors have a shape and a place, and nothing else."""
    model, device = model_of(torch.bfloat16, "meta"), torch.device("meta")
    cache = KvCache(KvShape.of(CONFIG), 30, PAGE_SIZES["varlen"], torch.bfloat16, device)
    rule = DecisionRule(SamplingConfig(mode, listen_top_k=2), SPECIAL, [15], device)
    DecodeSteps(model, cache, Decider(model, rule, device), 4, (1, 2, 4), kernel)


@torch.inference_mode()
def test_where_no_page_is_left_for_blank_rows_it_is_said() -> None:
    desk = Desk(model_of(), 16)
    desk.cache.reserve([(KvSequence(), 16 * desk.cache.num_free_pages)])
    with pytest.raises(KvCacheFull):
        desk.steps(reference_kernel)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["varlen", "flash", "sdpa"])
@torch.inference_mode()
def test_a_captured_step_with_a_real_kernel_gives_what_the_model_gives(name: Any) -> None:
    try:
        choose_attention("cuda", torch.bfloat16, name)
    except ModelError as error:
        pytest.skip(str(error))
    model = model_of(torch.bfloat16, "cuda")
    ours, theirs = (Desk(model, PAGE_SIZES[name], torch.bfloat16) for _ in range(2))
    for one, other in follow(ours, ours.steps(KERNELS[name]), theirs):
        torch.testing.assert_close(one, other, rtol=5e-2, atol=5e-2)
