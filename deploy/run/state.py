"""Where a running pipeline leaves its traces: one folder per project, for `down`, `ps` and `logs` to find it.

Rule: that it runs, and where, is known by what lives as long as it does (deploy/run/claim.py). Files are for people.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from deploy.run.claim import Claim, Claimed, ask
from graph.errors import GraphError

SOCKET_PATH_BYTES = 107
# Ray's longest: ray/session_2026-01-01_00-00-00_123456_4194304/sockets/plasma_store. Ours are shorter.
LONGEST_BELOW_BYTES = 68
CLEANER_S = 1.0  # who cleans /tmp holds a folder's lock for a moment while it looks


class StateError(GraphError):
    """Another process runs the pipeline of this folder."""


@dataclass(frozen=True, slots=True)
class Running:
    """A pipeline that runs: the process that holds it, its gateway, and what the gateway wants to be told before it
    changes anything. folder: where its logs are, which may be another one than ours when TMPDIR is."""

    pid: int
    url: str
    token: str = ""
    folder: str = ""


class StateFolder:
    """`<tmp>/omni-<uid>/<project>`, mode 0700; short, since sockets lie in it. A project is a folder to start from."""

    def __init__(self, project: Path) -> None:
        self._project = project
        self._claim: Claim | None = None
        self._written = ""
        name = hashlib.sha256(os.fsencode(project.resolve())).hexdigest()[:8]
        self.path = _base(len(name)) / name

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def file(self) -> Path:
        """What `read` answers, for scripts: the pid, the gateway's address and its token."""
        return self.path / "running.json"

    @property
    def logs_of_last_run(self) -> Path:
        """Of what runs, wherever that leaves them; else of what ran here."""
        running = self.read()
        return self.logs if running is None else Path(running.folder) / "logs"

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Keep every other `up` out, from its first check until everything is gone. The kernel lets go after a kill.

        Raises StateError, which names the process that holds it.
        """
        try:
            self._claim = Claim(self._project)
        except Claimed as error:
            raise StateError(_why_claimed(error)) from None
        try:
            with self._locked():
                yield
        finally:
            self._claim.release()
            self._claim = None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Who cleans /tmp by age leaves a locked folder alone, with all below (tmpfiles.d(5)). And who can't see our
        claim, in another container with this folder, sees the lock."""
        _own(self.path.parent)
        _own(self.path)
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            deadline_s = time.monotonic() + CLEANER_S
            while not _lock(folder):
                if time.monotonic() > deadline_s:
                    raise StateError(f"another pipeline, in another container, uses {self.path}; set TMPDIR to another")
                time.sleep(0.05)
            yield
        finally:
            os.close(folder)

    def create(self) -> None:
        """Make the folder, without an earlier run's logs."""
        _own(self.path.parent)
        _own(self.path)
        self.logs.mkdir(exist_ok=True)
        stderr = os.fstat(2)
        for log in self.logs.glob("*.log"):
            if not os.path.samestat(log.stat(), stderr):  # `up -d` writes to one already
                log.unlink()

    def write(self, running: Running) -> None:
        """From now on `read` finds it, as long as this process holds the folder."""
        assert self._claim is not None, "who writes holds"
        self._written = json.dumps(asdict(running))
        self._claim.says = self._written.encode()
        self.file.unlink(missing_ok=True)  # of one that was killed
        self.keep()

    def keep(self) -> None:
        """Write the file once more where somebody has removed it; without room for it, it stays away."""
        if self._written and not self.file.exists():
            with contextlib.suppress(OSError):
                self._make_folders()
                whole = self.file.with_suffix(".new")  # who reads meanwhile sees none or all
                whole.unlink(missing_ok=True)
                whole.touch(mode=0o600, exist_ok=False)
                whole.write_text(self._written, encoding="utf-8")
                whole.replace(self.file)

    def _make_folders(self) -> None:
        for folder in (self.path.parent, self.path, self.logs):
            folder.mkdir(mode=0o700, exist_ok=True)

    def read(self) -> Running | None:
        """The pipeline of this project, if one runs and is through with its checks.

        Raises StateError when it runs and does not answer.
        """
        answer = ask(self._project)
        if answer is None or answer.text == b"":
            return None
        if answer.text is None:
            raise StateError(f"the pipeline of this folder (pid {answer.pid}) does not answer; is it stopped (Ctrl-Z)?")
        try:
            return Running(**json.loads(answer.text))
        except (ValueError, TypeError):
            raise StateError(f"pid {answer.pid} runs another version of this pipeline; end it first") from None

    def holder(self) -> int | None:
        """The process that starts, runs or ends a pipeline of this project; 0: it can't be seen from here."""
        answer = ask(self._project)
        return None if answer is None else answer.pid

    def forget(self) -> None:
        """The pipeline is gone; its logs stay."""
        self._written = ""
        if self._claim is not None:
            self._claim.says = b""
        self.file.unlink(missing_ok=True)
        bus = self.path / "bus"
        if bus.is_dir():
            for socket in bus.iterdir():
                socket.unlink(missing_ok=True)
            bus.rmdir()


def _why_claimed(error: Claimed) -> str:
    if error.uid != os.getuid():
        return f"a process of another user (pid {error.pid}, uid {error.uid}) keeps the name of this folder"
    return f"a pipeline of this folder is starting or running already (pid {error.pid})"


def _base(name_bytes: int) -> Path:
    """The user's folder for all projects: below TMPDIR, or where a socket's path would become too long, /tmp."""
    user = f"omni-{os.getuid()}"
    room = SOCKET_PATH_BYTES - LONGEST_BELOW_BYTES - len(user) - name_bytes - 3
    theirs = _temporary_folder()
    for folder in (theirs, "/tmp", "/var/tmp"):
        if len(os.fsencode(folder)) <= room and os.access(folder, os.W_OK | os.X_OK):
            return Path(folder) / user
    raise StateError(
        f"TMPDIR: {theirs} has more than {room} bytes, so that no socket can lie in it, and /tmp can't be written to; "
        "set TMPDIR to a shorter folder"
    )


def _temporary_folder() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:
        raise StateError("no folder for temporary files can be written to; set TMPDIR to one that can") from None


def _lock(folder: int) -> bool:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: then nothing cleans it by them
        return True
    return True


def _own(folder: Path) -> None:
    """Make a folder that its user alone may use. Raises StateError where there is one which others may use."""
    if not folder.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
    if not _is_own(folder):
        raise StateError(f"{folder} is not this user's alone; remove it, or set TMPDIR to another folder")


def _is_own(folder: Path) -> bool:
    """Anybody may make a folder in /tmp."""
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
