"""deploy/state.py: a running pipeline is found, and one that is gone is not."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deploy.state import Running, StateError, StateFolder

URL = "http://127.0.0.1:8600"


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StateFolder:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = StateFolder(tmp_path / "project")
    folder.create()
    return folder


def mine() -> Running:
    return Running(os.getpid(), time.time(), URL)


def test_a_pipeline_that_runs_is_found(state: StateFolder):
    state.write(running := mine())
    assert state.read() == running


def test_nothing_is_found_where_nothing_was_started(state: StateFolder):
    assert state.read() is None


def test_a_process_that_has_ended_is_not_found(state: StateFolder):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    state.write(Running(process.pid, time.time(), URL))
    assert state.read() is None


def test_another_process_with_the_same_number_is_not_ours(state: StateFolder):
    started_s = psutil.Process().create_time() - 60  # the file is older than the process
    state.write(Running(os.getpid(), started_s, URL))
    assert state.read() is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"pid": "x"}', '{"pid": 1}', '{"pid": -1, "other": 2}'])
def test_a_file_that_is_none_counts_as_nothing(state: StateFolder, text: str):
    state.file.write_text(text)
    assert state.read() is None


def test_only_one_may_start_and_the_other_is_told_whom_it_waits_for(state: StateFolder):
    with state.hold(), pytest.raises(StateError, match=rf"running already \(pid {os.getpid()}\)"), state.hold():
        raise AssertionError("held twice")
    with state.hold():
        pass


HOLD = """
import sys, pathlib, deploy.state
with deploy.state.StateFolder(pathlib.Path(sys.argv[1])).hold():
    print(flush=True)
    sys.stdin.read()
"""


def test_a_killed_process_holds_nothing(state: StateFolder, tmp_path: Path):
    command, environment = (
        [sys.executable, "-c", HOLD, str(tmp_path / "project")],
        os.environ | {"TMPDIR": str(tmp_path)},
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(StateError, match=f"pid {process.pid}"), state.hold():
            raise AssertionError("held twice")
        process.kill()
        process.wait()
        with state.hold():
            pass


def test_a_forgotten_pipeline_leaves_its_logs_only(state: StateFolder):
    state.write(mine())
    (state.logs / "llm.0.log").write_text("what happened")
    (state.path / "bus").mkdir()
    (state.path / "bus" / "llm.0-0.ipc").touch()
    state.forget()
    state.forget()
    assert [path.relative_to(state.path) for path in state.path.rglob("*")] == [Path("logs"), Path("logs/llm.0.log")]
    assert state.read() is None


def test_a_new_run_begins_with_empty_logs(state: StateFolder):
    (state.logs / "llm.0.log").write_text("what happened")
    state.create()
    assert list(state.logs.iterdir()) == []


def test_nobody_else_may_look_in(state: StateFolder):
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (state.path, state.path.parent)]
    assert modes == [0o700, 0o700]


def test_every_project_has_a_short_folder_of_its_own(tmp_path: Path):
    one, other = StateFolder(tmp_path / "one"), StateFolder(tmp_path / "other")
    assert one.path != other.path
    assert StateFolder(tmp_path / "x" / ".." / "one").path == one.path
    assert len(one.path.name) == 8


def test_what_it_knows_is_its_users_alone(state: StateFolder):
    state.write(mine())
    assert stat.S_IMODE(state.file.stat().st_mode) == 0o600
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (state.path, state.path.parent)} == {0o700}


@pytest.mark.parametrize("level", ["project", "user"])
def test_a_folder_that_others_may_write_to_is_refused_and_what_lies_in_it_not_believed(state: StateFolder, level: str):
    state.write(mine())
    folder = state.path if level == "project" else state.path.parent
    folder.chmod(0o777)
    assert state.read() is None
    with pytest.raises(StateError, match="is not this user's alone"):
        state.create()


def test_a_link_is_no_folder_of_ours(state: StateFolder, tmp_path: Path):
    state.path.rename(tmp_path / "elsewhere")
    state.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StateError, match="is not this user's alone"):
        state.create()
