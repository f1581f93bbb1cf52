"""Stages of a user's own that are slow, wrong or deadly, in a real pipeline: each named, each paying for itself."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from graph.ledger import REASONS
from tests.support.pipeline import Place, Run, new_place

pytestmark = pytest.mark.ray

SLOW = """
import time
from stages.api import EVENTS, SOUND, In, Out, Stage, StageOptions
class Asr(Stage):
    sound, heard = In(SOUND, side=True), Out(EVENTS)
    class Options(StageOptions):
        work: float = 0.0
    def process(self, units):
        time.sleep(self.options.work)
        return [self.heard.event(unit.session, unit.start_ns, "words", window=unit.index) for unit in units]
"""


@pytest.fixture
def place(tmp_path: Path, cache: Path) -> Iterator[Place]:
    with new_place(tmp_path / "project", cache) as new:
        yield new


def write(place: Place, module: str, code: str, stages: str, *sessions: str) -> None:
    """A stage beside its pipeline.yaml. sessions: cameras with test pictures."""
    (place.folder / f"{module}.py").write_text(code)
    cameras = "\n".join(f'  {name}: {{source: "test://pattern?seed={i}"}}' for i, name in enumerate(sessions))
    (place.folder / "pipeline.yaml").write_text(f"version: 1\ncameras:\n{cameras}\nstages:\n{stages}\n")


def interrupted(place: Place, after: Callable[[], None]) -> Run:
    """A run that is ended by Ctrl-C."""
    process = place.start("up", "--out", "run")
    after()
    os.killpg(process.pid, signal.SIGINT)
    return place.finish(process)


def is_exact(run: Run) -> bool:
    accounts = run.ledger().values()
    return all(a["in_flight"] == 0 for a in accounts) and all(
        a["accepted"] == a["delivered"] + sum(a["dropped"][reason] for reason in REASONS) for a in accounts
    )


def test_ctrl_c_beside_a_busy_side_branch_leaves_an_exact_ledger(place: Place) -> None:
    write(place, "asr", SLOW, '  asr: {use: "asr:Asr", inputs: {sound: microphone.sound}, work: 2.6}', "door", "yard")
    run = interrupted(place, lambda: place.wait_for_window(3))
    assert run.returncode == 130
    assert is_exact(run), run.stderr
    assert place.leftovers() == []


# ---- what a stage returns --------------------------------------------------------------------------------------------

BAD = """
from stages.api import EVENTS, FRAMES, In, Kind, Out, Stage

class Dim(Stage):
    frames, small, notes = In(FRAMES, side=True), Out(FRAMES), Out(EVENTS)
    def process(self, units):
        pictures = [picture for unit in units for picture in unit.of(self.frames) if unit.session == "hall"]
        return [self.small.like(picture, arrays={"image": picture.arrays["image"] / 255}) for picture in pictures]

class Listing(Dim):
    boxes = Out(Kind("boxes"))
    def process(self, units):
        pictures = [picture for unit in units for picture in unit.of(self.frames) if unit.session == "hall"]
        return [self.boxes.like(picture, attrs={"corner": [1, 2]}) for picture in pictures]

class Mute(Stage):
    frames, small = In(FRAMES, side=True), Out(FRAMES)
    is_needed = True
    def process(self, units):
        if any(unit.session == "hall" for unit in units):
            raise ValueError("no such picture")
        return []

class Lost(Dim):
    def process(self, units):
        return [Out(EVENTS).event(unit.session, unit.start_ns, "x") for unit in units if unit.session == "hall"]

class Stray(Dim):
    def process(self, units):
        return [self.notes.event("attic", unit.start_ns, "x") for unit in units if unit.session == "hall"]
"""
REASONS_BY_STAGE = {
    "dim": "stage dim, port small: array 'image' is float64 [480, 640, 3]; it must be uint8 [height, width, 3]",
    "listing": "stage listing, port boxes: attribute 'corner' is a list; only int, float, str, bool and None travel",
    "mute": "ValueError: no such picture",
    "lost": "stage lost has no output ''; it has: notes, small",
    "stray": "ValueError: a chunk of 'attic'",
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Run]:
    with new_place(tmp_path_factory.mktemp("bad"), cache) as place:
        stages = [
            f'  {name}: {{use: "bad:{name.capitalize()}", inputs: {{frames: camera.frames}}, process: beside}}'
            for name in REASONS_BY_STAGE
        ]
        write(
            place,
            "bad",
            BAD,
            "\n".join([*stages, "  vision_encoder: {inputs: {frames: camera.frames}}"]),
            "hall",
            "yard",
        )
        yield place.up("--speed", "max", "--for", "6s")


@pytest.mark.parametrize("stage", [name for name in REASONS_BY_STAGE if name != "mute"])
def test_a_chunk_that_nobody_may_take_is_reported_also_where_nobody_would(bad: Run, stage: str) -> None:
    failed = [event for event in bad.events("hall", "unit_failed") if event["stage"] == stage]
    assert [event["window"] for event in failed] == list(range(6))
    assert all(REASONS_BY_STAGE[stage] in event["reason"] for event in failed)


@pytest.mark.parametrize("stage", REASONS_BY_STAGE)
def test_a_side_branch_that_is_given_up_is_named_however_short_the_run(bad: Run, stage: str) -> None:
    (line,) = [line for line in bad.stderr.splitlines() if f"stage {stage} failed three times" in line]
    assert line.startswith("camera hall: ") and line.endswith(f"; the camera goes on without {stage}")
    assert REASONS_BY_STAGE[stage] in line


def test_what_stages_of_ones_own_return_costs_nobody_else_anything(bad: Run) -> None:
    assert bad.returncode == 0
    assert is_exact(bad)
    assert bad.rows("events.jsonl", "yard") and bad.events("yard", "unit_failed") == []
    for session in ("hall", "yard"):
        assert [(row["index"], row["failed"]) for row in bad.windows(session)] == [(index, []) for index in range(6)]
