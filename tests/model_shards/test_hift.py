"""HiFT, standard and causal: against plain formulas, in pieces against whole, batched against alone.

The official numbers: tests/golden/test_token2wav.py and test_cv3.py.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from model_shards.config import HiftConfig
from model_shards.fold import fold
from model_shards.hift import STANDARD, HiftGenerator, ResBlock, Snake, Source
from model_shards.hift_causal import CausalHiftGenerator
from model_shards.hift_net import freeze_net
from tests.support.vocoder import official_draws

TINY = HiftConfig(base_channels=32, f0_cond_channels=16)
TINY_CAUSAL = HiftConfig(base_channels=32, f0_cond_channels=16, causal=True)
HOP = 480


class TableNoise(CausalHiftGenerator):
    """Reads noise from a table, as the official code does, from its start on."""

    table: Tensor
    num_read = 0

    def draw_noise(self, generator: torch.Generator, num_frames: int) -> Tensor:
        rows = torch.arange(self.num_read, self.num_read + num_frames * HOP) % self.table.shape[0]
        self.num_read += num_frames * HOP
        return self.table[rows]


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def small(kind: type[HiftGenerator] | type[CausalHiftGenerator], config: HiftConfig) -> Any:
    """Random weights, small enough for a wave that isn't clipped, and a predicted F0 of some 100 Hz."""
    torch.manual_seed(3)
    hift = kind(config)
    torch.nn.init.constant_(hift.f0_predictor.classifier.bias, 120.0)
    torch.nn.init.normal_(hift.conv_post.parametrizations.weight.original0, std=0.3)
    return hift.eval()


def silence_noise(hift: CausalHiftGenerator) -> TableNoise:
    quiet = small(TableNoise, TINY_CAUSAL)
    quiet.table = torch.zeros(1, 9)
    quiet.load_state_dict(hift.state_dict())
    return quiet


def weight_of(conv: Any) -> Tensor:
    """Weight norm, spelled out."""
    scale, direction = (getattr(conv.parametrizations.weight, f"original{i}") for i in (0, 1))
    return scale * direction / direction.square().sum(dim=(1, 2), keepdim=True).sqrt()


def test_snake_adds_a_squared_sine() -> None:
    snake = Snake(3)
    snake.alpha.copy_(torch.tensor([0.5, 1.0, 2.0]))
    x = torch.randn(1, 3, 10)
    expected = [x[0, c] + torch.sin(alpha * x[0, c]) ** 2 / alpha for c, alpha in enumerate((0.5, 1.0, 2.0))]
    torch.testing.assert_close(snake(x)[0], torch.stack(expected))


def test_a_residual_block_is_two_convolutions_per_dilation() -> None:
    torch.manual_seed(0)
    block, x = ResBlock(4, 3, (1, 5), STANDARD), torch.randn(1, 4, 30)
    expected = x
    for index, dilation in enumerate((1, 5)):
        conv1, conv2 = block.convs1[index], block.convs2[index]
        y = expected + torch.sin(expected) ** 2
        y = F.conv1d(y, weight_of(conv1), conv1.bias, dilation=dilation, padding=dilation)
        y = y + torch.sin(y) ** 2
        expected = expected + F.conv1d(y, weight_of(conv2), conv2.bias, padding=1)
    torch.testing.assert_close(block(x), expected)


def test_f0_is_never_negative_and_sees_two_frames_per_layer() -> None:
    hift = small(HiftGenerator, TINY)
    mel, x = torch.randn(1, 80, 20), None
    for index in range(0, 10, 2):
        conv = hift.f0_predictor.condnet[index]
        x = F.elu(F.conv1d(mel if x is None else x, weight_of(conv), conv.bias, padding=1))
    assert x is not None
    expected = F.linear(x.transpose(1, 2), hift.f0_predictor.classifier.weight, hift.f0_predictor.classifier.bias)
    torch.testing.assert_close(hift.f0_predictor(mel), expected.squeeze(2).abs())


def test_the_source_is_harmonics_where_there_is_a_voice_and_noise_elsewhere() -> None:
    torch.manual_seed(0)
    source = Source(TINY)
    sines, noise = torch.rand(1, 2, 9), torch.randn(1, 2, 9)
    mixed = source.mix(torch.tensor([[120.0, 5.0]]), source.weigh(sines), source.weigh(noise))
    voiced = 0.1 * sines[0, 0] + 0.003 * noise[0, 0]
    silent = 0.1 / 3 * noise[0, 1]
    weight, bias = source.l_linear.weight[0], source.l_linear.bias[0]
    expected = torch.stack([torch.tanh(x @ weight + bias) for x in (voiced, silent)])
    torch.testing.assert_close(mixed[0], expected)


def only_first_harmonic(hift: Any) -> Any:
    hift.m_source.l_linear.weight.copy_(torch.eye(1, 9))
    hift.m_source.l_linear.bias.zero_()
    return hift


def test_a_steady_voice_has_its_frequency() -> None:
    """A frame's phase is reached in its middle; beyond the first and the last middle it stands still."""
    hift = only_first_harmonic(small(HiftGenerator, TINY))
    (wave,) = hift.source(torch.full((1, 25), 100.0), torch.zeros(1, 25 * HOP))
    angle = 2 * math.pi * 100 * (torch.arange(25 * HOP) + 0.5 + HOP / 2) / 24000
    inner = slice(HOP // 2, -HOP // 2)
    torch.testing.assert_close(wave[inner], torch.tanh(0.1 * torch.sin(angle))[inner], rtol=0, atol=1e-4)


def test_the_harmonics_are_those_of_the_official_loop() -> None:
    """Each harmonic with a phase of its own, as the official code has it, in double."""
    hift = small(HiftGenerator, TINY)
    f0 = 80 + 300 * torch.rand(2, 25, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(2, 25 * HOP, dtype=torch.float64)
    for index, weight in enumerate(hift.m_source.l_linear.weight[0]):
        phase = (f0.double() * (index + 1) / 24000).cumsum(dim=1) * 2 * math.pi * HOP
        phase = F.interpolate(phase[:, None], scale_factor=HOP, mode="linear")[:, 0]
        expected += weight.double() * phase.sin()
    torch.testing.assert_close(hift._sines(f0).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("hop", [HOP, 15])
def test_the_phase_of_a_sample_is_between_those_of_the_middles_of_frames(hop: int) -> None:
    hift = only_first_harmonic(small(HiftGenerator, TINY))
    hift.hop = hop
    f0 = torch.tensor([[100.0, 200.0, 50.0]])
    middles = (f0 / 24000 * hop).cumsum(dim=1) * 2 * math.pi
    expected = F.interpolate(middles[None], scale_factor=hop, mode="linear")[0].sin()
    torch.testing.assert_close(hift._sines(f0), expected, rtol=0, atol=1e-5)


def test_one_normal_per_sample_is_as_the_official_normal_per_harmonic() -> None:
    hift = small(HiftGenerator, TINY)
    num_samples = 200 * HOP
    ours = hift.draw_noise(torch.Generator().manual_seed(0), 200)
    official = hift.m_source.weigh(official_draws(torch.Generator().manual_seed(0), num_samples, 9))
    assert ours.shape == official.shape == (num_samples,)
    near = 4 * official.std() / num_samples**0.5  # four standard errors
    assert abs(ours.mean()) < near and abs(ours.std() - official.std()) < near
    quantiles = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
    torch.testing.assert_close(ours.quantile(quantiles), official.quantile(quantiles), rtol=0, atol=6 * float(near))


def test_a_causal_voice_holds_its_phase_for_a_frame_and_hands_it_on() -> None:
    hift = only_first_harmonic(small(CausalHiftGenerator, TINY_CAUSAL))
    start = torch.full((1, 9), 0.25, dtype=torch.float64)
    (wave,), phase = hift.source(torch.full((1, 25), 100.0), start, torch.zeros(1, 25 * HOP, 9))
    angle = 2 * math.pi * (0.25 + 100 * (torch.arange(25 * HOP) // HOP + 1) * HOP / 24000)
    torch.testing.assert_close(wave, torch.tanh(0.1 * torch.sin(angle)), rtol=0, atol=1e-4)
    torch.testing.assert_close(phase, start, rtol=0, atol=1e-4)  # 50 whole turns


def test_spectrum_and_inverse_are_the_fourier_transforms_of_numpy() -> None:
    hift, n_fft, hop = small(HiftGenerator, TINY), TINY.istft_n_fft, TINY.istft_hop_len
    source = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    padded = np.pad(source[0].numpy(), n_fft // 2, mode="reflect")
    frames = [np.fft.rfft(padded[start : start + n_fft] * window) for start in range(0, 40 + 1, hop)]
    bands = np.stack(frames, axis=1)
    torch.testing.assert_close(
        hift.spectrum(source)[0], torch.from_numpy(np.concatenate((bands.real, bands.imag))).float(), rtol=0, atol=1e-5
    )
    magnitude = np.abs(bands).clip(max=100.0)
    angle = np.random.default_rng(0).normal(size=bands.shape)
    given = torch.from_numpy(np.concatenate((np.log(magnitude), angle)))[None].float()
    wave, weight = np.zeros(padded.shape), np.zeros(padded.shape)
    for index in range(bands.shape[1]):
        piece = np.fft.irfft(magnitude[:, index] * np.exp(1j * np.sin(angle[:, index])), n_fft)
        wave[index * hop : index * hop + n_fft] += piece * window
        weight[index * hop : index * hop + n_fft] += window**2
    inner = slice(n_fft // 2, -n_fft // 2)
    expected = torch.from_numpy(wave[inner] / weight[inner]).float()
    torch.testing.assert_close(hift._inverse(given)[0], expected, rtol=0, atol=1e-4)


def test_chunks_are_cross_faded_with_what_was_held_back() -> None:
    hift = small(HiftGenerator, TINY)
    mel, generator = torch.randn(1, 80, 50), torch.Generator().manual_seed(0)
    _, (held,) = hift.stream(mel, [hift.empty_cache()], [generator], last=False)
    noise = hift.draw_noise(generator.clone_state(), 58)[None]
    raw, _ = hift(torch.cat((held.mel[None], mel), dim=2), noise, held.source[None])

    (wave,), _ = hift.stream(mel, [held], [generator], last=False)

    hamming = torch.from_numpy(np.hamming(2 * 8 * HOP))
    faded = raw[0, : 8 * HOP] * hamming[: 8 * HOP] + held.speech * hamming[8 * HOP :]
    torch.testing.assert_close(wave, torch.cat((faded.float(), raw[0, 8 * HOP : -8 * HOP])))


@pytest.mark.parametrize(("kind", "config"), [(HiftGenerator, TINY), (CausalHiftGenerator, TINY_CAUSAL)])
def test_a_batch_gives_what_each_session_gives_alone(kind: Any, config: HiftConfig) -> None:
    hift, source = small(kind, config), torch.Generator().manual_seed(0)

    def speak(rows: list[int]) -> list[Tensor]:
        caches, generators = [hift.empty_cache() for _ in rows], [torch.Generator().manual_seed(row) for row in rows]
        waves: list[list[Tensor]] = [[] for _ in rows]
        for number, mel in enumerate(mels):
            chunk, caches = hift.stream(mel[rows], caches, generators, last=number == 2)
            for wave, piece in zip(waves, chunk, strict=True):
                wave.append(piece)
        return [torch.cat(wave) for wave in waves]

    mels = [torch.randn(3, 80, frames, generator=source) for frames in (50, 50, 20)]
    together = speak([0, 1, 2])
    for row in range(3):
        torch.testing.assert_close(together[row], speak([row])[0], rtol=0, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(9, 60), min_size=1, max_size=4))
def test_causal_speech_does_not_depend_on_the_chunks(cuts: list[int]) -> None:
    with torch.inference_mode():
        hift = silence_noise(small(CausalHiftGenerator, TINY_CAUSAL))
        mel = torch.randn(1, 80, sum(cuts), generator=torch.Generator().manual_seed(1))
        (whole,), _ = hift.stream(mel, [hift.empty_cache()], [torch.Generator()], last=True)
        cache, pieces = hift.empty_cache(), []
        for number, part in enumerate(mel.split(cuts, dim=2)):
            last = number == len(cuts) - 1
            (piece,), (cache,) = hift.stream(part, [cache], [torch.Generator()], last)
            pieces.append(piece)
            assert cache.mel.shape[1] <= hift.num_history + hift.delay_frames
    streamed = torch.cat(pieces)
    torch.testing.assert_close(streamed[streamed.shape[0] - whole.shape[0] :], whole, rtol=0, atol=1e-5)


def test_the_standard_stream_holds_back_160_ms_and_gives_them_with_the_last_chunk() -> None:
    hift = small(HiftGenerator, TINY)
    cache, generator = hift.empty_cache(), torch.Generator().manual_seed(0)
    mel = torch.randn(1, 80, 50, generator=generator)
    (first,), (cache,) = hift.stream(mel, [cache], [generator], last=False)
    (second,), (cache,) = hift.stream(mel, [cache], [generator], last=False)
    (third,), _ = hift.stream(mel[..., :10], [cache], [generator], last=True)
    assert [len(wave) for wave in (first, second, third)] == [24000, 24000, 10 * HOP + 8 * HOP]
    assert first[: 8 * HOP].eq(0).all()
    assert first[8 * HOP :].ne(0).any()


def test_other_rates_than_the_released_ones_fit() -> None:
    config = HiftConfig(
        base_channels=16,
        f0_cond_channels=8,
        upsample_rates=(4, 5),
        upsample_kernel_sizes=(8, 11),
        istft_n_fft=96,
        istft_hop_len=24,
        source_resblock_kernel_sizes=(7, 7),
        source_resblock_dilation_sizes=((1, 3), (1, 3)),
        resblock_kernel_sizes=(3, 7),
        resblock_dilation_sizes=((1, 3), (1, 3)),
    )
    hift, generator = HiftGenerator(config).eval(), torch.Generator().manual_seed(0)
    (wave,), _ = hift.stream(torch.randn(1, 80, 12), [hift.empty_cache()], [generator], last=True)
    assert wave.shape == (12 * HOP,)


def test_released_sizes() -> None:
    with torch.device("meta"):
        standard, causal = HiftGenerator(HiftConfig()), CausalHiftGenerator(HiftConfig(causal=True))
    assert (standard.hop, standard.overlap) == (480, 3840)
    assert (causal.num_history, causal.delay_frames) == (31, 8)
    assert 20e6 < sum(parameter.numel() for parameter in standard.parameters()) < 21e6


@pytest.mark.parametrize(("kind", "config"), [(HiftGenerator, TINY), (CausalHiftGenerator, TINY_CAUSAL)])
def test_a_frozen_net_gives_the_same_bands_for_any_sizes(kind: Any, config: HiftConfig) -> None:
    stock, ours = small(kind, config), small(kind, config)
    fold(ours)
    freeze_net(ours, torch.float32)
    for num_sessions, num_frames in ((1, 3), (2, 20), (5, 58)):
        hidden = torch.randn(num_sessions, 32, num_frames)
        spectrum = torch.randn(num_sessions, config.istft_n_fft + 2, num_frames * HOP // config.istft_hop_len + 1)
        torch.testing.assert_close(ours._net(hidden, spectrum), stock.bands(hidden, spectrum), rtol=1e-4, atol=1e-5)


def test_a_net_in_bfloat16_stays_forty_decibels_from_the_exact_one() -> None:
    exact, ours = small(HiftGenerator, TINY), small(HiftGenerator, TINY)
    fold(ours)
    freeze_net(ours, torch.bfloat16)
    mel, noise = torch.randn(2, 80, 58) - 3, torch.randn(2, 58 * HOP) * 0.1
    (reference, _), (wave, _) = exact(mel, noise), ours(mel, noise)
    assert 10 * torch.log10(reference.square().mean() / (wave - reference).square().mean()) > 38
