"""deploy/run/state.py: a running pipeline is found, and one that is gone is not."""

import fcntl
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.run import claim
from deploy.run.state import Running, StateError, StateFolder

URL = "http://127.0.0.1:8600"


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StateFolder:
    (tmp_path / "t").mkdir()
    (tmp_path / "project").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    monkeypatch.setattr("deploy.run.state.SOCKET_PATH_BYTES", 1000)  # pytest's folders have long names
    folder = StateFolder(tmp_path / "project")
    folder.create()
    return folder


def mine(state: StateFolder) -> Running:
    return Running(os.getpid(), URL, "token", str(state.path))


RUN = """
import sys, pathlib, deploy.run.state, os
state = deploy.run.state.StateFolder(pathlib.Path(sys.argv[1]))
deploy.run.state.SOCKET_PATH_BYTES = 1000
with state.hold():
    state.write(deploy.run.state.Running(os.getpid(), "http://127.0.0.1:1"))
    print(flush=True)
    sys.stdin.read()
"""


@contextmanager
def running(project: Path, **environment: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Another process, which runs the pipeline of a project."""
    command = [sys.executable, "-c", RUN, str(project)]
    with subprocess.Popen(command, env=os.environ | environment, stdin=-1, stdout=-1) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def test_a_pipeline_that_runs_is_found(state: StateFolder):
    with state.hold():
        state.write(mine(state))
        assert state.read() == mine(state)
        assert json.loads(state.file.read_text())["url"] == URL


def test_nothing_is_found_where_nothing_was_started(state: StateFolder):
    assert state.read() is None
    assert state.holder() is None


def test_one_that_starts_is_not_found_yet_and_may_be_stopped(state: StateFolder):
    with state.hold():
        assert state.read() is None
        assert state.holder() == os.getpid()


def test_a_process_that_has_ended_is_not_found(state: StateFolder, tmp_path: Path):
    with running(tmp_path / "project") as process:
        assert state.holder() == process.pid
        process.kill()
        process.wait()
        assert state.read() is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', '{"pid": -1, "other": 2}'])
def test_a_file_counts_as_nothing_and_is_replaced(state: StateFolder, text: str):
    state.file.write_text(text)
    assert state.read() is None
    with state.hold():
        state.write(mine(state))
        assert json.loads(state.file.read_text())["pid"] == os.getpid()


def test_no_clock_decides_whether_it_runs(state: StateFolder, monkeypatch: pytest.MonkeyPatch):
    with state.hold():
        state.write(mine(state))
        an_hour_later = time.time() + 3600
        monkeypatch.setattr("time.time", lambda: an_hour_later)
        os.utime(state.file, (0, 0))
        assert state.read() == mine(state)


def test_a_run_is_found_though_all_its_files_are_gone_and_they_are_written_again(state: StateFolder, tmp_path: Path):
    with state.hold():
        state.write(mine(state))
        shutil.rmtree(tmp_path / "t")
        (tmp_path / "t").mkdir()
        assert state.read() == mine(state)
        with (
            pytest.raises(StateError, match=f"running already .pid {os.getpid()}"),
            StateFolder(tmp_path / "project").hold(),
        ):
            raise AssertionError("held twice")
        state.keep()
        assert json.loads(state.file.read_text())["pid"] == os.getpid()
        assert stat.S_IMODE(state.path.stat().st_mode) == 0o700


def test_a_full_disk_costs_the_file_and_not_the_run(state: StateFolder, tmp_path: Path):
    with state.hold():
        state.write(mine(state))
        shutil.rmtree(tmp_path / "t")
        (tmp_path / "t").touch()  # nothing can be made below a file
        state.keep()
        assert state.read() == mine(state)


def test_a_run_is_found_and_kept_apart_whatever_the_temporary_folder_of_who_asks(
    state: StateFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with running(tmp_path / "project", TMPDIR="/tmp") as process:
        running_state = state.read()
        assert running_state is not None and running_state.pid == process.pid
        with pytest.raises(StateError, match=f"pid {process.pid}"), state.hold():
            raise AssertionError("held twice")


def test_a_renamed_project_is_the_same_and_so_is_one_that_was_made_anew(state: StateFolder, tmp_path: Path):
    with running(tmp_path / "project") as process:
        (tmp_path / "project").rename(tmp_path / "renamed")
        assert StateFolder(tmp_path / "renamed").holder() == process.pid
        (tmp_path / "project").mkdir()
        assert StateFolder(tmp_path / "project").holder() == process.pid


def test_a_link_to_a_project_is_the_project(state: StateFolder, tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "project")
    with running(tmp_path / "project") as process:
        assert StateFolder(tmp_path / "link").holder() == process.pid


def test_one_that_is_stopped_is_said_to_be(state: StateFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(claim, "ANSWER_S", 0.2)
    with running(tmp_path / "project") as process:
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        with pytest.raises(StateError, match=rf"pid {process.pid}\) does not answer; is it stopped"):
            state.read()
        with pytest.raises(StateError, match=rf"running already \(pid {process.pid}\)"), state.hold():
            raise AssertionError("held twice")


def test_while_it_runs_a_cleaner_of_old_files_finds_it_locked(state: StateFolder):
    with state.hold():
        folder = os.open(state.path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):  # as systemd-tmpfiles tries it
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(folder)


def test_a_folder_that_another_container_uses_is_told(state: StateFolder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deploy.run.state.CLEANER_S", 0.0)
    folder = os.open(state.path, os.O_RDONLY)  # its claim can't be seen, its lock can
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(StateError, match=r"in another container, uses .*; set TMPDIR"), state.hold():
        raise AssertionError("held twice")
    os.close(folder)
    with state.hold():
        pass


def test_a_child_process_keeps_nothing(state: StateFolder):
    with state.hold():
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], close_fds=False)
    with state.hold():
        assert child.poll() is None
    child.kill()
    child.wait()


def test_many_who_ask_and_go_away_disturb_nothing(state: StateFolder, tmp_path: Path):
    with state.hold():
        state.write(mine(state))
        for name in claim._names(tmp_path / "project"):
            for _ in range(300):
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.connect(name)
        assert state.read() == mine(state)


LONG = "x" * 100


@pytest.mark.parametrize("temporary", [f"/tmp/{LONG}", "/tmp/a b/" + LONG])
def test_a_temporary_folder_with_a_long_name_gives_way_to_tmp(temporary: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", temporary)
    assert StateFolder(Path("/")).path.parent == Path(f"/tmp/omni-{os.getuid()}")


def test_the_longest_socket_fits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", "/tmp/" + "x" * 12)
    monkeypatch.setattr("os.access", lambda *_: True)
    path = StateFolder(Path("/")).path / "ray/session_2026-01-01_00-00-00_123456_4194304/sockets/plasma_store"
    assert len(str(path)) <= 107


def test_where_nothing_fits_the_variable_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", f"/tmp/{LONG}")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(StateError, match=r"TMPDIR: /tmp/xxx.* set TMPDIR to a shorter folder"):
        StateFolder(Path("/"))


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_no_umask_opens_the_folder_to_others(tmp_path: Path, state: StateFolder, mask: int):
    shutil.rmtree(tmp_path / "t" / f"omni-{os.getuid()}")
    before = os.umask(mask)
    try:
        with state.hold():
            state.create()
            state.write(mine(state))
    finally:
        os.umask(before)
    assert stat.S_IMODE(state.path.stat().st_mode) == 0o700


def test_only_one_may_start_and_the_other_is_told_whom_it_waits_for(state: StateFolder):
    with state.hold(), pytest.raises(StateError, match=rf"running already \(pid {os.getpid()}\)"), state.hold():
        raise AssertionError("held twice")
    with state.hold():
        pass


def test_a_forgotten_pipeline_leaves_its_logs_only(state: StateFolder):
    with state.hold():
        state.write(mine(state))
        (state.logs / "llm.0.log").write_text("what happened")
        (state.path / "bus").mkdir()
        (state.path / "bus" / "llm.0-0.ipc").touch()
        state.forget()
        state.forget()
        state.keep()
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
    with state.hold():
        state.write(mine(state))
    assert stat.S_IMODE(state.file.stat().st_mode) == 0o600
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (state.path, state.path.parent)} == {0o700}


@pytest.mark.parametrize("level", ["project", "user"])
def test_a_folder_that_others_may_write_to_is_refused(state: StateFolder, level: str):
    folder = state.path if level == "project" else state.path.parent
    folder.chmod(0o777)
    with pytest.raises(StateError, match="is not this user's alone"):
        state.create()
    with pytest.raises(StateError, match="is not this user's alone"), state.hold():
        raise AssertionError("held")


def test_a_link_is_no_folder_of_ours(state: StateFolder, tmp_path: Path):
    state.path.rename(tmp_path / "elsewhere")
    state.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StateError, match="is not this user's alone"):
        state.create()
