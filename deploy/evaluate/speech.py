"""Recordings of speech, of any kind that PyAV reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from graph.errors import GraphError

if TYPE_CHECKING:
    from torch import Tensor


class SpeechError(GraphError):
    """A recording can't be read."""


def read_speech(path: Path, rate_hz: int) -> Tensor:
    """A recording as (samples,) float32 in [-1, 1], the mean of its channels. Raises SpeechError."""
    import av
    import numpy as np
    import torch

    if not path.is_file():
        raise SpeechError(f"{path}: no such file")
    resampler = av.AudioResampler(format="fltp", rate=rate_hz)
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise SpeechError(f"{path}: holds no sound")
            frames = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
            frames += resampler.resample(None)
    except av.FFmpegError as error:
        raise SpeechError(f"{path}: not a recording which can be read: {error.strerror}") from error
    # FFmpeg's own way to one channel makes what all channels have in common louder.
    pieces = [frame.to_ndarray().mean(axis=0) for frame in frames] or [np.zeros(0, np.float32)]
    return torch.from_numpy(np.concatenate(pieces).astype(np.float32))
