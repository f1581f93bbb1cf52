"""Our forward against transformers' Qwen3, and against itself in other company."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_shards.config import RELEASED, LlmConfig
from model_shards.kv_cache import FP8, KvCache, KvCacheFull, KvSequence, KvShape
from model_shards.llm import LanguageModel, SequenceInput

CONFIG = LlmConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(1)
    model = LanguageModel(CONFIG)
    for name, weights in model.named_parameters():
        scale = 1.0 if "norm" in name else 0.0
        weights.data = torch.randn_like(weights) * 0.2 + scale
    return model.requires_grad_(False).eval()


def new_cache(num_pages: int = 200, page_size: int = 4) -> KvCache:
    return KvCache(KvShape.of(CONFIG), num_pages, page_size)


def embeds(num_tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, CONFIG.hidden_size, generator=torch.Generator().manual_seed(seed))


def feed(model: LanguageModel, cache: KvCache, sequence: KvSequence, rows: Tensor) -> Tensor:
    return model(cache, [SequenceInput(sequence, rows)])[0]


def oracle(model: LanguageModel):  # transformers has no types
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        **{name: getattr(CONFIG, name) for name in CONFIG.__slots__ if name != "rope_theta"},
        rope_parameters={"rope_theta": CONFIG.rope_theta, "rope_type": "default"},
        tie_word_embeddings=False,
    )
    qwen = Qwen3ForCausalLM(config).eval()
    qwen.load_state_dict({key.removeprefix("llm."): value for key, value in model.state_dict().items()}, strict=True)
    return qwen.requires_grad_(False)


def test_released_sizes_have_the_released_number_of_parameters():
    with torch.device("meta"):
        model = LanguageModel(RELEASED.llm)
    assert sum(weights.numel() for weights in model.parameters()) == 8_189_195_264


def test_keys_are_those_of_the_checkpoint():
    with torch.device("meta"):
        keys = set(LanguageModel(CONFIG).state_dict())
    layer = "llm.model.layers.2."
    assert {"llm.model.embed_tokens.weight", "llm.model.norm.weight", "llm.lm_head.weight"} <= keys
    assert {key.removeprefix(layer) for key in keys if key.startswith(layer)} == {
        *(f"self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
        *(f"mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")),
        *("input_layernorm.weight", "post_attention_layernorm.weight"),
    }


def test_prefill_and_cached_continuation_match_transformers(model: LanguageModel):
    qwen, cache, sequence = oracle(model), new_cache(), KvSequence()
    rows = embeds(23)
    want = qwen(inputs_embeds=rows[None], output_hidden_states=True)
    got = torch.cat([feed(model, cache, sequence, part) for part in rows.split([11, 1, 1, 7, 3])])
    torch.testing.assert_close(got, want.hidden_states[-1][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.logits(got), want.logits[0], atol=1e-4, rtol=1e-4)


def test_embedding_matches_transformers(model: LanguageModel):
    ids = torch.tensor([5, 96, 0])
    assert torch.equal(model.embed(ids), oracle(model).model.embed_tokens(ids))


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 40)), min_size=1, max_size=6),
    page_size=st.sampled_from([1, 4, 32]),
)
def test_a_ragged_batch_gives_what_each_sequence_gives_alone(
    model: LanguageModel, sizes: list[tuple[int, int]], page_size: int
):
    cache, alone, inputs = new_cache(2000, page_size), [], []
    for seed, (past, new) in enumerate(sizes):
        rows = embeds(past + new, seed)
        alone.append(feed(model, cache, KvSequence(), rows)[past:])
        inputs.append(SequenceInput(KvSequence(), rows[past:]))
        if past:
            feed(model, cache, inputs[-1].sequence, rows[:past])
    together = model(cache, inputs)
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_very_unequal_sequences_don_t_disturb_each_other(model: LanguageModel):
    cache = new_cache(2000)
    long, short = embeds(3000, 1), embeds(2, 2)
    together = model(cache, [SequenceInput(KvSequence(), long), SequenceInput(KvSequence(), short)])
    torch.testing.assert_close(together[1], feed(model, cache, KvSequence(), short), atol=1e-5, rtol=1e-4)


def test_overwriting_reads_only_what_lies_before(model: LanguageModel):
    cache, edited, fresh = new_cache(), KvSequence(), KvSequence()
    rows, replacement = embeds(20), embeds(4, seed=7)
    feed(model, cache, edited, rows)
    tail = cache.read(edited, 1)[0][10:]
    got = model(cache, [SequenceInput(edited, replacement, start=6)])[0]
    want = feed(model, cache, fresh, torch.cat([rows[:6], replacement]))[6:]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert edited.length == 20
    assert torch.equal(cache.read(edited, 1)[0][10:], tail)


def test_what_is_overwritten_or_appended_is_written_into_no_page_that_others_have(model: LanguageModel):
    cache = new_cache()
    first, second, third = KvSequence(), KvSequence(), KvSequence()
    feed(model, cache, first, embeds(10))
    cache.fork(first, 10, second)
    cache.fork(first, 10, third)
    before = [cache.read(first, layer) for layer in range(CONFIG.num_hidden_layers)]
    model(cache, [SequenceInput(second, embeds(3, seed=1), start=6), SequenceInput(third, embeds(3, seed=2))])
    assert second.pages[:1] == first.pages[:1] and not set(second.pages[1:]) & set(first.pages)
    assert third.pages[:2] == first.pages[:2] and not set(third.pages[2:]) & set(first.pages)
    for layer, kept in enumerate(before):
        assert all(torch.equal(now, then) for now, then in zip(cache.read(first, layer), kept, strict=True))
    alone = KvSequence()
    feed(model, cache, alone, embeds(10))
    expected = model(cache, [SequenceInput(alone, embeds(3, seed=2))])[0]
    cache.truncate(third, 10)
    torch.testing.assert_close(feed(model, cache, third, embeds(3, seed=2)), expected, atol=1e-5, rtol=1e-4)


def test_a_session_without_pages_leaves_the_batch_as_it_was(model: LanguageModel):
    cache, first, second = new_cache(num_pages=4), KvSequence(), KvSequence()
    feed(model, cache, first, embeds(3))
    before = cache.read(first, 0)[0]
    with pytest.raises(KvCacheFull):
        model(cache, [SequenceInput(first, embeds(1)), SequenceInput(second, embeds(16))])
    assert first.length == 3 and second.length == 0
    assert torch.equal(cache.read(first, 0)[0], before)


def test_nothing_fed_is_nothing_returned(model: LanguageModel):
    assert model(new_cache(), []) == []


def test_bfloat16_stays_close_to_float32(model: LanguageModel):
    half = LanguageModel(CONFIG).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    cache = KvCache(KvShape.of(CONFIG), 20, 4, torch.bfloat16)
    got = feed(half, cache, KvSequence(), embeds(12).bfloat16())
    want = feed(model, new_cache(), KvSequence(), embeds(12))
    assert torch.nn.functional.cosine_similarity(got.float(), want, dim=-1).min() > 0.99


def folded(model: LanguageModel) -> LanguageModel:
    twin = LanguageModel(CONFIG).requires_grad_(False).eval()
    twin.load_state_dict(model.state_dict())
    twin.fold()
    return twin


@torch.inference_mode()
def test_a_folded_model_gives_the_same_for_any_sizes(model: LanguageModel):
    """Prefill and decode steps of sessions that share their attention, and of some that are too unlike for it."""
    sizes = [[5], [1], [1, 1], [3, 1, 8], [1, 1, 1, 1], [1, 1], [2, 900], [1, 1, 1, 1, 1]]
    said = []
    for each in (model, folded(model)):
        cache, sequences = new_cache(400), [KvSequence() for _ in range(5)]
        batches = [
            [SequenceInput(s, embeds(num, num)) for s, num in zip(sequences, nums, strict=False)] for nums in sizes
        ]
        said.append([*(each(cache, batch) for batch in batches), [*cache.read(sequences[0], 2)]])
    torch.testing.assert_close(*said)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, FP8])
@pytest.mark.parametrize("page_size", [1, 4, 32])
def test_a_folded_model_takes_each_cache_that_it_is_given(model: LanguageModel, page_size: int, dtype: torch.dtype):
    program, one, other = folded(model), KvSequence(), KvSequence()
    ours, theirs = (KvCache(KvShape.of(CONFIG), 20, page_size, dtype) for _ in range(2))
    for num in (7, 1, 1):
        torch.testing.assert_close(feed(program, ours, one, embeds(num)), feed(model, theirs, other, embeds(num)))
