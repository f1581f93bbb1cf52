"""Media files for tests, made with PyAV: H.264 and AAC, or what is asked for; and the recorded ones."""

import os
import random
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

MEDIA = Path(os.environ.get("OMNI_MEDIA") or Path(__file__).resolve().parents[2] / "../shared/media").resolve()
RECORDED = MEDIA / "real_20s.mp4"  # H.264 960x540 to be turned upright, AAC: 20 s from a telephone


def recorded_clip() -> Path:
    """A recorded video of 20 s. Skips the test where it is absent."""
    if not RECORDED.is_file():
        pytest.skip(f"{RECORDED} is absent; OMNI_MEDIA names the folder with recorded media")
    return RECORDED


def picture(index: int, width: int, height: int) -> av.VideoFrame:
    """A grey picture which is brighter the later it is: 4 steps per picture."""
    return av.VideoFrame.from_ndarray(np.full((height, width, 3), min(4 * index, 252), np.uint8), "rgb24")


def tone(rate_hz: int, layout: str, seconds: float) -> np.ndarray:
    t = np.arange(int(rate_hz * seconds)) / rate_hz
    return np.tile(np.sin(2 * np.pi * 440 * t).astype(np.float32) * 0.5, (av.AudioLayout(layout).nb_channels, 1))


class Clip:
    """A media file in the making: pictures at given times, a tone from a given time on."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = path
        self._container = av.open(str(path), "w", **options)
        self._packets: list[tuple[str, av.Packet]] = []

    def video(self, times_s: list[float], size: tuple[int, int] = (320, 240), codec: str = "libx264") -> "Clip":
        stream: Any = self._container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 30 if codec == "mpeg4" else 90_000)
        for index, time_s in enumerate(times_s):
            frame = picture(index, *size)
            frame.pts, frame.time_base = round(time_s / stream.codec_context.time_base), stream.codec_context.time_base
            self._packets += [("video", packet) for packet in stream.encode(frame)]
        self._packets += [("video", packet) for packet in stream.encode(None)]
        return self

    def sound(self, seconds: float, rate_hz: int = 48_000, layout: str = "stereo", **how: Any) -> "Clip":
        stream: Any = self._container.add_stream(how.get("codec", "aac"), rate=rate_hz, layout=layout)
        start, hole = int(how.get("start_s", 0) * rate_hz), how.get("hole_s", (1e9, 0.0))
        samples, step = tone(rate_hz, layout, seconds), stream.codec_context.frame_size or 1024
        for at in range(0, samples.shape[1] - step, step):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[:, at : at + step]), "fltp", layout)
            frame.rate, frame.time_base = rate_hz, Fraction(1, rate_hz)
            frame.pts = start + at + (int(hole[1] * rate_hz) if at >= hole[0] * rate_hz else 0)
            self._packets += [("audio", packet) for packet in stream.encode(frame)]
        self._packets += [("audio", packet) for packet in stream.encode(None)]
        return self

    def write(self, *, interleaved: bool = True) -> Path:
        if interleaved:
            self._packets.sort(key=lambda kind_packet: float(kind_packet[1].dts * kind_packet[1].time_base))
        with self._container:
            for _, packet in self._packets:
                (self._container.mux if interleaved else self._container.mux_one)(packet)
        return self.path


def damaged(source: Path, target: Path, hit: Callable[[str, int], bool], seed: int = 0) -> Path:
    """A copy in which the packets that `hit(kind, number)` names are noise; packets are numbered per kind, from 1."""
    noise, numbers = random.Random(seed), Counter[str]()
    with av.open(str(source)) as original, av.open(str(target), "w") as copy:
        streams = {stream.index: copy.add_stream_from_template(stream) for stream in original.streams}
        for packet in original.demux():
            if packet.dts is None:
                continue
            kind = packet.stream.type
            numbers[kind] += 1
            sent = packet
            if hit(kind, numbers[kind]):
                sent = av.Packet(noise.randbytes(packet.size))
                sent.pts, sent.dts, sent.time_base = packet.pts, packet.dts, packet.time_base
                sent.duration = packet.duration
            sent.stream = streams[packet.stream.index]
            copy.mux(sent)
    return target


def times(seconds: float, fps: float = 30) -> list[float]:
    return [index / fps for index in range(int(seconds * fps))]
