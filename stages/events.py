"""Events: what is worth telling, written as it comes: events.jsonl, windows.jsonl and the transcript."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from graph.chunk import NS_PER_MS, NS_PER_S, Chunk, Scalar, SessionId
from graph.kinds import WINDOW_EVENT
from graph.stage_type import In
from graph.window import Unit
from stages.disk import Disk, is_removed
from stages.kinds import EVENTS
from stages.light import LightOptions
from stages.session import Session
from stages.stage import Stage, StageError

SAID_EVENT = "said"  # by the model, at its window's end
HEARD_EVENT = "heard"  # by the listener, when it began to sound


class Events(Stage):
    """Writes what is worth telling, as it comes.

    events.jsonl    one line per event: session, time_s (event time), type, and its fields
    windows.jsonl   one line per window: session, index, start_s, end_s, digest, missing, failed (stages that raised
                    at it), latency_s, on_time, lead_s (speech received and not yet heard), stages
    transcript.txt  one line per word chunk: when it was heard, of which session, what was said
                    (where nothing speaks: when it was written)

    out: the folder they are written to, None: nowhere (a session may run without).
    A file that is removed meanwhile is made anew, and goes on from there.
    A file that can't be written to (disk full) is given up, and the session goes on; `lost` counts its lines since, and
    those for which the disk was too slow.
    """

    events = In(EVENTS, many=True)
    scope = "pipeline"  # sessions share files
    Options = LightOptions
    is_local = True
    can_be_off = False

    def __init__(self, disk: Disk | None = None) -> None:
        self._disk = disk or Disk()
        self._lines = _Lines()  # the disk's thread has it, and nobody else
        self._too_slow: Counter[Path] = Counter()
        self._open: dict[SessionId, Session] = {}

    @property
    def lost(self) -> Counter[Path]:
        """Lines that were not written, by file."""
        return self._lines.lost + self._too_slow

    def open_session(self, session: Session) -> None:
        """Raises StageError when the files can't be made."""
        out = session.out
        if out is not None:
            try:
                self._disk.call(lambda: self._lines.begin(out, anew=session.resume_ns is None))
            except OSError as error:
                self._close_folder(out)
                reason = error.strerror or str(error)
                raise StageError(f"events: {out} can't be written to: {reason}; name another --out") from error
        self._open[session.id] = session

    def close_session(self, session: SessionId) -> None:
        """Close the files with the last session that writes to their folder. The last of all waits for the disk."""
        state = self._open.pop(session, None)
        if state is None or state.out is None:
            return
        self._close_folder(state.out)
        if not self._open and not self._disk.drain():
            logging.error("events: the disk is too slow for what was left to write")

    def process(self, units: list[Unit]) -> list[Chunk]:
        for unit in units:
            session = self._open[unit.session]
            for chunk in unit.of(self.events) if session.out is not None else ():
                for name, line in _written(session, chunk):
                    self._append(session, session.out / name, line)  # type: ignore[operator]
        return []

    def _append(self, session: Session, path: Path, line: str) -> None:
        if not self._disk.put(lambda: self._lines.append(path, line), len(line), wait=not session.paced):
            if path not in self._too_slow:
                logging.error("events: the disk is too slow: lines of %s are lost", path)
            self._too_slow[path] += 1

    def _close_folder(self, out: Path) -> None:
        if out not in [session.out for session in self._open.values()]:
            self._disk.put(lambda: self._lines.close(out))


class _Lines:
    """Files that lines are appended to."""

    def __init__(self) -> None:
        self.lost: Counter[Path] = Counter()
        self._files: dict[Path, TextIO] = {}
        self._removed: set[Path] = set()  # the folders of which files were; logged once
        self._begun: set[Path] = set()  # a session may open when another of the same folder has ended already

    def begin(self, out: Path, *, anew: bool) -> None:
        """anew: what the folder's files hold is of an earlier run. Raises OSError."""
        out.mkdir(parents=True, exist_ok=True)
        for path in (out / name for name in ("events.jsonl", "windows.jsonl", "transcript.txt")):
            if not anew:
                self._begun.add(path)
            self._write(path, "")

    def append(self, path: Path, line: str) -> None:
        if path in self.lost:
            self.lost[path] += 1
            return
        try:
            self._write(path, line)
        except OSError as error:
            logging.error("events: %s is given up: %s", path, error)
            self._close(path)
            self.lost[path] += 1

    def close(self, out: Path) -> None:
        for path in [path for path in self._files if path.parent == out]:
            self._close(path)

    def _close(self, path: Path) -> None:
        file = self._files.pop(path, None)
        with suppress(OSError):  # what could not be written is counted
            if file is not None:
                file.close()

    def _write(self, path: Path, text: str) -> None:
        if path in self._files and is_removed(self._files[path]):
            self._make_anew(path)
        if path not in self._files:
            self._files[path] = path.open("a" if path in self._begun else "w", encoding="utf-8")
            self._begun.add(path)
        self._files[path].write(text)
        self._files[path].flush()

    def _make_anew(self, path: Path) -> None:
        self._close(path)
        if path.parent not in self._removed:
            logging.error("events: %s was removed during the run: it is made anew, what it held is lost", path)
            self._removed.add(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)


def _written(session: Session, chunk: Chunk) -> list[tuple[str, str]]:
    """What an event is in which file."""
    kind = chunk.attrs.get("type")
    if kind == WINDOW_EVENT:
        return [("windows.jsonl", _json_line(chunk.session, window_row(chunk.attrs)))]
    row: dict[str, object] = {"time_s": chunk.start_ns / NS_PER_S, **chunk.attrs}
    written = [("events.jsonl", _json_line(chunk.session, row))]
    if kind == (HEARD_EVENT if session.speech else SAID_EVENT) and chunk.attrs.get("text"):
        written.append(("transcript.txt", _spoken_line(chunk)))
    return written


def window_row(attrs: Mapping[str, Scalar]) -> dict[str, object]:
    """A row of windows.jsonl from the attrs of a window event (deploy/actor/sink.py makes them)."""
    row: dict[str, object] = {key: value for key, value in attrs.items() if key != "type"}
    for name in ("missing", "failed"):
        row[name] = [each for each in str(attrs.get(name, "")).split(",") if each]
    for name in ("stages", "compute"):
        row[name] = json.loads(str(attrs.get(name, "{}")))
    return row


def clock(at_ns: int) -> str:
    """12.345 s as 00:12.345."""
    minutes, rest_ns = divmod(max(at_ns, 0), 60 * NS_PER_S)
    return f"{minutes:02d}:{rest_ns // NS_PER_MS / 1000:06.3f}"


def _spoken_line(chunk: Chunk) -> str:
    end_ns = chunk.start_ns + round(float(chunk.attrs.get("seconds") or 0.0) * NS_PER_S)
    return f"{clock(chunk.start_ns)} - {clock(end_ns)}  [{chunk.session}] {chunk.attrs.get('text')}\n"


def _json_line(session: SessionId, row: Mapping[str, object]) -> str:
    """JSON has no NaN and no infinity: they are null."""
    fields = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
    return json.dumps({"session": session, **fields}, ensure_ascii=False, allow_nan=False) + "\n"
