"""Where a running pipeline leaves its traces: one folder per project, for `down`, `ps` and `logs` to find it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
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
        _own(self.path.parent)
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
        _own(self.path.parent)
        _own(self.path)
        self.logs.mkdir(exist_ok=True)
        for log in self.logs.glob("*.log"):
            if not log.samefile("/dev/stderr"):  # `up -d` writes to one already
                log.unlink()

    def write(self, running: Running) -> None:
        whole = self.file.with_suffix(".new")  # who reads meanwhile sees none or all
        whole.unlink(missing_ok=True)
        whole.touch(mode=0o600, exist_ok=False)
        whole.write_text(json.dumps(asdict(running)), encoding="utf-8")
        whole.replace(self.file)

    def read(self) -> Running | None:
        """The pipeline of this project, if it really runs; a stale file counts as none, and another user's folder."""
        try:
            if not (_is_own(self.path.parent) and _is_own(self.path)):
                return None
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


def _own(folder: Path) -> None:
    """Make a folder that its user alone may use. Raises StateError where there is one which others may use."""
    folder.mkdir(mode=0o700, exist_ok=True)
    if not _is_own(folder):
        raise StateError(f"{folder} is not this user's alone; remove it, or set TMPDIR to another folder")


def _is_own(folder: Path) -> bool:
    """Anybody may make a folder in /tmp, and leave a description of a pipeline there that is none of ours."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
