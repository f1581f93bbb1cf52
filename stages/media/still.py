"""One picture, decoded as viewers show it: by its bytes, upright, over white, as far as it is there."""

from __future__ import annotations

import contextlib
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Final

import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame
from PIL import AvifImagePlugin, Image, ImageFile, TiffImagePlugin, UnidentifiedImageError
from PIL.ExifTags import Base as Tag

from stages.media.colour import from_cmyk, in_srgb
from stages.media.types import PictureType, foreign_type, picture_type, read_head
from stages.media.view import MAX_PICTURE_PIXELS, Scaler, broken_limit, scaled_size, turned

BLOCK_ROWS: Final = 18  # of a JPEG with halved colours: 16, and 2 which are smoothed with the next ones
MAX_JPEG_PIXELS: Final = 4 * MAX_PICTURE_PIXELS  # as telephones take them; 1/64 of it is decoded
MAX_PROCESSOR_S: Final = 15.0  # for one picture; 64 Mpixel of PNG take 2.4
_MOVING: Final[tuple[PictureType, ...]] = ("GIF", "WEBP", "PNG", "AVIF")
_BACKGROUND: Final = "white"  # of see-through pictures: drawings and diagrams are made for paper
# What Pillow raises of bytes which are no such picture; its plugins are not strict about it.
_PICTURE_ERRORS: Final = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    ZeroDivisionError,
    NotImplementedError,
    AttributeError,
    struct.error,
)
# EXIF's orientations as display matrices, see media_view.turned.
_TURNS: Final[dict[int, tuple[int, int, int, int]]] = {
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}

Image.MAX_IMAGE_PIXELS = None  # _check_picture decides, before anything is decoded
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # more buy memory only


class BadPicture(Exception):
    """A picture which can't be read: the rest of a sentence which begins with its name."""


class Undecodable(BadPicture):
    """One whose bytes are damaged: a part of it may be there."""


class PictureReader:
    """Opens pictures by what their bytes say, and makes RGB of at most max_pixels of them; BadPicture if it can't."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._scaler = Scaler(max_pixels)

    @contextlib.contextmanager
    def open(self, path: Path) -> Iterator[Image.Image]:
        """The picture, its header read."""
        with contextlib.ExitStack() as stack:
            with self._guard(), forgiving():  # a damaged note beside the pixels hides no picture
                head = read_head(path)
                kind = picture_type(head)
                if kind is None:
                    raise BadPicture(foreign_type(head) or ("is no picture" if head else "is empty"))
                image = stack.enter_context(Image.open(path, formats=(kind,)))
                self._draft(image)
                _check_picture(image)
            yield image

    def num_pictures(self, image: Image.Image) -> int | None:
        """Of one which moves, as it says itself; None: it is damaged, and they have to be tried one by one."""
        try:
            with self._guard():
                return int(getattr(image, "n_frames", 1))
        except Undecodable:
            return None

    def seek(self, image: Image.Image, number: int) -> None:
        """Turn a picture which moves to one of its pictures; some kinds say its duration when it is decoded only.

        EOFError behind the last one.
        """
        with self._guard():
            try:
                image.seek(number)
            except EOFError:
                is_over = True
            else:
                is_over = False
                image.load()
        if is_over:
            raise EOFError

    def skip_damage(self, image: Image.Image) -> bool:
        """Take the picture that `seek` has failed at for what it is, so that the next one can be; whether it can."""
        try:
            with self._guard(), forgiving():
                image.load()
        except BadPicture:
            return False
        return True

    def read_still(self, image: Image.Image) -> tuple[npt.NDArray[np.uint8], str]:
        """As to_rgb; of a picture that is cut off what there is, as viewers show it, and what is wrong; "": nothing."""
        try:
            return self.to_rgb(image), ""
        except Undecodable as error:
            lacks_its_end_only = _has_last_rows(image)
            with forgiving():
                rgb = self.to_rgb(image)
            if (rgb == rgb[0, 0]).all():
                raise error from None
            return rgb, "" if lacks_its_end_only else f"{error}; what there is of it is shown"

    def to_rgb(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """uint8 [H, W, 3], turned upright, over white."""
        with self._guard():
            pixels = np.ascontiguousarray(np.asarray(flattened(image), np.uint8))
            small = in_srgb(self._scaler.to_rgb(VideoFrame.from_ndarray(pixels, "rgb24")), image)
            return np.ascontiguousarray(turned(small, _turn(image)))

    def _draft(self, image: Image.Image) -> None:
        """Have a JPEG scaled down while it is decoded, to no less than twice the size; once, for it can't be undone."""
        width, height = image.size
        if width * height <= MAX_JPEG_PIXELS:
            small_width, small_height = scaled_size(width, height, self._max_pixels)
            image.draft("RGB", (2 * small_width, 2 * small_height))

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            with limited_processor_time(MAX_PROCESSOR_S):
                yield
        except OutOfTime:
            raise BadPicture(f"takes more than {MAX_PROCESSOR_S:g} s to decode") from None
        except MemoryError:
            raise BadPicture("needs more memory than a decoder may have") from None
        except _PICTURE_ERRORS as error:
            raise Undecodable(f"can't be decoded ({_reason(error)})") from None


@contextlib.contextmanager
def forgiving() -> Iterator[None]:
    """Meanwhile Pillow takes what is cut off or damaged for what it is, as viewers do."""
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def _has_last_rows(image: Image.Image) -> bool:
    """Whether a JPEG that couldn't be decoded to its end lacks its last blocks at most, or just the mark of the end, as
    of cheap cameras: libjpeg gives no row of blocks before it has seen what follows."""
    if image.format not in ("JPEG", "MPO") or not isinstance(image, ImageFile.ImageFile):
        return False
    tile, image.tile = image.tile, []  # without it Pillow gives what it has decoded
    try:
        return bool(np.asarray(image)[max(image.height - 1 - BLOCK_ROWS, 0)].any())
    except _PICTURE_ERRORS:
        return False
    finally:
        image.tile = tile


def moves(image: Image.Image) -> bool:
    """Whether a viewer plays it; the second picture of a JPEG is a thumbnail, that of a TIFF another page."""
    try:
        return image.format in _MOVING and bool(getattr(image, "is_animated", False))
    except _PICTURE_ERRORS:  # the second one is damaged
        return True


def _check_picture(image: Image.Image) -> None:
    width, height = image.size
    if limit := broken_limit(width, height):
        raise BadPicture(f"is {width}x{height}, {width * height / 1e6:.0f} Mpixel; {limit}")


def _turn(image: Image.Image) -> tuple[int, int, int, int]:
    for name in ("xmp", "XML:com.adobe.xmp"):  # Pillow looks there too, viewers don't
        image.info.pop(name, None)
    try:
        orientation = image.getexif().get(Tag.Orientation, 1)
    except _PICTURE_ERRORS:  # damaged notes beside a picture which is whole
        orientation = 1
    return _TURNS.get(orientation, (1, 0, 0, 1)) if isinstance(orientation, int) else (1, 0, 0, 1)


def flattened(image: Image.Image) -> Image.Image:
    """The picture as RGB, over the background where it is see-through."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_deep(image)
    if image.mode == "CMYK":
        return from_cmyk(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    paper = Image.new("RGB", layer.size, _BACKGROUND)
    paper.paste(layer, mask=layer.getchannel("A"))
    return paper


def _from_deep(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits: integers are of the 16 bit range, floats of [0, 1] or of 8 bits."""
    values = np.nan_to_num(np.asarray(image, np.float32))
    if image.mode.startswith("I;16") and _is_white_zero(image):
        values = 65_535 - values
    if image.mode == "F":
        scale = 255.0 if values.max() <= 1.0 else 1.0
    else:
        scale = 255 / 65_535
    return Image.fromarray(np.clip(values * scale + 0.5, 0, 255).astype(np.uint8)).convert("RGB")


def _is_white_zero(image: Image.Image) -> bool:
    """Of a TIFF whether 0 is white in it, which Pillow heeds up to 8 bits only."""
    return isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(Tag.PhotometricInterpretation) == 0


def _reason(error: BaseException) -> str:
    """In words; what Pillow stumbles over inside says nothing to who looks at the picture."""
    text = str(getattr(error, "strerror", None) or error)
    is_for_people = isinstance(error, (OSError, SyntaxError)) and not isinstance(error, UnidentifiedImageError)
    return text if text and len(text) <= 80 and "/" not in text and is_for_people else "it is damaged"


class OutOfTime(Exception):
    """A picture that costs too much."""


@contextlib.contextmanager
def limited_processor_time(seconds: float) -> Iterator[None]:
    """OutOfTime when the body computes for longer; in the main thread, and between two calls of a library only."""

    def on_alarm(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGPROF, on_alarm)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
