"""The parts of a run: each a process of its own, with a time that it never passes, and what it has found until then.

Rule: a part gives entries (a key and what was measured) as it finds them. Each is in the file as soon as it is there:
whatever becomes of the part, of the device, or of us, costs what comes later and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from threading import Thread, Timer
from typing import Any, Final

from tests.benchmarks.gpu import ROOT, environment

Entry = tuple[str, Any]
"""Where it belongs in the record, and what was measured. A key that ends with [] has a list, which it is added to."""

AGAIN_S: Final = 10.0  # with less time a part is not begun again
RESERVE_S: Final = 10.0  # of the whole time: to end processes, and for whoever reads the file


@dataclass(frozen=True, slots=True)
class Request:
    """What a part is to measure. until_s: of the monotonic clock; then it is ended. skip: what was tried before, by a
    process that has died of the last of it."""

    part: str
    size: str
    device: str
    until_s: float
    skip: tuple[str, ...] = ()

    @property
    def left_s(self) -> float:
        return self.until_s - time.monotonic()

    @property
    def is_tiny(self) -> bool:
        return self.size == "tiny"


@dataclass(frozen=True, slots=True)
class Part:
    """share: of the whole time, at most. spares: what it leaves to those behind it, seconds of eight minutes.
    again: begun again without what it was at, where its process has died."""

    name: str
    module: str
    share: float
    spares_s: float = 0.0
    again: bool = False


PARTS: Final = (
    Part("machine", f"{__package__}.machine", 0.1),
    Part("stages", f"{__package__}.measured", 0.3, again=True),
    Part("pipeline", f"{__package__}.whole", 1.0, spares_s=45.0),
    Part("sequential", f"{__package__}.sequential", 1.0),
)


class Record:
    """What was measured, in a file that is whole at any time."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {**header, "stages_measured": [], "cells": [], "problems": []}
        self.save()

    def add(self, key: str, value: Any) -> None:
        if key.endswith("[]"):
            self.content.setdefault(key[:-2], []).append(value)
        elif key == "profile" and key in self.content:  # of a part that was begun again: what it had stays
            self.content[key] = {**value, "stages": {**self.content[key]["stages"], **value["stages"]}}
        else:
            self.content[key] = value
        self.save()

    def save(self) -> None:
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        beside.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.path)


def run_parts(record: Record, size: str, device: str, minutes: float, names: Sequence[str]) -> None:
    """All parts, in their order, within this time."""
    begun_s = time.monotonic()
    whole_s = minutes * 60 - min(RESERVE_S, 0.1 * minutes * 60)
    for part in (part for part in PARTS if part.name in names):
        spares_s = part.spares_s * minutes / 8
        now_s = time.monotonic()
        until_s = min(now_s + part.share * whole_s, begun_s + whole_s - spares_s)
        if until_s - now_s < 1:
            record.add("problems[]", {"part": part.name, "problem": "no time was left for it"})
            continue
        _run(record, part, Request(part.name, size, device, until_s))
        record.add("seconds", {**record.content.get("seconds", {}), part.name: round(time.monotonic() - now_s, 1)})


def command_for(request: str) -> list[str]:
    """What runs a part."""
    return [sys.executable, "-m", "tests.benchmarks.gpu", "--part", request]


def _run(record: Record, part: Part, request: Request) -> None:
    """A part, begun again behind that at which its process died."""
    while True:
        tried, problem = _run_once(record, request)
        if problem:
            record.add("problems[]", {"part": part.name, "at": tried[-1] if tried else "", "problem": problem})
        if not (problem and part.again and tried and request.left_s > AGAIN_S):
            return
        request = replace(request, skip=(*request.skip, *tried))


def _run_once(record: Record, request: Request) -> tuple[list[str], str]:
    """Returns what it has tried, and what ended it; "" where it came to its end."""
    tried: list[str] = []
    process: subprocess.Popen[bytes] | None = None
    timer: Timer | None = None
    try:
        process = subprocess.Popen(
            command_for(json.dumps(asdict(request))),
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,  # where we are gone, it closes: see `_end_with_parent`
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdout is not None
        timer = Timer(max(request.left_s, 0.1), _kill, [process])
        timer.start()
        for line in process.stdout:
            key, value = json.loads(line)
            if key == "at":
                tried.append(value)
            elif key == "problem":
                record.add("problems[]", {"part": request.part, **value})
            else:
                record.add(key, value)
        code = process.wait()
    finally:
        if timer is not None:
            timer.cancel()
        if process is not None:
            _kill(process)
    if not code:
        return tried, ""
    return tried, "its time was over" if request.left_s <= 0.5 else f"its process ended with {code}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """And what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def serve(written: str) -> None:
    """In the part's process: measure, and say each entry as a line."""
    Thread(target=_end_with_parent, name="dead man's end", daemon=True).start()
    fields = json.loads(written)
    request = Request(**{**fields, "skip": tuple(fields["skip"])})
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no entry
    part = next(part for part in PARTS if part.name == request.part)
    for entry in _entries(part, request):
        print(json.dumps(entry), file=out, flush=True)


def _end_with_parent() -> None:
    """Where standard input closes, who asked is gone: so is this process at once, with all that it has started."""
    while os.read(0, 1):
        pass
    with contextlib.suppress(ProcessLookupError):  # no group of ours: it was started by hand
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def _entries(part: Part, request: Request) -> Iterator[Entry]:
    try:
        yield from import_module(part.module).measure(request)
    except Exception as error:
        import traceback

        traceback.print_exc()
        yield "problem", {"problem": f"{type(error).__name__}: {error}"}
