"""The talker outside duplex: what each attention type remembers, and batched against alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model_shards.config import TtsConfig
from model_shards.errors import ModelError
from model_shards.sampling import Sampling
from model_shards.tts import ChunkRequest, Talker, TalkerState
from model_shards.tts_streaming import (
    Block,
    SpeechInput,
    SpeechState,
    SpeechStream,
    code_rows,
    reindex,
    speak_interleaved,
)

ATTENTION_TYPES = ["full_attention", "sliding_window", "sliding_recompute", "reindex"]
SAMPLING = Sampling(temperature=0.8, repetition_penalty=1.05, top_p=0.85, top_k=25)
GREEDY = Sampling(temperature=0.8, repetition_penalty=1.0)
TINY = TtsConfig(
    llm_dim=24,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    num_audio_tokens=50,
    num_text_tokens=100,
    audio_bos_token_id=90,
    text_eos_token_id=91,
    sliding_window_tokens=20,
)


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


@pytest.fixture
def tiny() -> Talker:
    torch.manual_seed(11)
    return Talker(TINY)


def piece(num_rows: int, seed: int, text_finished: bool = False) -> SpeechInput:
    rows = torch.randn(num_rows, TINY.hidden_size, generator=torch.Generator().manual_seed(seed))
    return SpeechInput(rows, text_finished)


MAX_STEPS = 12


def speak_all(talker: Talker, attention: str, pieces: list[SpeechInput]) -> SpeechState:
    """One turn, the likeliest code each time."""
    stream, state = SpeechStream(talker, attention, GREEDY, block_size=7), SpeechState(TalkerState())
    for text in pieces:
        stream.speak([(state, text)], MAX_STEPS)
    return state


def spoken(state: SpeechState) -> list[int]:
    assert state.last is not None
    return state.last.codes


def next_codes(talker: Talker, rows: Tensor, state: TalkerState | None = None) -> list[int]:
    """The codes behind these rows, with the draw that is given out unfed."""
    (chunk,) = talker.generate_chunks([(state or TalkerState(), ChunkRequest(rows, 0, MAX_STEPS))], GREEDY)
    return chunk.codes + [chunk.last_draw] * (chunk.last_draw != talker.eos)


def closed(talker: Talker, text: SpeechInput) -> Tensor:
    return torch.cat([text.condition, talker.text_row(TINY.audio_bos_token_id)])


def test_full_attention_remembers_the_whole_turn(tiny: Talker) -> None:
    """All but the draw given out unfed, whose position stays free."""
    state, by_hand = speak_all(tiny, "full_attention", [piece(4, 1), piece(5, 2)]), TalkerState()
    first = next_codes(tiny, closed(tiny, piece(4, 1)), by_hand)
    by_hand.next_position += len(first) == MAX_STEPS
    assert spoken(state) == next_codes(tiny, closed(tiny, piece(5, 2)), by_hand)


def test_sliding_recompute_reads_the_chunk_before_and_nothing_else(tiny: Talker) -> None:
    before = speak_all(tiny, "sliding_recompute", [piece(4, 1), piece(5, 2)])
    rows = [closed(tiny, piece(5, 2)), code_rows(tiny, spoken(before)), closed(tiny, piece(3, 3))]
    state = speak_all(tiny, "sliding_recompute", [piece(4, 1), piece(5, 2), piece(3, 3)])
    assert spoken(state) == next_codes(tiny, torch.cat(rows))


def test_sliding_window_keeps_the_latest_positions_and_counts_on(tiny: Talker) -> None:
    full, state = (speak_all(tiny, kind, [piece(6, 1), piece(30, 2)]) for kind in ("full_attention", "sliding_window"))
    assert state.talker.kv is not None and full.talker.kv is not None
    assert state.talker.kv.shape[3] == TINY.sliding_window_tokens < full.talker.kv.shape[3]
    assert state.talker.next_position > TINY.sliding_window_tokens


def test_reindex_keeps_the_first_and_the_last_chunk(tiny: Talker) -> None:
    kept = torch.arange(10.0).view(1, 1, 1, 10, 1).repeat(2, 2, 4, 1, 8)
    state = TalkerState(kv=kept, next_position=10)
    reindex(state, 3, 2, TINY.rope_theta)
    assert state.kv is not None
    assert state.kv[0, 1, 0, :, 0].tolist() == [0, 1, 2, 8, 9]  # values stay as they are
    assert torch.equal(state.kv[:, 0, :, :3], kept[:, 0, :, :3])  # so do the oldest keys
    assert state.next_position == 5


@pytest.mark.parametrize("attention", ["full_attention", "sliding_recompute", "reindex"])
def test_a_whole_text_in_one_piece_is_one_call(attention: str, tiny: Talker) -> None:
    rows = closed(tiny, piece(5, 4))
    assert speak_interleaved(tiny, [rows], attention, GREEDY, max_steps=MAX_STEPS) == next_codes(tiny, rows)[:-1]


def test_a_whole_text_with_sliding_recompute_reads_again_what_the_window_holds(tiny: Talker) -> None:
    pieces = [closed(tiny, piece(4 + n, n)) for n in range(3)]
    first, by_hand = TalkerState(), []
    for rows in pieces[:2]:
        (chunk,) = tiny.generate_chunks([(first, ChunkRequest(rows, 0, MAX_STEPS))], GREEDY)
        by_hand.append(chunk.codes)
    rows = torch.cat([pieces[1], code_rows(tiny, by_hand[1]), pieces[2]])
    (chunk,) = tiny.generate_chunks([(TalkerState(), ChunkRequest(rows, 0, MAX_STEPS))], GREEDY)
    codes = speak_interleaved(tiny, pieces, "sliding_recompute", GREEDY, max_steps=MAX_STEPS)
    assert codes == [code for codes in [*by_hand, chunk.codes] for code in codes]


@pytest.mark.parametrize("attention", ATTENTION_TYPES)
def test_a_session_says_the_same_alone_and_in_any_batch(attention: str, tiny: Talker) -> None:
    stream = SpeechStream(tiny, attention, SAMPLING, block_size=7)
    alone, together = ([SpeechState(TalkerState(torch.Generator().manual_seed(s))) for s in range(3)] for _ in range(2))
    for step in range(4):
        # Sessions join one after the other, so that pasts, histories and text have different lengths.
        pieces = [piece(1 + (3 * step + 5 * s) % 8, 10 * step + s) for s in range(min(3, step + 1))]
        expected = [stream.speak([pair], 15 + 2 * step)[0] for pair in zip(alone, pieces, strict=False)]
        assert stream.speak(list(zip(together, pieces, strict=False)), 15 + 2 * step) == expected
    for one, many in zip(alone, together, strict=True):
        assert (many.recent, many.buffer) == (one.recent, one.buffer)
        torch.testing.assert_close(many.talker.kv, one.talker.kv, rtol=1e-4, atol=1e-5)


def test_the_last_block_holds_what_is_left(tiny: Talker) -> None:
    stream = SpeechStream(tiny, "full_attention", SAMPLING)
    state = SpeechState(TalkerState(torch.Generator().manual_seed(3)))
    state.buffer = [1, 2, 3]
    (blocks,) = stream.speak([(state, piece(4, 1, text_finished=True))], max_steps=500)
    assert [block.last for block in blocks] == [False] * (len(blocks) - 1) + [True]
    assert [len(block.codes) for block in blocks[:-1]] == [25] * (len(blocks) - 1)
    assert state.last is not None
    assert [code for block in blocks for code in block.codes] == [1, 2, 3, *state.last.codes]
    assert state.buffer == []


def test_a_silent_turn_still_ends(tiny: Talker) -> None:
    stream = SpeechStream(tiny, "full_attention", SAMPLING)
    state = SpeechState(TalkerState())
    assert stream._blocks(state, [], over=True) == [Block([], last=True)]


@pytest.mark.parametrize("attention", ["sliding", "full"])
def test_an_unknown_attention_type_is_refused(attention: str, tiny: Talker) -> None:
    with pytest.raises(ModelError, match="it is one of full_attention"):
        SpeechStream(tiny, attention, SAMPLING)


def test_a_whole_text_with_sliding_window_is_refused(tiny: Talker) -> None:
    with pytest.raises(ModelError, match="sliding_window"):
        speak_interleaved(tiny, [torch.zeros(2, 32)], "sliding_window", SAMPLING)
