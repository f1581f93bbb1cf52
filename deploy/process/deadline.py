"""How long something may take that several have a share in."""

from __future__ import annotations

import time
from collections.abc import Callable


class Deadline:
    """A moment on the monotonic clock. It is handed on, so that who comes last has what the others have left."""

    def __init__(self, after_s: float, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._at_s = now_s() + after_s

    @property
    def left_s(self) -> float:
        """0 once it is over."""
        return max(self._at_s - self._now_s(), 0.0)

    @property
    def is_over(self) -> bool:
        return self.left_s == 0.0

    def share(self, most_s: float) -> Deadline:
        """So long from now, or to the end of this one."""
        return Deadline(min(most_s, self.left_s), self._now_s)
