"""Pictures of a film as a player shows them: in their true aspect and colours, over black, turned upright, as RGB."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from fractions import Fraction
from typing import Final, cast

import numpy as np
import numpy.typing as npt
from av.buffer import Buffer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from stages.media.wire import MediaError

MAX_SIDE: Final = 65_535  # of a JPEG; a panorama is as wide
MAX_PICTURE_PIXELS: Final = 1 << 26  # 64 Mpixel, twice 8K
MAX_PIXEL_ASPECT: Final = 8  # films are squeezed by 2 at most; beyond this a header is wrong

# By the numbers of H.273, which libav's frames carry; the others (and "unspecified") are guessed by size.
_MATRICES: Final = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}


class Scaler:
    """Pictures to RGB of at most max_pixels: as a player shows them, with even sizes.

    is_exact: the same bytes on every CPU, as a file's digests promise, at twice the cost.
    """

    def __init__(self, max_pixels: int, *, is_exact: bool = True) -> None:
        self._max_pixels = max_pixels
        exactly = Interpolation.BITEXACT if is_exact else 0
        self._how = int(Interpolation.BICUBIC | Interpolation.ACCURATE_RND | exactly)
        self._reformatter = VideoReformatter()

    def to_rgb(self, picture: VideoFrame, pixel_aspect: Fraction | None = None) -> npt.NDArray[np.uint8]:
        """uint8 [H, W, 3]; MediaError "limit" for a picture which nobody filmed.

        pixel_aspect: width of a pixel by its height, where the container or codec says so.
        """
        check_size(picture.width, picture.height)
        shown = shown_size(picture.width, picture.height, _sane_aspect(pixel_aspect))
        has_alpha = any(component.is_alpha for component in picture.format.components)
        rgb = self._reformatter.reformat(
            picture,
            *scaled_size(*shown, self._max_pixels),
            "rgba" if has_alpha else "rgb24",
            src_colorspace=_matrix_of(picture),
            dst_color_range=ColorRange.JPEG,
            interpolation=self._how,
            threads=1,
        )
        image = np.asarray(rgb.to_ndarray(), np.uint8)
        return np.ascontiguousarray(turned(over_black(image) if has_alpha else image, _display_matrix(picture)))


class PixelAspect:
    """Of a film's pixels, as players take it: the container's word, until the codec changes its own in mid stream."""

    def __init__(self, stream: VideoStream) -> None:
        self._codec = stream.codec_context
        self._shown = stream.sample_aspect_ratio
        self._coded: Fraction | None = None
        self._has_begun = False

    def now(self) -> Fraction | None:
        """Of the picture that was decoded last; None: nobody says it."""
        coded = self._codec.sample_aspect_ratio
        if self._has_begun and coded and coded != self._coded:
            self._shown = coded
        self._coded, self._has_begun = coded or self._coded, True
        return self._shown


def _sane_aspect(aspect: Fraction | None) -> Fraction:
    if aspect is None or not Fraction(1, MAX_PIXEL_ASPECT) <= aspect <= MAX_PIXEL_ASPECT:
        return Fraction(1)
    return aspect


def _matrix_of(picture: VideoFrame) -> Colorspace | None:
    """Of YUV pictures; those which don't say theirs are taken as players take them: BT.709 from 720 lines on."""
    if picture.format.is_rgb:
        return None
    is_hd = picture.width >= 1280 or picture.height > 576
    return _MATRICES.get(picture.colorspace, Colorspace.ITU709 if is_hd else Colorspace.ITU601)


def over_black(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """RGBA [H, W, 4] with straight alpha, laid over black: RGB [H, W, 3]."""
    return (image[..., :3].astype(np.uint16) * image[..., 3:] // 255).astype(np.uint8)


def _display_matrix(picture: VideoFrame) -> tuple[int, int, int, int]:
    """a, b, c, d of x' = ax + cy, y' = bx + dy: how the container wants the picture shown."""
    side_data = cast(Mapping[str, Buffer], picture.side_data)  # PyAV's stubs know of one kind only
    try:
        a, b, _, c, d, *_ = struct.unpack("=9i", bytes(side_data["DISPLAYMATRIX"]))
    except KeyError:
        return 1, 0, 0, 1
    return a, b, c, d


def turned(image: npt.NDArray[np.uint8], matrix: tuple[int, int, int, int]) -> npt.NDArray[np.uint8]:
    """The picture turned and mirrored by a display matrix; angles between are taken for the nearest right one."""
    a, b, c, d = matrix
    is_upright = abs(a) >= abs(b)
    across, down = (a, d) if is_upright else (c, b)
    image = image if is_upright else image.transpose(1, 0, 2)
    image = image[:, ::-1] if across < 0 else image
    return image[::-1] if down < 0 else image


def check_size(width: int, height: int) -> None:
    """MediaError "limit" for a picture which nobody filmed."""
    if limit := broken_limit(width, height):
        raise MediaError("limit", f"has pictures of {width}x{height}; {limit}")


def broken_limit(width: int, height: int) -> str:
    """Which limit a picture of this size breaks, as the end of a sentence; "" for one which is read."""
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        return f"sides of 1 to {MAX_SIDE} pixels are read"
    if width * height > MAX_PICTURE_PIXELS:
        return f"at most {MAX_PICTURE_PIXELS >> 20} Mi pixels are read"
    return ""


def shown_size(width: int, height: int, pixel_aspect: Fraction) -> tuple[int, int]:
    """Width and height in square pixels; players stretch, and never squeeze."""
    if pixel_aspect >= 1:
        return round(width * pixel_aspect), height
    return width, round(height / pixel_aspect)


def scaled_size(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Even width and height, at least 2, with the same aspect and at most max_pixels."""
    scale = min(1.0, (max_pixels / (width * height)) ** 0.5)
    short = max(2, int(min(width, height) * scale) // 2 * 2)
    long = max(2, min(int(max(width, height) * scale), max_pixels // short) // 2 * 2)
    return (long, short) if width >= height else (short, long)
