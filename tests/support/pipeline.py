"""`pipeline` as a user runs it: real processes, real sockets, real media, in a place where every trace can be seen."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

PIPELINE = Path(sys.executable).parent / "pipeline"
MARK = "OMNI_TEST_PLACE"
PATIENCE_S = 400.0  # a hang is to be found, no slow machine: two cores that run three pipelines each take 140 s for one


@dataclass(frozen=True, slots=True)
class Run:
    """What a run left behind: its answer, and the files of `--out`."""

    returncode: int
    stdout: str
    stderr: str
    out: Path

    def rows(self, name: str, session: str | None = None) -> list[dict[str, Any]]:
        """The lines of windows.jsonl or events.jsonl, of one session or all."""
        rows = [json.loads(line) for line in (self.out / name).read_text().splitlines()]
        return [row for row in rows if session in (None, row["session"])]

    def windows(self, session: str) -> list[dict[str, Any]]:
        return self.rows("windows.jsonl", session)

    def events(self, session: str, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.rows("events.jsonl", session) if row["type"] == kind]

    def digests(self, session: str) -> list[str]:
        return [row["digest"] for row in self.windows(session)]

    def transcript(self, session: str) -> list[str]:
        lines = (self.out / "transcript.txt").read_text().splitlines()
        return [line for line in lines if f"[{session}]" in line]

    def ledger(self) -> dict[str, Any]:
        return dict(json.loads((self.out / "ledger.json").read_text()))

    def speech(self, session: str) -> tuple[int, np.ndarray]:
        """(rate in Hz, samples int16 [n]) of the session's WAV."""
        with wave.open(str(self.out / f"{session}.wav"), "rb") as file:
            assert (file.getnchannels(), file.getsampwidth()) == (1, 2)
            return file.getframerate(), np.frombuffer(file.readframes(file.getnframes()), "<i2")


@dataclass(slots=True)
class Place:
    """A folder to run `pipeline` from, with a temporary folder of its own: sockets, logs and Ray's files lie there.

    Every process that is started here carries a mark in its environment; decoders, which inherit none, are known as
    children of the others (`watch`).
    """

    folder: Path
    cache: Path
    tmp: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    shared_memory: set[str] = field(default_factory=lambda: _shared_memory())
    seen: set[psutil.Process] = field(default_factory=set)
    started: "list[subprocess.Popen[str]]" = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        ours = {"TMPDIR": str(self.tmp), "XDG_CACHE_HOME": str(self.cache), MARK: self.mark, "OMP_NUM_THREADS": "1"}
        return kept | ours

    def start(self, *arguments: object, **changes: str) -> "subprocess.Popen[str]":
        """The command, in a process group of its own, as a shell would start it.

        Unless told, `up` gets a free port and the tiny model, and gives nothing up because the machine is busy.
        """
        process = subprocess.Popen(
            [str(PIPELINE), *map(str, _completed(arguments))],
            cwd=self.folder,
            env=self.environment | changes,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        self.started += [process] if arguments[:1] == ("up",) else []
        return process

    def finish(self, process: "subprocess.Popen[str]", out: str = "run") -> Run:
        """Wait for the end, keeping an eye on its processes."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                stdout, stderr = process.communicate(timeout=1.0)
                return Run(process.returncode, stdout, stderr, self.folder / out)
            except subprocess.TimeoutExpired:
                self.watch(process.pid)
                if time.monotonic() > deadline_s:
                    os.killpg(process.pid, signal.SIGKILL)
                    raise AssertionError(self._hung(process, self.folder / out)) from None

    def _hung(self, process: "subprocess.Popen[str]", out: Path) -> str:
        """What there is to say of a run which does not end."""
        stdout, stderr = process.communicate()
        files = [*self.tmp.glob("omni-*/*/logs/*.log"), out / "windows.jsonl"]
        tails = [f"{path.name}: ...{path.read_text()[-600:]}" for path in files if path.is_file()]
        return "\n".join([f"no end after {PATIENCE_S:g} s: {process.args}", stdout[-600:], stderr[-2000:], *tails])

    def run(self, *arguments: object, out: str = "run", **changes: str) -> Run:
        return self.finish(self.start(*arguments, **changes), out)

    def up(self, *arguments: object, out: str = "run") -> Run:
        """`pipeline up … --out`, to its end."""
        return self.run("up", *arguments, "--out", out, out=out)

    def url(self) -> str:
        """The gateway of the pipeline that runs here; waits until it is ready."""
        return str(self.state()["url"])

    def state(self) -> dict[str, Any]:
        """What the pipeline that starts here says of itself: pid, url."""
        (path, *_) = wait_for(lambda: list(self.tmp.glob("omni-*/*/running.json")))
        return dict(wait_for(lambda: _json_of(path)))

    def wait_for_window(self, index: int, out: str = "run") -> None:
        """Until every session that has begun is through with a window."""
        path = self.folder / out / "windows.jsonl"

        def is_there() -> bool:
            self._check_running()
            rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
            through = {row["session"] for row in rows if row["index"] >= index}
            return bool(rows) and through == {row["session"] for row in rows}

        wait_for(is_there)

    def _check_running(self) -> None:
        """Fails at once where every pipeline has ended that was started here: what is waited for will not come."""
        if self.started and all(process.poll() is not None for process in self.started):
            last = self.started[-1]
            raise AssertionError(f"it has ended ({last.returncode}): {last.communicate()[1][-2000:]}")

    def watch(self, pid: int) -> list[psutil.Process]:
        """The descendants of a process that runs; they are remembered."""
        try:
            children = psutil.Process(pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self.seen |= set(children)
        return children

    def processes(self) -> list[psutil.Process]:
        """What still runs of all that was started here."""
        marked = {process for process in psutil.process_iter() if self._is_marked(process)}
        return [process for process in marked | self.seen if _is_alive(process)]

    def leftovers(self, patience_s: float = 20.0) -> list[str]:
        """Processes, sockets, shared memory and Ray's files that outlived the run; kernels take a moment to bury."""
        deadline_s = time.monotonic() + patience_s
        while (leftovers := self._leftovers()) and time.monotonic() < deadline_s:
            time.sleep(0.2)
        return leftovers

    def close(self) -> None:
        """End whatever a failed test left, and remove the temporary folder."""
        for process in self.processes():
            process.kill()
        shutil.rmtree(self.tmp, ignore_errors=True)

    def _leftovers(self) -> list[str]:
        return [
            *(f"process {process.pid}: {_command_line(process)}" for process in self.processes()),
            *(f"socket {path}" for path in self.tmp.rglob("*") if path.is_socket()),
            *(f"file {path}" for path in self.tmp.glob("omni-*/*/*") if path.name != "logs"),
            *(f"shared memory {name}" for name in _unheld(_shared_memory() - self.shared_memory)),
        ]

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            return process.pid != os.getpid() and process.environ().get(MARK) == self.mark
        except psutil.Error:
            return False


@contextmanager
def new_place(folder: Path, cache: Path) -> Iterator[Place]:
    """A place to run in. Its temporary folder has a short name: the path of a socket has 107 bytes at most."""
    folder.mkdir(parents=True, exist_ok=True)
    place = Place(folder, cache, Path(tempfile.mkdtemp(prefix="e2e-", dir="/tmp")))
    try:
        yield place
    finally:
        place.close()


def wait_for(ask: Any, timeout_s: float = PATIENCE_S) -> Any:
    """The first answer that is true."""
    deadline_s = time.monotonic() + timeout_s
    while not (answer := ask()):
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.1)
    return answer


def _json_of(path: Path) -> Any:
    """Its content; None while it is being written."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _completed(arguments: tuple[object, ...]) -> tuple[object, ...]:
    if arguments[:1] != ("up",):
        return arguments
    written = " ".join(map(str, arguments))
    defaults = {"console.listen=": "127.0.0.1:0", "model=": "tiny", "window.lateness=": "20s", "shedding.": "ladder=[]"}
    settings = [name + value for name, value in defaults.items() if name not in written]
    return (*arguments, *(word for setting in settings for word in ("--set", setting)))


def _shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def _unheld(names: set[str]) -> set[str]:
    """Of these, what no living process has mapped: other programs on this machine share memory as well."""
    if not names:
        return names
    maps = "".join(_maps_of(pid) for pid in psutil.pids())
    return {name for name in names if f"/dev/shm/{name}" not in maps}


def _maps_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:120]
    except psutil.Error:
        return "?"
