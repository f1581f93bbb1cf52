"""What the released model takes of a device: weights, and what sessions keep."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model_shards.audio import AudioEncoder, AudioState
from model_shards.checkpoint import COMPONENTS, Component
from model_shards.config import RELEASED, ModelConfig, Quantization, VocoderConfig, load_config
from model_shards.duplex import DuplexConfig, max_session_tokens
from model_shards.memory import (
    LEAST_WORKSPACE,
    VOICE_FRAMES,
    Use,
    kv_token_bytes,
    session_bytes,
    shared_bytes,
    weight_bytes,
    workspace_bytes,
)
from tests.model_shards import test_audio_pool, test_flow_pool
from tests.support.tiny import Tiny

BF16 = torch.bfloat16
INT4 = dataclasses.replace(RELEASED, llm=dataclasses.replace(RELEASED.llm, quantization=Quantization(4, 128)))


def weights(config: ModelConfig) -> int:
    return sum(weight_bytes(component, config, BF16) for component in COMPONENTS)


def test_the_whole_model_with_a_session_takes_less_than_12_gb_in_4_bits() -> None:
    tokens = max_session_tokens(DuplexConfig(), 0)
    assert tokens == 9122, "the official window, and one more unit"
    kept = sum(session_bytes(component, INT4, BF16, VOICE_FRAMES) for component in COMPONENTS)
    voice = shared_bytes("vocoder", INT4, BF16, VOICE_FRAMES, is_resident=False)
    assert weights(INT4) + tokens * kv_token_bytes(INT4.llm, BF16) + kept + voice < 12e9


def test_4_bits_take_less_than_half_of_bfloat16() -> None:
    assert weights(INT4) < weights(RELEASED) / 2
    assert weights(RELEASED) == pytest.approx(19.4e9, rel=0.01)


@pytest.mark.parametrize("component", COMPONENTS)
def test_weights_are_counted_as_they_are_loaded(tiny: Tiny, component: Component) -> None:
    config = load_config(tiny.path)
    loaded = tiny.model(component).state_dict().values()
    counted = weight_bytes(component, config, torch.float32)
    in_memory = sum(tensor.numel() * tensor.element_size() for tensor in loaded)
    assert counted == pytest.approx(in_memory, rel=0.05), "what is folded when it is loaded changes little"


def test_a_session_keeps_what_the_reference_says_at_most() -> None:
    """reference/minicpmo-4.5.md §13.2: 143 MB of 1450 frames (and up to 1500 here), 0.25 GB of a turn of the talker."""
    assert session_bytes("audio", RELEASED, BF16, 0) == pytest.approx(143e6 * 1500 / 1450, rel=0.01)
    assert session_bytes("tts", RELEASED, BF16, 0) == pytest.approx(0.25e9, rel=0.02)
    assert session_bytes("vision", RELEASED, BF16, 0) == session_bytes("llm", RELEASED, BF16, 0) == 0


def resident_bytes(config: VocoderConfig, num_turns: int, num_codes: int) -> int:
    """Of the pools, with one voice of so many codes."""
    with torch.inference_mode():
        made = test_flow_pool.vocoder(config)
        made.make_resident([made.prepare(test_flow_pool.voice(num_codes))], num_turns, test_flow_pool.LADDER)
    resident = made._resident
    assert resident is not None
    pools = resident._pools
    return sum(tensor.nbytes for tensor in (*pools.kv, pools.encoder_conv, pools.dit_conv))


@pytest.mark.parametrize("num_codes", [test_flow_pool.SHORT, test_flow_pool.LONG])
@pytest.mark.parametrize("vocoder", [test_flow_pool.STANDARD, test_flow_pool.WITHOUT_GUIDANCE])
def test_a_turn_of_the_vocoder_takes_what_its_place_on_the_device_does(vocoder: VocoderConfig, num_codes: int) -> None:
    config, frames = ModelConfig(vocoder=vocoder), 2 * num_codes
    one, three = (resident_bytes(vocoder, num_turns, num_codes) for num_turns in (1, 3))
    each = session_bytes("vocoder", config, torch.float32, frames)
    assert each == (three - one) // 2
    voice = shared_bytes("vocoder", config, torch.float32, frames, is_resident=True) // 2
    assert 0 < one - each - voice < 0.1 * each, "places and slots that nobody has"


def test_a_turn_of_the_released_vocoder_takes_0_23_gb() -> None:
    assert session_bytes("vocoder", RELEASED, BF16, VOICE_FRAMES) == pytest.approx(0.235e9, rel=0.01)


def test_the_encoders_resident_sessions_take_what_is_reckoned_and_a_slot_more() -> None:
    audio = test_audio_pool.encoder(3)._resident
    assert audio is not None
    config = ModelConfig(audio=test_audio_pool.TINY)
    each = session_bytes("audio", config, torch.float32, 0)
    slot = shared_bytes("audio", config, torch.float32, 0, is_resident=True)
    assert audio._keys.nbytes + audio._values.nbytes == pytest.approx(3 * each + slot, rel=0.03)
    assert shared_bytes("audio", config, torch.float32, 0, is_resident=False) == 0


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
def test_a_larger_batch_works_with_more(component: Component) -> None:
    one, many = (workspace_bytes(component, RELEASED, BF16, Use(batch, 1100)) for batch in (1, 16))
    assert 0 < one <= many
    nothing = ModelConfig(vision=None, audio=None, tts=None, vocoder=None)
    if component != "llm":
        assert workspace_bytes(component, nothing, BF16, Use(16)) <= one


def test_keys_and_values_are_copied_layer_by_layer_and_only_where_the_attention_does_it() -> None:
    copied, paged = (workspace_bytes("tts", RELEASED, BF16, Use(16, copied_tokens=tokens)) for tokens in (4096, 0))
    assert copied - paged == 16 * session_bytes("tts", RELEASED, BF16, 0) // 20
    assert paged < LEAST_WORKSPACE + 100e6
    llm = [workspace_bytes("llm", RELEASED, BF16, Use(16, copied_tokens=tokens)) for tokens in (1000, 0)]
    assert llm[0] - llm[1] == 16 * 1000 * kv_token_bytes(RELEASED.llm, BF16) // 36


def test_of_resident_turns_the_history_of_one_layer_is_gathered_at_once() -> None:
    none, half, all_ = (workspace_bytes("vocoder", RELEASED, BF16, Use(16, resident=number)) for number in (0, 8, 64))
    assert none > half > all_
    step = 4 * 16 * 2 * 2 * 8 * 64 * (VOICE_FRAMES + 100 + 50)
    assert none - all_ == 16 * (step - step // 16)
