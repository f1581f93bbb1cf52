"""The released sizes: every parameter is counted, and each component computes at its true size within a CPU's memory.

Weights are a repeated random pattern: drawing 9 billion numbers would take longer than all the rest. So nothing is said
here about values but that they stay finite; the numbers are held at small size, by tests/golden.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model_shards.audio import AudioEncoder, AudioState
from model_shards.checkpoint import COMPONENTS, Component, build
from model_shards.config import RELEASED, HiftConfig
from model_shards.hift_causal import CausalHiftGenerator
from model_shards.image import slice_image
from model_shards.kv_cache import KvCache, KvSequence, KvShape
from model_shards.llm import LanguageModel, SequenceInput
from model_shards.mel import StreamingMel
from model_shards.tts import Talker, TalkerInput, TalkerState
from model_shards.vision import VisionEncoder
from model_shards.vocoder import Vocoder, VocoderInput, Voice
from tests.support.sparse import unused_talker_table

SECOND = np.zeros(16000, np.float32)
PATTERN = 1 << 20


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield
    gc.collect()  # one component at a time


def on_meta(component: Component) -> nn.Module:
    with torch.device("meta"):
        return build(component, RELEASED)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def num_unused() -> int:
    """Parameters of the released talker that are never used, and that ours doesn't have."""
    assert RELEASED.tts is not None
    return sum(torch.Size(shape).numel() for shape in unused_talker_table(RELEASED.tts).values())


# --- counts: reference §1 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("component", "part", "expected"),
    [
        ("llm", lambda llm: llm, 8_189_195_264),
        ("llm", lambda llm: llm.llm.model.embed_tokens, 151_748 * 4096),
        ("llm", lambda llm: llm.llm.lm_head, 151_748 * 4096),
        ("llm", lambda llm: llm.llm.model.layers[0], 192_946_432),
        ("vision", lambda vision: vision.vpm, 402_552_736),
        ("vision", lambda vision: vision.resampler, 88_907_776),
        ("audio", lambda audio: audio.apm, 307_216_384),
        ("audio", lambda audio: audio.audio_projection_layer, 20_979_712),
        ("tts", lambda tts: tts.tts.emb_text, 152_064 * 768),
    ],
)
def test_a_component_has_the_released_number_of_parameters(
    component: Component, part: Callable[[nn.Module], nn.Module], expected: int
) -> None:
    assert num_parameters(part(on_meta(component))) == expected


def test_the_talker_has_the_released_number_with_the_table_that_nobody_uses() -> None:
    assert num_unused() == 24_576_000
    assert num_parameters(on_meta("tts")) + num_unused() == 347_696_290


def test_all_parameters_of_the_released_file_are_built_on_meta_at_no_cost() -> None:
    modules = [on_meta(component) for component in COMPONENTS if component != "vocoder"]  # it has files of its own
    assert all(parameter.is_meta for module in modules for parameter in module.parameters())
    total = sum(num_parameters(module) for module in modules) + num_unused()
    assert total == 9_356_548_162


@pytest.mark.parametrize(
    ("part", "millions"),
    [("flow.decoder.estimator", 114.6), ("flow.encoder", 37.8), ("hift", 20.8)],
)
def test_the_vocoder_has_the_released_size(part: str, millions: float) -> None:
    """The reference tells millions: DiT 114.6, encoder 37.8, HiFT about 20, 0.17 B in all."""
    vocoder = on_meta("vocoder")
    assert round(num_parameters(vocoder.get_submodule(part)) / 1e6, 1) == millions
    assert round(num_parameters(vocoder) / 1e9, 2) in (0.17, 0.18)


# --- forward at true size ---------------------------------------------------------------------------------------------


def fill(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Norms and scales are 1, and a matrix keeps the scale of what it is multiplied with."""
    if name.endswith(("alpha", "original0", "norm.weight", "norm1.weight", "norm2.weight")):
        return torch.ones(shape, dtype=dtype)
    fan_in = max(1, shape[1:].numel()) if len(shape) > 1 else 10_000
    source = torch.Generator().manual_seed(len(name))
    pattern = ((torch.rand(PATTERN, generator=source) - 0.5) * (12 / fan_in) ** 0.5).to(dtype)
    tensor = torch.empty(shape.numel(), dtype=dtype)
    num_whole = tensor.numel() // PATTERN * PATTERN
    tensor[:num_whole].view(-1, PATTERN).copy_(pattern.expand(num_whole // PATTERN, -1))
    tensor[num_whole:] = pattern[: tensor.numel() - num_whole]
    return tensor.view(shape)


def filled(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A module that was built on `meta`, with weights."""
    state = {name: fill(name, tensor.shape, dtype) for name, tensor in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    return module.eval()


@pytest.mark.full_size
def test_vision_encodes_a_picture_at_full_size() -> None:
    encoder = filled(on_meta("vision"), torch.bfloat16)
    assert isinstance(encoder, VisionEncoder)
    picture = np.random.default_rng(0).integers(0, 256, (448, 448, 3), np.uint8)
    patches = slice_image(picture, encoder.config.slices)
    assert [(piece.rows, piece.cols) for piece in patches] == [(32, 32)]

    embeds = encoder.encode(patches)

    assert (embeds.shape, embeds.dtype) == ((1, 64, 4096), torch.bfloat16)
    assert embeds.isfinite().all()


@pytest.mark.full_size
def test_audio_encodes_seconds_at_full_size() -> None:
    encoder = filled(on_meta("audio"), torch.bfloat16)
    assert isinstance(encoder, AudioEncoder)
    mel, state = StreamingMel(), AudioState()
    for num_frames in (102, 104):
        (chunk,) = mel.push(SECOND)
        assert chunk.frames.shape[-1] == num_frames
        (embeds,) = encoder.encode([(state, chunk)])
        assert (embeds.shape, embeds.dtype) == ((10, 4096), torch.bfloat16)
        assert embeds.isfinite().all()


@pytest.mark.full_size
def test_the_talker_speaks_a_second_at_full_size() -> None:
    talker = filled(on_meta("tts"), torch.bfloat16)
    assert isinstance(talker, Talker)
    state = TalkerState(torch.Generator().manual_seed(0), turn_start=False)  # in mid-turn: 25 codes, no fewer
    unit = TalkerInput(torch.arange(6), torch.randn(6, 4096).bfloat16())

    (codes,) = talker.generate([(state, unit)])

    assert len(codes) == 25
    assert all(0 <= code < 6561 for code in codes)
    assert state.next_position == 6 + 1 + 25
    assert state.kv is not None
    assert (state.kv.shape, state.kv.dtype) == ((20, 2, 12, 32, 64), torch.bfloat16)


@pytest.mark.full_size
def test_the_vocoder_speaks_a_second_at_full_size() -> None:
    vocoder = filled(on_meta("vocoder"), torch.float32)  # as the product computes it
    assert isinstance(vocoder, Vocoder)
    voice = Voice(torch.arange(5, dtype=torch.int32), torch.randn(1, 10, 80), torch.randn(1, 192))
    state = vocoder.open(voice, noise_seed=0)

    (wave,) = vocoder.stream([(state, VocoderInput(range(25)))])

    assert (wave.shape, wave.dtype) == ((24000,), torch.float32)
    assert wave.isfinite().all()
    assert wave[:3840].eq(0).all() and wave[3840:].ne(0).any()
    assert state.flow.turn.dit_kv.shape == (5, 16, 2, 2, 8, 50, 64)
    assert state.flow.turn.code_kv.shape == (6, 2, 8, 25, 64)
    assert state.flow.turn.mel_kv.shape == (4, 2, 8, 50, 64)


@pytest.mark.full_size
def test_the_causal_vocoder_speaks_a_second_at_full_size() -> None:
    with torch.device("meta"):
        hift = CausalHiftGenerator(HiftConfig(causal=True))
    filled(hift, torch.float32)
    mel = torch.randn(1, 80, 50)
    (wave,), _ = hift.stream(mel, [hift.empty_cache()], [torch.Generator().manual_seed(0)], last=False)
    assert wave.shape == (24000,)
    assert wave.isfinite().all() and wave[3840:].ne(0).any()


@pytest.mark.full_size
def test_a_group_of_llm_layers_reads_a_unit_and_decodes_at_full_size() -> None:
    """Four layers of 36, with the whole vocabulary: 4 GB. A unit with a picture, then a word."""
    config = dataclasses.replace(RELEASED.llm, num_hidden_layers=4)
    with torch.device("meta"):
        model = LanguageModel(config)
    filled(model, torch.bfloat16)
    cache = KvCache(KvShape.of(config), num_pages=8, dtype=torch.bfloat16)
    sequence = KvSequence()
    unit = torch.cat((model.embed(torch.tensor([151_683])), torch.randn(78, 4096).bfloat16()))

    (hidden,) = model(cache, [SequenceInput(sequence, unit)])
    logits = model.logits(hidden[-1:])
    (after,) = model(cache, [SequenceInput(sequence, model.embed(logits.argmax(-1)))])

    assert (hidden.shape, hidden.dtype) == ((79, 4096), torch.bfloat16)
    assert logits.shape == (1, 151_748)
    assert after.shape == (1, 4096)
    assert logits.isfinite().all() and after.isfinite().all()
    assert sequence.length == 80
    keys, values = cache.read(sequence, 3)
    assert keys.shape == values.shape == (80, 8, 128)
