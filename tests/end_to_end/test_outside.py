"""Stages that nothing in the pipeline knows of, in a real one: README's first beside the description, and those of an
installed package (tests/outside)."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from graph.ledger import REASONS
from tests.support.pipeline import Place, Run

pytestmark = pytest.mark.ray

README = Path(__file__).parents[2] / "README.md"
NUM_WINDOWS = 6
SESSIONS = ("door", "yard")
OUTSIDE = """
  counter: {use: "omni_outside.counter:Counter", inputs: {frames: camera.frames}, process: beside}
  slow: {use: "omni_outside.counter:Counter", inputs: {frames: camera.frames}, work: 3s, batch: 1}
  scene: {use: "omni_outside.scene:Scene", inputs: {frames: camera.frames}, process: beside}
  census: {inputs: {frames: camera.frames}, process: beside}
"""


def blocks() -> dict[str, str]:
    """README's first stage, as it stands there, by language."""
    text = README.read_text().partition("## A stage of your own")[2]
    return {language: re.findall(rf"```{language}\n(.*?)```", text, re.S)[0] for language in ("python", "yaml")}


def test_the_first_stage_in_the_readme_takes_25_lines_at_most() -> None:
    lines = "".join(blocks().values()).splitlines()
    assert 10 < len(lines) <= 25


@dataclass(frozen=True, slots=True)
class Outside:
    run: Run
    stages: dict[str, object]


@pytest.fixture(scope="module")
def outside(place: Place) -> Iterator[Outside]:
    examples = blocks()
    (place.folder / "motion.py").write_text(examples["python"])
    cameras = "\n".join(f'  {name}: {{source: "test://pattern?seed={i}"}}' for i, name in enumerate(SESSIONS))
    description = f"version: 1\ncameras:\n{cameras}\n{examples['yaml'].rstrip()}{OUTSIDE}"
    (place.folder / "pipeline.yaml").write_text(description)
    run = place.run("up", "--for", f"{NUM_WINDOWS}s", "--out", "run")
    yield Outside(run, json.loads(place.run("stages", "--json").stdout))
    assert place.leftovers() == []


def test_the_readmes_stage_runs_as_it_stands_there(outside: Outside) -> None:
    assert outside.run.returncode == 0, outside.run.stderr
    for session in SESSIONS:
        moved = [event["moved"] for event in outside.run.events(session, "motion")]
        assert moved[0] == 1.0, "the first picture is news"
        account = outside.run.ledger()["motion.moving->vision_encoder.frames"]
        assert account["accepted"] >= len(moved)


def test_a_window_has_one_row_whatever_stands_beside_its_way(outside: Outside) -> None:
    for session in SESSIONS:
        assert [row["index"] for row in outside.run.windows(session)] == list(range(NUM_WINDOWS))


def test_a_side_input_sees_what_the_way_sees(outside: Outside) -> None:
    for session in SESSIONS:
        counted = outside.run.events(session, "counted")
        assert {event["window"] for event in counted} == set(range(NUM_WINDOWS))


def test_two_inputs_have_two_windows(outside: Outside) -> None:
    for session in SESSIONS:
        heard_s = [event["heard_s"] for event in outside.run.events(session, "scene")]
        assert len(heard_s) == NUM_WINDOWS
        assert max(heard_s) == 2.0 > heard_s[0] > 0, "one second, and from then on two"


def test_one_replica_of_scope_pipeline_sees_all_sessions(outside: Outside) -> None:
    for session in SESSIONS:
        assert max(event["seen"] for event in outside.run.events(session, "census")) == len(SESSIONS)


def test_a_slow_side_branch_costs_the_way_nothing_and_names_its_own_drops(outside: Outside) -> None:
    ledger = outside.run.ledger()
    side = ledger["camera.frames->slow.frames"]
    assert sum(side["dropped"].values()) + side["delivered"] == side["accepted"] > 0
    for edge in (
        "camera.frames->motion.frames",
        "motion.moving->vision_encoder.frames",
        "vision_encoder.image->llm.image",
    ):
        assert not any(ledger[edge]["dropped"].values()), edge


def test_every_edge_is_exact(outside: Outside) -> None:
    for edge, account in outside.run.ledger().items():
        assert account["in_flight"] == 0, edge
        assert account["accepted"] == account["delivered"] + sum(account["dropped"][reason] for reason in REASONS), edge


def test_an_installed_stage_is_listed_by_its_name(outside: Outside) -> None:
    assert outside.stages["census"]["class"] == "omni_outside.census:Census"  # type: ignore[index]
    assert outside.stages["census"]["scope"] == "pipeline"  # type: ignore[index]
