"""Films for benchmarks: H.264 as a camera on a wall gives it, a textured scene with a sensor's noise and two movers.

At 640x360, 15 fps and a keyframe each second that is 0.5 Mbit/s: 26 kB per keyframe, 2.4 kB per picture between.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import av
import numpy as np

NOISE: Final = 9  # of 255
TEXTURE: Final = 60  # of 255, in spots of SPOT pixels
SPOT: Final = 8
MOVER: Final = 80  # pixels wide
STEP: Final = 7  # pixels that it moves per picture


@dataclass(frozen=True, slots=True)
class FilmSpec:
    """keyframe_s: between two keyframes. num_b: B-frames in a row, which most cameras have none of."""

    seconds: int = 20
    keyframe_s: float = 1.0
    fps: int = 15
    width: int = 640
    height: int = 360
    num_b: int = 0


def make_film(path: Path, spec: FilmSpec) -> Path:
    """Encode it; the container is what the name's suffix says."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=spec.fps)
        stream.width, stream.height, stream.pix_fmt = spec.width, spec.height, "yuv420p"
        group = str(round(spec.keyframe_s * spec.fps))
        stream.options = {
            "preset": "veryfast",
            "crf": "26",
            "g": group,
            "keyint_min": group,
            "sc_threshold": "0",
            "bf": str(spec.num_b),
            "threads": "1",
        }
        scene = _Scene(spec.width, spec.height)
        for index in range(spec.seconds * spec.fps):
            container.mux(stream.encode(scene.picture(index)))
        container.mux(stream.encode(None))
    return path


class _Scene:
    def __init__(self, width: int, height: int) -> None:
        self._random = np.random.default_rng(1)
        self._width = width
        spots = self._random.integers(0, TEXTURE, (height // SPOT, width // SPOT, 3), dtype=np.uint8)
        texture = av.VideoFrame.from_ndarray(spots, "rgb24").reformat(width, height, "rgb24").to_ndarray()
        self._still = texture.astype(np.int16) + np.linspace(40, 180, width, dtype=np.int16)[None, :, None]

    def picture(self, index: int) -> av.VideoFrame:
        noise = self._random.integers(-NOISE, NOISE + 1, (*self._still.shape[:2], 1), dtype=np.int16)
        image = self._still + noise
        height, way = len(image) // 4, self._width - MOVER
        x = index * STEP % way
        image[height : 2 * height, x : x + MOVER] = 220
        image[2 * height : 3 * height, way - x : way - x + MOVER] = 30
        return av.VideoFrame.from_ndarray(np.clip(image, 0, 255).astype(np.uint8), "rgb24")
