"""A voice from a recording of speech: its codes, its mel, and who speaks.

The codes come from the speech tokenizer and the speaker from CAM++, both ONNX files of a released checkpoint, computed
by onnxruntime on the CPU. It is an extra (`pip install 'omni-pipeline[voice]'`), needed to make a voice, not to use it.

Source: minicpmo-utils 1.0.5, `stepaudio2` (`Token2wav._prepare_prompt`); Kaldi's `compute-fbank-feats`;
reference/minicpmo-4.5.md §6.2.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model_shards.checkpoint import VOCODER_FOLDER
from model_shards.errors import DependencyError, ModelError
from model_shards.mel import RATE_HZ, log_mel, mel_filters, scale_mel
from model_shards.vocoder import Voice, mel_spectrogram

TOKENIZER_FILE = VOCODER_FOLDER / "speech_tokenizer_v2_25hz.onnx"
SPEAKER_FILE = VOCODER_FOLDER / "campplus.onnx"
MIN_SPEECH_S = 1.0
MAX_SPEECH_S = 17.0  # more does not fit the official vocoder's buffers

FBANK_BINS = 80
FRAME_SAMPLES = 400  # 25 ms
FRAME_HOP = 160
FRAME_FFT = 512
LOWEST_HZ = 20.0
PREEMPHASIS = 0.97
_TOKENIZER_MELS = 128
_FRAMES_PER_CODE = 2


def make_voice(checkpoint: Path, speech: Tensor, speech_24k: Tensor) -> Voice:
    """How a session sounds which shall speak as a recording does.

    speech, speech_24k: the same recording, (samples,) float32 in [-1, 1], at 16 kHz and at 24 kHz.
    Raises DependencyError without onnxruntime, ModelError when the checkpoint's ONNX files are missing or damaged, or
    the recording is too short or too long.
    """
    seconds = speech.shape[0] / RATE_HZ
    if not MIN_SPEECH_S <= seconds <= MAX_SPEECH_S:
        raise ModelError(f"{seconds:.1f} s of speech; a voice is made from {MIN_SPEECH_S:g} to {MAX_SPEECH_S:g} s")
    tokenizer, speaker = _open(checkpoint, TOKENIZER_FILE), _open(checkpoint, SPEAKER_FILE)
    codes = speech_codes(tokenizer, speech)
    mel = fit_frames(mel_spectrogram(speech_24k), _FRAMES_PER_CODE * codes.shape[0])
    return Voice(codes, mel[None], speaker_embedding(speaker, speech))


def speech_codes(tokenizer: Any, speech: Tensor) -> Tensor:
    """Codes of speech, 25 a second: (N,) int32. tokenizer: an onnxruntime session of the speech tokenizer."""
    raw = log_mel(speech.numpy(), mel_filters(_TOKENIZER_MELS))
    mel = scale_mel(raw, float(raw.max()))[None]
    codes = _run(tokenizer, mel.numpy(), np.array([mel.shape[2]], dtype=np.int32))
    return torch.from_numpy(codes.astype(np.int32).reshape(-1))


def speaker_embedding(speaker: Any, speech: Tensor) -> Tensor:
    """Who speaks: (1, 192) float32. speaker: an onnxruntime session of CAM++."""
    features = fbank(speech)
    features = features - features.mean(dim=0, keepdim=True)
    return torch.from_numpy(_run(speaker, features[None].numpy()).astype(np.float32).reshape(1, -1))


def fit_frames(mel: Tensor, num_frames: int) -> Tensor:
    """Cut a mel, (frames, mels), to `num_frames`, or repeat its last frame."""
    lacking = max(0, num_frames - mel.shape[0])
    return F.pad(mel.T[None], (0, lacking), mode="replicate")[0].T[:num_frames].contiguous()


def fbank(samples: Tensor) -> Tensor:
    """Log mel energies as Kaldi has them, without dither: (samples,) at 16 kHz as (frames, 80), 100 frames a second.

    The signal must hold one frame, 400 samples; frames that would reach beyond its end are left out.
    """
    frames = samples.unfold(0, FRAME_SAMPLES, FRAME_HOP)
    frames = frames - frames.mean(dim=1, keepdim=True)
    frames = frames - PREEMPHASIS * torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
    window = torch.hann_window(FRAME_SAMPLES, periodic=False).pow(0.85)  # Povey's
    power = torch.fft.rfft(frames * window, n=FRAME_FFT).abs().square()
    energies: Tensor = power @ _fbank_filters()
    return energies.clamp(min=torch.finfo(torch.float32).eps).log()


def _fbank_filters() -> Tensor:
    """Triangles on Kaldi's mel scale, of height 1 and straight in mel: (257, 80), 20 Hz to 8 kHz."""

    def mel(hz: Tensor) -> Tensor:
        return 1127.0 * (1.0 + hz / 700.0).log()

    bins = mel(torch.linspace(0.0, RATE_HZ / 2, FRAME_FFT // 2 + 1, dtype=torch.float64))[:, None]
    low, high = 1127.0 * math.log1p(LOWEST_HZ / 700.0), 1127.0 * math.log1p(RATE_HZ / 2 / 700.0)
    edges = torch.linspace(low, high, FBANK_BINS + 2, dtype=torch.float64)
    left, middle, right = edges[:-2], edges[1:-1], edges[2:]
    return torch.minimum((bins - left) / (middle - left), (right - bins) / (right - middle)).clamp(min=0.0).float()


def _open(checkpoint: Path, name: Path) -> Any:
    """An onnxruntime session."""
    try:
        import onnxruntime
    except ImportError as error:
        raise DependencyError(
            f"a voice is made with onnxruntime, which is not installed ({error}); pip install onnxruntime"
        ) from error
    file = checkpoint / name
    if not file.is_file():
        raise ModelError(f"{file}: no such file; a voice is made with {TOKENIZER_FILE.name} and {SPEAKER_FILE.name}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # as the official package has it
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's errors have no common base
        raise ModelError(f"{file}: not an ONNX file that can be run: {error}") from error


def _run(session: Any, *inputs: Any) -> Any:
    """The first output. Raises ModelError when the graph takes other inputs."""
    names = [port.name for port in session.get_inputs()]
    try:
        return session.run(None, dict(zip(names, inputs, strict=True)))[0]
    except Exception as error:  # the library's errors have no common base
        raise ModelError(f"an ONNX graph with the inputs {', '.join(names)} can't be run: {error}") from error
