"""All kernels answer one question: what the ragged ones are handed gives, by their documents, what SDPA gives."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_shards import attention
from model_shards.attention import KERNELS, PAGE_SIZES, PREPARE, Ragged, RaggedBatch, Span, choose_attention
from model_shards.config import LlmConfig
from model_shards.errors import ModelError
from model_shards.kv_cache import FP8, KvCache, KvSequence, KvShape, taken, write
from model_shards.llm import LanguageModel, SequenceInput
from tests.support.kernels import reference_kernel

SHAPE = KvShape(num_layers=1, num_kv_heads=2, head_dim=8, rope_theta=1e4)
NUM_HEADS = 6


def filled(cache: KvCache, lengths: list[int]) -> list[KvSequence]:
    """Sequences whose pages lie across each other, in a pool of which no token is zero."""
    generator = torch.Generator().manual_seed(7)
    for pool in cache.layer(0):
        pool.copy_(torch.randn(pool.shape, generator=generator))
    sequences = [KvSequence() for _ in lengths]
    for step in range(max(lengths)):
        cache.extend([(s, 1) for s, length in zip(sequences, lengths, strict=True) if step < length])
    return sequences


def spans_of(sequences: list[KvSequence], news: list[tuple[int, int]]) -> list[Span]:
    """news: of each sequence, the start of its new tokens and their number."""
    row, spans = 0, []
    for sequence, (start, num) in zip(sequences, news, strict=True):
        spans.append(Span(sequence, row, start, num))
        row += num
    return spans


def answers(cache: KvCache, spans: list[Span], prepares: list[Any], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    num = sum(span.num for span in spans)
    query = torch.randn(num, NUM_HEADS, SHAPE.head_dim, generator=torch.Generator().manual_seed(num))
    keys, values = (pool.to(dtype) for pool in cache.layer(0))
    query = query.to(cache.device, dtype)
    return [prepare(cache, spans, NUM_HEADS // SHAPE.num_kv_heads, dtype)(query, keys, values) for prepare in prepares]


@st.composite
def work(draw: st.DrawFn) -> tuple[int, list[int], list[tuple[int, int]]]:
    """Page size, lengths, and of each sequence which tokens are new: its last ones, or earlier ones written over."""
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    news = []
    for length in lengths:
        num = draw(st.integers(1, min(length, 9)))
        news.append((draw(st.sampled_from([length - num, draw(st.integers(0, length - num))])), num))
    return draw(st.sampled_from([1, 4, 7, 64])), lengths, news


@settings(max_examples=60)
@given(work())
def test_what_a_ragged_kernel_is_handed_gives_what_sdpa_gives(
    case: tuple[int, list[int], list[tuple[int, int]]],
) -> None:
    page_size, lengths, news = case
    cache = KvCache(SHAPE, sum(-(-length // page_size) for length in lengths) + 1, page_size)
    spans = spans_of(filled(cache, lengths), news)
    sdpa, ragged = answers(cache, spans, [PREPARE["sdpa"], Ragged.by(reference_kernel)])
    torch.testing.assert_close(ragged, sdpa, rtol=1e-5, atol=1e-5)


@pytest.fixture
def model() -> LanguageModel:
    config = LlmConfig(
        vocab_size=11,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=SHAPE.num_kv_heads,
        head_dim=SHAPE.head_dim,
    )
    torch.manual_seed(0)
    return LanguageModel(config).requires_grad_(False).eval()


def hidden_of(model: LanguageModel, cache: KvCache) -> list[Tensor]:
    """Prefill, decode steps, and a session that writes over what it had; in one batch."""
    first, second = KvSequence(), KvSequence()
    rows = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    return [
        *model(cache, [SequenceInput(first, rows[:9]), SequenceInput(second, rows[9:11])]),
        *model(cache, [SequenceInput(first, rows[11:12]), SequenceInput(second, rows[12:17])]),
        *model(cache, [SequenceInput(first, rows[17:20], start=4), SequenceInput(second, rows[20:21])]),
    ]


def test_the_model_gives_the_same_by_a_ragged_kernel(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PREPARE, "varlen", Ragged.by(reference_kernel))
    by_sdpa = hidden_of(model, KvCache(KvShape.of(model.config), 40, 4))
    model.attention = "varlen"
    torch.testing.assert_close(hidden_of(model, KvCache(KvShape.of(model.config), 40, 4)), by_sdpa)


def test_keys_and_values_in_fp8_are_off_by_what_three_bits_round(model: LanguageModel) -> None:
    exact, rounded = (
        hidden_of(model, KvCache(KvShape.of(model.config), 40, 4, dtype)) for dtype in (torch.float32, FP8)
    )
    off = torch.cat(rounded) - torch.cat(exact)
    assert 0 < off.norm() / torch.cat(exact).norm() < 2**-4  # a number is off by 2^-4 of itself at most


def test_what_fp8_can_t_hold_is_as_near_as_it_can_be() -> None:
    cache = KvCache(SHAPE, 2, 4, FP8)
    rows = torch.tensor([-1e4, -448.0, 0.0, 1e-3, 1.0, 300.0, 460.0, 3e38]).expand(1, 2, 8)
    write(cache.layer(0)[0], torch.tensor([3]), rows)
    kept = taken(cache.layer(0)[0].flatten(0, 1), torch.tensor([3]), torch.float32)
    assert kept[0, 0].tolist() == [-448.0, -448.0, 0.0, 2**-9 * round(1e-3 * 2**9), 1.0, 288.0, 448.0, 448.0]


def test_tokens_in_fp8_move_like_all_others() -> None:
    plain, small = (KvCache(SHAPE, 8, 4, dtype) for dtype in (torch.float32, FP8))
    for cache in (plain, small):
        sequence = KvSequence()
        cache.extend([(sequence, 9)])
        generator = torch.Generator().manual_seed(3)
        for pool in cache.layer(0):
            write(pool, torch.arange(32), torch.randn(32, 2, 8, generator=generator))
        cache.drop(sequence, 2, 5)
        assert sequence.length == 6
    for exact, rounded in zip(plain.read(sequence, 0), small.read(sequence, 0), strict=True):
        torch.testing.assert_close(rounded.float(), exact, rtol=2**-3, atol=2**-3)


def test_pages_are_as_the_kernels_want_them() -> None:
    assert PAGE_SIZES["flash"] % 256 == PAGE_SIZES["varlen"] % 256 == 0


def test_on_a_cpu_there_is_sdpa_and_the_others_say_why_not() -> None:
    assert choose_attention("cpu", torch.bfloat16) == choose_attention("cpu", torch.float32, "sdpa") == "sdpa"
    for name in ("flash", "varlen"):
        with pytest.raises(ModelError, match=f"{name} runs on a GPU, not on cpu; here there is sdpa"):
            choose_attention("cpu", torch.bfloat16, name)
    with pytest.raises(ModelError, match="'fast' is none of sdpa, varlen, flash"):
        choose_attention("cpu", torch.float32, "fast")


def test_on_a_gpu_the_fastest_that_runs_there_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "_lacks_flash", lambda: "")
    monkeypatch.setattr(attention, "_failure", lambda name, device, dtype: "")
    assert choose_attention("cuda", torch.bfloat16) == "flash"
    monkeypatch.setattr(attention, "_lacks_flash", lambda: "needs the package flash-attn")
    assert choose_attention("cuda", torch.bfloat16) == "varlen"
    assert choose_attention("cuda", torch.float32) == "sdpa"
    with pytest.raises(ModelError, match="flash needs the package flash-attn; here there is sdpa, varlen"):
        choose_attention("cuda", torch.bfloat16, "flash")
    monkeypatch.setattr(attention, "_failure", lambda name, device, dtype: "fails there: no kernel image")
    assert choose_attention("cuda", torch.bfloat16) == "sdpa"
    with pytest.raises(ModelError, match="varlen fails there: no kernel image; here there is sdpa"):
        choose_attention("cuda", torch.bfloat16, "varlen")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ModelError, match=r"varlen needs a GPU of compute capability 8.0, this one has \(7, 5\)"):
        choose_attention("cuda", torch.bfloat16, "varlen")


def test_a_kernel_is_tried_before_it_is_taken() -> None:
    cpu = torch.device("cpu")
    assert attention._failure("sdpa", cpu, torch.float32) == ""
    assert attention._failure("varlen", cpu, torch.float32).startswith("fails there: ")


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    page_size=st.sampled_from([1, 4, 7, 64]),
    kv_dtype=st.sampled_from([torch.float32, FP8]),
)
def test_a_step_over_all_pages_of_a_table_sees_what_is_there(
    lengths: list[int], page_size: int, kv_dtype: torch.dtype
) -> None:
    cache = KvCache(SHAPE, sum(-(-length // page_size) for length in lengths), page_size, kv_dtype)
    table = cache.block_table(filled(cache, lengths), max(lengths) + 3 * page_size)
    batch = RaggedBatch.of_steps(torch.tensor(lengths, dtype=torch.int32), table.to(torch.int32), page_size)
    query = torch.randn(len(lengths), NUM_HEADS, SHAPE.head_dim, generator=torch.Generator().manual_seed(1))
    keys, values = cache.layer(0)
    plain = reference_kernel(query, keys.float(), values.float(), batch)
    torch.testing.assert_close(KERNELS["sdpa"](query, keys, values, batch), plain)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["varlen", "flash"])
@pytest.mark.parametrize("news", [[(0, 300), (700, 1), (5, 9)], [(299, 1), (700, 1), (13, 1)]])
def test_the_real_kernels_do_what_their_documents_say(name: Any, news: list[tuple[int, int]]) -> None:
    try:
        choose_attention("cuda", torch.bfloat16, name)
    except ModelError as error:
        pytest.skip(str(error))
    cache = KvCache(SHAPE, 8, PAGE_SIZES[name], device="cuda", dtype=torch.bfloat16)
    spans = spans_of(filled(cache, [300, 701, 14]), news)
    real, plain = answers(cache, spans, [PREPARE[name], Ragged.by(reference_kernel)], torch.bfloat16)
    torch.testing.assert_close(real, plain, rtol=2e-2, atol=2e-2)
