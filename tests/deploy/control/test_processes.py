"""deploy/control/processes.py: the coordinator's procedures over plain processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from deploy.actor.plan import ActorPlan, Call
from deploy.control.calls import ActorDied, CallError
from deploy.control.coordinator import Coordinator
from deploy.control.placement import Process
from deploy.control.processes import Processes
from graph.chunk import NS_PER_S, SessionId
from graph.sections import StageOptions
from stages.stage import StageError
from tests.support.sessions import make_session
from tests.support.written import ROOT, written_spec

USES = {
    "ticker": "tests.support.ticking:Ticker",
    "counter": "tests.support.ticking:Counter",
    "events": "stages.events:Events",
}
SAID = {"window": {"length": "100ms", "lateness": "10s"}, "stages": {name: {"wait": "0s"} for name in USES}}
PATIENCE_S = 60.0


@contextmanager
def running(folder: Path) -> Iterator[tuple[Coordinator, Processes, list[str]]]:
    lines: list[str] = []
    processes = Processes()
    coordinator = Coordinator(written_spec(USES, SAID), Path("none"), folder, processes, lines.append)
    try:
        coordinator.start()
        yield coordinator, processes, lines
    finally:
        coordinator.stop()
        processes.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: a socket's path has 107 bytes."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="omni", dir="/tmp") as made:
        yield Path(made)


def until(is_so: Callable[[], bool], coordinator: Coordinator) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline_s, "it never came"
        coordinator.poll()
        time.sleep(0.05)


def counted(folder: Path, camera: str = "hall") -> list[dict[str, int]]:
    path = folder / "out" / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row for row in rows if row["session"] == camera and row["type"] == "counted"]


def bare(folder: Path, name: str = "one.0") -> tuple[Process, ActorPlan]:
    process = Process(name, 0, {"one": StageOptions()}, is_local=True)
    return process, ActorPlan(name, name, 0, {}, (), (), folder, folder / "bus", folder / f"{name}.log")


def test_sessions_open_pass_their_windows_and_end(folder: Path) -> None:
    with running(folder) as (coordinator, _, _):
        length_ns = NS_PER_S
        sessions = [
            make_session(n, out=folder / "out", window_ns=100_000_000, duration_ns=length_ns) for n in ("hall", "shop")
        ]
        coordinator.open_sessions(sessions)
        until(lambda: not coordinator.sessions, coordinator)
        ledger = coordinator.end()
    windows = [row["window"] for row in counted(folder)]
    assert windows == list(range(10))
    assert len(counted(folder, "shop")) == 10
    assert all(account.in_flight == 0 for account in ledger.values())
    assert ledger["ticker.sound->counter.sound"].delivered == 20


def test_a_session_that_is_told_to_end_ends(folder: Path) -> None:
    with running(folder) as (coordinator, _, _):
        coordinator.open_sessions([make_session("hall", out=folder / "out", window_ns=100_000_000)])
        until(lambda: len(counted(folder)) > 2, coordinator)
        coordinator.end_session(SessionId("hall"))
        until(lambda: not coordinator.sessions, coordinator)


def test_a_session_for_which_a_stage_has_no_room_is_refused_in_its_words(folder: Path) -> None:
    with running(folder) as (coordinator, _, _):
        with pytest.raises(StageError, match="no room for session 'refused'"):
            coordinator.open_sessions([make_session("refused")])
        assert coordinator.sessions == []


def test_an_actor_that_is_killed_is_started_again_and_its_sessions_go_on_there(folder: Path) -> None:
    with running(folder) as (coordinator, _, lines):
        coordinator.open_sessions([make_session("hall", out=folder / "out", window_ns=100_000_000)])
        until(lambda: len(counted(folder)) > 2, coordinator)
        killed = coordinator.actors["counter.0"].pid
        os.kill(killed, signal.SIGKILL)
        until(lambda: any(row["pid"] != killed for row in counted(folder)), coordinator)
        assert coordinator.actors["counter.0"].pid != killed
        assert any("counter.0" in line and "killed by signal 9" in line for line in lines)
        before = max(row["window"] for row in counted(folder) if row["pid"] == killed)
        after = [row["window"] for row in counted(folder) if row["pid"] != killed]
        assert after[0] > before and after == list(range(after[0], after[0] + len(after)))


def test_stopping_leaves_no_process(folder: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    with running(folder) as (coordinator, _, _):
        pids = [address.pid for address in coordinator.actors.values()]
        assert all(psutil.pid_exists(pid) for pid in pids)
    assert set(psutil.Process().children(recursive=True)) - before == set()


def test_an_actor_that_hangs_holds_up_nobody_and_is_killed_at_the_end(folder: Path) -> None:
    with running(folder) as (coordinator, _, _):
        coordinator.begin_to_open(make_session("hanging", window_ns=100_000_000), lambda: None)
        for _ in range(5):
            coordinator.poll()
        assert set(coordinator.actors) == {"ticker.0", "counter.0", "io.0"}
        actors = [psutil.Process(address.pid) for address in coordinator.actors.values()]
    assert not any(actor.is_running() for actor in actors)


def test_actors_die_with_their_parent(folder: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from tests.deploy.control.test_processes import running\n"
        f"with running(Path({str(folder)!r})) as (coordinator, _, _):\n"
        "    print(*[a.pid for a in coordinator.actors.values()], flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        actors = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(actors) == 3
    _, alive = psutil.wait_procs(actors, timeout=PATIENCE_S)
    assert alive == []


def test_an_actor_that_can_not_start_says_why(folder: Path) -> None:
    processes = Processes()
    (folder / "bus").write_text("a file is in the way")
    handle = processes.replace(*bare(folder))
    reference = processes.perform(handle, [Call("address", ())])
    while not processes.finished([reference], 1.0):
        pass
    with pytest.raises((ActorDied, CallError), match="bus"):
        processes.answers("one.0", reference)
    processes.close()


def test_who_asks_a_dead_actor_hears_at_once_that_it_is_dead(folder: Path) -> None:
    processes = Processes()
    handle = processes.replace(*bare(folder))
    processes.kill(handle)
    reference = processes.perform(handle, [Call("address", ())])
    while not processes.finished([reference], 1.0):
        pass
    with pytest.raises(ActorDied, match=r"one\.0 has died: killed by signal 9"):
        processes.answers("one.0", reference)
    processes.close()
