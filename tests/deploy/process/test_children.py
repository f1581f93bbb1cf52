"""deploy/process/children.py: a child process runs our code, whatever lies in the user's folder and environment."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from deploy.process.children import descendants, environment_for_children, no_descendants_left, python
from deploy.process.search_path import ROOT

THEIRS = ("deploy", "graph", "stages", "model_shards", "ray", "numpy", "torch", "av", "psutil", "sitecustomize")
SLEEP = "import time; time.sleep(1000)"
IMPORT_ALL = "import deploy.cli.background, deploy.actor.actor, stages.media.fork_server, sys; sys.exit(0)"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user is in a folder with files that are called like what we import."""
    monkeypatch.chdir(tmp_path)
    for name in THEIRS:
        (tmp_path / f"{name}.py").write_text("raise SystemExit(f'{__file__} was run')")
    return tmp_path


def run_child(folder: Path, command: list[str], **environment: str) -> "subprocess.CompletedProcess[str]":
    variables = environment_for_children(os.environ | environment)
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, input="")


def test_no_file_of_the_users_folder_is_imported_or_run(folder: Path):
    child = [sys.executable, "-P", "-c", IMPORT_ALL]
    result = run_child(folder, child, PYTHONPATH=f":.:{folder}:/nowhere:")
    assert (result.returncode, result.stderr) == (0, "")


def test_a_module_of_ours_is_run_and_no_namesake(folder: Path):
    (folder / "deploy.py").write_text("print('the wrong one')")
    result = run_child(folder, python("deploy.cli.background"))
    assert result.stdout == ""
    assert "json" in result.stderr, "it has read what to run from stdin"


@pytest.mark.parametrize(
    "name", ["PYTHONSTARTUP", "PYTHONINSPECT", "PYTHONIOENCODING", "PYTHONWARNINGS", "PYTHONOPTIMIZE"]
)
def test_what_steers_the_users_interpreters_does_not_steer_ours(name: str):
    assert name not in environment_for_children({name: "1", "HOME": "/home/me"})


def test_everything_else_of_the_environment_is_passed_on():
    theirs = {"HOME": "/home/me", "HTTPS_PROXY": "http://proxy:3128", "GARAGE_LOGIN": "me:secret"}
    assert theirs.items() <= environment_for_children(theirs).items()


def test_folders_that_the_user_names_are_searched_after_ours():
    path = environment_for_children({"PYTHONPATH": "/opt/site:relative::/opt/site"})["PYTHONPATH"].split(":")
    assert path[0] == str(ROOT)
    assert path[2:] == ["/opt/site"]


def test_a_text_that_ascii_lacks_can_be_printed(folder: Path):
    child = [sys.executable, "-c", "print('\u95e8')"]
    assert run_child(folder, child, PYTHONIOENCODING="ascii", LC_ALL="C").stdout == "\u95e8\n"


ORPHANS = """
import subprocess, sys, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True).pid, flush=True)
sys.stdin.read()
"""


def test_orphans_of_a_killed_child_are_ended_and_older_children_are_not():
    with subprocess.Popen([sys.executable, "-c", SLEEP]) as older:
        others = descendants()
        with subprocess.Popen([sys.executable, "-c", ORPHANS], stdin=-1, stdout=-1) as child:
            assert child.stdout is not None
            orphan = psutil.Process(int(child.stdout.readline()))
            with no_descendants_left(others):
                child.kill()
                child.wait()
            assert not orphan.is_running()
        assert older.poll() is None
        older.kill()


def test_children_that_nobody_has_ended_are():
    child = subprocess.Popen([sys.executable, "-c", SLEEP])
    with no_descendants_left(descendants() - {psutil.Process(child.pid)}):
        assert child.poll() is None
    assert not psutil.pid_exists(child.pid)
