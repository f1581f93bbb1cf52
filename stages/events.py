"""Events: what is worth telling, written as it comes: events.jsonl, windows.jsonl and the transcript."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from graph.chunk import NS_PER_MS, NS_PER_S, Chunk, Scalar, SessionId
from graph.streams import EVENTS
from graph.window import Unit
from stages.stage import Session, Stage

WINDOW_EVENT = "window"
SAID_EVENT = "said"  # by the model, at its window's end
HEARD_EVENT = "heard"  # by the listener, when it began to sound


class Events(Stage):
    """Sink of `events`.

    events.jsonl    one line per event: session, time_s (event time), type, and its fields
    windows.jsonl   one line per window: session, index, start_s, end_s, digest, missing, failed (stages that raised
                    at it), latency_s, on_time, lead_s (speech received and not yet heard), stages
    transcript.txt  one line per word chunk: when it was heard, of which session, what was said
                    (where nothing speaks: when it was written)

    out: the folder they are written to, None: nowhere (a session may run without).
    A file that can't be written to (disk full) is given up, and the session goes on; `lost` counts its lines since.
    """

    windowed = False

    def __init__(self) -> None:
        self.lost: Counter[Path] = Counter()
        self._files: dict[Path, TextIO] = {}
        self._begun: set[Path] = set()  # a session may open when another of the same folder has ended already
        self._out: dict[SessionId, Path | None] = {}
        self._spoken: dict[SessionId, str] = {}  # the event that the transcript tells of

    def open_session(self, session: Session) -> None:
        self._out[session.id] = session.out
        self._spoken[session.id] = HEARD_EVENT if session.speech else SAID_EVENT
        if session.out is not None:
            session.out.mkdir(parents=True, exist_ok=True)
            for name in ("events.jsonl", "windows.jsonl", "transcript.txt"):
                self._write(session.out / name, "")

    def close_session(self, session: SessionId) -> None:
        """Close the files with the last session that writes to their folder."""
        out = self._out.pop(session, None)
        self._spoken.pop(session, None)
        if out is None or out in self._out.values():
            return
        for path in [path for path in self._files if path.parent == out]:
            self._close(path)

    def process(self, units: list[Unit]) -> list[Chunk]:
        for unit in units:
            out = self._out.get(unit.session)
            for chunk in unit.of(EVENTS) if out is not None else ():
                self._record(out, chunk)  # type: ignore[arg-type]
        return []

    def _record(self, out: Path, chunk: Chunk) -> None:
        kind = chunk.attrs.get("type")
        if kind == WINDOW_EVENT:
            self._append(out / "windows.jsonl", _json_line(chunk.session, window_row(chunk.attrs)))
            return
        row: dict[str, object] = {"time_s": chunk.start_ns / NS_PER_S, **chunk.attrs}
        self._append(out / "events.jsonl", _json_line(chunk.session, row))
        if kind == self._spoken[chunk.session] and chunk.attrs.get("text"):
            self._append(out / "transcript.txt", _spoken_line(chunk))

    def _append(self, path: Path, line: str) -> None:
        if path in self.lost:
            self.lost[path] += 1
            return
        try:
            self._write(path, line)
        except OSError:
            self._close(path)
            self.lost[path] += 1

    def _close(self, path: Path) -> None:
        file = self._files.pop(path, None)
        with suppress(OSError):  # what could not be written is counted
            if file is not None:
                file.close()

    def _write(self, path: Path, text: str) -> None:
        if path not in self._files:
            self._files[path] = path.open("a" if path in self._begun else "w", encoding="utf-8")
            self._begun.add(path)
        self._files[path].write(text)
        self._files[path].flush()


def window_row(attrs: Mapping[str, Scalar]) -> dict[str, object]:
    """A row of windows.jsonl from the attrs of a window event (deploy/sink.py makes them)."""
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
    return json.dumps({"session": session, **row}, ensure_ascii=False) + "\n"
