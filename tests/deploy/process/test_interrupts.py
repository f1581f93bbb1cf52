"""deploy/process/interrupts.py: Ctrl-C, whatever it cuts into."""

import ctypes
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress

import pytest
from typer import Exit

from deploy.cli.common import clear_errors
from deploy.process.interrupts import ENDING_SIGNALS, Interrupted, Interrupts, signals_blocked

LIBC = ctypes.CDLL(None)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """After a signal they stay without effect, which is right for a process that ends."""
    before = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


PRESS_CTRL_C = compile("signal.raise_signal(signal.SIGINT)", "<frozen importlib._bootstrap>", "exec")


def test_while_the_pipeline_starts_it_is_raised():
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert interrupts.count == 1


def test_where_it_would_be_swallowed_it_is_raised_a_moment_later():
    with Interrupts() as interrupts:
        exec(PRESS_CTRL_C)
        assert interrupts.count == 0
        with pytest.raises(KeyboardInterrupt):
            time.sleep(60)
    assert interrupts.count == 1


def test_what_the_callback_of_a_weak_reference_swallows_is_raised_a_moment_later_without_a_word(
    capfd: pytest.CaptureFixture[str],
):
    class Handler:
        pass

    with Interrupts() as interrupts:
        handler = Handler()
        reference = weakref.ref(handler, lambda _: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            del handler
            time.sleep(60)
    assert (interrupts.count, reference()) == (1, None)
    assert capfd.readouterr().err == ""


def test_what_others_could_not_raise_is_told_as_before(monkeypatch: pytest.MonkeyPatch):
    raised: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: raised.append(unraisable.exc_value))

    class Broken:
        def __del__(self) -> None:
            raise ValueError("gone")

    with Interrupts():
        del (broken := [Broken()])[0]
    assert [str(error) for error in raised] == ["gone"] and broken == []


def test_while_sessions_run_the_first_is_counted_and_the_second_raised():
    with Interrupts() as interrupts:
        interrupts.graceful = True
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert interrupts.count == 2


def test_who_has_taken_the_signals_since_loses_them_again():
    with Interrupts() as interrupts:
        interrupts.graceful = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        interrupts.listen()
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.count == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_all_that_ends_a_run_asks_for_the_same_end(number: signal.Signals):
    with Interrupts() as interrupts:
        interrupts.graceful = True
        signal.raise_signal(number)
        assert interrupts.count == 1
        with pytest.raises(Interrupted) as second:
            signal.raise_signal(signal.SIGINT)
    assert second.value.number == number, "the first one says how it ended"
    assert interrupts.is_ctrl_c == (number == signal.SIGINT)


def test_under_nohup_the_terminal_may_go():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interrupts() as interrupts:
        interrupts.listen()
        signal.raise_signal(signal.SIGHUP)
        interrupts.ignore()
    assert interrupts.count == 0
    assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 0)], ids=lambda value: str(value)
)
def test_a_start_that_is_stopped_is_no_mistake_and_one_that_is_interrupted_is_told(number: signal.Signals, code: int):
    with pytest.raises(Exit) as end, clear_errors(), Interrupts():
        signal.raise_signal(number)
    assert end.value.exit_code == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 0)])
def test_a_library_that_makes_an_error_of_its_own_of_a_signal_changes_no_exit_code(number: signal.Signals, code: int):
    with pytest.raises(Exit) as end, clear_errors(), Interrupts():
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None  # as Ray does, which knows one of them only
    assert end.value.exit_code == code


def test_a_signal_that_was_swallowed_while_the_pipeline_started_is_not_lost():
    with pytest.raises(Interrupted) as end, Interrupts() as interrupts:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        interrupts.check()
    assert end.value.number == signal.SIGTERM


def test_who_takes_a_signal_while_children_are_started_loses_it_before_it_can_come():
    with Interrupts() as interrupts:
        interrupts.graceful = True
        with signals_blocked():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            LIBC.signal(signal.SIGTERM, 0)  # below Python, as libraries in C do: its default ends the process
        assert interrupts.count == 1


def test_of_two_signals_at_once_the_second_says_nothing(monkeypatch: pytest.MonkeyPatch):
    said: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", said.append)
    with Interrupts(), pytest.raises(Interrupted), signals_blocked():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    time.sleep(0)  # what is pending is taken by now
    assert said == []


def test_until_the_process_has_ended_a_second_signal_does_nothing():
    with suppress(Interrupted), Interrupts():
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)  # by default it would end us here


def test_who_was_asked_for_no_end_gives_the_signals_back():
    before = [signal.getsignal(number) for number in ENDING_SIGNALS]
    with Interrupts():
        assert [signal.getsignal(number) for number in ENDING_SIGNALS] != before
    assert [signal.getsignal(number) for number in ENDING_SIGNALS] == before
