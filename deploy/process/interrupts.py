"""The signals that end a run: Ctrl-C, SIGTERM (docker, systemd, `pipeline down`) and SIGHUP (the terminal is gone).

Rule: they all mean the same, an end in order, and they are for `up` alone: its children take none of them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGAIN_S = 0.02


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """What is started in here, threads and processes, takes none of the signals: the main thread does."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        yield
    finally:
        _take_back()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _take_back() -> None:
    """The handlers that Python knows of count again: Ray, too, takes SIGTERM while it starts, and dies of it."""
    if threading.current_thread() is threading.main_thread():
        for number in ENDING_SIGNALS:
            if (handler := signal.getsignal(number)) is not None:
                signal.signal(number, handler)


class Interrupted(KeyboardInterrupt):
    """One of the signals came. number: the first one's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Interrupts:
    """While sessions run the first signal asks for a graceful end (`count`); while the pipeline starts, and for the
    second, Interrupted is raised. From then on they are ignored: nothing may cut off the clean-up.
    """

    def __init__(self) -> None:
        self.count = 0
        self.graceful = False
        self._first = 0

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
        if self._before[signal.SIGHUP] is signal.SIG_IGN:  # under nohup: the terminal may go
            del self._before[signal.SIGHUP]
        self.listen()
        self._hook_before = sys.unraisablehook
        sys.unraisablehook = self._on_swallowed
        return self

    def listen(self) -> None:
        """Take the signals, also from who has taken them since."""
        for number in self._before:
            signal.signal(number, self._on_signal)

    def __exit__(self, of_type: object, error: BaseException | None, traceback: object) -> None:
        """What was cut off by a signal may say so in its own way, as Ray does: the first signal stands.

        A process that was asked to end is about to: another signal does nothing any more.
        """
        sys.unraisablehook = self._hook_before
        for number, handler in self._before.items():
            signal.signal(number, _do_nothing if self.count else handler)
        if error is not None and not isinstance(error, Interrupted):
            self.check(isinstance(error, KeyboardInterrupt))

    def check(self, is_cut_off: bool = True) -> None:
        """Raise Interrupted where a signal came that somebody has swallowed while the pipeline started."""
        if self.count and (is_cut_off or not self.graceful):
            raise Interrupted(self._first)

    @property
    def is_ctrl_c(self) -> bool:
        """Whether a person has interrupted it, which is told by the exit code; else it was stopped as it should be."""
        return self._first == signal.SIGINT

    def ignore(self) -> None:
        """By doing nothing: of one that is under way already Python prints a traceback where it finds SIG_IGN."""
        for number in self._before:
            signal.signal(number, _do_nothing)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code.co_filename.startswith("<frozen importlib"):
            _send_again(number)  # its callbacks swallow what is raised in them
            return
        self._first = self._first or number
        self.count += 1  # no Event: its lock may be held by the thread which the signal interrupts
        if self.count > 1 or not self.graceful:
            self.ignore()
            raise Interrupted(self._first)

    def _on_swallowed(self, unraisable: sys.UnraisableHookArgs) -> None:
        """What was raised where nothing may be, such as in the callback of a weak reference, comes once more."""
        if not isinstance(unraisable.exc_value, Interrupted):
            self._hook_before(unraisable)
            return
        self.count -= 1
        self.listen()
        _send_again(unraisable.exc_value.number)


def _send_again(number: int) -> None:
    """A moment later."""
    threading.Timer(AGAIN_S, os.kill, (os.getpid(), number)).start()


def _do_nothing(number: int, frame: FrameType | None) -> None:
    pass
