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
