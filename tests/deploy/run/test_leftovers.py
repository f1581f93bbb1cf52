"""deploy/run/leftovers.py: what a killed pipeline has left is found and ended, and nothing else."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from deploy.cli.app import app
from deploy.run.leftovers import end_left, left_running
from deploy.run.state import StateFolder

SLEEP = shutil.which("sleep") or "/bin/sleep"


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StateFolder:
    (tmp_path / "t").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    monkeypatch.setattr("deploy.run.state.SOCKET_PATH_BYTES", 1000)  # pytest's folders have long names
    folder = StateFolder(tmp_path)
    folder.create()
    return folder


@pytest.fixture
def start() -> Iterator[Callable[[str, Path], psutil.Process]]:
    with ExitStack() as stack:

        def start_one(title: str, folder: Path) -> psutil.Process:
            process = stack.enter_context(subprocess.Popen([title, "600"], executable=SLEEP, cwd=folder))
            stack.callback(process.kill)
            return psutil.Process(process.pid)

        yield start_one


Start = Callable[[str, Path], psutil.Process]


def test_what_a_killed_pipeline_has_left_is_ended_and_nothing_else(state: StateFolder, start: Start, tmp_path: Path):
    agents = [start("ray::DashboardAgent", state.path), start("ray::RuntimeEnvAgent", state.path)]
    others = [start("sleep", state.path), start("ray::DashboardAgent", tmp_path)]
    assert set(left_running(state)) == set(agents)
    assert end_left(state) == 2
    assert left_running(state) == []
    assert all(other.status() != psutil.STATUS_ZOMBIE for other in others)
    assert end_left(state) == 0


def test_of_a_pipeline_that_runs_nothing_is_left(state: StateFolder, start: Start):
    agent = start("ray::DashboardAgent", state.path)
    with state.hold():
        assert left_running(state) == []
        assert end_left(state) == 0
    assert left_running(state) == [agent]


def test_where_nothing_ever_ran_no_folder_is_made(state: StateFolder, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    other = StateFolder(tmp_path / "elsewhere")
    assert end_left(other) == 0
    assert not other.path.exists()


def test_down_ends_them_and_ps_names_them(state: StateFolder, start: Start, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start("ray::DashboardAgent", state.path)
    shown = CliRunner().invoke(app, ["ps"])
    assert shown.exit_code == 1 and "a killed one has left processes of Ray, which `pipeline down` ends" in shown.stderr
    ended = CliRunner().invoke(app, ["down"])
    assert (ended.exit_code, ended.stderr) == (
        0,
        "ended what a killed pipeline of this folder had left (processes of Ray: 1)\n",
    )
    assert CliRunner().invoke(app, ["down"]).exit_code == 1
