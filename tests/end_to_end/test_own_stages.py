"""Stages of a user's own that are slow, wrong or deadly, in a real pipeline: each named, each paying for itself."""

import json
import os
import signal
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from graph.ledger import REASONS
from tests.support.pipeline import Place, Run, new_place, wait_for

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
    "stray": "ValueError: a chunk of session 'attic', which is none of its units'; they are of: hall",
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Run]:
    with new_place(tmp_path_factory.mktemp("bad"), cache) as place:
        beside = "process: beside, batch: 1"  # of a batch nobody knows whose a chunk of the attic was
        stages = [
            f'  {name}: {{use: "bad:{name.capitalize()}", inputs: {{frames: camera.frames}}, {beside}}}'
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
    """Three times, and once that the stage is not asked any more."""
    failed = [event for event in bad.events("hall", "unit_failed") if event["stage"] == stage]
    assert [event["window"] for event in failed] == list(range(4))
    assert all(REASONS_BY_STAGE[stage] in event["reason"] for event in failed)


@pytest.mark.parametrize("stage", REASONS_BY_STAGE)
def test_a_side_branch_that_is_given_up_is_named_however_short_the_run(bad: Run, stage: str) -> None:
    (line,) = [line for line in bad.stderr.splitlines() if f"stage {stage} failed three times" in line]
    assert line.startswith("camera hall: ") and line.endswith(f"; the camera goes on without {stage}")
    assert REASONS_BY_STAGE[stage] in line


def test_what_stages_of_ones_own_return_costs_nobody_else_anything(bad: Run) -> None:
    assert bad.returncode == 0
    assert is_exact(bad)
    assert bad.rows("events.jsonl", "yard")
    assert [(event["stage"], event["reason"]) for event in bad.events("yard", "unit_failed")] == []
    for session in ("hall", "yard"):
        assert [(row["index"], row["failed"]) for row in bad.windows(session)] == [(index, []) for index in range(6)]


# ---- what a stage does to its process --------------------------------------------------------------------------------

DEADLY = """
import os, signal
from pathlib import Path
from stages.api import EVENTS, FRAMES, In, Out, Stage, StageOptions

class Once(Stage):
    frames, notes = In(FRAMES, side=True), Out(EVENTS)
    class Options(StageOptions):
        mark: str = ""
    def process(self, units):
        for unit in units:
            mark = Path(self.options.mark)
            if (unit.session, unit.index) == ("hall", 2) and not mark.exists():
                mark.touch()
                self.go_wrong()
        return [self.notes.event(unit.session, unit.start_ns, type(self).__name__, window=unit.index) for unit in units]

class Loop(Once):
    def go_wrong(self):
        while True:
            pass

class Killed(Once):
    def go_wrong(self):
        os.kill(os.getpid(), signal.SIGKILL)

class Greedy(Once):
    def go_wrong(self):
        kept = []
        while True:
            kept.append(bytearray(16 << 20))
"""
DEADLY_STAGES = ("loop", "killed", "greedy")


@dataclass(frozen=True, slots=True)
class Deadly:
    run: Run
    status: dict[str, Any]  # while one of them was busy


@pytest.fixture(scope="module")
def deadly(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Deadly]:
    """Ended by Ctrl-C when all that had died is back and has gone on."""
    with new_place(tmp_path_factory.mktemp("deadly"), cache) as place:
        use = '  {0}: {{use: "deadly:{1}", mark: "{2}/{0}", inputs: {{frames: camera.frames}}{3}}}'
        stages = [
            use.format(name, name.capitalize(), place.folder, ", memory: 1GiB" if name == "greedy" else "")
            for name in DEADLY_STAGES
        ]
        write(
            place,
            "deadly",
            DEADLY,
            "\n".join([*stages, "  vision_encoder: {inputs: {frames: camera.frames}}"]),
            "hall",
            "yard",
        )
        status: dict[str, Any] = {}

        def is_busy() -> bool:
            with urllib.request.urlopen(f"{place.url()}/api/v1/ps") as answer:
                status.update(json.load(answer))
            return any(row["busy"] for row in status["stages"])

        def all_go_on() -> bool:
            rows = [json.loads(line) for line in (place.folder / "run/events.jsonl").read_text().splitlines()]
            back = [row for row in rows if row["type"] == "recovered" and row["session"] == "hall"]
            names = {row["actor"].partition(".")[0] for row in back}
            since_s = max((row["time_s"] for row in back), default=0.0)
            after = {row["type"].lower() for row in rows if row["session"] == "hall" and row["time_s"] > since_s}
            return names >= set(DEADLY_STAGES) and after >= set(DEADLY_STAGES)

        def until_all_go_on() -> None:
            place.wait_for_window(3)
            wait_for(is_busy)
            wait_for(all_go_on)

        yield Deadly(interrupted(place, until_all_go_on), status)
        assert place.leftovers() == []


def test_a_stage_that_never_returns_is_named_while_it_does_not(deadly: Deadly) -> None:
    lines = deadly.run.stderr.splitlines()
    assert any(line == "stage loop has been at window 2 of hall for 5 s" for line in lines)
    (row,) = [row for row in deadly.status["stages"] if row["busy"]]
    assert (row["stage"], row["state"]) == ("loop", "busy")
    assert row["busy"].startswith("stage loop has been at window 2 of hall for ")


@pytest.mark.parametrize(
    ("stage", "reason"), [("loop", "has not answered for 30 s"), ("killed", "has died"), ("greedy", "MemoryError")]
)
def test_a_stage_that_ends_its_process_is_named_with_its_window_and_comes_back(
    deadly: Deadly, stage: str, reason: str
) -> None:
    lines = deadly.run.stderr.splitlines()
    (line,) = [line for line in lines if line.endswith(f"; stage {stage} was at window 2 of hall")]
    assert line.startswith(f"{stage}.0") and reason in line
    assert f"  {stage}.0 ready again" in lines
    assert any(event["actor"] == f"{stage}.0" for event in deadly.run.events("hall", "recovered"))


def test_whatever_a_side_branch_does_to_its_process_the_way_goes_on(deadly: Deadly) -> None:
    assert deadly.run.returncode == 130
    assert is_exact(deadly.run), deadly.run.stderr
    for session in ("hall", "yard"):
        rows = deadly.run.windows(session)
        assert [row["index"] for row in rows] == list(range(len(rows)))
        assert all(row["failed"] == [] for row in rows)


KILLER = """
import os
from stages.api import EVENTS, FRAMES, In, Out, Stage
class Killer(Stage):
    frames, notes = In(FRAMES, side=True), Out(EVENTS)
    def process(self, units):
        if any(unit.session == "hall" and unit.index >= 2 for unit in units):
            os._exit(1)
        return [self.notes.event(unit.session, unit.start_ns, "killer", window=unit.index) for unit in units]
"""


def test_a_camera_whose_data_kill_a_side_branch_twice_goes_on_without_it(place: Place) -> None:
    write(
        place,
        "killer",
        KILLER,
        '  killer: {use: "killer:Killer", inputs: {frames: camera.frames}, batch: 1}\n'
        "  vision_encoder: {inputs: {frames: camera.frames}}",
        "hall",
        "yard",
    )

    def has_gone_on() -> bool:
        rows = [json.loads(line) for line in (place.folder / "run/events.jsonl").read_text().splitlines()]
        times_s = [row["time_s"] for row in rows if row["type"] == "recovered" and row["session"] == "yard"]
        noted_s = [row["time_s"] for row in rows if row["type"] == "killer" and row["session"] == "yard"]
        return len(times_s) == 2 and noted_s[-1] > times_s[-1] + 2

    def until_it_has_gone_on() -> None:
        place.wait_for_window(2)
        wait_for(has_gone_on)

    run = interrupted(place, until_it_has_gone_on)
    assert run.returncode == 130 and is_exact(run), run.stderr
    lines = run.stderr.splitlines()
    reason = "killer died twice in a row while it worked on its data"
    assert lines.count(f"camera hall: {reason}; the camera goes on without killer") == 1
    for session in ("hall", "yard"):
        rows = run.windows(session)
        assert [row["index"] for row in rows] == list(range(len(rows)))
        assert all(row["failed"] == [] for row in rows)
    assert run.events("hall", "unit_failed")[-1]["reason"].endswith(reason)
    assert place.leftovers() == []


SLEEPER = """
import time
from stages.api import EVENTS, FRAMES, In, Out, Stage
class Sleeper(Stage):
    frames, notes = In(FRAMES, side=True), Out(EVENTS)
    def process(self, units):
        if any(unit.index == 4 for unit in units):
            time.sleep(600)
        return []
"""


def test_a_run_whose_time_is_over_waits_seconds_for_a_side_branch_and_counts_what_it_held(place: Place) -> None:
    write(
        place,
        "sleeper",
        SLEEPER,
        '  sleeper: {use: "sleeper:Sleeper", inputs: {frames: camera.frames}}\n'
        "  vision_encoder: {inputs: {frames: camera.frames}}",
        "hall",
    )
    run = place.up("--for", "7s", "--out", "run")
    assert run.returncode == 0 and is_exact(run), run.stderr
    assert "all windows have come to their end; what sleeper is still at is dropped" in run.stderr.splitlines()
    assert "has died" not in run.stderr, "it is not waited for until it is taken for dead"
    assert [row["index"] for row in run.windows("hall")] == list(range(7))
    account = run.ledger()["camera.frames->sleeper.frames"]
    assert (account["accepted"], account["delivered"], account["dropped"]["crash"]) == (7, 4, 3)
    assert place.leftovers() == []


CLOSED = """
from stages.api import EVENTS, FRAMES, In, Out, Stage
class Keyless(Stage):
    frames, notes = In(FRAMES, side=True), Out(EVENTS)
    def open_session(self, session):
        raise KeyError("no key for it")
    def process(self, units):
        return []
"""


def test_a_stage_that_cannot_open_a_session_ends_the_start_with_one_line(place: Place) -> None:
    write(place, "closed", CLOSED, '  keyless: {use: "closed:Keyless"}', "hall")
    run = place.up("--for", "5s")
    assert run.returncode == 1
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("pipeline: ")]
    assert line == "pipeline: keyless: session 'hall' can't be opened: KeyError: 'no key for it'"
    assert place.leftovers() == []


# ---- what can't be brought up again ----------------------------------------------------------------------------------

ONCE = """
import os
from pathlib import Path
from stages.api import SOUND, In, Stage, StageError, StageOptions
class Once(Stage):
    sound = In(SOUND, side=True)
    is_needed = True
    class Options(StageOptions):
        marker: str = ""
    @classmethod
    def load(cls, options, site):
        if Path(options.marker).exists():
            raise StageError("once: the licence is used up")
        Path(options.marker).touch()
        return super().load(options, site)
    def process(self, units):
        if any(unit.index == 2 for unit in units):
            os._exit(1)
        return []
"""


def test_a_run_whose_time_is_over_does_not_wait_for_what_never_comes_back(place: Place) -> None:
    marker = place.folder / "marker"
    write(place, "once", ONCE, f'  once: {{use: "once:Once", marker: "{marker}"}}', "door")
    run = place.up("--for", "6s", "--out", "run")
    assert run.returncode == 1
    assert "once.0: once: the licence is used up" in run.stderr
    assert "once.0 has died 2 times within 10 minutes: it is tried again in 1 s" in run.stderr
    assert "once.0 started again after it has died: the run ends without" in run.stderr
    assert [window["index"] for window in run.windows("door")] == list(range(6)), "all others go on"
    assert is_exact(run), run.ledger()
