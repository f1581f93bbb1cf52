"""A camera that does what a test writes down: the readers behind `stages.media.feed`, without a process."""

from collections import deque
from collections.abc import Sequence

import numpy as np

from graph.chunk import NS_PER_S, Chunk, ChunkType, SessionId
from stages.camera import Camera
from stages.media.feeds import Feeds
from stages.media.reader import FOREVER_NS, Ended, Failed, Frame, MediaError, MediaItem, MediaRequest, Progress, Sound
from stages.microphone import Microphone
from stages.rates import SOUND_RATE_HZ
from tests.support.sessions import make_session

DOOR = SessionId("door")
GONE = Failed("closed", "rtsp://door closed the connection")


class FakeReader:
    """A reader whose items a test gives; None in between, until there are more."""

    def __init__(self, *items: MediaItem, live: bool = False) -> None:
        self.is_live = live
        self.items = deque(items)
        self.started_at_ns: list[int] = []
        self.closed = False

    def start(self, now_ns: int = 0, at_ns: int | None = None) -> None:
        self.started_at_ns.append(now_ns)

    def read(self, timeout_s: float) -> MediaItem | None:
        assert not self.closed, "nobody reads a closed reader"
        return self.items.popleft() if self.items else None

    def close(self) -> None:
        self.closed = True

    def fileno(self) -> int:
        return 1000 + id(self) % 1000

    def give(self, *items: MediaItem) -> None:
        self.items.extend(items)


class FakeMedia:
    """Opens the readers of a script one after the other; an error in the script is raised."""

    def __init__(self, *script: FakeReader | MediaError) -> None:
        self.script = deque(script)
        self.requests: list[MediaRequest] = []

    def __call__(self, request: MediaRequest) -> FakeReader:
        self.requests.append(request)
        reader = self.script.popleft()
        if isinstance(reader, MediaError):
            raise reader
        return reader


def frame(at_s: float) -> Frame:
    """A small picture whose shade tells its time."""
    return Frame(round(at_s * NS_PER_S), np.full((4, 4, 3), round(at_s * 4) % 256, np.uint8))


def sound(first: int, num: int = SOUND_RATE_HZ) -> Sound:
    """Samples that count: each is its own number, as far as float32 goes."""
    return Sound(first, np.arange(first, first + num, dtype=np.float32))


def progress(video_s: float | None, audio_s: float | None) -> Progress:
    """None: the stream does not exist, or has ended."""
    video_ns, audio_ns = (FOREVER_NS if at is None else round(at * NS_PER_S) for at in (video_s, audio_s))
    return Progress(video_ns, audio_ns)


def seconds(first: int, last: int, pictures: bool = True, sounds: bool = True) -> list[MediaItem]:
    """One picture and one second of sound for each of the seconds [first, last)."""
    items: list[MediaItem] = [progress(first if pictures else None, first if sounds else None)]
    for at in range(first, last):
        items += [frame(at)] if pictures else []
        items += [sound(at * SOUND_RATE_HZ)] if sounds else []
        items.append(progress(at + 1 if pictures else None, at + 1 if sounds else None))
    return items


def source(num_seconds: int, pictures: bool = True, sounds: bool = True) -> FakeReader:
    """A file of so many seconds, which then ends as the decoder ends one."""
    return FakeReader(*seconds(0, num_seconds, pictures, sounds), progress(None, None), Ended("it is at its end"))


class Door:
    """A camera with its microphone, both on one feed; `at` lets the clock go on and gives what they said."""

    def __init__(self, media: FakeMedia, **session: object) -> None:
        self.media = media
        self.feeds = Feeds(media)
        self.camera, self.microphone = Camera(self.feeds), Microphone(self.feeds)
        self.session = make_session("door", "rtsp://door", **session)
        for stage in (self.camera, self.microphone):
            stage.open_session(self.session)

    def at(self, *times_s: float) -> list[Chunk]:
        """Everything both say when their stages are advanced at these times."""
        said = []
        for time_s in times_s:
            now_ns = round(time_s * NS_PER_S)
            said += self.camera.advance(DOOR, now_ns) + self.microphone.advance(DOOR, now_ns)
        return said

    def until(self, end_s: float, step_s: float = 0.1, start_s: float = 0.0) -> list[Chunk]:
        """At every tenth of a second."""
        num_steps = round((end_s - start_s) / step_s)
        return self.at(*(start_s + step * step_s for step in range(num_steps + 1)))

    @property
    def finished(self) -> tuple[bool, bool]:
        return self.camera.finished(DOOR), self.microphone.finished(DOOR)


def data(chunks: Sequence[Chunk], stream: str) -> list[Chunk]:
    return [chunk for chunk in chunks if chunk.stream == stream and not chunk.is_control]


def ends(chunks: Sequence[Chunk]) -> dict[str, list[int]]:
    """When each stream has ended, in ns; a list, as it shall be told once."""
    ends_ns: dict[str, list[int]] = {}
    for chunk in chunks:
        if chunk.type is ChunkType.END:
            ends_ns.setdefault(chunk.stream, []).append(chunk.start_ns)
    return ends_ns


def watermarks(chunks: Sequence[Chunk], stream: str) -> list[int]:
    return [chunk.start_ns for chunk in chunks if chunk.type is ChunkType.WATERMARK and chunk.stream == stream]


def events(chunks: Sequence[Chunk]) -> list[str]:
    return [str(chunk.attrs["type"]) for chunk in chunks if chunk.stream == "events"]
