"""Where heard speech goes: what an output is, and the one that writes WAV."""

from __future__ import annotations

import wave
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from graph.chunk import NS_PER_S
from stages.disk import Disk, is_removed
from stages.rates import SPEECH_RATE_HZ

MAX_PART_S = 12 * 3600  # 2.07 GB: below 2 GiB, which is as far as some readers of RIFF count


@dataclass(frozen=True, slots=True)
class OutputEvent:
    """What an output has to tell: an event's type and its fields."""

    kind: str
    attrs: Mapping[str, float | str]


class Output(Protocol):
    """Where samples go when they are heard. One that fails tells it once and takes all the rest without a word."""

    def write(self, at_ns: int, samples: np.ndarray) -> list[OutputEvent]: ...
    def advance(self, now_ns: int) -> list[OutputEvent]: ...
    def close(self, end_ns: int) -> None: ...


class WavOutput:
    """16-bit mono WAV on the session's axis; silence where nothing was heard.

    After max_part_s it goes on in `<session>.2.wav`, `.3.wav` …, each from where the last one ended. What it tells:

    recording_continues  file, seconds: the next part, and where on the session's axis it begins; the first part, too,
                         where begin_ns is given: the process that recorded before has died, and its parts are kept
    recording_failed     file, reason: nothing more is written (disk full)
    recording_lost       file, seconds, reason: somebody has removed a part, which held so much. It is made anew, and
                         goes on from there (recording_continues)

    One in which nothing came to be, not even silence, is taken away when it is closed.
    Raises OSError when the first file can't be made.
    """

    def __init__(self, path: Path, max_part_s: int = MAX_PART_S, begin_ns: int | None = None) -> None:
        """begin_ns: where on the axis it begins that takes another one's place."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._first = self._path = path
        self._num_parts = 1
        self._news: list[OutputEvent] = []
        self._num_samples = 0 if begin_ns is None else begin_ns * SPEECH_RATE_HZ // NS_PER_S  # of the axis, all parts
        if begin_ns is not None:
            while self._path.exists():
                self._path = self._part(self._num_parts + 1)
                self._num_parts += 1
            self._news = [self._continues(begin_ns / NS_PER_S)]
        self._file: _WavFile | None = _open_wav(self._path)  # None: failed
        self._part_samples = self._room = max_part_s * SPEECH_RATE_HZ

    def write(self, at_ns: int, samples: np.ndarray) -> list[OutputEvent]:
        pcm = np.clip(samples * 32767.0, -32768, 32767).astype("<i2")
        return self._pad(at_ns) + self._append(pcm)

    def advance(self, now_ns: int) -> list[OutputEvent]:
        """Nothing was heard up to now: silence of whole seconds; the rest comes with what follows."""
        events, self._news = self._news, []
        while self._missing(now_ns) >= SPEECH_RATE_HZ:
            events += self._append(np.zeros(SPEECH_RATE_HZ, "<i2"))
        return events

    def close(self, end_ns: int) -> None:
        self._pad(end_ns)
        self._close()
        if not self._num_samples:
            with suppress(OSError):
                self._path.unlink()

    def _missing(self, at_ns: int) -> int:
        return at_ns * SPEECH_RATE_HZ // NS_PER_S - self._num_samples

    def _pad(self, at_ns: int) -> list[OutputEvent]:
        events = self.advance(at_ns)
        missing = self._missing(at_ns)
        if missing > 1:  # one alone is rounding: speech that goes on has no gap
            events += self._append(np.zeros(missing, "<i2"))
        return events

    def _append(self, pcm: np.ndarray) -> list[OutputEvent]:
        self._num_samples += len(pcm)  # the axis goes on, recorded or not
        if self._file is None:
            return []
        try:
            return self._record(self._file, pcm)
        except OSError as error:
            self._close()
            return [OutputEvent("recording_failed", {"file": self._path.name, "reason": str(error)})]

    def _record(self, file: _WavFile, pcm: np.ndarray) -> list[OutputEvent]:
        events: list[OutputEvent] = []
        begin_s = (self._num_samples - len(pcm)) / SPEECH_RATE_HZ
        if file.is_removed:
            lost: dict[str, float | str] = {
                "file": self._path.name,
                "seconds": file.getnframes() / SPEECH_RATE_HZ,
                "reason": "was removed",
            }
            file = self._begin_file()
            events.append(OutputEvent("recording_lost", lost))
            events.append(self._continues(begin_s))
        while len(pcm):
            if self._room == 0:
                file = self._next_part()
                begin_s = (self._num_samples - len(pcm)) / SPEECH_RATE_HZ
                events.append(self._continues(begin_s))
            block, pcm = pcm[: self._room], pcm[self._room :]
            file.writeframes(block.tobytes())
            self._room -= len(block)
        return events

    def _begin_file(self) -> _WavFile:
        self._close()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._room = _open_wav(self._path), self._part_samples
        return self._file

    def _next_part(self) -> _WavFile:
        self._num_parts += 1
        self._path = self._part(self._num_parts)
        return self._begin_file()

    def _part(self, number: int) -> Path:
        return self._first if number == 1 else self._first.with_suffix(f".{number}.wav")

    def _continues(self, begin_s: float) -> OutputEvent:
        return OutputEvent("recording_continues", {"file": self._path.name, "seconds": begin_s})

    def _close(self) -> None:
        file, self._file = self._file, None
        with suppress(OSError):  # what could not be written has been told of
            if file is not None:
                file.close()


class QueuedOutput:
    """An output whose disk waits for nobody's loop: what is heard is handed to a thread, what it tells comes later.

    What the disk is too slow for is silence in it, of which `recording_lost` tells once: file, seconds until then.
    """

    def __init__(self, disk: Disk, path: Path, *, lossless: bool, begin_ns: int | None = None) -> None:
        """lossless: in virtual time who writes waits. begin_ns: see WavOutput.

        Raises OSError when the file can't be made, or not in time.
        """
        self._disk, self._path, self._lossless = disk, path, lossless
        self._opened: list[WavOutput] = []  # the thread's
        self._events: deque[OutputEvent] = deque()
        self._lost_samples = 0
        self._loss_reported = False
        self._advanced_s = 0  # silence is written by whole seconds
        try:
            disk.call(lambda: self._opened.append(WavOutput(path, begin_ns=begin_ns)))
        except OSError:
            self.close(0)  # where it is made after all
            raise

    def write(self, at_ns: int, samples: np.ndarray) -> list[OutputEvent]:
        if not self._put(lambda output: self._events.extend(output.write(at_ns, samples)), samples.nbytes):
            self._lost_samples += len(samples)
        return self._news()

    def advance(self, now_ns: int) -> list[OutputEvent]:
        if now_ns // NS_PER_S > self._advanced_s:
            self._advanced_s = now_ns // NS_PER_S
            self._put(lambda output: self._events.extend(output.advance(now_ns)))
        return self._news()

    def close(self, end_ns: int) -> None:
        self._put(lambda output: output.close(end_ns))

    def _put(self, job: Callable[[WavOutput], object], num_bytes: int = 0) -> bool:
        def work() -> None:
            for output in self._opened:
                job(output)

        return self._disk.put(work, num_bytes, wait=self._lossless)

    def _news(self) -> list[OutputEvent]:
        news: list[OutputEvent] = []
        while self._events:
            news.append(self._events.popleft())
        if self._lost_samples and not self._loss_reported:
            self._loss_reported = True
            seconds = self._lost_samples / SPEECH_RATE_HZ
            news.append(OutputEvent("recording_lost", {"file": self._path.name, "seconds": seconds}))
        return news


class _WavFile(wave.Wave_write):
    """Closes the file that it writes to."""

    def __init__(self, file: BinaryIO) -> None:
        self._opened = file
        super().__init__(file)

    @property
    def is_removed(self) -> bool:
        return is_removed(self._opened)

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._opened.close()


def _open_wav(path: Path) -> _WavFile:
    file = _WavFile(path.open("wb"))
    file.setnchannels(1)
    file.setsampwidth(2)
    file.setframerate(SPEECH_RATE_HZ)
    return file
