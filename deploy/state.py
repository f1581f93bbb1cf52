"""Where a running pipeline leaves its traces: one folder per project, for `down`, `ps` and `logs` to find it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class Running:
    """A pipeline that runs: the process that holds it, and its gateway."""

    pid: int
    started_unix_s: float
    url: str


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

    def create(self) -> None:
        """Make the folder, without an earlier run's logs."""
        self.path.parent.mkdir(mode=0o700, exist_ok=True)
        self.path.mkdir(mode=0o700, exist_ok=True)
        self.logs.mkdir(exist_ok=True)
        for log in self.logs.glob("*.log"):
            if not log.samefile("/dev/stderr"):  # `up -d` writes to one already
                log.unlink()

    def write(self, running: Running) -> None:
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
