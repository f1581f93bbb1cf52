"""What is printed in a process that nobody looks at goes to its log."""

from __future__ import annotations

import io
import logging
import sys


def log_what_is_printed() -> None:
    """From now on each line that `print()` writes is a line of the log."""
    sys.stdout = _Log()
    logging.captureWarnings(True)


class _Log(io.TextIOBase):
    def __init__(self) -> None:
        self._line = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            logging.getLogger("print").info("%s", line)
        return len(text)
