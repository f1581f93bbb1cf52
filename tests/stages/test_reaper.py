"""stages/media/reaper.py: who ends a process does not wait for it."""

import subprocess
import sys

from stages.media.reaper import Reaper

STUBBORN = "import signal; signal.signal(signal.SIGUSR1, signal.SIG_IGN)"
POLITE = "import signal, sys; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))"


def process(code: str) -> subprocess.Popen[bytes]:
    code += "; import time; print('up', flush=True); time.sleep(60)"
    started = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert started.stdout is not None
    assert started.stdout.readline() == b"up\n"
    started.stdout.close()
    return started


class FakeProcess:
    """A process which hangs in the kernel: no signal ends it, until it is let go."""

    stdin = None

    def __init__(self) -> None:
        self.status: int | None = None
        self.signals: list[str] = []

    def poll(self) -> int | None:
        return self.status

    def terminate(self) -> None:
        self.signals.append("term")

    def kill(self) -> None:
        self.signals.append("kill")


def test_a_process_that_says_goodbye_is_not_killed():
    reaper, ending = Reaper(), process(POLITE)
    reaper.end(ending, goodbye_s=30.0)
    assert reaper.settle(20.0)
    assert ending.returncode == 7
    assert ending.stdin is not None and ending.stdin.closed


def test_a_process_that_does_not_go_is_killed():
    reaper, ending = Reaper(), process(STUBBORN)
    reaper.end(ending, goodbye_s=0.05)
    assert reaper.settle(20.0)
    assert ending.returncode == -9


def test_a_process_that_hangs_in_the_kernel_holds_nobody_up():
    # Given: one which not even SIGKILL ends.
    reaper, stuck = Reaper(), FakeProcess()
    reaper.end(stuck, goodbye_s=0.0)  # type: ignore[arg-type]
    after = process(POLITE)
    reaper.end(after, goodbye_s=30.0)
    assert not reaper.settle(0.0)
    # Then: the next one is ended all the same, and the stuck one is taken when it lets go.
    assert after.wait(20.0) == 7
    assert stuck.signals == ["kill"]
    stuck.status = -9
    assert reaper.settle(20.0)


def test_one_thread_serves_all():
    reaper = Reaper()
    processes = [process(POLITE) for _ in range(3)]
    for ending in processes:
        reaper.end(ending, goodbye_s=30.0)
    thread = reaper._thread
    assert reaper.settle(20.0)
    assert {ending.returncode for ending in processes} == {7}
    assert reaper._thread is thread
