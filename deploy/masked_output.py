"""The last line of defence: what is logged, and what is said on stderr, holds no secret that this process has read."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from graph.secret import KNOWN, hide


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
