"""What the released model takes of a device: weights, and what sessions keep."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model_shards.audio import AudioEncoder, AudioState
from model_shards.checkpoint import COMPONENTS, build
from model_shards.config import RELEASED, ModelConfig, Quantization, load_config
from model_shards.duplex import DuplexConfig, max_session_tokens
from model_shards.flow import HISTORY_FRAMES
from model_shards.memory import VOICE_FRAMES, kv_token_bytes, session_bytes, shared_bytes, weight_bytes, workspace_bytes
from tests.support.tiny import Tiny

BF16 = torch.bfloat16
INT4 = dataclasses.replace(RELEASED, llm=dataclasses.replace(RELEASED.llm, quantization=Quantization(4, 128)))


def weights(config: ModelConfig) -> int:
    return sum(weight_bytes(component, config, BF16) for component in COMPONENTS)


def test_the_whole_model_with_a_session_takes_less_than_12_gb_in_4_bits() -> None:
    tokens = max_session_tokens(DuplexConfig(), 0)
    assert tokens == 9122, "the official window, and one more unit"
    kept = sum(session_bytes(component, INT4, BF16, VOICE_FRAMES) for component in COMPONENTS)
    voice = shared_bytes("vocoder", INT4, VOICE_FRAMES)
    assert weights(INT4) + tokens * kv_token_bytes(INT4.llm, BF16) + kept + voice < 12e9


def test_4_bits_take_less_than_half_of_bfloat16() -> None:
    assert weights(INT4) < weights(RELEASED) / 2
    assert weights(RELEASED) == pytest.approx(19.4e9, rel=0.01)


@pytest.mark.parametrize("component", COMPONENTS)
def test_weights_are_counted_as_they_are_loaded(tiny: Tiny, component: str) -> None:
    config = load_config(tiny.path)
    loaded = tiny.model(component).state_dict().values()  # type: ignore[arg-type]
    counted = weight_bytes(component, config, torch.float32)  # type: ignore[arg-type]
    in_memory = sum(tensor.numel() * tensor.element_size() for tensor in loaded)
    assert counted == pytest.approx(in_memory, rel=0.05), "what is folded when it is loaded changes little"


def test_a_session_keeps_what_the_reference_says_at_most() -> None:
    """reference/minicpmo-4.5.md §13.2: 143 MB of 1450 frames (and up to 1500 here), 0.25 GB of a turn of the talker."""
    assert session_bytes("audio", RELEASED, BF16, 0) == pytest.approx(143e6 * 1500 / 1450, rel=0.01)
    assert session_bytes("tts", RELEASED, BF16, 0) == pytest.approx(0.25e9, rel=0.02)
    assert session_bytes("vision", RELEASED, BF16, 0) == session_bytes("llm", RELEASED, BF16, 0) == 0


def test_what_the_vocoder_keeps_of_a_frame_is_what_its_history_has(tiny: Tiny) -> None:
    config = load_config(tiny.path)
    vocoder = config.vocoder
    assert vocoder is not None
    history = build("vocoder", config).flow.empty_history(vocoder.num_steps)
    floats = 0
    for kv, per_frame in ((history.dit_kv, 1.0), (history.mel_kv, 1.0), (history.code_kv, 1 / vocoder.flow.up_stride)):
        *lead, _, dim = kv.shape
        floats += torch.Size([*lead, dim]).numel() * per_frame
    frames = VOICE_FRAMES + HISTORY_FRAMES + 100
    assert session_bytes("vocoder", config, torch.float32, VOICE_FRAMES) == pytest.approx(4 * floats * frames, rel=0.2)


def test_an_audio_session_grows_to_what_is_reckoned(tiny: Tiny) -> None:
    config = load_config(tiny.path)
    audio, state = config.audio, AudioState()
    assert audio is not None
    encoder = AudioEncoder(audio)
    assert state.kv is None and encoder.config is audio
    shape = (audio.encoder_layers, 2, audio.encoder_attention_heads, audio.max_source_positions)
    head_dim = audio.d_model // audio.encoder_attention_heads
    assert session_bytes("audio", config, torch.float32, 0) == 4 * torch.Size([*shape, head_dim]).numel()


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_larger_batch_works_with_more(component: str) -> None:
    one, many = (workspace_bytes(component, RELEASED, BF16, batch, 1100) for batch in (1, 16))  # type: ignore[arg-type]
    assert 0 < one <= many
    nothing = ModelConfig(vision=None, audio=None, tts=None, vocoder=None)
    if component != "llm":
        assert workspace_bytes(component, nothing, BF16, 16, 1100) <= one  # type: ignore[arg-type]
