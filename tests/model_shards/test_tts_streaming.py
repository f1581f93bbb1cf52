"""The talker outside duplex, against the official codes of every attention type, and batched against alone."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model_shards.config import TtsConfig, load_config
from model_shards.errors import ModelError
from model_shards.sampling import Sampling
from model_shards.tts import ChunkRequest, Talker, TalkerState
from model_shards.tts_streaming import Block, SpeechInput, SpeechState, SpeechStream, speak_interleaved

PLACES = [Path(__file__).parents[up] / "shared" / "golden" for up in (2, 3)]
GOLDEN = Path(os.environ.get("OMNI_GOLDEN") or next((place for place in PLACES if place.is_dir()), PLACES[0]))
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden data; OMNI_GOLDEN names its folder")

ATTENTION_TYPES = ["full_attention", "sliding_window", "sliding_recompute", "reindex"]
SAMPLING = Sampling(temperature=0.8, repetition_penalty=1.05, top_p=0.85, top_k=25)
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


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(GOLDEN / "tts.safetensors")


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    return json.loads((GOLDEN / "tts.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def official(cases: dict[str, Any]) -> Talker:
    config = load_config(GOLDEN).tts
    assert config is not None
    talker = Talker(dataclasses.replace(config, sliding_window_tokens=cases["token_window_size"]))
    weights = load_file(GOLDEN / "model.safetensors")
    talker.load_state_dict({key: value for key, value in weights.items() if key.startswith("tts.")})
    return talker


@pytest.fixture
def tiny() -> Talker:
    torch.manual_seed(11)
    return Talker(TINY)


def piece(num_rows: int, seed: int, text_finished: bool = False) -> SpeechInput:
    rows = torch.randn(num_rows, TINY.hidden_size, generator=torch.Generator().manual_seed(seed))
    return SpeechInput(rows, text_finished)


@golden
@pytest.mark.parametrize("name", [*ATTENTION_TYPES, "full_small_chunk"])
def test_a_turn_in_pieces_gives_the_official_codes(
    name: str, official: Talker, tensors: dict[str, Tensor], cases: dict[str, Any]
) -> None:
    case, state = cases[name], SpeechState(TalkerState())
    sampling = Sampling(case["temperature"], case["repetition_penalty"], case["top_p"], case["top_k"])
    stream = SpeechStream(official, case["attention_type"], sampling, case["chunk_size"])
    for index, row in enumerate(case["rows"]):
        text = SpeechInput(tensors[f"{name}.{index}.cond_no_bos"], row["text_finished"])
        (blocks,) = stream.speak([(state, text)], case["max_new_token"])
        assert state.last is not None
        assert state.last.codes == row["sampled"]
        assert [{"tokens": block.codes, "last": block.last} for block in blocks] == row["yields"]
        assert (state.talker.next_position, len(state.buffer)) == (row["text_start_pos"], row["buffer_left"])
        assert state.talker.kv is not None
        assert state.talker.kv.shape[3] == row["kv_len"]
    torch.testing.assert_close(state.talker.kv[None, 0, 0], tensors[f"{name}.final_k0"], rtol=1e-4, atol=1e-4)


@golden
@pytest.mark.parametrize("attention", ["full_attention", "sliding_recompute", "reindex"])
def test_a_whole_text_in_pieces_gives_the_official_codes(
    attention: str, official: Talker, tensors: dict[str, Tensor], cases: dict[str, Any]
) -> None:
    case = cases[f"interleaved.{attention}"]
    conditions = [tensors[f"interleaved.cond{index}"] for index in range(4)]
    codes = speak_interleaved(
        official, conditions, attention, Sampling(0.8, 1.05), max_steps=case["max_new_token_patched"]
    )
    assert codes == case["tokens"]


@golden
def test_a_whole_text_at_once_gives_the_official_codes(
    official: Talker, tensors: dict[str, Tensor], cases: dict[str, Any]
) -> None:
    request = ChunkRequest(tensors["generate.cond"], min_steps=50, max_steps=cases["generate"]["n_steps"])
    (spoken,) = official.generate_chunks([(TalkerState(), request)], SAMPLING)
    assert spoken.codes == cases["generate"]["tokens"]


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
