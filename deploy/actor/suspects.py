"""Whose data an actor was at work on when it died.

Rule: an actor writes down the windows of a batch before it works on it, into a file that outlives it. A session that
was in the work of two deaths of its stage in a row is guilty. Where a batch of several died, each of them goes alone
for a while, so that the next death has one name; should it have several again, the third in a row counts for all. Who
has gone on for a minute is cleared.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from graph.chunk import SessionId
from graph.window import Unit

NOTE_BYTES = 1 << 16  # 256 names of the length that is allowed
LENGTH_BYTES = 4
CLEARED_AFTER_S = (
    60.0  # of a suspect that goes on unharmed: data that kill come again by then, kills from outside may not
)
MAX_NAMED = 3  # windows, in a line for people
NUM_ALONE = 20  # units of a suspect that go without others
DEATHS_OF_ONE, DEATHS_OF_SEVERAL = 2, 3  # in a row, which make one guilty, or several at once


@dataclass(frozen=True, slots=True)
class Work:
    """What an actor is working on: the windows of a batch, each of a session, at one of its stages."""

    stage: str = ""
    windows: tuple[tuple[SessionId, int], ...] = ()

    @property
    def sessions(self) -> frozenset[SessionId]:
        return frozenset(session for session, _ in self.windows)

    @property
    def named(self) -> str:
        """Such as "window 2 of hall, window 3 of yard"."""
        named = [f"window {index} of {session}" for session, index in self.windows[:MAX_NAMED]]
        others = len(self.windows) - len(named)
        return ", ".join(named) + (f" and {others} more" if others else "")


NO_WORK = Work()


class WorkNote:
    """What an actor works on, for whoever looks when it is dead. It costs a few microseconds per batch."""

    def __init__(self, path: Path) -> None:
        with path.open("w+b") as file:
            file.truncate(NOTE_BYTES)
            self._bytes = mmap.mmap(file.fileno(), NOTE_BYTES)  # the kernel's, however this process ends

    @contextmanager
    def of(self, stage: str, units: Iterable[Unit]) -> Iterator[None]:
        lines = [stage, *(f"{unit.index} {unit.session}" for unit in units)]
        names = "\n".join(lines).encode()[: NOTE_BYTES - LENGTH_BYTES]
        self._bytes[LENGTH_BYTES : LENGTH_BYTES + len(names)] = names
        self._bytes[:LENGTH_BYTES] = len(names).to_bytes(LENGTH_BYTES, "little")
        yield
        self._bytes[:LENGTH_BYTES] = bytes(LENGTH_BYTES)  # not where an error has passed that ends the process


def note_path(directory: Path, peer: str) -> Path:
    """peer: the actor's name on the bus, which no other has had."""
    return directory / f"{peer}.work"


def read_note(path: Path) -> Work:
    """What an actor works on, or did when it died; nothing where it is on another machine."""
    try:
        content = path.read_bytes()
    except OSError:
        return NO_WORK
    length = int.from_bytes(content[:LENGTH_BYTES], "little")
    stage, *lines = content[LENGTH_BYTES : LENGTH_BYTES + length].decode(errors="replace").split("\n")
    windows = (line.partition(" ") for line in lines)
    return Work(stage, tuple((SessionId(name), int(index)) for index, _, name in windows if index.isdecimal()))


@dataclass(slots=True)
class _Suspect:
    """num_deaths: in a row, in whose work it was. since_s: the last of them, or when it went on after it."""

    num_deaths: int
    since_s: float


class Suspects:
    """By group of processes, the sessions that were in the work of the last death."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._suspects: dict[str, dict[SessionId, _Suspect]] = {}

    def died(self, group: str, working_on: Iterable[SessionId]) -> list[SessionId]:
        """A process of a group has died; returns the guilty. A death without anybody at work says nothing."""
        before = self._suspects.get(group, {})
        suspects = {session: self._again(before.get(session)) for session in sorted(working_on)}
        if not suspects:
            return []
        again = [session for session, suspect in suspects.items() if suspect.num_deaths >= DEATHS_OF_ONE]
        limit = DEATHS_OF_ONE if len(again) == 1 else DEATHS_OF_SEVERAL
        guilty = [session for session in again if suspects[session].num_deaths >= limit]
        self._suspects[group] = {session: each for session, each in suspects.items() if session not in guilty}
        return guilty

    def is_suspect(self, group: str, session: SessionId) -> bool:
        """It is open again; was it in the work of the last death?"""
        suspect = self._suspects.get(group, {}).get(session)
        if suspect is not None:
            suspect.since_s = self._now_s()
        return suspect is not None

    def _again(self, before: _Suspect | None) -> _Suspect:
        is_cleared = before is None or self._now_s() - before.since_s > CLEARED_AFTER_S
        return _Suspect(1 if is_cleared or before is None else before.num_deaths + 1, self._now_s())
