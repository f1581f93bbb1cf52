"""Still pictures as a viewer shows them: one, a folder of them, or one which moves. In the decoder's process only.

Rule: a bad picture costs itself: its period stays empty, it is counted and named, and the next one is shown.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Final

import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame
from PIL import AvifImagePlugin, Image
from PIL.ExifTags import Base as Tag

from graph.chunk import NS_PER_MS
from stages.media_health import Warner
from stages.media_screen import FrameGrid, Screen
from stages.media_tracks import Put
from stages.media_types import PICTURE_SUFFIXES, PictureType, foreign_name, foreign_type, picture_type, read_head
from stages.media_view import Scaler, check_size, scaled_size, turned
from stages.media_wire import FOREVER_NS, Ended, Frame, MediaError, MediaItem, MediaRequest, Order, Progress

MAX_PICTURES: Final = 100_000
MAX_NAMED: Final = 20  # bad pictures which are named; the others are counted
MAX_KINDS_NAMED: Final = 6  # of what is left out of a folder
MAX_MOVING: Final = 100_000  # pictures of one which moves
MAX_PROCESSOR_S: Final = 15.0  # for one picture; 64 Mpixel of PNG take 2.4
MAX_READING_S: Final = 60  # a file on a slow server, or a machine with much to do; then the parent's watchdog decides
FIRST_WORD_S: Final = 5  # later the parent takes the source for one which does not open
MIN_SHOWN_MS, USUAL_SHOWN_MS = 20, 100  # browsers show what is to go faster than 50 per second 10 times a second

_HIDDEN: Final = frozenset(("thumbs.db", "desktop.ini", "ehthumbs.db", "__macosx"))  # and whatever begins with a dot
_BACKUPS: Final = ("~", ".bak", ".old", "#")  # of editors: a picture would be shown twice
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

Image.MAX_IMAGE_PIXELS = None  # check_size decides, before anything is decoded
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # more buy memory only


# --- one picture --------------------------------------------------------------------------------------------------


class BadPicture(Exception):
    """A picture which can't be read: the rest of a sentence which begins with its name."""


class PictureReader:
    """Opens pictures by what their bytes say, and makes RGB of at most max_pixels of them; BadPicture if it can't."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._scaler = Scaler(max_pixels)

    @contextlib.contextmanager
    def open(self, path: Path) -> Iterator[Image.Image]:
        """The picture, its header read."""
        with contextlib.ExitStack() as stack:
            with self._guard():
                head = read_head(path)
                kind = picture_type(head)
                if kind is None:
                    raise BadPicture(foreign_type(head) or ("is no picture" if head else "is empty"))
                image = stack.enter_context(Image.open(path, formats=(kind,)))
                _check_picture(image)
            yield image

    def seek(self, image: Image.Image, number: int) -> None:
        """Turn a picture which moves to one of its pictures; some kinds say its duration when it is decoded only."""
        with self._guard():
            image.seek(number)
            image.load()

    def to_rgb(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """uint8 [H, W, 3], turned upright, over white."""
        with self._guard():
            if not moves(image):  # JPEGs are scaled down while they are decoded, to no less than twice the size
                width, height = scaled_size(*image.size, self._max_pixels)
                image.draft("RGB", (2 * width, 2 * height))
            pixels = np.ascontiguousarray(np.asarray(flattened(image), np.uint8))
            upright = turned(self._scaler.to_rgb(VideoFrame.from_ndarray(pixels, "rgb24")), _turn(image))
            return np.ascontiguousarray(upright)

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
            raise BadPicture(f"can't be decoded ({_reason(error)})") from None


def moves(image: Image.Image) -> bool:
    """Whether a viewer plays it; the second picture of a JPEG is a thumbnail, that of a TIFF another page."""
    return image.format in _MOVING and bool(getattr(image, "is_animated", False))


def _check_picture(image: Image.Image) -> None:
    try:
        check_size(*image.size)
    except MediaError:
        width, height = image.size
        raise BadPicture(f"is {width}x{height}, {width * height / 1e6:.0f} Mpixel; at most 64 Mi are read") from None


def _turn(image: Image.Image) -> tuple[int, int, int, int]:
    try:
        orientation = image.getexif().get(Tag.Orientation, 1)
    except _PICTURE_ERRORS:  # damaged notes beside a picture which is whole
        orientation = 1
    return _TURNS.get(orientation, (1, 0, 0, 1)) if isinstance(orientation, int) else (1, 0, 0, 1)


def flattened(image: Image.Image) -> Image.Image:
    """The picture as RGB, over the background where it is see-through."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_deep(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    paper = Image.new("RGB", layer.size, _BACKGROUND)
    paper.paste(layer, mask=layer.getchannel("A"))
    return paper


def _from_deep(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits: integers are of the 16 bit range, floats of [0, 1] or of 8 bits."""
    values = np.nan_to_num(np.asarray(image, np.float32))
    if image.mode == "F":
        scale = 255.0 if values.max() <= 1.0 else 1.0
    else:
        scale = 255 / 65_535 if values.max() > 255 else 1.0
    return Image.fromarray(np.clip(values * scale + 0.5, 0, 255).astype(np.uint8)).convert("RGB")


def _reason(error: BaseException) -> str:
    text = str(getattr(error, "strerror", None) or error) or type(error).__name__
    return text if len(text) <= 80 and "/" not in text else type(error).__name__


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


@contextlib.contextmanager
def ticking(tick: Callable[[int], None]) -> Iterator[None]:
    """Meanwhile `tick` is called each second with the number of seconds, from a thread, up to MAX_READING_S."""
    over = threading.Event()

    def run() -> None:
        for second in range(1, MAX_READING_S + 1):
            if over.wait(1.0):
                return
            tick(second)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()  # two threads must not write into the pipe at once


# --- folders ------------------------------------------------------------------------------------------------------


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sorts names as file managers do: img2 before img10, without regard to case."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name.casefold())
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts], name


def is_hidden(name: str) -> bool:
    """Whether a file manager shows no such file."""
    return name.startswith(".") or name.endswith(_BACKUPS) or name.casefold() in _HIDDEN


def list_folder(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The pictures of a folder in natural order, and what is left out of it, by kind.

    A name that promises a picture is believed until its turn comes; other files are pictures if their bytes say so.
    """
    home, names, left_out = folder.resolve(), [], Counter[str]()
    with os.scandir(folder) as entries:
        for entry in (entry for entry in entries if not is_hidden(entry.name)):
            if kind := _kind_of(entry, home):
                left_out[kind] += 1
            else:
                names.append(entry.name)
    return [folder / name for name in sorted(names, key=natural_key)], left_out


def _kind_of(entry: os.DirEntry[str], home: Path) -> str:
    """What a folder's entry is that is no picture; "" for a picture."""
    path = Path(entry)
    try:
        if entry.is_symlink() and not path.resolve().is_relative_to(home):
            return "link out of the folder"
        if entry.is_dir():
            return "folder"
        if not entry.is_file():
            return "no file"
        suffix = path.suffix.lower()
        if suffix in PICTURE_SUFFIXES or picture_type(head := read_head(path)) is not None:
            return ""
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        return "unreadable"
    name = foreign_name(head)
    return f"{suffix or 'without suffix'}{f': {name}' if name else ''}"


def tell_left_out(left_out: Counter[str]) -> str:
    """How many of which kinds, as "3 (2 .txt, 1 folder)"."""
    most = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))[:MAX_KINDS_NAMED]
    kinds = [f"{count} {kind}" for kind, count in most]
    rest = left_out.total() - sum(count for _, count in most)
    return f"{left_out.total()} ({', '.join(kinds)}{f', {rest} others' if rest else ''})"


# --- running ------------------------------------------------------------------------------------------------------


def run_pictures(order: Order, put: Put) -> MediaItem:
    """A picture, or the pictures of a folder, each for one period; the last item to send.

    Nothing is said before a picture could be read, so that whoever looks in learns of a source which has none.
    """
    request, path = order.request, Path(order.request.source)
    reader = PictureReader(request.max_pixels)
    if not path.is_dir():
        return run_single(path, request, reader, put)
    names, left_out = list_folder(path)
    if not 0 < len(names) <= MAX_PICTURES:
        what = f"has {len(names)} images; 1 to {MAX_PICTURES} are read{_beside(left_out)}"
        raise MediaError("limit" if names else "missing", what)
    return Slides(request, reader, put).run(names, left_out)


def _beside(left_out: Counter[str]) -> str:
    return f"; left out: {tell_left_out(left_out)}" if left_out else ""


class Slides:
    """The pictures of one folder, each for one period."""

    def __init__(self, request: MediaRequest, reader: PictureReader, put: Put) -> None:
        self._request = request
        self._reader = reader
        self._put = put
        self._warner = Warner(put)
        self._grid = FrameGrid(request.fps, request.window_ns)
        self._position_ns = 0
        self._has_spoken = False
        self._bad: list[str] = []  # what is wrong with each

    def run(self, names: list[Path], left_out: Counter[str]) -> MediaItem:
        until_ns = FOREVER_NS if self._request.duration_ns is None else self._request.duration_ns
        for index, path in enumerate(names):
            start_ns = self._grid.instant_ns(index)
            if start_ns >= until_ns:
                return Ended("the duration asked for is over")
            with ticking(self._live):
                rgb = self._read(path)
            if rgb is not None:
                self._say_progress()
                self._put(Frame(start_ns, rgb))
            self._position_ns = self._grid.first_ns(index + 1)
            if self._has_spoken or len(self._bad) > MAX_NAMED:
                self._say_progress()
                self._warn(left_out)
        if len(self._bad) == len(names):
            raise MediaError("unreadable", f"has no picture which can be read, of {len(names)}: {self._bad[0]}")
        return Ended("the last picture has been shown")

    def _read(self, path: Path) -> npt.NDArray[np.uint8] | None:
        try:
            with self._reader.open(path) as image:
                return self._reader.to_rgb(image)
        except BadPicture as error:
            self._bad.append(f"{shown_name(path)} {error}")
            return None

    def _live(self, second: int) -> None:
        """A sign of life while a picture is read."""
        if self._has_spoken or second >= FIRST_WORD_S:
            self._say_progress()

    def _say_progress(self) -> None:
        if not self._has_spoken:
            self._put(Progress(0, FOREVER_NS))
        self._has_spoken = True
        self._put(Progress(self._position_ns, FOREVER_NS, 0, len(self._bad)))

    def _warn(self, left_out: Counter[str]) -> None:
        source = self._request.masked
        if left_out:
            what = f"{source}: what is no picture is left out: {tell_left_out(left_out)}"
            self._warner.warn("video", "left_out", what)
        for what in self._bad[:MAX_NAMED]:
            self._warner.warn("video", "bad_picture", f"{source}: {what}; the others are shown")
        if len(self._bad) > MAX_NAMED:
            self._warner.warn("video", "bad_picture", f"{source}: more than {MAX_NAMED} pictures can't be read")


def shown_name(path: Path) -> str:
    """A file's name as it may stand in a sentence, also one which is no UTF-8."""
    return path.name.encode(errors="replace").decode(errors="replace")


def run_single(path: Path, request: MediaRequest, reader: PictureReader, put: Put) -> MediaItem:
    """One picture for one period; one which moves is a film."""
    try:
        with reader.open(path) as image:
            if moves(image):
                return run_moving(image, request, reader, put)
            with ticking(lambda second: put(Progress(0, FOREVER_NS)) if second >= FIRST_WORD_S else None):
                rgb = reader.to_rgb(image)
    except BadPicture as error:
        raise MediaError("unreadable", str(error)) from None
    grid = FrameGrid(request.fps, request.window_ns)
    put(Progress(0, FOREVER_NS))
    put(Frame(grid.instant_ns(0), rgb))
    put(Progress(grid.first_ns(1), FOREVER_NS))
    return Ended("the picture has been shown")


def run_moving(image: Image.Image, request: MediaRequest, reader: PictureReader, put: Put) -> MediaItem:
    """A picture which moves, played once; a short one again and again, until it has been seen."""
    grid = FrameGrid(request.fps, request.window_ns)
    screen: Screen[int] = Screen(grid)
    until_ns = FOREVER_NS if request.duration_ns is None else request.duration_ns
    time_ns = 0
    put(Progress(0, FOREVER_NS))
    while time_ns <= grid.instant_ns(0):
        for number in range(min(getattr(image, "n_frames", 1), MAX_MOVING)):
            reader.seek(image, number)
            shots = screen.show(time_ns, number)
            time_ns += shown_ns(image)
            due = [shot for shot in shots + screen.stand(time_ns - 1) if shot.instant_ns < until_ns]
            for shot, rgb in zip(due, [reader.to_rgb(image)] * len(due) if due else [], strict=True):
                put(Frame(shot.start_ns, rgb, shot.age_ns))
            put(Progress(screen.position_ns, FOREVER_NS))
            if time_ns >= until_ns:
                return Ended("the duration asked for is over")
    return Ended("the picture has been shown to its end")


def shown_ns(image: Image.Image) -> int:
    """How long this picture of a moving one stands, as browsers show it."""
    duration_ms = float(image.info.get("duration") or 0)
    return round(NS_PER_MS * (duration_ms if MIN_SHOWN_MS <= duration_ms <= 3600_000 else USUAL_SHOWN_MS))
