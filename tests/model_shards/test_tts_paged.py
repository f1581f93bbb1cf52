"""The talker in pages, several codes per launch, against the talker that looks at every code: the same, in any batch.

The kernel is the plain reference of what the real ones document (tests/support/kernels.py).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from model_shards import tts
from model_shards.attention import PAGE_SIZES, choose_attention, gathered
from model_shards.config import TtsConfig
from model_shards.errors import ModelError
from model_shards.kv_cache import KvCache, KvCacheFull
from model_shards.noise import waits
from model_shards.programs import ladder_to
from model_shards.tts import ChunkRequest, Talker, TalkerState, duplex_sampling
from model_shards.tts_paged import APART, NUM_STEPS, PagedState, PagedTalker, shape_of
from tests.model_shards.test_tts import TINY, unit
from tests.support.kernels import reference_kernel, shapes_only

PAGE_SIZE = 16


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


@dataclass(slots=True)
class Seeded:
    """In the place of a generator: draws what a device draws."""

    seed: int
    num_draws: int = 0


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The talker that looks at every code draws from the same numbers."""

    def draw(probs: Tensor, generators: Sequence[Seeded | None]) -> list[int]:
        probs = probs.clone()
        for row, own in enumerate(generators):
            if own is not None:
                seeds, draws = torch.tensor([own.seed]), torch.tensor([own.num_draws])
                probs[row] /= waits(seeds, draws, torch.arange(probs.shape[1]))[0]
                own.num_draws += 1
        return cast(list[int], probs.argmax(-1).tolist())

    monkeypatch.setattr(tts, "draw", draw)


def talker_of(config: TtsConfig = TINY) -> Talker:
    torch.manual_seed(11)
    return Talker(config).requires_grad_(False).eval()


def paged(talker: Talker, num_pages: int = 200, max_rows: int = 4) -> PagedTalker:
    cache = KvCache(shape_of(talker.config), num_pages, PAGE_SIZE, talker.tts.emb_text.weight.dtype)
    return PagedTalker(talker, cache, "sdpa", ladder_to(max_rows), reference_kernel)


def plain_state(seed: int | None) -> TalkerState:
    return TalkerState(cast(Any, None if seed is None else Seeded(seed ^ APART)))


def length_of(state: TalkerState) -> int:
    return 0 if state.kv is None else int(state.kv.shape[3])


def assert_same(state: PagedState, plain: TalkerState) -> None:
    """Where a session stands, and what it has drawn."""
    assert state.sequence.length == state.next_position == plain.next_position == length_of(plain)
    assert state.turn_start == plain.turn_start
    assert len(state.sequence.pages) == -(-state.sequence.length // PAGE_SIZE)
    if isinstance(plain.generator, Seeded):
        assert state.num_draws == plain.generator.num_draws


@pytest.mark.parametrize(("seeds", "num_ends"), [([None] * 4, 0), ([7, None, 8, 9], 4)], ids=["likeliest", "drawn"])
def test_turns_are_spoken_as_if_the_host_looked_at_every_code(
    one_by_one: None, seeds: list[int | None], num_ends: int
) -> None:
    """Sessions join one after the other, turns open and end, some units say nothing; EOS comes in the middle."""
    talker = talker_of()
    pages = paged(talker)
    ours, theirs = [pages.new_state(seed) for seed in seeds], [plain_state(seed) for seed in seeds]
    lengths = []
    for step in range(6):
        units = [unit((3 * step + 5 * s) % 19, 10 * step + s, (s + step) % 4 == 3) for s in range(min(4, step + 1))]
        codes = pages.generate(list(zip(ours, units, strict=False)))
        assert codes == talker.generate(list(zip(theirs, units, strict=False)))
        lengths += [len(own) for own in codes]
        for state, plain in zip(ours, theirs, strict=True):
            assert_same(state, plain)
    assert 25 in lengths and len({length for length in lengths if length < 25}) >= num_ends


def test_the_cache_holds_what_the_talker_would_keep(one_by_one: None) -> None:
    talker = talker_of()
    pages, plain = paged(talker), plain_state(9)
    state = pages.new_state(9)
    for step in range(3):
        assert pages.generate([(state, unit(4, step))]) == talker.generate([(plain, unit(4, step))])
    assert plain.kv is not None
    for layer in range(TINY.num_hidden_layers):
        for ours, theirs in zip(state.cache.read(state.sequence, layer), plain.kv[layer], strict=True):
            torch.testing.assert_close(ours.transpose(0, 1), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", [None, 100])
def test_a_session_says_the_same_alone_and_in_any_batch(seed: int | None) -> None:
    pages = paged(talker_of())
    seeds = [None if seed is None else seed + session for session in range(4)]
    alone, together = ([pages.new_state(s) for s in seeds] for _ in range(2))
    for step in range(4):
        units = [unit((3 * step + 5 * s) % 19, 10 * step + s, s == 1 and step == 2) for s in range(min(4, step + 1))]
        expected = [pages.generate([(state, said)])[0] for state, said in zip(alone, units, strict=False)]
        assert pages.generate(list(zip(together, units, strict=False))) == expected
        assert [s.num_draws for s in together] == [s.num_draws for s in alone]


def test_a_call_ends_after_its_steps_wherever_a_launch_ends(one_by_one: None) -> None:
    talker = talker_of()
    pages = paged(talker, max_rows=8)
    limits = [1, 2, NUM_STEPS, NUM_STEPS + 1, NUM_STEPS + 2, 26]
    requests = [ChunkRequest(torch.randn(4 + n, 32), 100, limit, (7, 8, 9)) for n, limit in enumerate(limits)]
    ours, theirs = [pages.new_state(n) for n in range(6)], [plain_state(n) for n in range(6)]
    spoken = pages.generate_chunks(list(zip(ours, requests, strict=True)))
    assert spoken == talker.generate_chunks(list(zip(theirs, requests, strict=True)), duplex_sampling(TINY))
    assert [len(chunk.codes) for chunk in spoken] == [limit - 1 for limit in limits]
    for state, plain in zip(ours, theirs, strict=True):
        assert (state.sequence.length, state.num_draws) == (length_of(plain), cast(Any, plain.generator).num_draws)


def test_a_turn_that_never_ends_stays_within_the_positions(one_by_one: None) -> None:
    talker = talker_of(dataclasses.replace(TINY, max_position_embeddings=100))
    pages, plain = paged(talker, num_pages=8), plain_state(4)
    state, lengths = pages.new_state(4), []
    assert pages.max_sessions == 1, "7 pages of 16 hold 100 positions and a launch more; one is for blank rows"
    for step in range(8):
        assert pages.generate([(state, unit(10, step))]) == talker.generate([(plain, unit(10, step))])
        lengths.append(state.sequence.length)
        assert_same(state, plain)
    assert max(lengths) <= 100 and lengths != sorted(lengths)


def test_the_end_of_a_turn_and_a_barge_in_give_all_pages_back() -> None:
    pages = paged(talker_of())
    first, second = pages.new_state(1), pages.new_state(None)
    cache, before = first.cache, first.cache.num_used_pages
    pages.generate([(first, unit(4, 1)), (second, unit(9, 2))])
    assert cache.num_used_pages > before
    pages.generate([(first, unit(4, 3, end_of_turn=True))])
    second.end_turn()
    assert (cache.num_used_pages, first.turn_start, second.turn_start) == (before, True, True)
    assert pages.generate([(first, unit(4, 3))]) != [[]]


def test_as_many_sessions_as_are_promised_have_room_and_more_are_refused() -> None:
    talker = talker_of(dataclasses.replace(TINY, max_position_embeddings=60))
    pages = paged(talker, num_pages=12)
    states = [pages.new_state(seed) for seed in range(3)]
    assert pages.max_sessions == 2, "5 pages each, and one for blank rows"
    for step in range(6):
        pages.generate([(state, unit(18, step)) for state in states[:2]])
    requests = [(state, ChunkRequest(torch.randn(30, 32), 26, 26)) for state in states]
    for state, _ in requests:
        state.end_turn()
    with pytest.raises(KvCacheFull, match="pages of 16 tokens wanted for 3 sequences"):
        pages.generate_chunks(requests)
    assert [state.sequence.length for state in states] == [0, 0, 0]


def test_what_is_no_number_is_refused() -> None:
    pages = paged(talker_of())
    with pytest.raises(ModelError, match="no numbers"):
        pages.generate_chunks([(pages.new_state(1), ChunkRequest(torch.full((3, 32), torch.nan), 0, 26))])


@pytest.mark.parametrize("kernel", [shapes_only, gathered])
def test_a_program_looks_at_no_value_and_brings_none_from_the_host(kernel: Any) -> None:
    """As what a GPU captures must not; made where tensors have a shape and a place, and nothing else."""
    talker = talker_of().bfloat16().to("meta")
    cache = KvCache(shape_of(TINY), 40, PAGE_SIZES["varlen"], torch.bfloat16, "meta")
    PagedTalker(talker, cache, "varlen", ladder_to(4), kernel)


def test_it_runs_in_half_precision() -> None:
    talker = talker_of().bfloat16()
    pages = paged(talker)
    state = pages.new_state(1)
    pages.generate([(state, unit(4, 1)), (pages.new_state(None), unit(9, 2))])
    assert len(pages.generate([(state, unit(4, 3))])[0]) == 25


def test_a_session_comes_once_per_batch() -> None:
    pages = paged(talker_of())
    state = pages.new_state(1)
    with pytest.raises(ModelError, match="one after the other"):
        pages.generate([(state, unit(1, 1)), (state, unit(1, 2))])
    assert pages.generate([]) == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["varlen", "flash", "sdpa"])
def test_captured_with_a_real_kernel_it_says_what_the_talker_says(name: Any) -> None:
    """Likeliest codes in bfloat16: the first launch's are the same; later ones may differ by a tie."""
    try:
        choose_attention("cuda", torch.bfloat16, name)
    except ModelError as error:
        pytest.skip(str(error))
    config = dataclasses.replace(TINY, hidden_size=128, num_attention_heads=2, num_key_value_heads=2)
    talker = talker_of(config).bfloat16().cuda()
    cache = KvCache(shape_of(config), 70, PAGE_SIZES[name], torch.bfloat16, "cuda")
    pages = PagedTalker(talker, cache, name, ladder_to(4))
    requests = [ChunkRequest(torch.randn(4 + n, 128, dtype=torch.bfloat16).cuda(), 26, 26) for n in range(3)]
    ours = pages.generate_chunks([(pages.new_state(None), request) for request in requests])
    theirs = talker.generate_chunks([(TalkerState(), request) for request in requests], duplex_sampling(config))
    assert [chunk.codes[:4] for chunk in ours] == [chunk.codes[:4] for chunk in theirs]
