"""Decoders, actors and patience that die in the middle of a run: who pays, what is left, and what is not."""

import json
import os
import signal
import subprocess
import time
import urllib.request
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from graph.ledger import REASONS
from tests.support.pipeline import Place, Run, new_place, wait_for

pytestmark = pytest.mark.ray

NUM_WINDOWS = 10
YARD = ("--camera", "yard=test://pattern?seed=5")


@pytest.fixture
def fresh(tmp_path: Path, cache: Path) -> Iterator[Place]:
    with new_place(tmp_path / "project", cache) as new:
        yield new


def is_exact(run: Run) -> bool:
    accounts = run.ledger().values()
    return all(a["in_flight"] == 0 for a in accounts) and all(
        a["accepted"] == a["delivered"] + sum(a["dropped"][reason] for reason in REASONS) for a in accounts
    )


# --- a camera -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_a_dead_decoder(place: Place, clip: Path) -> Run:
    """The decoder of `door` is killed in window 1; it has read a few seconds ahead."""
    cameras = ("--camera", f"door={clip}", *YARD)
    process = place.start("up", *cameras, "--for", f"{NUM_WINDOWS}s", "--out", "run")
    place.wait_for_window(0)
    (decoder,) = [child for child in place.watch(process.pid) if reads(child, clip)]
    decoder.kill()
    return place.finish(process)


def reads(process: psutil.Process, path: Path) -> bool:
    try:
        is_decoder = "stages.media.fork_server" in process.cmdline()
        return is_decoder and any(Path(file.path) == path.resolve() for file in process.open_files())
    except psutil.Error:
        return False


def test_a_camera_that_dies_is_an_event_and_no_error(with_a_dead_decoder: Run) -> None:
    assert with_a_dead_decoder.returncode == 0, with_a_dead_decoder.stderr
    (lost,) = with_a_dead_decoder.events("door", "camera_lost")
    assert lost["reason"] == "crashed"
    assert "SIGKILL" in lost["message"]


def test_a_run_of_which_the_only_camera_gave_nothing_is_in_vain(fresh: Place) -> None:
    photographs = fresh.folder / "photographs"
    photographs.mkdir()
    for number in range(2):
        (photographs / f"{number}.png").write_bytes(os.urandom(5000))
    run = fresh.up("--camera", f"door={photographs}")
    assert run.returncode == 1, run.stderr
    (line,) = [line for line in run.stderr.splitlines() if "camera door" in line]
    assert str(photographs) in line
    assert fresh.leftovers() == []


def lacking(windows: list[dict[str, Any]]) -> int:
    """How many of them lack something, which is their picture and nothing else."""
    missing = [window["missing"] for window in windows if window["missing"]]
    assert all(streams == ["image"] for streams in missing)
    return len(missing)


def num_pictures_dropped(run: Run) -> int:
    """On a busy machine a picture may be too old for the encoder; the ledger names it then."""
    return sum(run.ledger()["camera.frames->vision_encoder.frames"]["dropped"].values())


def test_a_dead_camera_costs_its_own_windows(with_a_dead_decoder: Run) -> None:
    windows = with_a_dead_decoder.windows("door")
    assert [window["index"] for window in windows] == list(range(NUM_WINDOWS))
    assert lacking(windows[:1]) <= num_pictures_dropped(with_a_dead_decoder)
    # What the decoder had read ahead is over by then.
    assert [window["missing"] for window in windows[-5:]] == [["audio", "image"]] * 5


def test_a_dead_camera_costs_nobody_else_anything(with_a_dead_decoder: Run, interrupted: Run) -> None:
    windows = with_a_dead_decoder.windows("yard")
    assert [window["index"] for window in windows] == list(range(NUM_WINDOWS))
    assert lacking(windows) <= num_pictures_dropped(with_a_dead_decoder)
    elsewhere = interrupted.digests("yard")
    assert len(elsewhere) >= 3
    assert with_a_dead_decoder.digests("yard")[: len(elsewhere)] == elsewhere[:NUM_WINDOWS]


def test_the_ledger_of_a_run_with_a_dead_camera_is_exact(with_a_dead_decoder: Run, place: Place) -> None:
    assert is_exact(with_a_dead_decoder)
    assert place.leftovers() == []


# --- Ctrl-C -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Interrupted:
    run: Run
    second_up: Run
    leftovers: list[str]


@pytest.fixture(scope="module")
def interruption(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Interrupted]:
    """A run without an end; while it runs, another is started in its folder; then Ctrl-C."""
    with new_place(tmp_path_factory.mktemp("interrupted"), cache) as place:
        process = place.start("up", *YARD, "--out", "run")
        place.wait_for_window(3)
        second = place.run("up", *YARD, "--out", "run")
        press_ctrl_c(process)
        run = place.finish(process)
        yield Interrupted(run, second, place.leftovers())


@pytest.fixture(scope="module")
def interrupted(interruption: Interrupted) -> Run:
    return interruption.run


def press_ctrl_c(process: "subprocess.Popen[str]") -> None:
    """As a terminal does it: to the whole group in the foreground."""
    os.killpg(process.pid, signal.SIGINT)


def read_until(words: str, process: "subprocess.Popen[str]") -> str:
    """What it says, to the line with these words."""
    assert process.stderr is not None
    said = ""
    while words not in said:
        line = process.stderr.readline()
        assert line, f"it ended without {words!r}: {said}"
        said += line
    return said


def test_ctrl_c_ends_a_run_with_130_and_whole_files(interrupted: Run) -> None:
    assert interrupted.returncode == 130
    assert "Traceback" not in interrupted.stderr
    windows = interrupted.windows("yard")
    assert [window["index"] for window in windows] == list(range(len(windows)))
    assert len(windows) >= 4
    assert is_exact(interrupted)
    rate_hz, samples = interrupted.speech("yard")
    assert len(samples) >= len(windows) * rate_hz


def test_ctrl_c_leaves_nothing_behind(interruption: Interrupted) -> None:
    assert interruption.leftovers == []


def test_after_ctrl_c_the_listener_hears_what_was_said(interrupted: Run) -> None:
    """The last words of a turn that was cut off included."""
    said = [event["text"] for event in interrupted.events("yard", "said")]
    heard = [event["text"] for event in interrupted.events("yard", "heard")]
    assert "".join(heard) == "".join(said) != ""


def test_a_second_pipeline_of_the_same_folder_is_refused(interruption: Interrupted) -> None:
    assert interruption.second_up.returncode == 1
    (line,) = [line for line in interruption.second_up.stderr.splitlines() if line.startswith("pipeline: ")]
    assert "is running already (pid" in line


def test_the_second_ctrl_c_ends_at_once(fresh: Place) -> None:
    process = fresh.start("up", *YARD, "--out", "run")
    fresh.wait_for_window(0)
    fresh.watch(process.pid)
    press_ctrl_c(process)
    said = read_until("Ctrl-C again ends at once", process)
    press_ctrl_c(process)
    run = fresh.finish(process)
    assert run.returncode == 130
    assert "Traceback" not in said + run.stderr
    assert run.windows("yard")
    assert len(run.speech("yard")[1])
    assert fresh.leftovers() == []


@pytest.mark.parametrize("until", ["the gateway is up", "an actor is up"])
def test_ctrl_c_while_it_starts_leaves_nothing_behind(fresh: Place, until: str) -> None:
    process = fresh.start("up", *YARD)
    fresh.state()
    if until == "an actor is up":
        read_until("ready", process)
    fresh.watch(process.pid)
    press_ctrl_c(process)
    run = fresh.finish(process)
    assert run.returncode == 130
    assert "Traceback" not in run.stderr
    assert fresh.leftovers() == []


# --- the cluster --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_dead_actors(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[tuple[Run, list[str]]]:
    """The vocoder is killed, and when it is back one of two LLMs; when that is back and is heard, the run is ended."""
    replicas = ("--set", "stages.llm.replicas=2", "--set", "stages.llm.kv_memory=128MiB")
    with new_place(tmp_path_factory.mktemp("dead"), cache) as place:
        process = place.start("up", *YARD, *replicas, "--out", "run", "--barge-in", "2.5s")
        place.wait_for_window(2)
        for name in ("vocoder.0", "llm.0"):
            kill(place, process.pid, name)
            wait_for(lambda: problem(place))
            wait_for(lambda: not problem(place))
        wait_for(lambda: "heard" in kinds_after(place, "recovered", 2))
        process.send_signal(signal.SIGTERM)
        yield place.finish(process), place.leftovers()


def kinds_after(place: Place, kind: str, count: int) -> list[str]:
    """The kinds of the events so far behind the `count`-th of this kind."""
    lines = (place.folder / "run" / "events.jsonl").read_text().splitlines(keepends=True)
    kinds = [json.loads(line)["type"] for line in lines if line.endswith("\n")]
    places = [index for index, other in enumerate(kinds) if other == kind]
    return kinds[places[count - 1] :] if len(places) >= count else []


def problem(place: Place) -> str:
    with urllib.request.urlopen(f"{place.url()}/api/v1/ps") as answer:
        return str(json.load(answer)["problem"])


def kill(place: Place, pid: int, name: str) -> None:
    (actor,) = [child for child in place.watch(pid) if is_actor(child, place, name)]
    actor.kill()


def test_an_actor_that_dies_is_started_again_and_the_run_goes_on(with_dead_actors: tuple[Run, list[str]]) -> None:
    run, leftovers = with_dead_actors
    assert run.returncode == 0, run.stderr
    for name in ("vocoder.0", "llm.0"):
        assert f"{name} has died" in run.stderr
        assert f"  {name} ready again" in run.stderr
    assert "raylet" not in run.stdout + run.stderr
    assert leftovers == []


def test_what_a_dead_actor_costs_is_named_and_the_ledger_is_exact(with_dead_actors: tuple[Run, list[str]]) -> None:
    run, _ = with_dead_actors
    windows = run.windows("yard")
    assert [window["index"] for window in windows] == list(range(len(windows)))
    assert is_exact(run)
    assert {window["late_stage"] for window in windows} & {"vocoder"}
    assert [event["actor"] for event in run.events("yard", "recovered")] == ["vocoder.0", "llm.0"]
    assert [event["epoch"] for event in run.events("yard", "cut_off")] == [2, 3], "after the barge-in"


def test_after_a_death_it_is_heard_again(with_dead_actors: tuple[Run, list[str]]) -> None:
    run, _ = with_dead_actors
    (_, last) = run.events("yard", "recovered")
    assert any(event["time_s"] > last["time_s"] for event in run.events("yard", "heard"))
    assert any(window["start_s"] > last["time_s"] and not window["missing"] for window in run.windows("yard"))


@dataclass(frozen=True, slots=True)
class Stopped:
    run: Run
    added: Run
    leftovers: list[str]


@pytest.fixture(scope="module")
def with_stopped_actors(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Stopped]:
    """The LLM hangs, then a camera comes; when another LLM has its place the TTS hangs, and the run is ended."""
    with new_place(tmp_path_factory.mktemp("stopped"), cache) as place:
        process = place.start("up", *YARD, "--out", "run")
        place.wait_for_window(1)
        stop(place, process.pid, "llm.0")
        added = place.run("camera", "add", "door=test://pattern?seed=6")
        wait_for(lambda: problem(place))
        wait_for(lambda: not problem(place))
        stop(place, process.pid, "tts.0")
        process.send_signal(signal.SIGTERM)
        yield Stopped(place.finish(process), added, place.leftovers())


def stop(place: Place, pid: int, name: str) -> None:
    (actor,) = [child for child in place.watch(pid) if is_actor(child, place, name)]
    actor.suspend()


def test_a_camera_that_would_go_to_an_actor_that_hangs_is_refused_with_the_reason(with_stopped_actors: Stopped) -> None:
    assert with_stopped_actors.added.returncode == 1
    assert "llm.0 has not answered for 10 s" in with_stopped_actors.added.stderr


def test_an_actor_that_hangs_is_replaced_and_the_run_goes_on(with_stopped_actors: Stopped) -> None:
    run = with_stopped_actors.run
    assert "llm.0 has not answered for 30 s" in run.stderr
    assert "  llm.0 ready again" in run.stderr
    windows = run.windows("yard")
    assert [window["index"] for window in windows] == list(range(len(windows)))
    assert [event["actor"] for event in run.events("yard", "recovered")] == ["llm.0"]
    assert {row["session"] for row in run.rows("windows.jsonl")} == {"yard"}


def test_a_run_in_which_an_actor_hangs_ends_in_order_with_its_ledger(with_stopped_actors: Stopped) -> None:
    run = with_stopped_actors.run
    assert (run.returncode, with_stopped_actors.leftovers) == (0, [])
    assert "tts.0 has not answered for 30 s" not in run.stderr, f"nobody has waited for it: {run.stderr}"
    assert is_exact(run)


@pytest.fixture(scope="module")
def with_dead_sources_and_speaker(tmp_path_factory: pytest.TempPathFactory, cache: Path, clip: Path) -> Iterator[Run]:
    """What holds the cameras is killed, then what holds speaker and files."""
    with new_place(tmp_path_factory.mktemp("project"), cache) as place:
        cameras = ("--camera", f"door={clip}", *YARD, "--camera", "hall=synthetic://room?seed=7&events=busy")
        process = place.start("up", *cameras, "--out", "run")
        for number, name in enumerate(("media.0", "io.0")):
            place.wait_for_window(3 + 6 * number)
            kill(place, process.pid, name)
        place.wait_for_window(17)
        process.send_signal(signal.SIGINT)
        yield place.finish(process)
        assert place.leftovers() == []


def test_whatever_holds_cameras_speaker_and_files_is_replaced_and_the_run_ends_as_asked(
    with_dead_sources_and_speaker: Run,
) -> None:
    run = with_dead_sources_and_speaker
    assert run.returncode == 130, run.stderr
    for name in ("media.0", "io.0"):
        assert f"{name} has died" in run.stderr
        assert f"  {name} ready again" in run.stderr
    assert is_exact(run), run.ledger()


def test_each_window_is_named_once_whatever_has_died(with_dead_sources_and_speaker: Run) -> None:
    for session in ("yard", "hall"):
        indexes = [window["index"] for window in with_dead_sources_and_speaker.windows(session)]
        assert indexes == list(range(len(indexes)))


def test_cameras_and_microphones_deliver_again_where_they_would_be_now(with_dead_sources_and_speaker: Run) -> None:
    windows = with_dead_sources_and_speaker.windows("yard")
    assert windows[2]["missing"] == [] == windows[16]["missing"], "before and behind"
    assert any(window["missing"] for window in windows[3:14])
    assert [e["actor"] for e in with_dead_sources_and_speaker.events("yard", "recovered")] == ["media.0", "io.0"]


def test_what_the_dead_speaker_recorded_is_kept_and_the_recording_goes_on(with_dead_sources_and_speaker: Run) -> None:
    run = with_dead_sources_and_speaker
    (event,) = run.events("hall", "recording_continues")
    assert event["file"] == "hall.2.wav"
    with wave.open(str(run.out / "hall.wav")) as first, wave.open(str(run.out / "hall.2.wav")) as second:
        assert first.getnframes() / first.getframerate() > 5
        assert second.getnframes() / second.getframerate() > 5


def test_while_an_actor_is_slow_a_session_sheds_pictures_and_names_them(fresh: Place) -> None:
    """The LLM stands still for 3 s."""
    ladder = ("--set", "shedding.ladder=[fewer_frames]", "--set", "window.lateness=5s")
    process = fresh.start("up", *YARD, *ladder, "--for", "12s", "--out", "run")
    fresh.wait_for_window(2)
    (llm,) = [child for child in fresh.watch(process.pid) if is_actor(child, fresh, "llm.0")]
    llm.suspend()
    time.sleep(3.0)  # no patience: it is what happens to the pipeline
    llm.resume()
    run = fresh.finish(process)
    assert run.returncode == 0, run.stderr
    (shed, *_) = run.events("yard", "shed")
    assert (shed["step"], shed["level"]) == ("fewer_frames", 1)
    frames = run.ledger()["camera.frames->vision_encoder.frames"]
    assert frames["dropped"]["shed"] > 0
    assert is_exact(run)
    windows = run.windows("yard")
    assert [window["index"] for window in windows] == list(range(12))
    lacking = [window for window in windows if window["missing"]]
    assert len(lacking) == sum(frames["dropped"].values())  # on a busy machine some may be too old besides
    assert all(window["missing"] == ["image"] for window in lacking)
    others = [account["dropped"] for edge, account in run.ledger().items() if "frames" not in edge]
    assert not any(dropped["shed"] + dropped["closed"] for dropped in others)


def is_actor(process: psutil.Process, place: Place, name: str) -> bool:
    """An actor has its log open."""
    try:
        return any(Path(file.path).name == f"{name}.log" for file in process.open_files())
    except psutil.Error:
        return False


def test_what_no_node_has_is_told_and_nothing_is_left(fresh: Place) -> None:
    run = fresh.run("up", *YARD, "--set", "stages.llm.gpus=8", "--set", "stages.tts.resources={moon: 1}")
    assert run.returncode == 1
    lines = [line for line in run.stderr.splitlines() if line.startswith("pipeline: ")]
    assert lines == [
        "pipeline: the cluster can't hold the pipeline:",
        "pipeline:   llm.0 asks for 0.25 CPU, 8 GPU; GPU: no node has more than 0 left",
        "pipeline:   tts.0 asks for 0.25 CPU, 1 moon; moon: no node has more than 0 left",
    ]
    assert fresh.leftovers() == []
