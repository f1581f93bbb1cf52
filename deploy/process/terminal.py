"""What is told to people, and how it leaves the process.

Rule: what is told never steers what runs. A reader that has gone, a full disk or a terminal that stands still costs the
lines, and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import select
import sys
import threading
import time
from types import TracebackType
from typing import Final, Self, TextIO

from deploy.process.interrupts import signals_blocked
from graph.secret import hide

MAX_WAITING: Final = 1000  # lines
STALLED_S: Final = 1.0  # how long the end waits for a terminal that takes nothing
PART_CHARS: Final = 1000  # in UTF-8 no more than a pipe takes that has room, PIPE_BUF


def prepare_standard_files() -> None:
    """Call first of all. A standard file that is closed becomes /dev/null, so that no socket takes its number; what an
    encoding lacks is written as `?` on stdout, and as `\\u95e8` in what is told."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    sys.stdin = sys.stdin or _opened(0)
    sys.stdout = sys.stdout or _opened(1)
    sys.stderr = sys.stderr or _opened(2)
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)


def flush_standard_output() -> None:
    """Call last. What can't be written is told, and exits with 1; a reader that has read enough is no news."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _give_up(1)
        if not isinstance(error, BrokenPipeError):
            tell(f"pipeline: standard output: {error.strerror}")
        sys.exit(1)


def _give_up(number: int) -> None:
    """The interpreter flushes once more at its end, and would exit with 120."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def _opened(number: int) -> TextIO:
    return open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False)


def tell(line: str) -> None:
    """One line on stderr, if it can be written within STALLED_S."""
    text = hide(line) + "\n"
    try:
        for start in range(0, len(text), PART_CHARS):
            if not _has_room(sys.stderr):
                _give_up(2)
                return
            sys.stderr.write(text[start : start + PART_CHARS])
            sys.stderr.flush()
    except OSError:
        _give_up(2)
    except ValueError:  # it is closed
        pass


def _has_room(stream: TextIO) -> bool:
    """Whether it takes a part, now or soon: a pipe that nobody reads would hold us up for ever."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
    except (OSError, ValueError):  # it is no file, or closed
        return True
    return bool(poll.poll(STALLED_S * 1000))


class Teller:
    """Lines for stderr, written by a thread of their own: who tells never waits, and never fails.

    Of a terminal that stands still (Ctrl-S) at most MAX_WAITING lines wait; more are dropped, and their number is told.
    """

    def __init__(self, descriptor: int | None = None, encoding: str | None = None) -> None:
        """descriptor: where to, a duplicate of it is written to; None: stderr."""
        self._descriptor = os.dup(2 if descriptor is None else descriptor)
        self._encoding = encoding or getattr(sys.stderr, "encoding", None) or "utf-8"
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_WAITING)
        self._num_dropped = 0
        self._thread = threading.Thread(target=self._run, name="teller", daemon=True)

    def __enter__(self) -> Self:
        with signals_blocked():
            self._thread.start()
        return self

    def tell(self, line: str) -> None:
        try:
            self._lines.put_nowait(hide(line))
        except queue.Full:
            self._num_dropped += 1

    def __exit__(
        self, of_type: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Waits for what was told, STALLED_S at most."""
        deadline_s = time.monotonic() + STALLED_S
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=STALLED_S)
            self._thread.join(max(0.0, deadline_s - time.monotonic()))
        if not self._thread.is_alive():
            os.close(self._descriptor)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            if dropped := self._num_dropped:
                self._num_dropped -= dropped
                line = f"({dropped} lines were dropped here: nobody took them)\n{line}"
            self._write(line.encode(self._encoding, "backslashreplace") + b"\n")

    def _write(self, text: bytes) -> None:
        """The rest of a line that can't be written is lost; the next one is tried again."""
        while text:
            try:
                text = text[os.write(self._descriptor, text) :]
            except BlockingIOError:
                select.select([], [self._descriptor], [])
            except OSError as error:
                if error.errno != errno.EINTR:
                    return
