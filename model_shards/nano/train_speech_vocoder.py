"""Nano's HiFT: from true mel to the teacher's wave."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model_shards.config import HiftConfig
from model_shards.hift import HiftGenerator
from model_shards.nano.speech_data import FRAME_SAMPLES, Corpus, corpus_beside, nano_mel
from model_shards.nano.speech_sizes import HIFT
from model_shards.nano.training import Schedule, Training

RESOLUTIONS: Final = ((256, 64), (512, 128), (1200, 240), (2048, 480))  # samples of the window, and of the hop

_BATCH: Final = 8
_FRAMES: Final = 30
_QUIET: Final = -3.0  # logarithm of the first magnitudes, so that training begins near silence
_F0_HZ: Final = 100.0  # what the last layer's outputs are multiplied with at first
_SEED: Final = 21


def new_hift(config: HiftConfig = HIFT) -> HiftGenerator:
    """An untrained HiFT which begins near silence and with pitches of the right size."""
    torch.manual_seed(_SEED)
    hift = HiftGenerator(config)
    with torch.no_grad():
        hift.conv_post.bias[: config.istft_n_fft // 2 + 1] = _QUIET
        hift.f0_predictor.classifier.weight.mul_(_F0_HZ)
    return hift


def train(folder: Path, minutes: float) -> None:
    """Goes on with the training in `folder`; see `speech_data.corpus_beside` for what it learns from."""
    corpus = corpus_beside(folder)
    schedule = Schedule(minutes=minutes, rate=2e-3, betas=(0.8, 0.99), weight_decay=0.01, clip=5.0, average=0.995)
    training = Training(folder, new_hift(), schedule)
    hift = training.module
    assert isinstance(hift, HiftGenerator)

    def loss(step: int, passed: float) -> tuple[Tensor, Mapping[str, float]]:
        mel, f0, wave = draw_pieces(corpus, np.random.default_rng((_SEED, step)))
        return vocoder_loss(hift, mel, f0, wave)

    training.run(loss)


def draw_pieces(corpus: Corpus, random: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """mel (batch, 80, frames), f0 (batch, frames) in Hz and wave (batch, samples) of the same random places."""
    starts = random.integers(0, len(corpus.f0) - _FRAMES, _BATCH)
    mel = np.stack([corpus.mel[start : start + _FRAMES] for start in starts]).astype(np.float32)
    f0 = np.stack([corpus.f0[start : start + _FRAMES] for start in starts]).astype(np.float32)
    pieces = [corpus.wave[start * FRAME_SAMPLES : (start + _FRAMES) * FRAME_SAMPLES] for start in starts]
    wave = np.stack(pieces).astype(np.float32) / 32768
    return torch.from_numpy(mel).transpose(1, 2), torch.from_numpy(f0), torch.from_numpy(wave)


def vocoder_loss(hift: HiftGenerator, mel: Tensor, f0: Tensor, wave: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The wave is made with the true pitch; the predictor learns it beside. L1 of the pitch in 100 Hz has its least
    where a frame without voice is given exactly none."""
    noise = torch.randn(*wave.shape, hift.config.nb_harmonics + 1)
    made = hift.decode(mel, hift.source(f0, hift.m_source.weigh(noise)))
    spectral = sum((spectral_loss(made, wave, *size) for size in RESOLUTIONS), torch.zeros(())) / len(RESOLUTIONS)
    mel_l1 = F.l1_loss(nano_mel(made.flatten()), nano_mel(wave.flatten()))
    pitch = F.l1_loss(hift.f0_predictor(mel) / 100, f0 / 100)
    numbers = {"spectral": float(spectral.detach()), "mel": float(mel_l1.detach()), "pitch": float(pitch.detach())}
    return spectral + 2 * mel_l1 + pitch, numbers


def spectral_loss(made: Tensor, wave: Tensor, window: int, hop: int) -> Tensor:
    """Spectral convergence, and L1 of the logarithms, of magnitudes."""
    ours, true = (_magnitudes(samples, window, hop) for samples in (made, wave))
    convergence: Tensor = torch.linalg.vector_norm(true - ours) / torch.linalg.vector_norm(true)
    return convergence + F.l1_loss(ours.log(), true.log())


def _magnitudes(samples: Tensor, window: int, hop: int) -> Tensor:
    bands = torch.stft(samples, window, hop, window=torch.hann_window(window), return_complex=True)
    magnitudes: Tensor = (torch.view_as_real(bands).square().sum(-1) + 1e-7).sqrt()
    return magnitudes
