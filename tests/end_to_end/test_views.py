"""A camera of several views in a real pipeline: one that ends early, one that comes while it runs and goes again, and
one that is cut off and comes back."""

import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from graph.ledger import REASONS
from tests.support.media import Clip, times
from tests.support.pipeline import Place, Run, new_place, wait_for

pytestmark = pytest.mark.ray

NUM_SECONDS = 30
EARLY_END = 4
DESCRIPTION = """
version: 1
cameras:
  porch:
    views: {{front: "test://pattern?seed=1", back: "{back}"}}
    microphone: front
  door: {{source: "test://pattern?seed=3"}}
window: {{lateness: 300ms}}
stages:
  views: {{use: "omni_outside.views:Views", process: beside}}
"""


@dataclass(frozen=True, slots=True)
class Porch:
    run: Run
    status: dict[str, Any]
    metrics: str

    def missing(self, view: str) -> list[int]:
        return [row["index"] for row in self.run.windows("porch") if f"camera/porch/{view}" in row["missing"]]

    def seen(self, view: str) -> list[int]:
        events = self.run.events("porch", "views")
        return [event["window"] for event in events if view in event["views"].split(",")]

    def at(self, kind: str, view: str) -> int:
        """The window in which something happened to a view first."""
        return int(min(event["time_s"] for event in self.run.events("porch", kind) if event.get("view") == view))


@pytest.fixture(scope="module")
def porch(place: Place) -> Iterator[Porch]:
    back = Clip(place.folder / "back.mkv").video(times(EARLY_END, 5)).write()
    (place.folder / "pipeline.yaml").write_text(DESCRIPTION.format(back=back))
    up = place.start("up", "--for", f"{NUM_SECONDS}s", "--out", "run")
    url = place.url()
    place.wait_for_window(EARLY_END + 2)
    added = place.run("camera", "add", "porch/side=test://pattern?seed=2")
    assert (added.returncode, added.stderr) == (0, "camera porch/side: added\n")
    place.wait_for_window(len((place.folder / "run" / "windows.jsonl").read_text().splitlines()) // 2 + 3)
    status = json.loads(place.run("ps", "--json").stdout)
    metrics = urllib.request.urlopen(f"{url}/metrics").read().decode()
    removed = place.run("camera", "remove", "porch/side")
    assert (removed.returncode, removed.stderr) == (0, "camera porch/side: removed\n")
    refused = place.run("camera", "remove", "porch/front")
    assert refused.returncode == 2 and "its sound is what is heard of the camera" in refused.stderr
    yield Porch(place.finish(up), status, metrics)
    assert place.leftovers() == []


def test_every_window_is_there_once_whatever_becomes_of_its_views(porch: Porch) -> None:
    assert porch.run.returncode == 0, porch.run.stderr
    for session in ("porch", "door"):
        assert [row["index"] for row in porch.run.windows(session)] == list(range(NUM_SECONDS))
        assert not [row for row in porch.run.windows(session) if row["index"] > 1 and "image" in row["missing"]]


def test_a_view_that_ends_early_is_missing_by_its_name_and_costs_nothing_else(porch: Porch) -> None:
    assert set(range(EARLY_END + 1, NUM_SECONDS)) <= set(porch.missing("back"))
    assert not set(range(2, EARLY_END)) & set(porch.missing("back"))
    ended = [event["view"] for event in porch.run.events("porch", "camera_ended")]
    assert ended[0] == "back"


def test_a_view_that_is_added_is_seen_from_then_on_until_it_is_taken_away(porch: Porch) -> None:
    first, last = porch.at("view_added", "side"), porch.at("view_removed", "side")
    assert set(range(first + 2, last)) <= set(porch.seen("side")) <= set(range(first, last + 1))
    assert set(porch.missing("side")) <= {first, first + 1}, "while its decoder starts"


def test_an_outside_stage_is_given_the_pictures_of_a_window_by_time_and_view(porch: Porch) -> None:
    events = {event["window"]: event for event in porch.run.events("porch", "views")}
    assert events[2]["views"] in ("back,front", "front,back")
    assert events[EARLY_END]["lately"] == "back,front", "from the two seconds before"
    assert {event["views"] for event in porch.run.events("door", "views")} <= {"", ","}, "one view has no name"


def test_status_and_metrics_say_how_each_view_does(porch: Porch) -> None:
    sessions = {row["session"]: row for row in porch.status["sessions"]}
    assert {view["view"]: view["state"] for view in sessions["porch"]["views"]} == {
        "front": "up",
        "back": "down",
        "side": "up",
    }
    assert sessions["door"]["views"] == []
    up = [line for line in porch.metrics.splitlines() if line.startswith("omni_camera_up{")]
    for label, value in {"door": 1, "porch/front": 1, "porch/back": 0, "porch/side": 1}.items():
        assert [float(line.split()[-1]) for line in up if f'camera="{label}"' in line] == [value]


def test_the_ledger_is_exact(porch: Porch) -> None:
    for edge, account in porch.run.ledger().items():
        assert account["in_flight"] == 0, edge
        assert account["accepted"] == account["delivered"] + sum(account["dropped"][reason] for reason in REASONS), edge
    accepted = porch.run.ledger()["camera.frames->vision_encoder.frames"]["accepted"]
    assert accepted >= 2 * NUM_SECONDS + EARLY_END - 1 + len(porch.seen("side"))


# ---- a view that is cut off ------------------------------------------------------------------------------------------

RTSP_SERVER = Path(__file__).parents[1] / "stages" / "rtsp_server.py"
CUT_SECONDS = 35  # the camera is looked for again after 1, 2, 4 … s
CUT_DESCRIPTION = """
version: 1
cameras:
  gate:
    views: {{near: "test://pattern?seed=1", far: "rtsp://127.0.0.1:{port}/live"}}
    microphone: near
"""


@contextlib.contextmanager
def rtsp_camera(port: int = 0) -> Iterator[int]:
    """A camera on a port, which is cut off at the end."""
    command = [sys.executable, str(RTSP_SERVER), "camera", "1e9", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield int(server.stdout.readline())
        finally:
            server.kill()


def test_a_view_that_is_cut_off_is_missing_by_its_name_until_it_is_back(
    tmp_path_factory: pytest.TempPathFactory, cache: Path
) -> None:
    with new_place(tmp_path_factory.mktemp("cut"), cache) as place:
        out = place.folder / "run"
        with rtsp_camera() as port:
            (place.folder / "pipeline.yaml").write_text(CUT_DESCRIPTION.format(port=port))
            up = place.start("up", "--for", f"{CUT_SECONDS}s", "--out", "run", "--set", "window.lateness=5s")
            place.wait_for_window(5)
        running = Run(0, "", "", out)

        def misses_far() -> bool:
            last = running.windows("gate")[-2:]
            return all("camera/gate/far" in row["missing"] for row in last) or up.poll() is not None

        wait_for(misses_far)
        with rtsp_camera(port):
            run = place.finish(up)
        assert run.returncode == 0, run.stderr
        assert place.leftovers() == []

    windows = {row["index"]: row["missing"] for row in run.windows("gate")}
    assert sorted(windows) == list(range(CUT_SECONDS))
    lost_s = min(event["time_s"] for event in run.events("gate", "camera_lost") if event["view"] == "far")
    back = [event["time_s"] for event in run.events("gate", "camera_up") if event["view"] == "far"]
    back_s = next(time_s for time_s in back if time_s > lost_s)
    missing = {index for index, names in windows.items() if index > 1 and "camera/gate/far" in names}
    assert set(range(int(lost_s) + 1, int(back_s))) <= missing <= set(range(int(lost_s) - 1, int(back_s) + 2))
    assert len(missing) >= 2, "it was waited for"
    assert not [index for index, names in windows.items() if index > 1 and {"camera/gate/near", "image"} & set(names)]
    for edge, account in run.ledger().items():
        assert account["accepted"] == account["delivered"] + sum(account["dropped"][reason] for reason in REASONS), edge
