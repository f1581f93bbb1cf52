"""deploy/cameras/sources.py: what is asked of the cameras before anything starts."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from deploy.cameras.sources import MAX_FILES_AT_ONCE, Probed, SourceError, check_cameras, probe, probe_all
from graph.secret import Secret
from graph.sections import CameraSpec
from graph.spec import PipelineSpec
from tests.support.media import Clip, damaged, times
from tests.support.specs import parse_spec

SILENT = ("gave nothing", True)
PATIENCE_S = 60.0
FOR_EVER_S = 36_000.0  # longer than a test may take: who waits for it fails


def live(count: int) -> dict[str, CameraSpec]:
    return {f"door{k}": CameraSpec(source=Secret(f"rtsp://10.0.0.{k}/live")) for k in range(count)}


def files(count: int) -> dict[str, CameraSpec]:
    return {f"clip{k}": CameraSpec(source=Secret("test://pattern")) for k in range(count)}


def test_all_live_cameras_are_asked_at_once():
    everybody = threading.Barrier(40, timeout=PATIENCE_S)

    def ask(camera: CameraSpec, is_over: Callable[[], bool]) -> Probed:
        everybody.wait()
        return SILENT

    assert probe_all(live(40), ask) == dict.fromkeys(live(40), SILENT)


def test_files_are_asked_while_dead_cameras_keep_silent():
    num_files = 3 * MAX_FILES_AT_ONCE
    heard = threading.Semaphore(0)

    def ask(camera: CameraSpec, is_over: Callable[[], bool]) -> Probed:
        if camera.source.reveal().startswith("rtsp"):
            for _ in range(num_files):
                assert heard.acquire(timeout=PATIENCE_S)
            return SILENT
        heard.release()
        return "", False

    assert list(probe_all(live(1) | files(num_files), ask).values()) == [SILENT, *[("", False)] * num_files]


def test_cameras_that_have_not_answered_after_a_while_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deploy.cameras.sources.SLOW_S", 0.0)
    said = threading.Event()
    calls: list[list[str]] = []

    def ask(camera: CameraSpec, is_over: Callable[[], bool]) -> Probed:
        assert said.wait(PATIENCE_S)
        return "", True

    def say(silent: Sequence[str]) -> None:
        calls.append(list(silent))
        said.set()

    assert probe_all(live(2), ask, say=say) == dict.fromkeys(live(2), ("", True))
    assert calls == [["door0", "door1"]]


def test_live_cameras_share_one_deadline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deploy.cameras.sources.PROBE_S", 0.2)
    monkeypatch.setattr("deploy.cameras.sources.MAX_LIVE_AT_ONCE", 1)
    num_looks = []

    def ask(camera: CameraSpec, is_over: Callable[[], bool]) -> Probed:
        looks = 0
        while not is_over():
            looks += 1
            time.sleep(0.01)
        num_looks.append(looks)
        return SILENT

    probe_all(live(MAX_FILES_AT_ONCE + 3), ask)
    assert sorted(num_looks)[:2] == [0, 0], "those whose turn comes after it are not waited for"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Whoever starts the tests in the background lets them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_waits_for_nobody(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deploy.cameras.sources.PROBE_S", FOR_EVER_S)
    left = []

    def ask(camera: CameraSpec, is_over: Callable[[], bool]) -> Probed:
        if camera.source.reveal() == "rtsp://10.0.0.0/live":
            os.kill(os.getpid(), signal.SIGINT)  # as a terminal does: to the process, not to this thread
        while not is_over():
            time.sleep(0.01)
        left.append(camera)
        return SILENT

    with pytest.raises(KeyboardInterrupt):
        probe_all(live(5) | files(30), ask)
    assert len(left) <= 5 + MAX_FILES_AT_ONCE, "who had not been asked is not asked any more"


def test_a_camera_that_keeps_silent_is_left_when_it_is_over(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deploy.cameras.sources.PROBE_S", FOR_EVER_S)
    assert probe(None, files(1)["clip0"], lambda: True) == (f"gave nothing within {FOR_EVER_S:g} s", False)


# ---- before `up` starts ----------------------------------------------------------------------------------------------


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Probed]]:
    """What each camera says, try by try."""
    answers: dict[str, list[Probed]] = {}

    def probe_all(cameras: Mapping[str, CameraSpec], _: object, within_s: float, say: object) -> dict[str, Probed]:
        return {name: answers[name].pop(0) if len(answers[name]) > 1 else answers[name][0] for name in cameras}

    monkeypatch.setattr("deploy.cameras.sources.probe_all", probe_all)
    monkeypatch.setattr("deploy.cameras.sources.PROBE_AGAIN_S", 0.0)
    return answers


OFF: Probed = ("refused the connection", True)
THERE: Probed = ("", True)
NO_FILE: Probed = ("there is no such file", False)


def spec_of(*names: str) -> PipelineSpec:
    sources = {name: {"source": f"rtsp://10.0.0.{number}/live"} for number, name in enumerate(names)}
    return parse_spec(json.dumps({"version": 1, "cameras": sources}), "here")


def test_a_camera_that_is_off_is_waited_for_as_it_would_be_beside_others(ask: dict[str, list[Probed]]):
    said: list[str] = []
    ask["yard"] = [OFF]
    assert list(check_cameras(spec_of("yard"), None, said.append)) == ["yard"]
    assert said == ["camera yard: refused the connection; it is looked for again while the pipeline runs"]


def test_where_all_cameras_are_off_it_starts_and_says_so(ask: dict[str, list[Probed]]):
    said: list[str] = []
    ask.update(yard=[OFF], door=[OFF], hall=[THERE])
    check_cameras(spec_of("yard", "door"), None, said.append)
    assert len(said) == 2


def test_what_can_never_be_read_is_an_error_at_once(ask: dict[str, list[Probed]]):
    ask.update(yard=[OFF], clip=[NO_FILE])
    with pytest.raises(SourceError, match="camera clip: there is no such file"):
        check_cameras(spec_of("yard", "clip"), None, print, wait_s=3600.0)


def test_cameras_that_must_be_there_are_waited_for(ask: dict[str, list[Probed]]):
    said: list[str] = []
    ask.update(yard=[OFF, OFF, THERE], door=[THERE])
    check_cameras(spec_of("yard", "door"), None, said.append, wait_s=3600.0)
    assert said == ["camera yard: refused the connection; waiting for it"]


def test_cameras_that_must_be_there_and_are_not_end_it(ask: dict[str, list[Probed]]):
    ask.update(yard=[OFF], door=[THERE])
    with pytest.raises(SourceError, match=r"^camera yard: refused the connection \(waited for 0\.05 s\)$"):
        check_cameras(spec_of("yard", "door"), None, print, wait_s=0.05)


class Rounds:
    """Cameras that keep silent as long as they are let, and a clock that only they move."""

    def __init__(self, first_s: float) -> None:
        self.now_s, self.first_s = 1000.0, first_s
        self.limits_s: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def probe_all(
        self, cameras: Mapping[str, CameraSpec], _: object, within_s: float, say: object
    ) -> dict[str, Probed]:
        self.limits_s.append(within_s)
        refused_at_once = len(self.limits_s) == 1 and self.first_s < within_s
        self.now_s += self.first_s if refused_at_once else within_s
        return dict.fromkeys(cameras, OFF if refused_at_once else SILENT)


@pytest.mark.parametrize(
    ("wait_s", "first_s", "limits_s", "why"),
    [
        (6.0, 60.0, [6.0], "gave nothing"),
        (6.0, 2.0, [6.0, 3.0], "refused the connection"),  # what is known of it, and not that it was cut off
        (6.0, 5.5, [6.0], "refused the connection"),
        (30.0, 60.0, [12.0, 12.0, 4.0], "gave nothing"),
        (0.0, 60.0, [12.0], "gave nothing"),  # one look
    ],
)
def test_the_time_to_wait_for_cameras_holds_for_all_looks_together(
    monkeypatch: pytest.MonkeyPatch, wait_s: float, first_s: float, limits_s: list[float], why: str
):
    rounds = Rounds(first_s)
    monkeypatch.setattr("deploy.cameras.sources.time", rounds)
    monkeypatch.setattr("deploy.cameras.sources.probe_all", rounds.probe_all)
    with pytest.raises(SourceError, match=f"^camera yard: {why}"):
        check_cameras(spec_of("yard", "door", "hall"), None, lambda line: None, wait_s=wait_s)
    assert rounds.limits_s == limits_s
    assert rounds.now_s - 1000.0 == (wait_s or 12.0)


def test_a_camera_whose_time_is_over_says_what_it_had():
    assert probe(None, live(1)["door0"], lambda: True, 6.0) == ("gave nothing within 6 s", True)


def test_a_webcam_that_is_not_plugged_in_is_waited_for_like_any_live_camera():
    why, is_live = probe(None, CameraSpec(source=Secret("/dev/video97")), lambda: False)
    assert why and is_live


def test_a_file_that_is_not_there_is_not_waited_for():
    why, is_live = probe(None, CameraSpec(source=Secret("/nowhere/clip.mp4")), lambda: False)
    assert why and not is_live


def test_pictures_of_which_none_can_be_read_are_told_before_anything_starts(tmp_path: Path):
    for name in ("a.jpg", "b.png"):
        (tmp_path / name).write_text("no picture")
    folder, single = (CameraSpec(source=Secret(str(path))) for path in (tmp_path, tmp_path / "a.jpg"))
    assert probe(None, folder, lambda: False) == (
        f"{tmp_path} has no picture which can be read, of 2: a.jpg is no picture",
        False,
    )
    assert probe(None, single, lambda: False) == (
        f"{tmp_path}/a.jpg is a text file, which is not read here; give a film, a picture or a folder of pictures",
        False,
    )


def test_a_film_of_which_nothing_can_be_decoded_is_told_before_anything_starts(tmp_path: Path):
    whole = Clip(tmp_path / "whole.mp4").video(times(3)).write()
    assert probe(None, CameraSpec(source=Secret(str(whole))), lambda: False) == ("", False)
    noise = damaged(whole, tmp_path / "noise.mp4", lambda kind, number: True)
    why, is_live = probe(None, CameraSpec(source=Secret(str(noise))), lambda: False)
    assert "of which nothing can be decoded" in why or "holds nothing which could be decoded" in why
    assert not is_live
