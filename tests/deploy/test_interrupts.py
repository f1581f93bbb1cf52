"""deploy/interrupts.py: Ctrl-C, whatever it cuts into."""

import signal
import time

import pytest

from deploy.interrupts import Interrupts

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
