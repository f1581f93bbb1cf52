"""The audio encoder, against stock Whisper, and batched against alone."""

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from model_shards.audio import AudioEncoder, AudioState
from model_shards.config import RELEASED, AudioConfig
from model_shards.errors import ModelError
from model_shards.mel import MelChunk

TINY = AudioConfig(
    d_model=32,
    encoder_layers=2,
    encoder_attention_heads=2,
    encoder_ffn_dim=128,
    max_source_positions=400,
    embed_dim=48,
)


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


@pytest.fixture
def tiny() -> AudioEncoder:
    torch.manual_seed(3)
    return AudioEncoder(TINY)


def second(seed: int, num_frames: int = 104, prefix: int = 2) -> MelChunk:
    frames = torch.randn(80, num_frames, generator=torch.Generator().manual_seed(seed))
    return MelChunk(frames, 0, prefix, 2)


def state_after(encoder: AudioEncoder, seeds: list[int]) -> AudioState:
    state = AudioState()
    for seed in seeds:
        encoder.encode([(state, second(seed))])
    return state


def test_a_full_length_clip_equals_stock_whisper(tiny: AudioEncoder) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    stock = WhisperEncoder(
        transformers.WhisperConfig(
            d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=128, max_source_positions=400
        )
    ).eval()
    stock.load_state_dict(tiny.apm.state_dict())
    mel = second(0, 800, 0).frames
    expected = stock(mel[None]).last_hidden_state
    hidden, lens = tiny.hidden([(AudioState(), MelChunk(mel, 0, 0, 0))])
    assert lens == [400]
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)
    embeds = tiny.encode_offline(mel[None], [800], None)[0]
    pooled = tiny.audio_projection_layer(expected)[0].unflatten(0, (80, 5)).mean(dim=1)
    torch.testing.assert_close(embeds, pooled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk_length_s", [None, 1.0, 0.5])
def test_clips_in_a_batch_hear_each_others_padding_only_if_asked(
    tiny: AudioEncoder, chunk_length_s: float | None
) -> None:
    clips = [second(seed, length).frames for seed, length in ((1, 400), (2, 321), (3, 90))]
    lens = [clip.shape[1] for clip in clips]
    mel = torch.stack([F.pad(clip, (0, max(lens) - clip.shape[1])) for clip in clips])

    together = tiny.encode_offline(mel, lens, chunk_length_s, hear_padding=False)

    for clip, embeds in zip(clips, together, strict=True):
        alone = tiny.encode_offline(clip[None], [clip.shape[1]], chunk_length_s)[0]
        torch.testing.assert_close(embeds, alone, rtol=1e-4, atol=1e-5)
    official = tiny.encode_offline(mel, lens, chunk_length_s)
    torch.testing.assert_close(official[0], together[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(official[1], together[1], rtol=1e-4, atol=1e-5)


def test_a_batch_of_unequal_pasts_gives_what_each_session_gets_alone(tiny: AudioEncoder) -> None:
    pasts = [[], [1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]
    chunks = [second(20, 102, 0), second(21), second(22), second(23, 37)]
    together, alone = ([state_after(tiny, past) for past in pasts] for _ in range(2))
    for _ in range(2):
        batched = tiny.encode(list(zip(together, chunks, strict=True)))
        for embeds, state, chunk in zip(batched, alone, chunks, strict=True):
            torch.testing.assert_close(embeds, tiny.encode([(state, chunk)])[0], rtol=1e-4, atol=1e-5)
    assert [state.num_frames for state in together] == [state.num_frames for state in alone]


def test_the_past_is_dropped_when_the_positions_are_used_up(tiny: AudioEncoder) -> None:
    state = state_after(tiny, list(range(7)))
    assert state.num_frames == 350
    (embeds,) = tiny.encode([(state, second(9))])
    assert state.num_frames == 50
    torch.testing.assert_close(embeds, tiny.encode([(AudioState(), second(9))])[0])


def test_released_sessions_are_reset_before_second_29() -> None:
    config = AudioConfig(d_model=8, encoder_layers=1, encoder_attention_heads=1, encoder_ffn_dim=16, embed_dim=4)
    encoder, state = AudioEncoder(config), AudioState()
    encoder.encode([(state, second(0, 102, 0))])
    lengths = []
    for index in range(1, 60):
        encoder.encode([(state, second(index))])
        lengths.append(state.num_frames)
    assert [index for index, length in enumerate(lengths, start=1) if length == 50] == [29, 58]
    assert max(lengths) == 1450


def test_a_copied_state_goes_on_with_the_same_embeddings(tiny: AudioEncoder) -> None:
    state = state_after(tiny, [1, 2])
    other = copy.deepcopy(state)
    torch.testing.assert_close(tiny.encode([(state, second(3))]), tiny.encode([(other, second(3))]))


def test_a_chunk_of_nothing_but_overlap_changes_nothing(tiny: AudioEncoder) -> None:
    state, other = state_after(tiny, [1]), AudioState()
    embeds, full = tiny.encode([(state, second(2, 4)), (other, second(3))])
    assert (embeds.shape, full.shape, state.num_frames) == ((0, 48), (10, 48), 50)


def test_the_encoder_runs_in_half_precision(tiny: AudioEncoder) -> None:
    (expected,) = tiny.encode([(AudioState(), second(1))])
    states = [AudioState(), AudioState()]
    embeds, _ = tiny.bfloat16().encode([(states[0], second(1)), (states[1], second(2, 60))])
    assert embeds.dtype == torch.bfloat16
    torch.testing.assert_close(embeds.float(), expected, rtol=0.05, atol=0.05)


def test_a_session_comes_once_per_batch(tiny: AudioEncoder) -> None:
    state = AudioState()
    with pytest.raises(ModelError, match="one after the other"):
        tiny.encode([(state, second(1)), (state, second(2))])


def test_a_clip_longer_than_the_positions_is_refused(tiny: AudioEncoder) -> None:
    with pytest.raises(ModelError, match="400"):
        tiny.encode_offline(torch.zeros(1, 80, 802), [802], None)


def test_parameters_are_those_of_the_release() -> None:
    assert RELEASED.audio is not None
    with torch.device("meta"):
        encoder = AudioEncoder(RELEASED.audio)
    assert sum(weight.numel() for weight in encoder.apm.parameters()) == 307_216_384
    assert sum(weight.numel() for weight in encoder.audio_projection_layer.parameters()) == 20_979_712
