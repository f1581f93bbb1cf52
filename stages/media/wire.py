"""What the decoder process and its parent say to each other: the values, and their bytes on a pipe.

Rule: the parent believes nothing that comes out of the pipe. A decoder has read hostile bytes; every field of its
messages is held against what was asked for before memory is taken for it, and the first odd one ends the decoder.

A message is a header (magic, kind, length, time, age, height, width) and `length` bytes.
"""

from __future__ import annotations

import json
import math
import signal
import struct
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Final, Literal, TypeAlias, cast, get_args

import numpy as np
import numpy.typing as npt

from graph.chunk import NS_PER_MS, NS_PER_S
from graph.secret import KNOWN, mask_source
from stages.rates import SOUND_RATE_HZ

FOREVER_NS: Final = (1 << 63) - 1  # a stream which does not exist, or has ended, holds nobody up
DURATION_OVER: Final = "the duration asked for is over"

FPS_RANGE: Final = (0.01, 60.0)
PIXELS_RANGE: Final = (64, 1 << 24)  # 48 MiB of RGB: the largest message
PIECE_RANGE_NS: Final = (10 * NS_PER_MS, 60 * NS_PER_S)
MIN_HOLE_SAMPLES: Final = SOUND_RATE_HZ  # sound of which nothing came for so long may be left out
MAX_SAMPLE: Final = 1 << 45  # 69 years
MAX_TEXT_BYTES: Final = 4096
MAX_WARNING_BYTES: Final = 512
MAX_WARNINGS: Final = 64  # of one connection: two tracks have so few things to say, and a log is no place to fill

SourceKind: TypeAlias = Literal["file", "images", "rtsp", "http", "webcam", "test", "synthetic"]
LIVE_KINDS: Final[tuple[SourceKind, ...]] = ("rtsp", "webcam")  # these set the pace themselves
GOODBYE_SIGNAL: Final = signal.SIGUSR1  # ours: SIGTERM comes from the user, and from systemd to every process
FailKind: TypeAlias = Literal["missing", "unreadable", "refused", "blocked", "timeout", "closed", "crashed", "limit"]
# missing: not there · unreadable: no media in it · refused: by its owner · blocked: by us · closed: live, and cut off
TrackName: TypeAlias = Literal["video", "audio", ""]  # "": of the source as a whole
WarnCode: TypeAlias = Literal[
    "damaged",  # packets which can't be decoded; the track goes on
    "bad_picture",  # a picture file which can't be read; the others are
    "left_out",  # something which is there and is not read
    "track_given_up",  # nothing of it can be decoded: the other one goes on alone
    "track_frozen",  # a live track has stopped, and the other one goes on
    "track_late",  # a live track that is announced has not come yet, and the other one goes on
    "track_back",  # and has come, or come again
    "clock_jump",  # a track's stamps leap by more than any recording does; it goes on beside the other one
    "no_keyframe",  # pictures wait for one
    "over_udp",  # the camera refuses RTP over TCP
]


class MediaError(Exception):
    """A source which will not be opened; `kind` as in Failed, the message says what, where and what instead."""

    def __init__(self, kind: FailKind, message: str) -> None:
        super().__init__(kind, message)
        self.kind: FailKind = kind
        self.message = message

    def __str__(self) -> str:
        return self.message


class WireError(Exception):
    """Bytes which no honest decoder sends."""


@dataclass(frozen=True, slots=True)
class MediaRequest:
    """What is wanted of one source. MediaError "limit" when a number is outside what a decoder may be asked for."""

    source: str = field(
        repr=False
    )  # URL, file, image, folder of images, /dev/video0, test://pattern[?…] or synthetic://room[?…]
    fps: float  # frames per second of event time, not of the source
    max_pixels: int  # per frame; larger pictures are scaled down, smaller ones never up
    want_video: bool
    want_audio: bool
    piece_ns: int  # sound comes in pieces so long
    duration_ns: int | None  # None: to the source's end
    masked: str = ""  # the source as it may be shown; "": as is found out here
    window_ns: int = NS_PER_S  # of the session: a frame lies in the window of its sampling instant
    start_ns: int = 0  # of a file: nothing before this event time is sent. A live source begins in the present

    def __post_init__(self) -> None:
        KNOWN.add_source(self.source)
        object.__setattr__(self, "masked", self.masked or mask_source(self.source))
        _check_range("fps", self.fps, FPS_RANGE)
        _check_range("max_pixels", self.max_pixels, PIXELS_RANGE)
        _check_range("piece_ns", self.piece_ns, PIECE_RANGE_NS)
        _check_range("window_ns", self.window_ns, PIECE_RANGE_NS)
        if self.duration_ns is not None and self.duration_ns <= 0:
            raise MediaError("limit", f"duration_ns is {self.duration_ns}; it must be above 0, or None for no end")
        if self.start_ns < 0:
            raise MediaError("limit", f"start_ns is {self.start_ns}; it must be 0 or above")
        if not (self.want_video or self.want_audio):
            raise MediaError("limit", "neither video nor audio is wanted: there is nothing to read")


def _check_range(name: str, value: float, allowed: tuple[float, float]) -> None:
    low, high = allowed
    if not (math.isfinite(value) and low <= value <= high):
        raise MediaError("limit", f"{name} is {value}; it must be between {low} and {high}")


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One sampled picture: image uint8 [H, W, 3] RGB, read-only.

    start_ns: its event time, or the sampling instant when it is held over from an earlier period or window.
    age_ns: how long it had been on the screen at the sampling instant.
    """

    start_ns: int
    image: npt.NDArray[np.uint8]
    age_ns: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Sound:
    """16 kHz mono, float32 [n] in about [-1, 1], read-only: one piece, fewer only where the stream ends.

    first_sample is the running count of samples before: items follow each other without gap, or with one of
    MIN_HOLE_SAMPLES at least, in which there was nothing.
    """

    first_sample: int
    samples: npt.NDArray[np.float32]

    @property
    def start_ns(self) -> int:
        return self.first_sample * NS_PER_S // SOUND_RATE_HZ


@dataclass(frozen=True, slots=True)
class Progress:
    """Nothing before these times will come any more; FOREVER_NS for a stream which is absent or has ended.

    The first item of every source, but for warnings, is a Progress: it is open, and the streams at FOREVER_NS do not
    exist. The others begin there: a file at 0, a live source when it was opened.
    """

    video_ns: int
    audio_ns: int
    num_gaps: int = 0  # running total of holes filled with zeros, overlaps cut and clocks set anew
    num_bad_video: int = 0  # running totals of packets and pictures which could not be decoded
    num_bad_audio: int = 0

    @property
    def num_bad(self) -> int:
        return self.num_bad_video + self.num_bad_audio


@dataclass(frozen=True, slots=True)
class Warned:
    """Something worth telling which ends nothing; message is one sentence for the source's owner, without passwords.

    A decoder sends each code at most once per track, unless its state has changed meanwhile.
    """

    track: TrackName
    code: WarnCode
    message: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The clean end: of the source, or of the duration which was asked for."""

    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The source gave out; message is one sentence for its owner, without passwords."""

    kind: FailKind
    message: str


MediaItem: TypeAlias = Frame | Sound | Progress | Warned | Ended | Failed


@dataclass(frozen=True, slots=True)
class Order:
    """The line which starts a decoder; it goes through stdin, since URLs hold passwords and argv is public.

    origin_ns: when event time 0 is, on this host's monotonic clock; a live source's media is put on that axis.
    """

    kind: SourceKind
    request: MediaRequest
    open_timeout_s: float
    silence_timeout_s: float
    origin_ns: int

    def to_line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @staticmethod
    def from_line(line: bytes) -> Order:
        fields = json.loads(line)
        return Order(**{**fields, "request": MediaRequest(**fields["request"])})


MAGIC: Final = b"omw1"
# magic, kind, payload bytes, start_ns or first_sample, age_ns, height, width
HEADER: Final = struct.Struct("<4sIIqqII")
_PROGRESS: Final = struct.Struct("<qqqqq")
_FRAME, _SOUND, _PROGRESS_KIND, _ENDED, _FAILED, _WARNED = range(1, 7)


def to_bytes(item: MediaItem) -> list[bytes | memoryview]:
    """The buffers of one message, in order; pictures and samples are not copied."""
    match item:
        case Frame(start_ns, image, age_ns):
            height, width, _ = image.shape
            return _message(_FRAME, image.data.cast("B"), start_ns, age_ns, height, width)
        case Sound(first_sample, samples):
            return _message(_SOUND, samples.data.cast("B"), first_sample)
        case Progress(video_ns, audio_ns, num_gaps, num_bad_video, num_bad_audio):
            return _message(_PROGRESS_KIND, _PROGRESS.pack(video_ns, audio_ns, num_gaps, num_bad_video, num_bad_audio))
        case Warned(track, code, message):
            return _message(_WARNED, f"{track}\n{code}\n{message}".encode()[:MAX_WARNING_BYTES])
        case Ended(reason):
            return _message(_ENDED, reason.encode()[:MAX_TEXT_BYTES])
        case Failed(kind, message):
            return _message(_FAILED, f"{kind}\n{message}".encode()[:MAX_TEXT_BYTES])


def _message(
    kind: int, payload: bytes | memoryview, time: int = 0, age: int = 0, height: int = 0, width: int = 0
) -> list[bytes | memoryview]:
    return [HEADER.pack(MAGIC, kind, len(payload), time, age, height, width), payload]


_Header: TypeAlias = tuple[int, int, int, int, int, int]  # kind, length, time, age, height, width


class ItemParser:
    """Bytes from a decoder become items; WireError at the first byte which doesn't fit the request.

    Put bytes into `space()`, then say how many to `filled()`. Takes memory for one message of checked size at a time.

    begins_ns: the source's streams begin in this span of event time.
    """

    def __init__(self, request: MediaRequest, begins_ns: tuple[int, int] = (0, 0)) -> None:
        self._max_pixels = request.max_pixels
        self._max_samples = request.piece_ns * SOUND_RATE_HZ // NS_PER_S + 1
        first, last = (begin_ns * SOUND_RATE_HZ // NS_PER_S for begin_ns in begins_ns)
        self._next_samples = range(first, last + 1)  # the next sound begins with one of these
        self._last_frame_ns = 0
        self._last_progress = Progress(0, 0)
        self._num_warnings = 0
        self._header: _Header | None = None
        self._expect(HEADER.size)

    def _expect(self, num_bytes: int) -> None:
        self._buffer = np.empty(num_bytes, np.uint8)
        self._num_filled = 0

    def space(self) -> memoryview:
        """Where the next bytes go; never empty."""
        return self._buffer.data[self._num_filled :]

    def filled(self, num_bytes: int) -> MediaItem | None:
        """Account for bytes put into `space()`; the item which they complete, if they do."""
        self._num_filled += num_bytes
        if self._num_filled < self._buffer.size:
            return None
        if self._header is None:
            self._header = self._read_header(self._buffer.tobytes())
            self._expect(self._header[1])
            if self._buffer.size:
                return None
        item = self._read_item(*self._header, self._buffer)
        self._header = None
        self._expect(HEADER.size)
        return item

    def _read_header(self, header: bytes) -> _Header:
        magic, kind, length, time, age, height, width = HEADER.unpack(header)
        if magic != MAGIC:
            raise WireError(f"a message begins with {magic!r}, not {MAGIC!r}")
        allowed: Mapping[int, bool] = {
            _FRAME: 0 < height * width <= self._max_pixels and length == 3 * height * width and age >= 0,
            _SOUND: 0 < length <= 4 * self._max_samples and length % 4 == 0,
            _PROGRESS_KIND: length == _PROGRESS.size,
            _ENDED: length <= MAX_TEXT_BYTES,
            _FAILED: length <= MAX_TEXT_BYTES,
            _WARNED: length <= MAX_WARNING_BYTES,
        }
        if not allowed.get(kind, False):
            raise WireError(f"a message of kind {kind} with {length} bytes, {height}x{width}")
        return kind, length, time, age, height, width

    def _read_item(
        self, kind: int, length: int, time: int, age: int, height: int, width: int, payload: npt.NDArray[np.uint8]
    ) -> MediaItem:
        match kind:
            case 1:
                return self._read_frame(time, age, payload.reshape(height, width, 3))
            case 2:
                return self._read_sound(time, payload.view(np.float32))
            case 3:
                return self._read_progress(Progress(*_PROGRESS.unpack(payload.tobytes())))
            case 4:
                return Ended(_printable(payload))
            case 6:
                return self._read_warned(payload)
            case _:
                return _read_failed(payload)

    def _read_frame(self, start_ns: int, age_ns: int, image: npt.NDArray[np.uint8]) -> Frame:
        if start_ns < self._last_frame_ns:
            raise WireError(f"a frame of {start_ns} ns after one of {self._last_frame_ns} ns")
        self._last_frame_ns = start_ns
        image.flags.writeable = False
        return Frame(start_ns, image, age_ns)

    def _read_sound(self, first_sample: int, samples: npt.NDArray[np.float32]) -> Sound:
        is_due = first_sample in self._next_samples
        is_after_hole = self._next_samples.start + MIN_HOLE_SAMPLES <= first_sample <= MAX_SAMPLE
        if not (is_due or is_after_hole) or not np.isfinite(samples).all():
            raise WireError(f"sound which begins at sample {first_sample}, not {self._next_samples}, or isn't finite")
        self._next_samples = range(first_sample + samples.size, first_sample + samples.size + 1)
        samples.flags.writeable = False
        return Sound(first_sample, samples)

    def _read_progress(self, now: Progress) -> Progress:
        last = self._last_progress
        if any(getattr(now, field) < getattr(last, field) for field in Progress.__slots__):
            raise WireError(f"progress went back: {now} after {last}")
        self._last_progress = now
        return now

    def _read_warned(self, payload: npt.NDArray[np.uint8]) -> Warned:
        self._num_warnings += 1
        track, code, message = [*payload.tobytes().decode(errors="replace").split("\n", 2), "", ""][:3]
        if self._num_warnings > MAX_WARNINGS:
            raise WireError(f"more than {MAX_WARNINGS} warnings")
        if track not in get_args(TrackName) or code not in get_args(WarnCode):
            raise WireError("a warning of a track or code which does not exist")
        return Warned(cast(TrackName, track), cast(WarnCode, code), _printable(message))


def _read_failed(payload: npt.NDArray[np.uint8]) -> Failed:
    kind, _, message = payload.tobytes().decode(errors="replace").partition("\n")
    if kind not in get_args(FailKind):
        raise WireError("a failure of a kind which does not exist")
    return Failed(cast(FailKind, kind), _printable(message))


def _printable(text: npt.NDArray[np.uint8] | str) -> str:
    """Text of a decoder as a log may hold it: one line, no control characters."""
    decoded = text if isinstance(text, str) else text.tobytes().decode(errors="replace")
    return "".join(" " if is_control(c) else c for c in decoded)


def is_control(char: str) -> bool:
    """Whether a character steers a terminal, breaks a line or can't be written at all; odd spaces do nothing of it."""
    return unicodedata.category(char) in ("Cc", "Zl", "Zp", "Cs")
