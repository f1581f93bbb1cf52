"""Still pictures as a viewer shows them: one, a folder of them, or one which moves. In the decoder's process only.

Rule: a bad picture costs itself: it is counted and named, and the next one is shown. What there is of one that is cut
off is shown; where nothing can be decoded, its period stays empty.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from graph.chunk import NS_PER_MS
from stages.media.health import Warner
from stages.media.screen import FrameGrid, Screen
from stages.media.still import BadPicture, PictureReader, moves
from stages.media.tracks import Put
from stages.media.types import PICTURE_SUFFIXES, foreign_name, picture_type, read_head
from stages.media.wire import (
    DURATION_OVER,
    FOREVER_NS,
    Ended,
    Frame,
    MediaError,
    MediaItem,
    MediaRequest,
    Order,
    Progress,
)

MAX_PICTURES: Final = 100_000
MAX_NAMED: Final = 20  # bad pictures which are named; the others are counted
MAX_KINDS_NAMED: Final = 6  # of what is left out of a folder
MAX_MOVING: Final = 100_000  # pictures of one which moves
MAX_READING_S: Final = 60  # a file on a slow server, or a machine with much to do; then the parent's watchdog decides
FIRST_WORD_S: Final = 5  # later the parent takes the source for one which does not open
MIN_SHOWN_MS, USUAL_SHOWN_MS = 20, 100  # browsers show what is to go faster than 50 per second 10 times a second

_HIDDEN: Final = frozenset(("thumbs.db", "desktop.ini", "ehthumbs.db", "__macosx"))  # and whatever begins with a dot
_BACKUPS: Final = ("~", ".bak", ".old", "#")  # of editors: a picture would be shown twice
_OTHERS: Final = "; the others are shown"


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
        self._num_shown = 0

    def run(self, names: list[Path], left_out: Counter[str]) -> MediaItem:
        until_ns = FOREVER_NS if self._request.duration_ns is None else self._request.duration_ns
        for index, path in enumerate(names):
            start_ns = self._grid.instant_ns(index)
            if start_ns >= until_ns:
                return Ended(DURATION_OVER)
            with ticking(self._live):
                rgb = self._read(path)
            if rgb is not None:
                self._num_shown += 1
                self._say_progress()
                self._put(Frame(start_ns, rgb))
            self._position_ns = self._grid.first_ns(index + 1)
            if self._has_spoken or len(self._bad) > MAX_NAMED:
                self._say_progress()
                self._warn(left_out)
        if not self._num_shown:
            raise MediaError(
                "unreadable", f"has no picture which can be read, of {len(names)}: {self._bad[0].removesuffix(_OTHERS)}"
            )
        return Ended("the last picture has been shown")

    def _read(self, path: Path) -> npt.NDArray[np.uint8] | None:
        try:
            with self._reader.open(path) as image:
                rgb, damage = self._reader.read_still(image)
        except BadPicture as error:
            rgb, damage = None, f"{error}{_OTHERS}"
        if damage:
            self._bad.append(f"{shown_name(path)} {damage}")
        return rgb

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
            self._warner.warn("video", "bad_picture", f"{source}: {what}")
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
                return Moving(image, request, reader, put).run()
            with ticking(lambda second: put(Progress(0, FOREVER_NS)) if second >= FIRST_WORD_S else None):
                rgb, damage = reader.read_still(image)
    except BadPicture as error:
        raise MediaError("unreadable", str(error)) from None
    grid = FrameGrid(request.fps, request.window_ns)
    put(Progress(0, FOREVER_NS))
    put(Frame(grid.instant_ns(0), rgb))
    put(Progress(grid.first_ns(1), FOREVER_NS, 0, int(bool(damage))))
    if damage:
        Warner(put).warn("video", "bad_picture", f"{request.masked} {damage}")
    return Ended("the picture has been shown")


class Moving:
    """A picture which moves, played once; a short one again and again, until it has been seen."""

    def __init__(self, image: Image.Image, request: MediaRequest, reader: PictureReader, put: Put) -> None:
        self._image = image
        self._request = request
        self._reader = reader
        self._put = put
        self._grid = FrameGrid(request.fps, request.window_ns)
        self._screen: Screen[int] = Screen(self._grid)
        self._until_ns = FOREVER_NS if request.duration_ns is None else request.duration_ns
        self._time_ns = 0
        self._bad: dict[int, str] = {}
        self._has_spoken = False

    def run(self) -> MediaItem:
        """The last item to send; BadPicture when not one of them can be decoded."""
        num_pictures = self._reader.num_pictures(self._image)
        last = MAX_MOVING if num_pictures is None else min(num_pictures, MAX_MOVING)
        # The picture for programs which can't play it is no part of what is played.
        first = 1 if self._image.info.get("default_image") and last > 1 else 0
        while self._time_ns <= self._grid.instant_ns(0):
            for number in range(first, last):
                if not self._play(number):
                    self._bad.update(dict.fromkeys(range(number, num_pictures or number), ""))
                    break
                if self._time_ns >= self._until_ns:
                    return Ended(DURATION_OVER)
            if not self._has_spoken:
                raise BadPicture(next(iter(self._bad.values()), "holds no picture"))
            self._put(Progress(self._screen.position_ns, FOREVER_NS, 0, len(self._bad)))
        return Ended("the picture has been shown to its end")

    def _play(self, number: int) -> bool:
        """Show one of them for its time; False where nothing can follow."""
        try:
            self._reader.seek(self._image, number)
        except EOFError:
            return False
        except BadPicture as error:
            return self._lose(number, error)
        if not self._has_spoken:
            self._put(Progress(0, FOREVER_NS))
        self._has_spoken = True
        shots = self._screen.show(self._time_ns, number)
        self._time_ns += shown_ns(self._image)
        shots += self._screen.stand(self._time_ns - 1)
        due = [shot for shot in shots if shot.instant_ns < self._until_ns]
        for shot, rgb in zip(due, [self._reader.to_rgb(self._image)] * len(due) if due else [], strict=True):
            self._put(Frame(shot.start_ns, rgb, shot.age_ns))
        self._put(Progress(self._screen.position_ns, FOREVER_NS, 0, len(self._bad)))
        return True

    def _lose(self, number: int, error: BadPicture) -> bool:
        """Its time passes with the one before, as long as that is trusted; False where nothing can follow."""
        self._bad[number] = str(error)
        self._screen.doubt()
        what = f"{self._request.masked} moves, and its picture {number + 1} {error}{_OTHERS}"
        if self._has_spoken and len(self._bad) == 1:
            Warner(self._put).warn("video", "bad_picture", what)
        self._time_ns += shown_ns(self._image)
        return self._reader.skip_damage(self._image)


def shown_ns(image: Image.Image) -> int:
    """How long this picture of a moving one stands, as browsers show it."""
    duration_ms = float(image.info.get("duration") or 0)
    return round(NS_PER_MS * (duration_ms if MIN_SHOWN_MS <= duration_ms <= 3600_000 else USUAL_SHOWN_MS))
