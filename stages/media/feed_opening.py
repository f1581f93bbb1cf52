"""Opening a source beside the loop that reads all of them: a path on a dead network disk, or a slow start of a decoder,
costs that source alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from graph.chunk import NS_PER_S
from stages.media.reader import MediaError, MediaReader

PATIENCE_NS = 15 * NS_PER_S  # a disk that sleeps wakes up in less

Opener = Callable[[Callable[[], MediaReader]], "Future[MediaReader]"]


def at_once(job: Callable[[], MediaReader]) -> Future[MediaReader]:
    """Do it now, in this thread."""
    future: Future[MediaReader] = Future()
    try:
        future.set_result(job())
    except BaseException as error:  # as an executor does: whoever asks for the result is told
        future.set_exception(error)
    return future


def in_thread(job: Callable[[], MediaReader]) -> Future[MediaReader]:
    """Do it in a thread of its own, which nobody waits for: one that hangs in the kernel can't be ended."""
    future: Future[MediaReader] = Future()

    def work() -> None:
        future.set_running_or_notify_cancel()
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="open", daemon=True).start()
    return future


class Opening:
    """A reader that is being opened."""

    def __init__(self, future: Future[MediaReader], now_ns: int) -> None:
        self._future = future
        self._since_ns = now_ns
        self._is_overdue = False

    @property
    def done(self) -> bool:
        return self._future.done()

    def reader(self) -> MediaReader:
        """Raises MediaError when it could not be opened. Only when done."""
        return self._future.result()

    def becomes_overdue(self, now_ns: int) -> bool:
        """Once: it takes longer than anything that works."""
        if self._is_overdue or now_ns < self._since_ns + PATIENCE_NS:
            return False
        self._is_overdue = True
        return True

    def abandon(self) -> None:
        """Nobody wants it any more: it is closed when it comes."""
        self._future.add_done_callback(_close)


def _close(future: Future[MediaReader]) -> None:
    with suppress(MediaError):
        future.result().close()
