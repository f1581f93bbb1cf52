"""deploy/cli/app.py and its kin as a process: odd arguments, odd folders, odd outputs, and never a traceback."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from deploy.cli.app import app
from deploy.run.state import StateFolder

PIPELINE = Path(sys.executable).parent / "pipeline"
DESCRIPTION = """
version: 1
model: tiny
cameras:
  yard:
    source: 门.mp4
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "project").mkdir()
    (tmp_path / "t").mkdir()
    (tmp_path / "project" / "pipeline.yaml").write_text(DESCRIPTION, encoding="utf-8")
    return tmp_path / "project"


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project, of this process."""
    monkeypatch.chdir(project)
    monkeypatch.setattr("tempfile.tempdir", str(project.parent / "t"))
    monkeypatch.setattr("deploy.run.state.SOCKET_PATH_BYTES", 1000)  # pytest's folders have long names
    return project


def pipeline(project: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    result = subprocess.run(
        [PIPELINE, *arguments],
        cwd=project,
        env=os.environ | {"TMPDIR": str(project.parent / "t")} | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert "Traceback" not in result.stderr
    return result


def invoke(*arguments: str) -> Result:
    """The same without a process of its own, where only the arguments matter."""
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_names_that_the_terminal_lacks_are_printed_all_the_same(project: Path, encoding: str):
    result = pipeline(project, "validate", PYTHONIOENCODING=encoding)
    assert result.returncode == 0
    assert "?.mp4" in result.stdout


def test_a_mistake_is_told_in_an_encoding_that_lacks_its_letters(project: Path):
    result = pipeline(project, "up", "--camera", "门=x", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr.startswith("pipeline: ")) == (2, True)


@pytest.mark.parametrize("command", ["validate", "stages", "graph", "simulate steady --seeds 0:1"])
def test_that_a_folder_has_no_description_and_the_shipped_one_is_used_is_said(here: Path, command: str):
    said = "there is no pipeline.yaml in this folder: the description that is shipped is used\n"
    assert said not in invoke(*command.split()).stderr
    (here / "pipeline.yaml").unlink()
    result = invoke(*command.split())
    assert (result.exit_code, result.stderr) == (0, said)


NOTHING_RUNS = "pipeline: no pipeline of this folder is running; `pipeline up -d` starts one\n"


@pytest.mark.parametrize(
    "arguments",
    [["ps"], ["ps", "--json"], ["down"], ["camera", "remove", "\udcff"], ["camera", "add", "a=test://pattern"]],
    ids=" ".join,
)
def test_what_needs_a_pipeline_that_runs_says_that_there_is_none(here: Path, arguments: list[str]):
    result = invoke(*arguments)
    assert (result.exit_code, result.output) == (1, NOTHING_RUNS)


@pytest.mark.parametrize("name", ["/tmp/x", "../x", "*", "[", "llm.0\n", "", "x" * 5000])
def test_logs_of_what_is_no_process_are_refused_in_one_line(here: Path, name: str):
    assert invoke("logs", name).output == "pipeline: no logs here; `pipeline up` makes them\n"
    state = StateFolder(here)
    state.create()
    (state.logs / "llm.0.log").write_text("one\ntwo\n")
    result = invoke("logs", name)
    assert (result.exit_code, result.output) == (1, f"pipeline: no logs here of {name!r}; there are: llm.0\n")


@pytest.mark.parametrize(("tail", "lines"), [("0", 0), ("1", 1), ("2", 2), ("50", 2)])
def test_so_many_lines_of_a_log_are_printed(here: Path, tail: str, lines: int):
    state = StateFolder(here)
    state.create()
    (state.logs / "llm.0.log").write_bytes(b"one\ntwo \xff\n")
    assert len(invoke("logs", "--tail", tail).output.splitlines()) == lines


def test_a_log_that_is_a_folder_is_told_in_one_line(here: Path):
    state = StateFolder(here)
    state.create()
    (state.logs / "llm.0.log").mkdir()
    result = invoke("logs")
    assert (result.exit_code, result.output) == (1, f"pipeline: {state.logs}/llm.0.log: Is a directory\n")


def test_one_that_ends_while_it_is_stopped_is_stopped(here: Path, monkeypatch: pytest.MonkeyPatch):
    gone = subprocess.Popen(["true"])
    gone.wait()
    holders = iter([gone.pid, None])
    monkeypatch.setattr(StateFolder, "holder", lambda self: next(holders))
    result = invoke("down")
    assert (result.exit_code, result.output) == (0, "stopped\n")


@pytest.mark.parametrize(
    "arguments",
    [["logs", "--tail", "-1"], ["logs", "--tail", "x"], ["down", "--timeout", "-1"], ["down", "--timeout", "x"]],
    ids=" ".join,
)
def test_numbers_that_are_none_are_a_wrong_command(here: Path, arguments: list[str]):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Invalid value" in result.output


@pytest.mark.parametrize("option", ["--for=0s", "--for=-1s", "--for=", "--listener=paused", "--barge-in=never", "-f."])
def test_values_of_up_that_mean_nothing_are_told_in_one_line(here: Path, option: str):
    result = invoke("up", option)
    assert result.exit_code == 2
    assert [line[:10] for line in result.output.splitlines()] == ["pipeline: "]


def test_a_folder_that_has_gone_is_told(project: Path):
    script = f'rmdir "$PWD" && exec "{PIPELINE}" ps'
    (project / "gone").mkdir()
    result = subprocess.run(["sh", "-c", script], cwd=project / "gone", capture_output=True, text=True)
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert result.stderr.startswith("pipeline: the folder that this was started in has been removed")


def test_a_name_that_the_locale_can_not_write_is_told_with_what_can(project: Path):
    odd = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = pipeline(project, "up", **odd)
    assert result.returncode == 2
    assert "LC_ALL=C.UTF-8" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "beginning", "instead"),
    [
        (["up", "--camera", "a=test://pattern", "--camera", "b=caf\udce9.mp4"], "--camera b=caf\\udce9.mp4: ", "ln -s"),
        (["camera", "add", "b=caf\udce9.mp4"], "b=caf\\udce9.mp4: ", "ln -s"),
        (["validate", "--set", "cameras.yard.source=caf\udce9.mp4"], "--set cameras.yard.source=caf\\udce9.mp4: ", ""),
        (["validate", "--set", "caf\udce9=3"], "--set caf\\udce9=3: ", ""),
    ],
)
def test_a_name_that_is_no_utf_8_is_told_with_where_it_stands(
    project: Path, arguments: list[str], beginning: str, instead: str
):
    result = pipeline(project, *arguments)
    assert result.returncode == 2
    assert (
        result.stderr.startswith(f"pipeline: {beginning}it holds a byte that is no UTF-8") and instead in result.stderr
    )


def test_a_reader_that_has_read_enough_is_no_news(project: Path):
    script = f'"{PIPELINE}" validate | head -1'
    result = subprocess.run(["sh", "-c", script], cwd=project, capture_output=True, text=True)
    assert result.stderr == ""


@pytest.mark.parametrize("nowhere", ["/dev/full", "a pipe that nobody reads"])
def test_who_can_be_told_nothing_still_gets_the_exit_code(project: Path, nowhere: str):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") if nowhere != "/dev/full" else Path(nowhere).open("w") as stderr:
        assert subprocess.run([PIPELINE, "up", "--for=0s"], cwd=project, stderr=stderr).returncode == 2


@pytest.mark.parametrize("arguments", [["up", "--for=0s"], ["validate", f"--set={'x' * 9000}"]], ids=["short", "long"])
def test_a_pipe_that_is_full_and_not_read_holds_no_end_up(project: Path, arguments: list[str]):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while os.write(writing, bytes(4096)):
            pass
    os.set_blocking(writing, True)
    with os.fdopen(reading), os.fdopen(writing, "w") as stderr:
        assert subprocess.run([PIPELINE, *arguments], cwd=project, stderr=stderr, timeout=300).returncode == 2


def test_a_full_disk_behind_stdout_is_told(project: Path):
    with Path("/dev/full").open("w") as full:
        result = subprocess.run([PIPELINE, "validate"], cwd=project, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (1, "pipeline: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_files_are_no_mistake(project: Path, closed: str):
    result = subprocess.run(["sh", "-c", f'exec "{PIPELINE}" validate {closed}'], cwd=project, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")


def test_a_temporary_folder_that_can_hold_no_socket_gives_way(project: Path):
    long = project.parent / ("x" * 100)
    long.mkdir()
    assert pipeline(project, "ps", TMPDIR=str(long)).stderr == NOTHING_RUNS


def test_nothing_is_imported_from_the_users_folder(project: Path):
    """With an empty entry in PYTHONPATH, as `PYTHONPATH=$PYTHONPATH:/opt/site` leaves it."""
    for name in ("typer", "psutil", "ruamel", "pydantic", "numpy", "graph", "stages"):
        (project / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    assert pipeline(project, "ps", PYTHONPATH=":/opt/site").stderr == NOTHING_RUNS
    assert pipeline(project, "validate", PYTHONPATH=":/opt/site").returncode == 0
