"""Log-mel spectrograms as the audio encoder knows them: of a whole clip, and of a stream, second by second.

Rule: a frame's level depends on the clamp, and the clamp is an argument. Nothing here remembers which clamp an earlier
clip had (the official extractor does, so that a reference voice sounds different after a session: pass `FIXED` to get
that result).

The streaming numbers are those of recomputing the whole buffer at each push, as the official code does; what is really
computed are the new frames, the two frames at each edge (reflected samples), and the loudest bin of the buffer.

Source: MiniCPM-o 4.5 `processing_minicpmo.py` (MiniCPMAAudioProcessor, StreamingMelProcessorExact) and the audio buffer
of `DuplexCapability.streaming_prefill`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from model_shards.errors import ModelError

Samples = npt.NDArray[np.float32]

RATE_HZ = 16000
N_FFT = 400
HOP = 160
N_MELS = 80
HALF_WINDOW = N_FFT // 2
OFFLINE_PIECE_SAMPLES = 30 * RATE_HZ
DYNAMIC_RANGE = 8.0  # log10 units below the loudest bin
DYNAMIC_FROM_SAMPLES = 5 * RATE_HZ  # a shorter streaming buffer has a fixed floor


class Clamp(Enum):
    """What bounds a log-mel from below, before it is scaled."""

    DYNAMIC = "dynamic"  # 8 below the loudest bin of the clip or buffer
    FIXED = "fixed"  # -10, which the 1e-10 under the logarithm keeps already: no bound


def mel_filters(num_mels: int = N_MELS) -> Tensor:
    """Triangular filters on Slaney's mel scale, each of unit area: [201, num_mels] float32, from 0 to 8000 Hz.

    Slaney's scale is linear (200/3 Hz per mel) up to 1000 Hz and logarithmic (27 mels per factor 6.4) above.
    """
    break_mel = 1000.0 / (200.0 / 3.0)
    top_mel = break_mel + 27.0 * math.log(RATE_HZ / 2 / 1000.0) / math.log(6.4)
    mels = np.linspace(0.0, top_mel, num_mels + 2)
    edges_hz = np.where(mels < break_mel, mels * 200.0 / 3.0, 1000.0 * 6.4 ** ((mels - break_mel) / 27.0))
    bins_hz = np.linspace(0.0, RATE_HZ / 2, N_FFT // 2 + 1)[:, None]
    low, mid, high = edges_hz[:-2], edges_hz[1:-1], edges_hz[2:]
    triangles = np.minimum((bins_hz - low) / (mid - low), (high - bins_hz) / (high - mid))
    return torch.from_numpy(np.maximum(0.0, triangles) * 2.0 / (high - low)).to(torch.float32)


def num_frames(num_samples: int) -> int:
    """Frames of a clip: one per whole hop. The frame t is centred on sample 160 t."""
    return num_samples // HOP


def log_mel(samples: Samples, filters: Tensor, first: int = 0) -> Tensor:
    """Unclamped log10 mel power of frames `first` … of a clip, its edges reflected.

    samples: [n] float32 at 16 kHz, n >= 400.
    returns: [mels of the filters, n // 160 - first] float32, at least -10.
    """
    start = first * HOP - HALF_WINDOW
    left = 0 if start >= 0 else HALF_WINDOW
    tail = torch.from_numpy(samples[max(0, start) :])
    padded = F.pad(tail[None], (left, HALF_WINDOW), mode="reflect")[0, first * HOP if left else 0 :]
    spectrum = torch.stft(padded, N_FFT, HOP, window=torch.hann_window(N_FFT), center=False, return_complex=True)
    power = spectrum[:, :-1].abs() ** 2
    return (filters.T @ power).clamp(min=1e-10).log10()


def scale_mel(log_mel: Tensor, peak: float | None) -> Tensor:
    """Clamp to 8 below `peak` (not at all where it is None) and scale as Whisper does."""
    clamped = log_mel if peak is None else log_mel.clamp(min=peak - DYNAMIC_RANGE)
    return (clamped + 4.0) / 4.0


def offline_mel(clips: Sequence[Samples], clamp: Clamp = Clamp.DYNAMIC) -> tuple[Tensor, list[int]]:
    """Mel of whole clips; what is longer than 30 s becomes several pieces of at most 30 s.

    clips:   [n] float32 at 16 kHz each.
    returns: [pieces, 80, max frames] float32, zeros after each piece's end, and the frames per piece (ceil(n / 160)).

    Every piece is padded with silence to 30 s before the transform, and the loudest bin is that of the 30 s.
    Source: `process_audio_batch`.
    """
    filters = mel_filters()
    lens: list[int] = []
    mels: list[Tensor] = []
    for clip in clips:
        _check(clip)
        for start in range(0, max(1, len(clip)), OFFLINE_PIECE_SAMPLES):
            piece = clip[start : start + OFFLINE_PIECE_SAMPLES]
            raw = log_mel(np.pad(piece, (0, OFFLINE_PIECE_SAMPLES - len(piece))), filters)
            lens.append(-(-len(piece) // HOP))
            mels.append(scale_mel(raw, float(raw.max()) if clamp is Clamp.DYNAMIC else None)[:, : lens[-1]])
    if not mels:
        return torch.zeros(0, N_MELS, 0), []
    return torch.stack([F.pad(mel, (0, max(lens) - mel.shape[1])) for mel in mels]), lens


@dataclass(frozen=True, slots=True)
class MelSettings:
    """How a stream is cut. The defaults are those of a duplex session; `FIRST_CHUNK_MS` 1035, redundancy 20 ms."""

    chunk_samples: int = 16000
    first_chunk_samples: int = 16560  # rounded down to whole hops when taken
    redundancy_frames: int = 2
    slide_trigger_samples: int = 30 * RATE_HZ
    slide_stride_samples: int = 10 * RATE_HZ

    def __post_init__(self) -> None:
        if self.slide_stride_samples % HOP or self.slide_stride_samples + RATE_HZ > self.slide_trigger_samples:
            raise ModelError(
                f"mel: a stride of {self.slide_stride_samples} samples must be whole hops of {HOP} and leave 1 s "
                f"of a buffer of {self.slide_trigger_samples}"
            )


@dataclass(frozen=True, slots=True)
class MelChunk:
    """The frames of one unit, with the neighbours which the convolutions need.

    frames: [80, prefix_extra + core + suffix_extra] float32. `first_frame` is the number of frames[:, 0] since the
    start of the stream; the frame t is centred on sample 160 t (the zeros put before the first unit included).
    """

    frames: Tensor
    first_frame: int
    prefix_extra: int
    suffix_extra: int


@dataclass(frozen=True, slots=True)
class MelSnapshot:
    """Everything a stream remembers, as plain arrays and numbers (at most 2 MB)."""

    buffer: Samples  # what the transform sees
    pending: Samples  # pushed, not yet taken
    peaks: Samples  # loudest log-mel bin of each frame of the buffer whose right side is known
    base_frame: int  # frames dropped on the left
    core_end: int  # first frame that no chunk had in its core
    started: bool


class StreamingMel:
    """The mel of one stream. `push` is the duplex rule; `process` is one step of it with pieces of any size."""

    def __init__(self, settings: MelSettings | None = None) -> None:
        self.settings = settings or MelSettings()
        self._filters = mel_filters()
        nothing = np.zeros(0, dtype=np.float32)
        self.restore(MelSnapshot(nothing, nothing, nothing, base_frame=0, core_end=0, started=False))

    def snapshot(self) -> MelSnapshot:
        """The state now; later pushes don't change it."""
        return self._state

    def restore(self, snapshot: MelSnapshot) -> None:
        """Go on from `snapshot`, which must come from a stream with the same settings."""
        self._state = snapshot

    def push(self, samples: Samples, max_chunks: int | None = None) -> list[MelChunk]:
        """Add one unit's samples ([n] float32, 16 kHz) and take every chunk that is complete.

        The first push is filled up with zeros on its left. Samples that don't fill a chunk wait for the next push, and
        so do those beyond `max_chunks` (the official session takes one chunk per unit, so that a client which sends too
        much falls behind for ever: 1 gives its numbers, None catches up and keeps less than one chunk waiting).
        """
        _check(samples)
        if len(samples) == 0:
            return []
        pending = np.concatenate([self._state.pending, samples])
        if not self._state.started:
            pending = np.pad(pending, (max(0, self.settings.first_chunk_samples - len(pending)), 0))
        chunks: list[MelChunk] = []
        while len(pending) >= self.chunk_size() and (max_chunks is None or len(chunks) < max_chunks):
            size = self.chunk_size()
            chunks += self.process(pending[:size])
            pending = pending[size:]
        self._state = replace(self._state, pending=pending)
        return chunks

    def chunk_size(self) -> int:
        """How many samples the next chunk takes."""
        if self._state.started:
            return self.settings.chunk_samples
        return max(HOP, self.settings.first_chunk_samples // HOP * HOP)

    def process(self, piece: Samples, last: bool = False) -> list[MelChunk]:
        """Add a piece to the buffer and give the next chunk, if its frames are stable (or `last` gives what there is).

        At most one chunk comes, however long the piece is. Each call slides the buffer at most once.
        """
        _check(piece)
        self._state = replace(self._state, buffer=np.concatenate([self._state.buffer, piece]), started=True)
        self._slide()
        state, redundancy = self._state, self.settings.redundancy_frames
        core_start = state.core_end
        core_end = core_start + self.settings.chunk_samples // HOP
        stable = state.base_frame + _num_stable(len(state.buffer))
        mel, mel_start = self._extract(core_start - redundancy)
        if mel.shape[1] == 0 or not (last or stable >= core_end + redundancy):
            return []
        self._state = replace(self._state, core_end=core_end)
        frames = mel[:, : max(0, core_end + redundancy - mel_start)].clone()
        end = mel_start + frames.shape[1]
        return [MelChunk(frames, mel_start, max(0, core_start - mel_start), max(0, end - core_end))]

    def flush(self) -> list[MelChunk]:
        """End the stream: every frame that was in no chunk's core, up to the right edge, without overlap."""
        whole = np.concatenate([self._state.buffer, self._state.pending])
        self._state = replace(self._state, buffer=whole, pending=whole[:0])
        mel, mel_start = self._extract(self._state.core_end)
        self._state = replace(self._state, core_end=mel_start + mel.shape[1])
        return [MelChunk(mel, mel_start, 0, 0)] if mel.shape[1] else []

    def _extract(self, first_frame: int) -> tuple[Tensor, int]:
        """Scaled mel from `first_frame` (of the stream) to the end of the buffer, and the frame where it starts."""
        state = self._state
        total = num_frames(len(state.buffer))
        start = min(max(0, first_frame - state.base_frame), total)
        if len(state.buffer) < N_FFT:
            return torch.zeros(N_MELS, 0), state.base_frame + start
        first = min(start, len(state.peaks))
        raw = log_mel(state.buffer, self._filters, first)
        peaks = np.concatenate([state.peaks[:first], raw.amax(dim=0).numpy()])
        self._state = replace(self._state, peaks=peaks[: _num_stable(len(state.buffer))])
        peak = float(peaks.max()) if len(state.buffer) >= DYNAMIC_FROM_SAMPLES else None
        return scale_mel(raw[:, start - first :], peak), state.base_frame + start

    def _slide(self) -> None:
        """Forget the oldest 10 s once there are 30, and reflect the new left edge.

        The peaks of the two frames at that edge change with it, and count for the clamp.
        """
        state, stride = self._state, self.settings.slide_stride_samples
        if len(state.buffer) < self.settings.slide_trigger_samples:
            return
        buffer = state.buffer[stride:].copy()
        peaks = state.peaks[stride // HOP :].copy()
        edge = min(len(peaks), -(-HALF_WINDOW // HOP))
        peaks[:edge] = log_mel(buffer[: N_FFT + HOP * edge], self._filters).amax(dim=0).numpy()[:edge]
        self._state = replace(self._state, buffer=buffer, peaks=peaks, base_frame=state.base_frame + stride // HOP)


def _num_stable(num_samples: int) -> int:
    """Frames whose whole window is known: reflected samples on the right will not change them any more."""
    if num_samples < HALF_WINDOW:
        return 0
    return min(num_frames(num_samples), (num_samples - HALF_WINDOW) // HOP + 1)


def _check(samples: Samples) -> None:
    if samples.ndim != 1 or samples.dtype != np.float32:
        raise ModelError(f"mel: expected samples [n] float32, got {list(samples.shape)} {samples.dtype}")
    if not np.isfinite(samples).all():
        raise ModelError("mel: a sample is not a finite number; it would silence the 30 s around it")
