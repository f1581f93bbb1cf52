"""Pictures of a film as a player shows them."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

from stages.media_wire import MediaError

MAX_SIDE: Final = 16_384
MAX_PICTURE_PIXELS: Final = 1 << 26  # 64 Mpixel, twice 8K


class Scaler:
    """Pictures to RGB of at most max_pixels: aspect kept, even sizes, turned upright as the camera was held."""

    # Bit-exact: frames of one file are the same bytes on every CPU.
    HOW = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._reformatter = VideoReformatter()

    def to_rgb(self, picture: VideoFrame) -> npt.NDArray[np.uint8]:
        """MediaError "limit" for a picture which nobody filmed."""
        check_size(picture.width, picture.height)
        width, height = scaled_size(picture.width, picture.height, self._max_pixels)
        rgb = self._reformatter.reformat(picture, width, height, "rgb24", interpolation=int(self.HOW), threads=1)
        image = np.asarray(rgb.to_ndarray(), np.uint8)
        return np.ascontiguousarray(np.rot90(image, picture.rotation // 90))


def check_size(width: int, height: int) -> None:
    """MediaError "limit" for a picture which nobody filmed."""
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= MAX_PICTURE_PIXELS):
        raise MediaError(
            "limit", f"has pictures of {width}x{height}; at most {MAX_PICTURE_PIXELS >> 20} Mpixel are read"
        )


def scaled_size(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Even width and height, at least 2, with the same aspect and at most max_pixels."""
    scale = min(1.0, (max_pixels / (width * height)) ** 0.5)
    short = max(2, int(min(width, height) * scale) // 2 * 2)
    long = max(2, min(int(max(width, height) * scale), max_pixels // short) // 2 * 2)
    return (long, short) if width >= height else (short, long)
