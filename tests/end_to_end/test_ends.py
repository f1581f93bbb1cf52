"""Ends that come from outside, to one process or to all, and what a run lives through before."""

import os
import pty
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from graph.ledger import REASONS
from tests.support.pipeline import PIPELINE, Place, Run, new_place, wait_for

pytestmark = pytest.mark.ray

YARD = ("--camera", "yard=test://pattern?seed=5")
THEIRS = ("deploy", "graph", "ray", "numpy", "torch", "av", "sitecustomize")

PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "grpc_proxy")
NO_PROXY_THERE = dict.fromkeys(PROXIES, "http://127.0.0.1:1")


def is_exact(run: Run) -> bool:
    accounts = run.ledger().values()
    return all(a["in_flight"] == 0 for a in accounts) and all(
        a["accepted"] == a["delivered"] + sum(a["dropped"][reason] for reason in REASONS) for a in accounts
    )


def send_to_all(place: Place, pid: int, number: int) -> None:
    """As systemd does it: to every process of the service, decoders in sessions of their own included."""
    for process in (*place.watch(pid), psutil.Process(pid)):
        process.send_signal(number)


@dataclass(frozen=True, slots=True)
class Lived:
    """What a run went through, and what the commands said meanwhile."""

    run: Run
    added: Run
    listed: Run
    second: Run
    leftovers: list[str]


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Lived]:
    """In a folder with namesakes of what we import, and with proxies that none of our own calls shall take. Who reads
    what it says leaves after two lines (`| head -2`); a camera is added; its files in /tmp are cleaned away; all its
    processes are stopped and go on (Ctrl-Z, fg); then SIGTERM comes to every process."""
    with new_place(tmp_path_factory.mktemp("lived"), cache) as place:
        for name in THEIRS:
            (place.folder / f"{name}.py").write_text("raise SystemExit('the wrong one')")
        process = place.start("up", *YARD, "--out", "run", PYTHONIOENCODING="ascii", **NO_PROXY_THERE)
        read_two_lines(process)
        place.wait_for_window(0)
        added = place.run("camera", "add", "door=test://pattern?seed=6", **NO_PROXY_THERE)
        clean_away_files(place)
        listed, second = place.run("ps"), place.run("up", *YARD, TMPDIR="/tmp")
        stop_and_continue(place, process.pid, seconds=3.0)
        through = len((place.folder / "run" / "windows.jsonl").read_text().splitlines())
        wait_for(lambda: len((place.folder / "run" / "windows.jsonl").read_text().splitlines()) >= through + 4)
        send_to_all(place, process.pid, signal.SIGTERM)
        yield Lived(place.finish(process), added, listed, second, place.leftovers())


def read_two_lines(process: "subprocess.Popen[str]") -> None:
    assert process.stderr is not None
    for _ in range(2):
        process.stderr.readline()
    process.stderr.close()


def clean_away_files(place: Place) -> None:
    (folder,) = place.tmp.glob("omni-*/*")
    (folder / "running.json").unlink()
    shutil.rmtree(folder / "logs")


def stop_and_continue(place: Place, pid: int, seconds: float) -> None:
    processes = (psutil.Process(pid), *place.watch(pid))
    for process in processes:
        process.suspend()
    time.sleep(seconds)
    for process in processes:
        process.resume()


def test_a_reader_that_has_gone_costs_what_is_told_and_nothing_else(lived: Lived) -> None:
    assert (lived.added.returncode, lived.added.stderr) == (0, "camera door: added\n")
    assert lived.run.windows("door")


def test_without_its_files_it_is_found_and_a_second_one_is_refused(lived: Lived) -> None:
    assert lived.listed.returncode == 0, lived.listed.stderr
    assert "door" in lived.listed.stdout
    assert lived.second.returncode == 1
    assert "running already (pid" in lived.second.stderr


def test_after_all_its_processes_were_stopped_it_goes_on(lived: Lived) -> None:
    windows = lived.run.windows("yard")
    assert [window["index"] for window in windows] == list(range(len(windows)))
    assert lived.run.rows("events.jsonl", "yard")
    assert not lived.run.events("yard", "recovered"), "no actor was taken for dead"


def test_sigterm_to_every_process_is_an_end_in_order(lived: Lived) -> None:
    assert lived.run.returncode == 0
    assert is_exact(lived.run)
    assert not [event for session in ("yard", "door") for event in lived.run.events(session, "camera_lost")]
    assert lived.leftovers == []


@pytest.fixture
def fresh(tmp_path: Path, cache: Path) -> Iterator[Place]:
    with new_place(tmp_path / "project", cache) as new:
        yield new


def test_a_terminal_that_closes_is_an_end_in_order(fresh: Place) -> None:
    settings = ("--set", "console.listen=127.0.0.1:0", "--set", "model=tiny", "--set", "window.lateness=20s")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(fresh.folder)
        os.execve(PIPELINE, ["pipeline", "up", *YARD, *settings, "--out", "run"], fresh.environment)
    fresh.wait_for_window(0)
    fresh.watch(pid)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert is_exact(Run(0, "", "", fresh.folder / "run"))
    assert fresh.leftovers() == []


def test_sigterm_to_every_process_while_ray_starts_leaves_nothing_behind(fresh: Place) -> None:
    process = fresh.start("up", *YARD)
    wait_for(lambda: [child for child in fresh.watch(process.pid) if child.name() == "raylet"])
    send_to_all(fresh, process.pid, signal.SIGTERM)
    run = fresh.finish(process)
    assert (run.returncode, run.stderr.splitlines()[-1]) == (0, "pipeline: interrupted")
    assert fresh.leftovers() == []
