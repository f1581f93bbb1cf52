"""stages/disk.py, and who writes by it: a slow or hung disk costs what is written, and never a loop."""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from graph.chunk import NS_PER_S, Chunk, SessionId
from stages.disk import Disk
from stages.events import Events
from stages.media.feed import Feed
from stages.media.feeds import Feeds, FeedStage, Reading
from stages.rates import SPEECH_RATE_HZ
from stages.session import Session, View
from stages.speaker import Speaker
from stages.stage import MissingDependency, Stage, StageError
from stages.wav import Output, OutputEvent
from tests.support.units import DOOR, session, speech, unit

PATIENCE_S = 60.0


@pytest.fixture
def hung() -> Iterator[Callable[[Disk], None]]:
    """Lets a disk hang until the test is over."""
    goes_on = threading.Event()
    yield lambda disk: disk.put(goes_on.wait) and None
    goes_on.set()


def event(index: int) -> Chunk:
    return Chunk(DOOR, "events", index, attrs={"type": "word", "index": index})


def test_jobs_are_done_in_order_by_another_thread():
    disk, done = Disk(), list[tuple[int, int]]()
    for index in range(100):
        assert disk.put(lambda index=index: done.append((index, threading.get_ident())))  # type: ignore[misc]
    assert disk.drain(PATIENCE_S)
    assert [index for index, _ in done] == list(range(100))
    assert {thread for _, thread in done} != {threading.get_ident()}


def test_what_is_more_than_may_wait_is_refused_until_there_is_room(hung):
    disk = Disk(max_waiting_bytes=100)
    hung(disk)
    assert [disk.put(lambda: None, 40) for _ in range(4)] == [True, True, False, False]
    assert not disk.drain(0.0)


def test_what_is_asked_of_a_disk_that_hangs_fails_in_time(hung):
    disk = Disk()
    hung(disk)
    with pytest.raises(OSError, match=r"does not answer within 0\.01 s"):
        disk.call(lambda: None, timeout_s=0.01)


def test_a_question_is_answered_with_what_it_returns_or_raises():
    disk = Disk()
    assert disk.call(lambda: 7) == 7
    with pytest.raises(KeyError):
        disk.call(lambda: {}[1])


def test_a_disk_that_hangs_holds_up_no_events_loses_lines_and_counts_them(tmp_path: Path, hung):
    disk = Disk(max_waiting_bytes=1000)
    stage = Events(disk)
    stage.open_session(session("door", out=tmp_path, paced=True))
    hung(disk)
    for index in range(100):
        stage.process([unit("door", 0, event(index))])
    path = tmp_path / "events.jsonl"
    assert 80 < stage.lost[path] < 100


def test_in_virtual_time_no_line_is_lost_however_slow_the_disk_is(tmp_path: Path):
    stage = Events(Disk(max_waiting_bytes=200))
    stage.open_session(session("door", out=tmp_path, paced=False))
    for index in range(200):
        stage.process([unit("door", 0, event(index))])
    stage.close_session(DOOR)
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 200


def test_a_disk_that_hangs_holds_up_no_listener_and_what_is_lost_of_the_recording_is_told(tmp_path: Path, hung):
    disk = Disk(max_waiting_bytes=10_000)
    speaker = Speaker(disk=disk)
    speaker.open_session(session("door", out=tmp_path, paced=True))
    hung(disk)
    chunks = speaker.advance(DOOR, NS_PER_S)
    chunks += speaker.process([unit("door", 0, speech("door", 0, np.zeros(SPEECH_RATE_HZ, np.float32), "word"))])
    chunks += speaker.advance(DOOR, 3 * NS_PER_S)
    chunks += speaker.advance(DOOR, 4 * NS_PER_S)
    kinds = [chunk.attrs.get("type") for chunk in chunks if not chunk.is_control]
    assert sorted(kinds) == ["heard", "recording_lost"]


def test_files_that_are_removed_during_a_run_are_made_anew_and_that_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    out = tmp_path / "run"
    stage = Events()
    stage.open_session(session("door", out=out))
    stage.process([unit("door", 0, event(0))])
    assert stage._disk.drain(PATIENCE_S)
    shutil.rmtree(out)
    for index in (1, 2):
        stage.process([unit("door", index, event(index))])
    stage.close_session(DOOR)
    rows = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == [1, 2]
    assert not stage.lost
    assert caplog.messages == [
        f"events: {out}/events.jsonl was removed during the run: it is made anew, what it held is lost"
    ]


def test_a_file_that_was_moved_away_goes_on_where_it_is_now(tmp_path: Path):
    stage = Events()
    stage.open_session(session("door", out=tmp_path))
    assert stage._disk.drain(PATIENCE_S)
    (tmp_path / "events.jsonl").rename(tmp_path / "moved.jsonl")
    stage.process([unit("door", 0, event(0))])
    stage.close_session(DOOR)
    assert len((tmp_path / "moved.jsonl").read_text().splitlines()) == 1


# ---- opening: all or nothing -----------------------------------------------------------------------------------------


class Missing(Output):
    """A device that is not there the first time."""

    num_tries = 0

    def __init__(self) -> None:
        type(self).num_tries += 1
        if type(self).num_tries % 2:
            raise MissingDependency("no sound device")

    def write(self, at_ns: int, samples: np.ndarray) -> list[OutputEvent]:
        return []

    def advance(self, now_ns: int) -> list[OutputEvent]:
        return []

    def close(self, end_ns: int) -> None: ...


def fails_once() -> Callable[[Session, View, Feed], Reading]:
    tries: list[Session] = []

    def begin(session: Session, view: View, feed: Feed) -> Reading:
        tries.append(session)
        if len(tries) == 1:
            raise ValueError("not now")
        return Reading(session, view, feed)

    return begin


def blocked(folder: Path) -> Path:
    """A folder that can't be made, since a file is where it is to be."""
    folder.write_text("")
    return folder


def opened_files(folder: Path) -> list[str]:
    names = [os.path.realpath(each) for each in Path("/proc/self/fd").iterdir()]
    return [name for name in names if name.startswith(str(folder))]


@pytest.mark.parametrize("make", [Events, Speaker, lambda: Speaker(Missing)], ids=["events", "speaker", "device"])
def test_a_stage_that_can_not_open_a_session_keeps_nothing_of_it_and_opens_the_next(make, tmp_path: Path):
    stage: Stage = make()
    is_device = isinstance(stage, Speaker) and stage._open_device is not None
    bad = tmp_path / "bad" if is_device else blocked(tmp_path / "bad")
    with pytest.raises(StageError):
        stage.open_session(session("door", out=bad))
    assert stage._disk.drain(PATIENCE_S)  # type: ignore[attr-defined]
    assert (stage._open, opened_files(tmp_path)) == ({}, [])  # type: ignore[attr-defined]
    stage.close_session(DOOR)
    stage.open_session(session("door", out=tmp_path / "good"))
    assert opened_files(tmp_path)
    stage.close_session(DOOR)
    assert stage._disk.drain(PATIENCE_S)  # type: ignore[attr-defined]
    assert opened_files(tmp_path) == []


def test_a_source_that_can_not_begin_gives_its_feed_back():
    feeds = Feeds()
    stage = FeedStage(feeds, fails_once())
    with pytest.raises(ValueError, match="not now"):
        stage.open_session(session("door"))
    assert (feeds._feeds, feeds._users) == ({}, {})
    stage.close_session(DOOR)
    stage.open_session(session("door"))
    stage.close_session(DOOR)
    assert (feeds._feeds, feeds._users) == ({}, {})


def test_a_folder_that_can_not_be_written_to_is_named(tmp_path: Path):
    with pytest.raises(StageError, match=r"events: .*bad can't be written to: .*; name another --out"):
        Events().open_session(session("door", out=blocked(tmp_path / "bad")))


def test_a_session_closed_before_it_began_leaves_no_recording(tmp_path: Path):
    stage = Speaker()
    stage.open_session(session("n1", out=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["n1.wav"]
    stage.close_session(SessionId("n1"))
    assert stage._disk.drain(PATIENCE_S)
    assert list(tmp_path.iterdir()) == []


def test_a_session_closed_twice_is_closed_once():
    stage = Events()
    stage.open_session(session("door"))
    stage.close_session(DOOR), stage.close_session(DOOR), stage.close_session(SessionId("nobody"))
