"""What is not whole of a source: which warnings are news, and the running totals of what was damaged.

Rule: a warning is given once per source, track and code, however often its cause comes back; the totals count them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Final

from stages.media.wire import Progress, TrackName, WarnCode, Warned

_ENDS: Final[dict[WarnCode, WarnCode]] = {"track_back": "track_frozen", "track_frozen": "track_back"}


class News:
    """Which warnings have not been given yet. A state that has changed back and forth is news each time, and so is each
    bad picture, which the message names; their number is their sender's business."""

    def __init__(self) -> None:
        self._given: set[tuple[TrackName, WarnCode, str]] = set()

    def is_new(self, warned: Warned) -> bool:
        """Whether this one is to be passed on; then it has been given."""
        key = (warned.track, warned.code, warned.message if warned.code == "bad_picture" else "")
        if key in self._given:
            return False
        self._given.add(key)
        if warned.code in _ENDS:
            self._given.discard((warned.track, _ENDS[warned.code], ""))
        return True


class Warner:
    """The decoder's side: sends what is news."""

    def __init__(self, put: Callable[[Warned], None]) -> None:
        self._put = put
        self._news = News()

    def warn(self, track: TrackName, code: WarnCode, message: str) -> None:
        """message: one sentence for the source's owner, without passwords."""
        warned = Warned(track, code, message)
        if self._news.is_new(warned):
            self._put(warned)


@dataclass(frozen=True, slots=True)
class Totals:
    """Since the source's session began, over all its connections; see Progress."""

    num_gaps: int = 0
    num_bad_video: int = 0
    num_bad_audio: int = 0

    def plus(self, progress: Progress) -> Totals:
        return Totals(*(getattr(self, total.name) + getattr(progress, total.name) for total in fields(self)))


class Health:
    """The parent's side: one source over all its connections."""

    def __init__(self) -> None:
        self.news = News()
        self.totals = Totals()
        self._before = Totals()  # of the connections that are closed

    def connect(self) -> None:
        """A new connection counts from 0."""
        self._before = self.totals

    def count(self, progress: Progress) -> None:
        self.totals = self._before.plus(progress)
