"""Decoder processes as their owner has them: started by forking, watched and signalled through a pidfd.

A pidfd means that process and no later one of its number, whoever has reaped it. It takes Linux 5.3.

The fork server (stages/media/fork_server.py) is started with the first decoder of a process. It ends when nobody wants
one for long, and may die: running decoders live on, and the next one starts another fork server.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Final

FORK: Final = b"f"  # a request: this byte, with NUM_DESCRIPTORS descriptors
NUM_DESCRIPTORS: Final = 3  # where the order comes from, where items go, where reports go
REPORT: Final = struct.Struct(
    "<i"
)  # first the process id, with a pidfd, or minus errno of a fork; then the exit status
UNKNOWN_STATUS: Final = 255  # of a decoder that ended after its fork server
PIPE_BYTES: Final = 1 << 18  # a kernel buffer which holds 4 s of sound, or 40 % of a 448x448 frame
START_S: Final = 60.0  # for a fork server to import what decoders need; that takes long on a busy machine
END_S: Final = 5.0  # for a fork server to end with all that it has forked


class DecoderProcess:
    """A decoder, as `subprocess.Popen` has its processes.

    stdin: its lifeline, and where its order goes. stdout: its items.
    """

    def __init__(self, pid: int, pidfd: int, stdin: io.FileIO, stdout: io.FileIO, reports: socket.socket) -> None:
        """Owns all descriptors; they close with stdin, stdout, and the first `poll()` that finds the process ended."""
        self.pid = pid
        self.stdin = stdin
        self.stdout = stdout
        self.returncode: int | None = None
        self._handle = io.FileIO(pidfd)
        self._reports = reports

    def poll(self) -> int | None:
        """The exit status, minus the signal's number where one ended it; None while it runs."""
        if self.returncode is None and self._has_ended():
            try:
                report = self._reports.recv(REPORT.size, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None  # its fork server is about to say
            except OSError:
                report = b""
            self.returncode = REPORT.unpack(report)[0] if report else UNKNOWN_STATUS
            self._handle.close()
            self._reports.close()
        return self.returncode

    def _has_ended(self) -> bool:
        return bool(select.select([self._handle], [], [], 0)[0])

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle.fileno(), number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """Forks decoders, from any thread; starts the process that does it when there is none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: _Running | None = None

    @property
    def pid(self) -> int | None:
        """The process that decoders are forked from, if it was started; it may have ended."""
        return self._running.process.pid if self._running is not None else None

    def fork(self, timeout_s: float) -> DecoderProcess:
        """A decoder that waits for its order. OSError when the system gives no process, pipe or answer in time."""
        try:
            return self._fork(timeout_s)
        except ConnectionError:  # it has died, or has just ended because nobody wanted it
            return self._fork(timeout_s)

    def _fork(self, timeout_s: float) -> DecoderProcess:
        with self._lock:
            running = self._running = self._running or _Running()
        try:
            return running.fork(timeout_s)
        except (ConnectionError, TimeoutError):
            with self._lock:
                self._running = None if self._running is running else self._running
            running.kill()
            raise

    def close(self) -> None:
        """End the fork server, and the decoders which are left of it; the next decoder starts another one."""
        with self._lock:
            running, self._running = self._running, None
        if running is not None:
            running.close()


class _Running:
    """One fork server. It hears of our end by the socket's; a thread waits for its end, so that it is no zombie."""

    def __init__(self) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = _start(theirs)
        self._waiting = threading.Thread(target=self.process.wait, name="fork-server", daemon=True)
        self._waiting.start()
        self._has_answered = False

    def fork(self, timeout_s: float) -> DecoderProcess:
        """ConnectionError when the fork server has ended, TimeoutError when it does not answer."""
        with contextlib.ExitStack() as stack:
            order, stdin = _pipe(stack)
            stdout, items = _pipe(stack)
            reports, reporter = (stack.enter_context(end) for end in socket.socketpair(type=socket.SOCK_SEQPACKET))
            with contextlib.suppress(PermissionError):  # this user's pipes take much memory: then it stays small
                fcntl.fcntl(items, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            patience_s = timeout_s if self._has_answered else max(timeout_s, START_S)
            self._requests.settimeout(patience_s)
            reports.settimeout(patience_s)
            try:
                socket.send_fds(self._requests, [FORK], [order.fileno(), items.fileno(), reporter.fileno()])
                for end in (order, items, reporter):  # so that the end of theirs is an end
                    end.close()
                pid, pidfd = _first_report(reports)
                self._has_answered = True
            except TimeoutError:
                raise TimeoutError(errno.ETIMEDOUT, "its fork server does not answer") from None
            stack.pop_all()
        return DecoderProcess(pid, pidfd, stdin, stdout, reports)

    def kill(self) -> None:
        self._requests.close()
        self.process.kill()

    def close(self) -> None:
        self._requests.close()
        self._waiting.join(END_S)
        if self._waiting.is_alive():
            self.process.kill()


def _pipe(stack: contextlib.ExitStack) -> tuple[io.FileIO, io.FileIO]:
    read, write = os.pipe()
    return stack.enter_context(io.FileIO(read, "rb")), stack.enter_context(io.FileIO(write, "wb"))


def _first_report(reports: socket.socket) -> tuple[int, int]:
    """The decoder's process id and pidfd."""
    report, descriptors, _, _ = socket.recv_fds(reports, REPORT.size, 1, socket.MSG_CMSG_CLOEXEC)
    if not report:
        raise ConnectionResetError(errno.ECONNRESET, "its fork server has ended")
    (number,) = REPORT.unpack(report)
    if number < 0:
        raise OSError(-number, os.strerror(-number))
    return number, descriptors[0]


def _start(requests: socket.socket) -> subprocess.Popen[bytes]:
    """A fork server in a session of its own, with nothing of our environment: no proxies, no tokens."""
    environment = {
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "MALLOC_TRIM_THRESHOLD_": "131072",  # bytes: what was freed of a picture goes back to the system
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",  # which would start threads when it is imported
    }
    return subprocess.Popen(
        # -P: a file called av.py in the working directory is not the PyAV we want.
        [sys.executable, "-P", "-s", "-m", "stages.media.fork_server"],
        stdin=requests.fileno(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        close_fds=True,
        start_new_session=True,
        cwd="/",
        env=environment | {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ},
    )


FORK_SERVER: Final = ForkServer()
"""Of this process."""
