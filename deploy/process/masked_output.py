"""The last line of defence: what is logged, and what is said on stderr, holds no secret that this process has read."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, TextIO

from graph.secret import KNOWN, hide

# A path or a user's name may be referred to as well; no process runs without these.
NEEDED_BY_ALL: Final = frozenset({"HOME", "LANG", "LD_LIBRARY_PATH", "LOGNAME", "PATH", "TMPDIR", "USER"})


class MaskingFormatter(logging.Formatter):
    """A log's lines, tracebacks included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return hide(super().format(record))


class MaskedStream:
    """A text stream that shows no secret; all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(hide(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def mask_stderr(arguments: Iterable[str]) -> None:
    """From now on whatever speaks on stderr (we, a library, a traceback) shows no secret of the command line either."""
    for argument in arguments:
        KNOWN.add_text(argument)
    if not isinstance(sys.stderr, MaskedStream):
        sys.stderr = MaskedStream(sys.stderr)


@contextlib.contextmanager
def environment_without_secrets() -> Iterator[None]:
    """What is started in here inherits no variable that a reference has named: its secret is where it is needed."""
    secret = {name: os.environ.pop(name) for name in KNOWN.variables - NEEDED_BY_ALL if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(secret)


def hide_arguments() -> None:
    """Star the secrets among this process's arguments, which every user of the machine may read as long as it runs.

    Linux only, and late by as long as Python takes to start: `${env:…}` and `${file:…}` never stand there.
    """
    try:
        written = Path("/proc/self/cmdline").read_bytes()
        start = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45])  # arg_start, field 48
    except (OSError, ValueError, IndexError):
        return
    starred = KNOWN.star(written)
    if start and starred != written and ctypes.string_at(start, len(written)) == written:
        ctypes.memmove(start, starred, len(starred))
