"""What the user or the disk may do wrong: one clear message, the right exit code, nothing started."""

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from click.testing import Result
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer import Exit
from typer.testing import CliRunner

from deploy.cameras.sources import probe
from deploy.cli.app import app
from deploy.cli.common import clear_errors
from deploy.run.state import StateFolder
from deploy.run.up import Outcome
from graph.costs import Profile, StageCost
from graph.secret import Secret
from graph.sections import CameraSpec
from stages.media.fork import FORK_SERVER
from stages.media.reader import check_source
from stages.media.reaper import REAPER
from tests.support.media import Clip, times

PATTERN = ("--camera", "door=test://pattern")
ANY_PORT = ("--set", "console.listen=127.0.0.1:0")


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Path]:
    """A folder to run from; nothing may have been started when the test is over."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    before = set(psutil.Process().children(recursive=True))
    yield tmp_path
    assert REAPER.settle(20.0)  # decoders that have been given up
    FORK_SERVER.close()
    assert set(psutil.Process().children(recursive=True)) - before == set()


def up(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["up", *ANY_PORT, *arguments])


def error_lines(result: Result) -> list[str]:
    """The lines of the error message."""
    assert "Traceback" not in result.output
    return [line.removeprefix("pipeline: ") for line in result.output.splitlines() if line.startswith("pipeline: ")]


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--camera", "door"], "--camera door: expected name=source"),
        (["--camera", "=clip.mp4"], "--camera =clip.mp4: expected name=source"),
        ([*PATTERN, *PATTERN], "--camera door: given twice"),
        (["--camera", "Front Door=test://pattern"], "'Front Door' is no name"),
        ([*PATTERN, "--for", "nonsense"], "--for: must be a duration like 1s"),
        ([*PATTERN, "--for", "0s"], "--for: must be longer than 0s"),
        ([*PATTERN, "--speed", "fast"], "--speed fast: expected real or max"),
        ([*PATTERN, "--listener", "asleep@1s"], "--listener asleep@1s: expected paused@START:END"),
        ([*PATTERN, "--listener", "paused@5s:3s"], "the end must come after the start"),
        ([*PATTERN, "--barge-in", "soon"], "--barge-in: must be a duration like 1s"),
        ([*PATTERN, "--speaker", "gramophone"], "must be 'virtual' or 'device'"),
        ([*PATTERN, "--set", "stages.llm.gpu=1"], "unknown key 'gpu' in stages.llm; did you mean 'gpus'?"),
        ([*PATTERN, "--set", "model=/nowhere"], "no such folder"),
        ([*PATTERN, "-f", "absent.yaml"], "absent.yaml: can't be read"),
        (["--camera", "door=gopher://host/clip"], "'gopher:' sources are not read here; use rtsp://"),
        (["--camera", "door=http://127.0.0.1/clip.mp4"], "'http:' sources are not read here"),
        (["--camera", "door=rtsp://me:canary@10.0.0.7/live", "--speed", "max"], "--speed max reads files and test"),
    ],
)
def test_a_wrong_command_is_told_in_one_line_and_exits_with_2(arguments: list[str], message: str) -> None:
    result = up(*arguments)
    assert result.exit_code == 2
    (line,) = error_lines(result)
    assert message in line


@pytest.mark.parametrize(("in_vain", "code"), [(True, 1), (False, 0)])
def test_a_run_in_vain_exits_with_1(monkeypatch: pytest.MonkeyPatch, in_vain: bool, code: int) -> None:
    outcome = Outcome(interrupted=False, in_vain=in_vain, ledger={}, out=None)
    monkeypatch.setattr("deploy.run.up.run_up", lambda *_: outcome)
    assert up(*PATTERN).exit_code == code


def test_an_unknown_option_exits_with_2() -> None:
    assert up("--frobnicate").exit_code == 2


def test_every_mistake_of_a_description_is_told_at_once_with_line_and_column(project: Path) -> None:
    (project / "p.yaml").write_text(
        "version: 1\n"
        "modell: tiny\n"
        "window: {length: 1x}\n"
        "cameras:\n"
        '  door: {source: "test://pattern", fps: many}\n'
        '  door: {source: "test://pattern"}\n'
        "edges:\n"
        "  - {from: vision_encoder.tokens, to: llm.image}\n"
        "stages:\n"
        "  llm: {replicas: -1}\n"
    )
    result = up("-f", "p.yaml")
    assert result.exit_code == 2
    lines = error_lines(result)
    assert [line.split(": ")[0] for line in lines] == [
        "p.yaml:2:1",
        "p.yaml:3:18",
        "p.yaml:5:41",
        "p.yaml:6:3",
        "p.yaml:8:12",
        "p.yaml:10:19",
    ]
    assert "did you mean 'model'?" in lines[0]


# --- the media ----------------------------------------------------------------------------------------------------


def test_a_missing_file_is_told_with_the_likely_one(project: Path) -> None:
    (project / "clip.mp4").write_bytes(b"")
    result = up("--camera", "door=clp.mp4")
    assert result.exit_code == 1
    assert error_lines(result) == ["camera door: clp.mp4: No such file or directory. Did you mean 'clip.mp4'?"]


def test_all_unreadable_files_are_told_together(project: Path) -> None:
    (project / "empty.mp4").write_bytes(b"")
    (project / "noise.mp4").write_bytes(os.urandom(5000))
    whole = Clip(project / "whole.mp4").video(times(3)).sound(3).write().read_bytes()
    (project / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    result = up(*(f"--camera={name}={name}.mp4" for name in ("whole", "empty", "noise", "cut")))
    assert result.exit_code == 1
    empty, noise, cut = error_lines(result)
    assert empty == "camera empty: empty.mp4: the file is empty"
    assert noise.startswith("camera noise:") and "not a media file which can be read" in noise
    assert cut.startswith("camera cut:") and "not a media file which can be read" in cut


def test_cameras_that_must_be_there_and_do_not_answer_are_an_error() -> None:
    result = up("--camera", "door=rtsp://127.0.0.1:9/live", "--wait-for-cameras", "0s")
    assert result.exit_code == 1
    (line,) = error_lines(result)
    assert "refused the connection" in line


def test_a_request_that_no_decoder_takes_is_the_cameras_problem() -> None:
    camera = CameraSpec(source=Secret("test://pattern")).model_copy(update={"fps": 0.001})
    assert probe(None, camera, lambda: False) == ("fps is 0.001; it must be between 0.01 and 60.0", False)


def test_a_run_that_ends_before_the_first_picture_is_told(project: Path) -> None:
    Clip(project / "mute.mp4").video(times(3)).write()
    result = up("--camera=door=mute.mp4", "--for=0.5s")
    assert result.exit_code == 1
    (line,) = error_lines(result)
    assert line.endswith(
        "is to run for 0.5 s, but its first picture is taken at 0.8 s (fps 1): let it run longer, or raise its fps"
    )


def test_a_second_pipeline_of_a_folder_is_refused_while_the_first_one_starts(project: Path) -> None:
    with StateFolder(project).hold():
        result = up(*PATTERN)
    assert result.exit_code == 1
    assert error_lines(result) == [f"a pipeline of this folder is starting or running already (pid {os.getpid()})"]


def test_a_source_that_vanishes_while_the_pipeline_starts_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exit) as end, clear_errors():
        check_source("gone.mp4")
    assert end.value.exit_code == 1
    assert capsys.readouterr().err == "pipeline: gone.mp4: No such file or directory\n"


# --- the checkpoint -----------------------------------------------------------------------------------------------

Tensors = dict[str, Tensor]


def remove(tensors: Tensors, name: str) -> None:
    del tensors[name]


def rename(tensors: Tensors, name: str) -> None:
    tensors[f"{name}s"] = tensors.pop(name)


def reshape(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name][:-1].clone()


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (remove, "1 missing: {name}."),
        (rename, "1 missing: {name}. 1 unknown: {name}s."),
        (reshape, "1 of another shape: {name} is (127, 256), the config wants (128, 256)."),
    ],
)
def test_a_checkpoint_with_other_tensors_is_refused_by_their_names(
    project: Path, tiny: Path, tamper: Callable[[Tensors, str], None], message: str
) -> None:
    name = "llm.model.layers.0.mlp.down_proj.weight"
    shutil.copytree(tiny, project / "model")
    tensors = load_file(project / "model/model.safetensors")
    tamper(tensors, name)
    save_file(tensors, project / "model/model.safetensors", metadata={"format": "pt"})
    result = up(*PATTERN, "--set", "model=model")
    assert result.exit_code == 1
    assert error_lines(result) == [f"model: llm: tensors don't fit the config. {message.format(name=name)}"]


@pytest.mark.parametrize(
    ("file", "num_bytes", "message"),
    [
        ("model.safetensors", 100_000, "not a whole safetensors file"),
        ("assets/token2wav/hift.safetensors", 10, "not a whole safetensors file"),
        ("config.json", 10, "can't be read as JSON"),
    ],
)
def test_a_truncated_file_of_a_checkpoint_is_named(
    project: Path, tiny: Path, file: str, num_bytes: int, message: str
) -> None:
    shutil.copytree(tiny, project / "model")
    whole = (tiny / file).read_bytes()
    (project / "model" / file).write_bytes(whole[:num_bytes])
    result = up(*PATTERN, "--set", "model=model")
    assert result.exit_code == 1
    (line,) = error_lines(result)
    assert line.startswith(f"model/{file}: ") and message in line


# --- the machine --------------------------------------------------------------------------------------------------


def test_more_cameras_than_are_served_on_time_are_refused_before_anything_starts(tmp_path: Path) -> None:
    slow = StageCost(100_000_000, 50_000_000)
    stages = dict.fromkeys(("vision_encoder", "audio_encoder", "llm", "tts", "vocoder"), slow)
    profile = tmp_path / "here.json"
    profile.write_text(Profile("tiny", {}, 2, stages).as_json())
    cameras = [text for k in range(9) for text in ("--camera", f"c{k}=test://pattern?seed={k}")]
    result = up(*cameras, "--set", f"admission.profile={profile}")
    assert result.exit_code == 1
    assert "9 cameras can't be served on time, 2 can" in error_lines(result)[-1]


def test_a_busy_port_is_told_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = up(*PATTERN, "--set", f"console.listen=127.0.0.1:{port}")
    assert result.exit_code == 1
    assert error_lines(result) == [f"port {port} on 127.0.0.1 is busy; set console.listen to another address"]


def test_too_little_memory_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.run.memory._machine_bytes", lambda root: 500_000_000)
    result = up(*PATTERN)
    assert result.exit_code == 1
    (line,) = error_lines(result)
    assert "of memory" in line and "and 0.5 GB are free" in line


def test_a_folder_that_cant_be_written_to_is_told(project: Path) -> None:
    (project / "file").write_text("")
    result = up(*PATTERN, "--out", "file/run")
    assert result.exit_code == 1
    (line,) = error_lines(result)
    assert line.startswith("--out file/run: can't be written to")


def test_what_needs_a_running_pipeline_says_that_there_is_none() -> None:
    for command in ("ps", "down", "logs"):
        result = CliRunner().invoke(app, [command])
        assert result.exit_code == 1
        assert len(error_lines(result)) == 1
