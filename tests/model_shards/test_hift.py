"""HiFT, standard and causal: against the official numbers, in pieces against whole, batched against alone."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from model_shards.config import HiftConfig
from model_shards.hift import HiftGenerator
from model_shards.hift_causal import CausalHiftGenerator

PLACES = [Path(__file__).parents[up] / "shared" / "golden" for up in (2, 3)]
GOLDEN = Path(os.environ.get("OMNI_GOLDEN") or next((place for place in PLACES if place.is_dir()), PLACES[0]))
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden data; OMNI_GOLDEN names its folder")

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


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(GOLDEN / "token2wav.safetensors") | load_file(GOLDEN / "cv3.safetensors")


@pytest.fixture(scope="module")
def official() -> HiftGenerator:
    with torch.device("meta"):
        hift = HiftGenerator(TINY)
    weights = load_file(GOLDEN / "token2wav_weights.safetensors")
    own = {key.removeprefix("hift."): value for key, value in weights.items() if key.startswith("hift.")}
    hift.load_state_dict(own, strict=True, assign=True)
    return hift.eval()


@pytest.fixture
def official_causal(tensors: dict[str, Tensor]) -> TableNoise:
    with torch.device("meta"):
        hift = TableNoise(TINY_CAUSAL)
    own = {key.removeprefix("cv3.weight."): value for key, value in tensors.items() if key.startswith("cv3.weight.")}
    hift.load_state_dict(own, strict=True, assign=True)
    hift.table = tensors["cv3.noise_table"][0]
    return hift.eval()


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


@golden
def test_f0_is_the_official_one(official: HiftGenerator, tensors: dict[str, Tensor]) -> None:
    f0 = official.f0_predictor(tensors["off.mel"])
    torch.testing.assert_close(f0, tensors["off.f0"], rtol=1e-4, atol=1e-4)


@golden
def test_decoding_a_given_source_is_official(official: HiftGenerator, tensors: dict[str, Tensor]) -> None:
    mel = tensors["hift.mel"]
    silent = official.decode(mel, torch.zeros(1, mel.shape[2] * HOP))
    torch.testing.assert_close(silent, tensors["hift.decode_zero_source_wav"], rtol=0, atol=1e-4)
    time = torch.arange(30 * HOP, dtype=torch.float64) / 24000
    sine = (0.1 * torch.sin(2 * torch.pi * 180 * time)).float()[None]
    wave = official.decode(tensors["off.mel"][..., :30], sine)
    torch.testing.assert_close(wave, tensors["hift.decode_sine180_wav"], rtol=0, atol=1e-4)


@golden
def test_a_seed_gives_the_official_draws_and_wave(official: HiftGenerator, tensors: dict[str, Tensor]) -> None:
    seed = json.loads((GOLDEN / "token2wav.json").read_text(encoding="utf-8"))["hift_manual_seed"]
    noise = official.draw_noise(torch.Generator().manual_seed(seed), 14)[None]
    torch.testing.assert_close(noise, tensors["hift.draw1.randn_like"], rtol=0, atol=0)
    wave, source = official(tensors["hift.mel"], noise)
    torch.testing.assert_close(source, tensors["hift.source"][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(wave, tensors["hift.wav"], rtol=0, atol=1e-4)


@golden
def test_causal_f0_and_decoding_are_official(official_causal: TableNoise, tensors: dict[str, Tensor]) -> None:
    mel = tensors["cv3.mel"]
    f0 = official_causal.f0_predictor(mel, last=True)
    torch.testing.assert_close(f0, tensors["cv3.f0_full"], rtol=1e-5, atol=1e-4)
    silent = torch.zeros(1, 20 * HOP)
    whole = official_causal.decode(mel[..., :20], silent, last=True)
    torch.testing.assert_close(whole, tensors["cv3.decode_zero_source"], rtol=0, atol=1e-4)
    open_end = official_causal.decode(mel[..., :20], silent, last=False)
    torch.testing.assert_close(open_end, tensors["cv3.decode_zero_source_nofinal"], rtol=0, atol=1e-4)


@golden
@pytest.mark.parametrize("run", ["short", "full"])
def test_causal_stream_is_the_official_one(official_causal: TableNoise, tensors: dict[str, Tensor], run: str) -> None:
    rows = json.loads((GOLDEN / "cv3.json").read_text(encoding="utf-8"))["rows"]
    cache, start, silence = official_causal.empty_cache(), 0, 8 * HOP
    for index, row in enumerate(row for row in rows if row["run"] == run):
        mel = tensors["cv3.mel"][..., start : start + row["frames"]]
        (wave,), (cache,) = official_causal.stream(mel, [cache], [torch.Generator()], row["finalize"])
        assert wave[:silence].eq(0).all()
        torch.testing.assert_close(wave[None, silence:], tensors[f"cv3.{run}.wav{index}"], rtol=0, atol=1e-4)
        assert (cache.mel.shape[1], cache.source.shape[0]) == (row["cache"]["mel"][2], row["cache"]["source"][2])
        start, silence = start + row["frames"], 0


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
