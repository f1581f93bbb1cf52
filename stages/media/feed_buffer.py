"""What a feed has read and its readers have not taken yet."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from graph.chunk import NS_PER_S
from stages.media.reader import Frame
from stages.rates import SOUND_RATE_HZ
from stages.session import Session

Samples = npt.NDArray[np.float32]
MAX_AHEAD_NS = 2 * NS_PER_S
"""Of media that are held, or two windows."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that happened to a camera: it delivers, it was lost, it ended, or not all of it can be used."""

    type: str
    at_ns: int
    reason: str = ""
    message: str = ""
    track: str = ""


class SoundBuffer:
    """Sound by the running number of its samples, from the number `begin` on. Holes cost no memory."""

    def __init__(self, begin: int = 0) -> None:
        self._parts: deque[tuple[int, Samples]] = deque()
        self._end = begin  # of what has come
        self.num_samples = 0

    @property
    def first_ns(self) -> int:
        """When the oldest sample begins; only where there is one."""
        return self._parts[0][0] * NS_PER_S // SOUND_RATE_HZ

    def add(self, first: int, samples: Samples) -> None:
        """Sound after all that has come; what has been before is left out."""
        samples = samples[max(self._end - first, 0) :]
        first = max(first, self._end)
        if len(samples):
            self._parts.append((first, samples))
            self._end = first + len(samples)
            self.num_samples += len(samples)

    def take(self, end: int) -> tuple[int, Samples]:
        """The sound before sample `end`: (number of its first one, float32 [n]). Holes inside of it are zeros."""
        taken: list[tuple[int, Samples]] = []
        while self._parts and self._parts[0][0] < end:
            first, samples = self._parts.popleft()
            if first + len(samples) > end:
                self._parts.appendleft((end, samples[end - first :]))
                samples = samples[: end - first]
            taken.append((first, samples))
            self.num_samples -= len(samples)
        if not taken:
            return end, np.zeros(0, np.float32)
        begin, (last, rest) = taken[0][0], taken[-1]
        whole = np.zeros(last + len(rest) - begin, np.float32)
        for first, samples in taken:
            whole[first - begin : first - begin + len(samples)] = samples
        return begin, whole

    def cut(self, end: int) -> None:
        """Forget what begins at sample `end` or later."""
        parts = [(first, samples[: end - first]) for first, samples in self._parts if first < end]
        self._parts = deque(parts)
        self.num_samples = sum(len(samples) for _, samples in parts)
        self._end = min(self._end, end)

    def shift(self, num_samples: int) -> None:
        """Everything happens so much later."""
        self._parts = deque((first + num_samples, samples) for first, samples in self._parts)
        self._end += num_samples


@dataclass(slots=True)
class Sides:
    """What the two readers of a feed, and who hears of it, have not taken yet.

    window_ns: of the session. max_frames, max_samples: what may wait before nothing more is read.
    ending: that the source ends, which may have been read ahead of its time.
    """

    window_ns: int
    max_frames: int
    max_samples: int
    frames: deque[Frame] = field(default_factory=deque)
    sound: SoundBuffer = field(default_factory=SoundBuffer)
    notices: deque[Notice] = field(default_factory=deque)
    ending: Notice | None = None

    @classmethod
    def of(cls, session: Session) -> Sides:
        ahead_ns = max(MAX_AHEAD_NS, 2 * session.window_ns)
        begin = session.begin_index * session.window_ns * SOUND_RATE_HZ // NS_PER_S
        max_frames = max(int(session.media.fps * ahead_ns // NS_PER_S), 2)
        return cls(session.window_ns, max_frames, ahead_ns * SOUND_RATE_HZ // NS_PER_S, sound=SoundBuffer(begin))

    @property
    def has_room(self) -> bool:
        """May more be read?"""
        return len(self.frames) < self.max_frames and self.sound.num_samples < self.max_samples

    def make_room(self) -> None:
        """Forget the oldest window of what nobody takes."""
        if len(self.frames) >= self.max_frames:
            self.take_frames(self._window_end_ns(self.frames[0].start_ns) - 1)
        if self.sound.num_samples >= self.max_samples:
            self.sound.take(self._window_end_ns(self.sound.first_ns) * SOUND_RATE_HZ // NS_PER_S)

    def shift(self, by_ns: int) -> None:
        """Everything happens so much later."""
        self.frames = deque(replace(frame, start_ns=frame.start_ns + by_ns) for frame in self.frames)
        self.sound.shift(by_ns * SOUND_RATE_HZ // NS_PER_S)

    def _window_end_ns(self, time_ns: int) -> int:
        return (time_ns // self.window_ns + 1) * self.window_ns

    @property
    def next_frame_ns(self) -> int | None:
        return self.frames[0].start_ns if self.frames else None

    def take_frames(self, until_ns: int) -> list[Frame]:
        """The pictures whose time has come."""
        taken = []
        while self.frames and self.frames[0].start_ns <= until_ns:
            taken.append(self.frames.popleft())
        return taken

    @property
    def has_notices(self) -> bool:
        return bool(self.notices) or self.ending is not None

    def take_notices(self, until_ns: int) -> list[Notice]:
        """What has happened; of the end, when its time has come."""
        notices = list(self.notices)
        self.notices.clear()
        if self.ending is not None and self.ending.at_ns <= until_ns:
            notices.append(self.ending)
            self.ending = None
        return notices

    def cut(self, end_ns: int) -> None:
        """Forget what comes at `end_ns` or later."""
        self.frames = deque(frame for frame in self.frames if frame.start_ns < end_ns)
        self.sound.cut(end_ns * SOUND_RATE_HZ // NS_PER_S)
