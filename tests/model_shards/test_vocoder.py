"""The vocoder: batched against alone, and what a session keeps. The official speech: tests/golden/test_token2wav.py."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model_shards.config import SILENCE_CODE, FlowConfig, HiftConfig, VocoderConfig
from model_shards.errors import ModelError
from model_shards.flow import Release
from model_shards.fold import fold
from model_shards.vocoder import (
    Vocoder,
    VocoderInput,
    VocoderState,
    Voice,
    Window,
    cut_windows,
    mel_spectrogram,
)

TINY = VocoderConfig(
    flow=FlowConfig(
        input_size=32,
        encoder_attention_heads=2,
        encoder_linear_units=64,
        encoder_num_blocks=2,
        encoder_num_up_blocks=1,
        dit_hidden_size=32,
        dit_depth=2,
        dit_num_heads=2,
        dit_head_dim=8,
    ),
    hift=HiftConfig(base_channels=32, f0_cond_channels=16),
)
FAST = dataclasses.replace(TINY, num_steps=2)
FAST_CAUSAL = dataclasses.replace(FAST, hift=dataclasses.replace(TINY.hift, causal=True))
SECOND = 24000


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def small(config: VocoderConfig, release: Release | None = None) -> Vocoder:
    """Random weights with which speech depends on its codes, and isn't clipped."""
    torch.manual_seed(9)
    vocoder = Vocoder(config, release)
    for parameter in vocoder.flow.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.constant_(vocoder.hift.f0_predictor.classifier.bias, 120.0)
    return vocoder.eval()


def small_voice(num_codes: int = 12) -> Voice:
    source = torch.Generator().manual_seed(num_codes)
    mel = torch.randn(1, 2 * num_codes, 80, generator=source)
    return Voice(torch.arange(num_codes, dtype=torch.int32), mel, torch.ones(1, 192))


def say(vocoder: Vocoder, state: VocoderState, codes: list[int], end_of_turn: bool = False) -> Tensor:
    return vocoder.stream([(state, VocoderInput(codes, end_of_turn))])[0]


def test_mel_of_reference_speech_is_that_of_numpy() -> None:
    samples = np.random.default_rng(0).normal(scale=0.1, size=3000)
    padded = np.pad(samples, 720, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1920) / 1920)
    num_frames = (len(padded) - 1920) // 480 + 1
    bands = [np.fft.rfft(padded[480 * frame : 480 * frame + 1920] * window) for frame in range(num_frames)]
    magnitudes = np.sqrt(np.abs(np.stack(bands)) ** 2 + 1e-9)
    expected = np.log((magnitudes @ mel_filters().T).clip(min=1e-5))
    mel = mel_spectrogram(torch.from_numpy(samples).float())
    torch.testing.assert_close(mel, torch.from_numpy(expected).float(), rtol=0, atol=1e-3)


def mel_filters() -> np.ndarray:
    """Slaney's: linear up to 1 kHz, then 27 per factor of 6.4; triangles of unit area."""

    def hz(mel: float) -> float:
        return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    top = 15 + 27 * np.log(8) / np.log(6.4)
    edges = [hz(mel) for mel in np.linspace(0, top, 82)]
    bins = np.arange(961) * 12.5
    rows = [np.interp(bins, edges[i : i + 3], (0.0, 1.0, 0.0)) * 2 / (edges[i + 2] - edges[i]) for i in range(80)]
    return np.stack(rows)


@pytest.mark.parametrize("config", [FAST, FAST_CAUSAL])
def test_a_folded_vocoder_says_the_same(config: VocoderConfig) -> None:
    plain, folded = small(config), small(config)
    fold(folded)
    assert not any("parametrizations" in name for name in folded.hift.ups.state_dict())
    for codes, end in ((range(25), False), (range(100, 125), False), (range(9), True)):
        waves = []
        for vocoder in (plain, folded):
            state = vocoder.open(small_voice(), noise_seed=1)
            waves.append([say(vocoder, state, list(codes), end), say(vocoder, state, [5] * 25, end)])
        torch.testing.assert_close(waves[1], waves[0], rtol=0, atol=1e-4)
        assert waves[0][0].abs().max() > 0.01


@pytest.mark.parametrize("config", [FAST, FAST_CAUSAL])
def test_a_session_sounds_the_same_whoever_shares_its_batch(config: VocoderConfig) -> None:
    vocoder = small(config)
    voices = [vocoder.prepare(small_voice(num_codes)) for num_codes in (12, 60)]
    units = [VocoderInput(range(25)), VocoderInput(range(50, 75)), VocoderInput(range(8), True), VocoderInput([7] * 25)]
    scripts = [units, [VocoderInput(()), *units[:3]], [VocoderInput(range(200, 260))] * 4, units[1:] + units[:1]]
    alone: list[list[Tensor]] = []
    for seed, script in enumerate(scripts):
        state = vocoder.open(voices[seed % 2], noise_seed=seed)
        alone.append([vocoder.stream([(state, unit)])[0] for unit in script])
    states = [vocoder.open(voices[seed % 2], noise_seed=seed) for seed in range(len(scripts))]
    for unit in range(4):
        together = vocoder.stream([(state, script[unit]) for state, script in zip(states, scripts, strict=True)])
        for wave, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(wave, expected[unit], rtol=0, atol=1e-4)
    assert max(wave.abs().max() for wave in alone[0]) < 0.9  # nothing is hidden by clipping
    assert (alone[0][1] - alone[3][0]).abs().max() > 1e-2  # … and histories matter


@pytest.mark.parametrize("config", [FAST, FAST_CAUSAL])
def test_codes_become_seconds(config: VocoderConfig) -> None:
    vocoder = small(config)
    state = vocoder.open(small_voice(), noise_seed=1)
    first, second = say(vocoder, state, list(range(25))), say(vocoder, state, list(range(25)))
    last = say(vocoder, state, list(range(5)), end_of_turn=True)
    assert [len(wave) for wave in (first, second)] == [SECOND, SECOND]
    assert first[:3840].eq(0).all()
    # All in all: three silence codes in front and the silence of the first chunk, then the codes.
    assert len(first) + len(second) + len(last) == 3840 + 960 * (3 + 25 + 25 + 5)


def test_a_short_call_is_filled_to_a_second_unless_it_ends_the_turn() -> None:
    vocoder = small(FAST)
    state = vocoder.open(small_voice(), noise_seed=1)
    wave = say(vocoder, state, list(range(9)))
    assert wave.shape == (SECOND,)
    assert wave[: SECOND - 9 * 960].eq(0).all()
    assert say(vocoder, state, []).shape == (0,)
    assert len(say(vocoder, state, list(range(2)), end_of_turn=True)) < SECOND


@pytest.mark.parametrize("config", [FAST, FAST_CAUSAL])
def test_a_turn_does_not_hear_the_turn_before(config: VocoderConfig) -> None:
    vocoder = small(config)
    voice = vocoder.prepare(small_voice())
    state, fresh = vocoder.open(voice, noise_seed=1), vocoder.open(voice, noise_seed=1)
    say(vocoder, state, list(range(100, 150)))
    vocoder.reset(state)
    state.generator.manual_seed(1)
    torch.testing.assert_close(say(vocoder, state, list(range(25))), say(vocoder, fresh, list(range(25))))
    say(vocoder, state, list(range(9)), end_of_turn=True)
    assert state.flow.turn.mel_kv.shape[-2] == 0
    assert state.flow.voice is voice.history
    assert state.codes == [SILENCE_CODE] * 3


@pytest.mark.parametrize("config", [FAST, FAST_CAUSAL])
def test_a_session_stays_bounded(config: VocoderConfig) -> None:
    vocoder = small(config)
    state = vocoder.open(small_voice(), noise_seed=1)
    sizes = []
    for _ in range(8):
        say(vocoder, state, list(range(25)))
        kept = [*dataclasses.astuple(state.flow.turn), *(x for x in dataclasses.astuple(state.hift))]
        sizes.append([tensor.untyped_storage().nbytes() for tensor in kept if isinstance(tensor, Tensor)])
    assert sizes[3] == sizes[-1]


def test_a_copy_goes_on_as_the_original() -> None:
    vocoder = small(FAST)
    state = vocoder.open(small_voice(), noise_seed=1)
    say(vocoder, state, list(range(27)))
    snapshot = state.copy()
    expected = say(vocoder, state, list(range(23)))
    torch.testing.assert_close(say(vocoder, snapshot, list(range(23))), expected, rtol=0, atol=0)


def test_release_decides_what_the_prompt_looks_ahead_to() -> None:
    old, new = small(FAST), small(FAST, Release.V1_0_7)
    by_silence = old.prepare(small_voice()).history.mel_kv
    by_codes = new.prepare(small_voice()).history.mel_kv
    assert not torch.allclose(by_silence, by_codes)
    assert small(FAST_CAUSAL).release is Release.V1_0_7


def test_whole_utterances_have_960_samples_per_code() -> None:
    for config in (FAST, FAST_CAUSAL):
        wave = small(config).token2wav(list(range(30)), small_voice(), noise_seed=0)
        assert wave.shape == (30 * 960,)
        assert wave.abs().max() > 0


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.booleans())
def test_each_code_is_spoken_once_and_in_order(counts: list[int], end_of_turn: bool) -> None:
    rest, spoken, start = [SILENCE_CODE] * 3, [], 0
    for nth, count in enumerate(counts):
        codes = [*rest, *range(start, start + count)]
        windows, rest = cut_windows(codes, end_of_turn and nth == len(counts) - 1)
        start += count
        for window in windows:
            assert len(window.codes) <= 28
            spoken += window.codes if window.last else window.codes[:-3]
    assert [*spoken, *rest] == [SILENCE_CODE] * 3 + list(range(start))
    assert len(rest) == 0 if end_of_turn else 3 <= len(rest) < 8


def test_wrong_input_is_refused_before_anything_changes() -> None:
    vocoder = small(FAST)
    state = vocoder.open(small_voice(), noise_seed=1)
    with pytest.raises(ModelError, match="not all speech codes"):
        say(vocoder, state, [6561] * 25)
    with pytest.raises(ModelError, match="it needs 8"):
        vocoder.speak([(state, Window((1, 2, 3, 4), last=False))])
    assert state.codes == [SILENCE_CODE] * 3
    assert state.flow.num_frames == 0
    with pytest.raises(ModelError, match=r"expected \(N,\), \(1, 2 N, 80\)"):
        vocoder.prepare(dataclasses.replace(small_voice(), prompt_mel=torch.zeros(1, 7, 80)))


def test_an_empty_batch_is_nothing() -> None:
    assert small(FAST).stream([]) == []
