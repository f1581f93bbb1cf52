"""stages/events.py: what is worth telling, in files that can be read while they grow."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from graph.chunk import NS_PER_MS, NS_PER_S, Chunk, SessionId
from stages.events import Events, clock, window_row
from stages.llm import Llm
from tests.support.units import DOOR, session, unit

PATIENCE_S = 60.0


def event(at_s: float, kind: str, name: str = "door", **attrs: object) -> Chunk:
    return Chunk(SessionId(name), "events", round(at_s * NS_PER_S), attrs={"type": kind, **attrs})


def window(index: int, name: str = "door", **attrs: object) -> Chunk:
    fields = {"index": index, "missing": "", "digest": "ab", "stages": "{}", **attrs}
    return event(float(index), "window", name, **fields)


def record(stage: Events, *chunks: Chunk) -> None:
    for chunk in chunks:
        assert stage.process([unit(chunk.session, 0, chunk)]) == []
    assert stage._disk.drain(PATIENCE_S)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def stage(tmp_path: Path) -> Events:
    subject = Events()
    subject.open_session(session("door", out=tmp_path / "run"))
    return subject


def test_an_event_is_a_line_with_its_session_time_and_fields(stage: Events, tmp_path: Path):
    record(stage, event(1.5, "barge_in", seconds=0.25, epoch=1))
    expected = {"session": "door", "time_s": 1.5, "type": "barge_in", "seconds": 0.25, "epoch": 1}
    assert rows(tmp_path / "run" / "events.jsonl") == [expected]


def test_a_number_that_json_does_not_have_is_null(stage: Events, tmp_path: Path):
    record(stage, event(1.5, "loud", mean=math.nan, peak=math.inf, low=-0.5))
    text = (tmp_path / "run" / "events.jsonl").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {
        "session": "door",
        "time_s": 1.5,
        "type": "loud",
        "mean": None,
        "peak": None,
        "low": -0.5,
    }


@pytest.mark.parametrize(
    ("kind", "attrs", "problem"),
    [
        ("window", {}, "an event of type 'window' is a row of windows.jsonl"),
        ("mine", {"time_s": 1.0}, "event 'mine': each event has time_s already; give your field another name"),
        ("mine", {"session": "x", "type": "y"}, "event 'mine': each event has session, type already"),
    ],
)
def test_an_event_takes_the_place_of_no_row_and_no_field(kind: str, attrs: dict[str, Any], problem: str):
    with pytest.raises(ValueError, match=problem):
        Llm.events.event(DOOR, 0, kind, **attrs)


def test_a_window_is_a_line_of_its_own_file(stage: Events, tmp_path: Path):
    record(stage, window(0), window(1, missing="audio,image", stages='{"llm.compute": 0.1}'))
    first, second = rows(tmp_path / "run" / "windows.jsonl")
    assert (first["index"], first["missing"], first["stages"]) == (0, [], {})
    assert (second["missing"], second["stages"]) == (["audio", "image"], {"llm.compute": 0.1})
    assert rows(tmp_path / "run" / "events.jsonl") == []


def test_the_transcript_tells_when_what_was_heard(stage: Events, tmp_path: Path):
    record(stage, event(1.3, "heard", text="a dog", seconds=1.0), event(61.25, "heard", text="ein Hund ä", seconds=0.5))
    text = (tmp_path / "run" / "transcript.txt").read_text(encoding="utf-8")
    assert text == "00:01.300 - 00:02.300  [door] a dog\n01:01.250 - 01:01.750  [door] ein Hund ä\n"


def test_every_line_can_be_read_at_once(stage: Events, tmp_path: Path):
    record(stage, event(0.0, "camera_up"))
    assert len(rows(tmp_path / "run" / "events.jsonl")) == 1


def test_all_files_are_there_from_the_beginning_and_empty(stage: Events, tmp_path: Path):
    assert {path.name: path.stat().st_size for path in (tmp_path / "run").iterdir()} == {
        "events.jsonl": 0,
        "windows.jsonl": 0,
        "transcript.txt": 0,
    }


def test_sessions_of_one_folder_share_its_files_to_the_last(stage: Events, tmp_path: Path):
    stage.open_session(session("yard", out=tmp_path / "run"))
    record(stage, event(0.0, "camera_up"))
    stage.close_session(SessionId("door"))
    record(stage, event(1.0, "camera_up", "yard"))
    stage.close_session(SessionId("yard"))
    assert [row["session"] for row in rows(tmp_path / "run" / "events.jsonl")] == ["door", "yard"]


def test_a_session_that_opens_later_keeps_what_was_written(stage: Events, tmp_path: Path):
    record(stage, event(0.0, "camera_up"))
    stage.close_session(SessionId("door"))
    stage.open_session(session("yard", out=tmp_path / "run"))
    assert len(rows(tmp_path / "run" / "events.jsonl")) == 1


def test_a_session_without_a_folder_writes_nothing(tmp_path: Path):
    subject = Events()
    subject.open_session(session("door"))
    record(subject, event(0.0, "camera_up"))
    subject.close_session(SessionId("door"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_costs_the_file_and_not_the_session(tmp_path: Path):
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    subject = Events()
    subject.open_session(session("door", out=tmp_path))
    record(subject, event(0.0, "camera_up"), event(1.0, "camera_lost"), window(0))
    subject.close_session(SessionId("door"))
    assert subject.lost == {tmp_path / "events.jsonl": 2}
    assert len(rows(tmp_path / "windows.jsonl")) == 1


@pytest.mark.parametrize(
    ("at_ns", "expected"),
    [
        (0, "00:00.000"),
        (12_345 * NS_PER_MS, "00:12.345"),
        (61 * NS_PER_S, "01:01.000"),
        (3600 * NS_PER_S, "60:00.000"),
        (-5, "00:00.000"),
        (60 * NS_PER_S - 1, "00:59.999"),
    ],
)
def test_times_read_as_minutes_and_seconds(at_ns: int, expected: str):
    assert clock(at_ns) == expected


def test_a_window_row_names_what_is_missing():
    assert window_row({"type": "window", "index": 3, "missing": ""}) == {
        "index": 3,
        "missing": [],
        "failed": [],
        "stages": {},
        "compute": {},
    }
