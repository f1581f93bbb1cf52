"""Where a running pipeline leaves its traces: one folder per project, for `down`, `ps` and `logs` to find it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from graph.errors import GraphError


class StateError(GraphError):
    """Another process runs the pipeline of this folder."""


@dataclass(frozen=True, slots=True)
class Running:
    """A pipeline that runs: the process that holds it, its gateway, and what the gateway wants to be told before it
    changes anything."""

    pid: int
    started_unix_s: float
    url: str
    token: str = ""


class StateFolder:
    """`<tmp>/omni-<uid>/<project>`, mode 0700; short, since sockets lie in it. A project is a folder to start from."""

    def __init__(self, project: Path) -> None:
        name = hashlib.sha256(str(project.resolve()).encode()).hexdigest()[:8]
        self.path = Path(tempfile.gettempdir()) / f"omni-{os.getuid()}" / name

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def file(self) -> Path:
        return self.path / "running.json"

    @property
    def lock(self) -> Path:
        """Stays when nothing runs: who removes a lock may remove another one's."""
        return self.path.with_suffix(".lock")

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Keep every other `up` out, from its first check until everything is gone. The kernel lets go after a kill.

        Raises StateError, which names the process that holds it.
        """
        self.path.parent.mkdir(mode=0o700, exist_ok=True)
        with self.lock.open("a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                message = f"a pipeline of this folder is starting or running already (pid {lock.read()})"
                raise StateError(message) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def create(self) -> None:
        """Make the folder, without an earlier run's logs."""
        self.path.parent.mkdir(mode=0o700, exist_ok=True)
        self.path.mkdir(mode=0o700, exist_ok=True)
        self.logs.mkdir(exist_ok=True)
        for log in self.logs.glob("*.log"):
            if not log.samefile("/dev/stderr"):  # `up -d` writes to one already
                log.unlink()

    def write(self, running: Running) -> None:
        self.file.touch(mode=0o600)
        self.file.write_text(json.dumps(asdict(running)), encoding="utf-8")

    def read(self) -> Running | None:
        """The pipeline of this project, if it really runs; a stale file counts as none."""
        try:
            running = Running(**json.loads(self.file.read_text(encoding="utf-8")))
            process = psutil.Process(running.pid)
        except (OSError, ValueError, TypeError, psutil.NoSuchProcess):
            return None
        # A pid is used again after a while; a process that is younger than the file is another one.
        return running if process.create_time() <= running.started_unix_s + 1 else None

    def forget(self) -> None:
        """The pipeline is gone; its logs stay."""
        self.file.unlink(missing_ok=True)
        bus = self.path / "bus"
        if bus.is_dir():
            for socket in bus.iterdir():
                socket.unlink(missing_ok=True)
            bus.rmdir()
