"""Sources, speaker and events in the place of those whose process has died: what was before is past, and kept."""

import json
from pathlib import Path

import numpy as np
import pytest

from graph.chunk import NS_PER_S, ChunkType
from graph.tail import Ack, ack_of
from stages.events import Events
from stages.media.reader import Ended, Sound
from stages.rates import SOUND_RATE_HZ, SPEECH_RATE_HZ
from stages.session import ListenerAction, Session
from stages.speaker import Speaker
from stages.stage import Source
from stages.wav import OutputEvent, WavOutput
from tests.support.media import Clip, times
from tests.support.media_script import DOOR, Door, FakeMedia, FakeReader, data, frame, progress, seconds, sound, source
from tests.support.reading import frames_of, read_all, starts_s
from tests.support.ticking import Ticker
from tests.support.units import of_kind, session, speech, unit

# --- sources ----------------------------------------------------------------------------------------------------------


def test_a_file_is_read_on_from_the_window_that_the_session_is_in():
    door = Door(FakeMedia(source(10)), resume_ns=4 * NS_PER_S + NS_PER_S // 2)
    said = door.until(11, start_s=4.5)
    assert door.media.requests[0].start_ns == 4 * NS_PER_S
    assert [chunk.start_ns // NS_PER_S for chunk in data(said, "frames")] == [5, 6, 7, 8, 9], (
        "picture 4 was seen before"
    )
    assert [chunk.start_ns // NS_PER_S for chunk in data(said, "sound")] == [4, 5, 6, 7, 8, 9], "sound is whole windows"
    assert door.finished == (True, True)


def test_a_live_camera_goes_on_in_the_present():
    reader = FakeReader(
        progress(4.5, 4.5), frame(5.0), sound(round(4.5 * SOUND_RATE_HZ)), progress(5.5, 5.5), live=True
    )
    door = Door(FakeMedia(reader), resume_ns=4 * NS_PER_S + NS_PER_S // 2)
    said = door.until(5.4, start_s=4.6)
    assert [chunk.start_ns for chunk in data(said, "frames")] == [5 * NS_PER_S]
    (first,) = data(said, "sound")
    assert first.start_ns == 4 * NS_PER_S + NS_PER_S // 2
    assert min(chunk.start_ns for chunk in said if chunk.type is ChunkType.WATERMARK) > 4 * NS_PER_S


def test_a_file_that_had_ended_before_ends_again_and_is_no_lost_camera():
    door = Door(FakeMedia(FakeReader(progress(None, None), Ended("the source is at its end"))), resume_ns=30 * NS_PER_S)
    said = door.until(31, start_s=30)
    assert door.finished == (True, True)
    assert [c.attrs["type"] for c in data(said, "events")] == ["camera_ended"]
    assert [report.problem for report in door.feeds.reports().values()] == [""]


def test_a_source_of_ones_own_makes_the_windows_that_are_left():
    made_s: list[int] = []

    class Meter(Source):
        def make(self, session: Session, start_ns: int, end_ns: int) -> list:
            made_s.append(start_ns // NS_PER_S)
            return []

    meter = Meter()
    meter.open_session(session("door", paced=False, resume_ns=7 * NS_PER_S + 1, duration_ns=9 * NS_PER_S))
    while not meter.finished(DOOR):
        meter.advance(DOOR, 0)
    assert made_s == [7, 8]


def test_a_source_of_ones_own_says_its_end_with_its_last_window():
    """A window later a reader's clock would have passed the next one, which nobody fills."""
    meter = Ticker()
    meter.open_session(session("door", duration_ns=2 * NS_PER_S))
    assert [chunk.type for chunk in meter.advance(DOOR, NS_PER_S)] == [ChunkType.DATA, ChunkType.WATERMARK]
    last = meter.advance(DOOR, 2 * NS_PER_S)
    assert [chunk.type for chunk in last] == [ChunkType.DATA, ChunkType.WATERMARK, ChunkType.END]
    assert last[-1].start_ns == 2 * NS_PER_S and meter.finished(DOOR)
    assert meter.advance(DOOR, 3 * NS_PER_S) == []


def test_a_source_of_ones_own_that_is_told_to_end_between_two_windows_does_not_wait_for_the_next():
    meter = Ticker()
    meter.open_session(session("door"))
    meter.advance(DOOR, NS_PER_S)
    meter.end(DOOR, NS_PER_S)
    assert meter.due_in_ns(DOOR, NS_PER_S) == 0
    assert [chunk.type for chunk in meter.advance(DOOR, NS_PER_S)] == [ChunkType.END]


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 s with a keyframe each 4 s; picture and sound tell their time."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    Clip(path).video(times(40)).sound(40).write()
    return path


@pytest.mark.parametrize("start_s", [1, 17, 38])
def test_what_is_read_from_there_on_is_what_was_to_be_read(film: Path, start_s: int):
    whole, rest = read_all(film), read_all(film, start_ns=start_s * NS_PER_S)
    assert starts_s(rest) == [at for at in starts_s(whole) if at >= start_s]
    late = [each for each in frames_of(whole) if each.start_ns >= start_s * NS_PER_S]
    for one, other in zip(late, frames_of(rest), strict=True):
        assert np.abs(one.image.astype(int) - other.image).max() <= 1
    heard, again = (joined(items) for items in (whole, rest))
    first = start_s * SOUND_RATE_HZ
    settled = first + SOUND_RATE_HZ // 10  # a resampler that begins, and a codec, swing in
    assert again[0] <= first
    ours = again[1][settled - again[0] :]
    assert np.abs(heard[1][settled - heard[0] :][: len(ours)] - ours).max() < 0.1, (
        "within a sample, which is 0.09 of this tone"
    )


def joined(items: list) -> tuple[int, np.ndarray]:
    sounds = [item for item in items if isinstance(item, Sound)]
    return sounds[0].first_sample, np.concatenate([item.samples for item in sounds])


def test_beyond_its_end_a_file_gives_nothing_and_has_ended(film: Path):
    *items, end = read_all(film, start_ns=100 * NS_PER_S)
    assert isinstance(end, Ended)
    assert not frames_of(items)


def test_a_drawn_room_is_drawn_from_there_on():
    room = {"duration_ns": 1205 * NS_PER_S, "start_ns": 1200 * NS_PER_S}
    items = read_all("synthetic://room?seed=3", **room)
    assert [round(at) for at in starts_s(items)] == [1201, 1202, 1203, 1204, 1205]


def test_reading_on_takes_no_longer_however_far_it_is():
    reader = FakeReader(*seconds(3600, 3603), progress(None, None), Ended("it is at its end"))
    door = Door(FakeMedia(reader), resume_ns=3600 * NS_PER_S)
    said = door.until(3604, start_s=3600)
    assert len(data(said, "sound")) == 3
    assert door.microphone.finished(DOOR)


# --- speaker ----------------------------------------------------------------------------------------------------------

HEARD = Ack(9 * NS_PER_S, heard_ns=4 * NS_PER_S, received_ns=6 * NS_PER_S, num_turns=2, epoch=3, num_windows=8)


def resumed_speaker(**fields: object) -> Speaker:
    speaker = Speaker()
    of = session(paced=True, resume_ns=10 * NS_PER_S, **fields)
    of.playback.ack(HEARD)
    speaker.open_session(of)
    return speaker


def acks(chunks: list) -> list[Ack]:
    return [ack_of(chunk) for chunk in of_kind(chunks, ChunkType.PLAYBACK)]


def test_the_totals_of_a_listener_go_on_and_what_he_had_not_heard_is_gone():
    speaker = resumed_speaker()
    (ack,) = acks(speaker.advance(DOOR, 10 * NS_PER_S))
    assert (ack.heard_ns, ack.received_ns, ack.num_turns, ack.epoch) == (4 * NS_PER_S, 4 * NS_PER_S, 2, 3)
    assert (ack.at_ns, ack.num_windows) == (10 * NS_PER_S, 8)


def test_all_who_speak_begin_anew_in_an_epoch_that_none_of_them_has_seen():
    chunks = resumed_speaker().cut_off(DOOR, 10 * NS_PER_S)
    assert [chunk.epoch for chunk in chunks if chunk.type is ChunkType.BARGE_IN] == [4]


def test_what_the_listener_did_before_is_not_done_again_but_he_may_be_gone():
    actions = (ListenerAction(2 * NS_PER_S, "barge_in"), ListenerAction(3 * NS_PER_S, "pause"))
    speaker = resumed_speaker(listener=actions)
    chunks = speaker.advance(DOOR, 11 * NS_PER_S)
    assert not [chunk for chunk in chunks if chunk.type is ChunkType.BARGE_IN]
    speaker.process([unit("door", 10, speech("door", 10, np.zeros(SPEECH_RATE_HZ)))])
    speaker.advance(DOOR, 15 * NS_PER_S)
    assert acks(speaker.drain(DOOR))[-1].heard_ns == 4 * NS_PER_S


def test_a_recording_that_was_cut_off_is_kept_and_goes_on_in_a_part_beside_it(tmp_path: Path):
    before = WavOutput(tmp_path / "door.wav")
    before.write(0, np.full(SPEECH_RATE_HZ, 0.5))
    kept = (tmp_path / "door.wav").read_bytes()
    again = WavOutput(tmp_path / "door.wav", begin_ns=10 * NS_PER_S)
    events = again.advance(10 * NS_PER_S)
    again.write(11 * NS_PER_S, np.full(SPEECH_RATE_HZ, 0.25))
    again.close(12 * NS_PER_S)
    assert events == [OutputEvent("recording_continues", {"file": "door.2.wav", "seconds": 10.0})]
    assert (tmp_path / "door.wav").read_bytes() == kept
    assert (tmp_path / "door.2.wav").stat().st_size == 44 + 2 * 2 * SPEECH_RATE_HZ


# --- events -----------------------------------------------------------------------------------------------------------


def test_what_stood_in_the_files_stays_there(tmp_path: Path):
    for resume_ns in (None, 5 * NS_PER_S):
        stage = Events()
        stage.open_session(session("door", out=tmp_path, resume_ns=resume_ns))
        stage.process([unit("door", 0, Speaker.events.event(DOOR, 0, "shed"))])
        stage.close_session(DOOR)
    rows = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [row["type"] for row in rows] == ["shed", "shed"]
