"""stages/speaker.py: what is heard, when, and who is told."""

import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from graph.chunk import NS_PER_MS, NS_PER_S, Chunk, ChunkType
from graph.tail import Ack, ack_of
from stages.rates import SPEECH_RATE_HZ
from stages.session import ListenerAction
from stages.speaker import Speaker
from stages.wav import OutputEvent
from tests.support.units import DOOR, of_kind, session, speech, unit

TICK_NS = 10 * NS_PER_MS
DELAY_S = 0.3  # playout delay: speech of window k sounds from its end + delay on


def voice(seconds: float, level: float = 0.5) -> np.ndarray:
    return np.full(round(seconds * SPEECH_RATE_HZ), level, np.float32)


def action(at_s: float, kind: str) -> ListenerAction:
    return ListenerAction(round(at_s * NS_PER_S), kind)


class Room:
    """A speaker with one session; `to` lets time pass in ticks, as the actor's loop does."""

    def __init__(self, tick_ns: int = TICK_NS, speaker: Speaker | None = None, **fields: object) -> None:
        self.speaker = speaker or Speaker()
        self.speaker.open_session(session(**({"paced": True} | fields)))
        self.tick_ns = tick_ns
        self.now_ns = 0
        self.chunks: list[Chunk] = []

    def to(self, at_s: float) -> "Room":
        while self.now_ns < round(at_s * NS_PER_S):
            self.now_ns = min(self.now_ns + self.tick_ns, round(at_s * NS_PER_S))
            self.chunks += self.speaker.advance(DOOR, self.now_ns)
        return self

    def hear(self, index: int, *pieces: Chunk) -> "Room":
        """Window `index` comes in, now."""
        self.chunks += self.speaker.process([unit("door", index, *pieces)])
        return self

    def acks(self) -> list[Ack]:
        return [ack_of(chunk) for chunk in of_kind(self.chunks, ChunkType.PLAYBACK)]

    def events(self, kind: str) -> list[tuple[float, dict[str, object]]]:
        data = of_kind(self.chunks, ChunkType.DATA)
        return [(c.start_ns / NS_PER_S, dict(c.attrs)) for c in data if c.attrs["type"] == kind]

    def close(self) -> None:
        self.chunks += self.speaker.drain(DOOR)
        self.speaker.close_session(DOOR)


def written(room: Room) -> None:
    assert room.speaker._disk.drain(60.0)


def read(path: Path) -> np.ndarray:
    with wave.open(str(path), "rb") as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, SPEECH_RATE_HZ)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


def sounding(samples: np.ndarray) -> list[tuple[float, float]]:
    """The stretches (from, to) in seconds in which there is no silence."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], samples != 0, [0]]).astype(np.int8)))
    return [(start / SPEECH_RATE_HZ, end / SPEECH_RATE_HZ) for start, end in edges.reshape(-1, 2)]


def test_who_has_nothing_to_hear_is_heard_of_every_second():
    assert [ack.at_ns for ack in Room().to(3.5).acks()[1:]] == [NS_PER_S, 2 * NS_PER_S, 3 * NS_PER_S]


def test_who_hears_is_heard_of_every_100_ms_and_when_all_has_been_heard():
    room = Room().to(1.0).hear(0, speech("door", 0, voice(0.34)))
    room.chunks.clear()
    at_ms = [ack.at_ns // NS_PER_MS for ack in room.to(1.9).acks()]
    assert at_ms == [1100, 1200, 1300, 1400, 1500, 1600, 1640]


def test_who_looks_only_when_it_is_due_hears_all_that_a_steady_look_hears():
    def rows_of(room: Room, step_ns: Callable[[Room], int]) -> list[tuple[object, ...]]:
        for index, seconds in enumerate((1.0, 0.4, 0.0, 1.0)):
            room.hear(index, *([speech("door", index, voice(seconds), "word")] if seconds else []))
            while room.now_ns < (index + 2) * NS_PER_S:
                room.now_ns = min(room.now_ns + step_ns(room), (index + 2) * NS_PER_S)
                room.chunks += room.speaker.advance(DOOR, room.now_ns)
        return [(c.type, c.start_ns, dict(c.attrs)) for c in room.chunks]

    actions = (action(1.75, "pause"), action(2.45, "resume"), action(3.33, "barge_in"))
    steady = rows_of(Room(listener=actions), lambda room: NS_PER_MS)
    when_due = rows_of(Room(listener=actions), lambda room: room.speaker.due_in_ns(DOOR, room.now_ns) + 1)
    acks = [row for row in when_due if row[0] is ChunkType.PLAYBACK]
    assert [t for t in when_due if t[0] is not ChunkType.PLAYBACK] == [
        t for t in steady if t[0] is not ChunkType.PLAYBACK
    ]
    assert len(acks) == sum(t[0] is ChunkType.PLAYBACK for t in steady)


def test_speech_of_a_window_is_heard_from_its_end_and_the_delay_on():
    room = Room().to(1.0).hear(0, speech("door", 0, voice(1.0))).to(1.8)
    latest = room.acks()[-1]
    assert (latest.received_ns, latest.heard_ns) == (NS_PER_S, NS_PER_S // 2)
    assert latest.queue == ((1800 * NS_PER_MS, 500 * NS_PER_MS),)


def test_an_ack_follows_every_window_at_once():
    room = Room().to(1.03).hear(0, speech("door", 0, voice(1.0), end_of_turn=True))
    latest = room.acks()[-1]
    assert (latest.at_ns, latest.through_ns, latest.num_turns) == (1030 * NS_PER_MS, NS_PER_S, 1)


@pytest.mark.parametrize("tick_ns", [TICK_NS, 7_777_777, 333_333_333])
def test_the_wav_lies_on_the_session_axis(tmp_path: Path, tick_ns: int):
    room = Room(tick_ns, out=tmp_path).to(1.0).hear(0, speech("door", 0, voice(1.0))).to(2.0)
    room.hear(1, speech("door", 1, voice(0.5), end_of_turn=True)).to(3.0).hear(2).to(4.0)
    room.hear(3, speech("door", 3, voice(0.25))).to(5.0)
    room.close()
    samples = read(tmp_path / "door.wav")
    assert sounding(samples) == [(1.3, 2.8), (4.3, 4.55)]
    assert len(samples) == 5 * SPEECH_RATE_HZ
    assert set(samples[samples != 0]) == {int(0.5 * 32767)}


def test_what_is_too_loud_is_clipped(tmp_path: Path):
    Room(out=tmp_path).to(1.0).hear(0, speech("door", 0, np.array([2.0, -2.0] * 480))).to(2.0).close()
    samples = read(tmp_path / "door.wav")
    assert (samples.max(), samples.min()) == (32767, -32768)


def test_a_paused_listener_goes_on_where_it_stopped(tmp_path: Path):
    actions = (action(1.5, "pause"), action(2.5, "resume"))
    room = Room(out=tmp_path, listener=actions).to(1.0).hear(0, speech("door", 0, voice(1.0))).to(2.0)
    assert (room.acks()[-1].heard_ns, room.acks()[-1].queue) == (200 * NS_PER_MS, ())
    room.to(4.0).close()
    assert sounding(read(tmp_path / "door.wav")) == [(1.3, 1.5), (2.5, 3.3)]
    assert [at for at, _ in room.events("listener_pause") + room.events("listener_resume")] == [1.5, 2.5]


def test_barge_in_drops_what_was_not_heard_and_raises_the_epoch(tmp_path: Path):
    room = Room(out=tmp_path, listener=(action(1.8, "barge_in"),)).to(1.0)
    room.hear(0, speech("door", 0, voice(1.0))).to(3.0)
    latest = room.acks()[-1]
    assert (latest.heard_ns, latest.received_ns, latest.epoch) == (NS_PER_S // 2, NS_PER_S // 2, 1)
    assert [(c.start_ns, c.epoch) for c in of_kind(room.chunks, ChunkType.BARGE_IN)] == [(1800 * NS_PER_MS, 1)]
    assert room.events("barge_in") == [(1.8, {"type": "barge_in", "seconds": 0.5, "epoch": 1})]
    room.close()
    assert sounding(read(tmp_path / "door.wav")) == [(1.3, 1.8)]


def test_whoever_is_interrupted_has_been_told_before_what_was_heard():
    room = Room(listener=(action(1.8, "barge_in"),)).to(1.0).hear(0, speech("door", 0, voice(1.0))).to(3.0)
    index = room.chunks.index(of_kind(room.chunks, ChunkType.BARGE_IN)[0])
    before = [chunk for chunk in room.chunks[:index] if chunk.type is ChunkType.PLAYBACK][-1]
    assert (before.epoch, before.start_ns) == (1, 1800 * NS_PER_MS)


def test_what_is_cut_off_is_dropped_and_raises_the_epoch():
    room = Room().to(1.0).hear(0, speech("door", 0, voice(1.0))).to(1.8)
    room.chunks += room.speaker.cut_off(DOOR, 1_900_000_000)
    assert room.events("cut_off") == [(1.9, {"type": "cut_off", "seconds": 0.4, "epoch": 1})]
    (control,) = of_kind(room.chunks, ChunkType.BARGE_IN)
    assert (control.epoch, control.start_ns) == (1, 1_900_000_000)
    assert room.acks()[-1].heard_ns == room.to(4.0).acks()[-1].heard_ns == 600_000_000


def test_each_barge_in_has_an_epoch_of_its_own():
    room = Room(listener=(action(0.5, "barge_in"), action(0.7, "barge_in"))).to(1.0)
    assert [chunk.epoch for chunk in of_kind(room.chunks, ChunkType.BARGE_IN)] == [1, 2]


def test_a_piece_that_comes_too_late_inside_a_turn_is_an_underrun():
    room = Room().to(1.0).hear(0, speech("door", 0, voice(1.0))).to(2.0).hear(1).to(3.0).hear(2).to(4.4)
    room.hear(3, speech("door", 3, voice(1.0)))
    assert room.events("underrun") == [(4.4, {"type": "underrun", "window": 3, "seconds": pytest.approx(0.1)})]


def test_the_first_piece_of_a_turn_is_never_an_underrun():
    room = Room().to(1.0).hear(0, speech("door", 0, voice(1.0), end_of_turn=True)).to(3.5)
    room.hear(1, speech("door", 1, voice(1.0)))
    assert room.events("underrun") == []


def test_after_a_barge_in_a_new_turn_begins():
    room = Room(listener=(action(1.8, "barge_in"),)).to(1.0).hear(0, speech("door", 0, voice(1.0))).to(3.5)
    room.hear(1, speech("door", 1, voice(1.0)))
    assert room.events("underrun") == []


def test_a_word_is_told_when_it_begins_to_sound():
    room = Room().to(1.0).hear(0, speech("door", 0, voice(1.0), "one")).to(2.0)
    room.hear(1, speech("door", 1, voice(0.5), "two")).to(4.0)
    words = [(at, event["text"], event["seconds"]) for at, event in room.events("heard")]
    assert words == [(1.3, "one", 1.0), (2.3, "two", 0.5)]


def test_a_word_that_was_flushed_is_never_told():
    room = Room(listener=(action(1.8, "barge_in"),)).to(1.0)
    room.hear(0, speech("door", 0, voice(1.0), "one"), speech("door", 0, voice(1.0), "two")).to(4.0)
    assert [event["text"] for _, event in room.events("heard")] == ["one"]


def test_a_session_ends_when_everything_has_been_heard():
    room = Room().to(1.0).hear(0, speech("door", 0, voice(1.0)))
    assert not room.to(2.2).speaker.finished(DOOR)
    assert room.to(2.3).speaker.finished(DOOR)


def test_nobody_waits_for_a_listener_who_will_not_come_back():
    room = Room(listener=(action(1.5, "pause"),)).to(1.0).hear(0, speech("door", 0, voice(1.0))).to(2.0)
    assert room.speaker.finished(DOOR)


def test_a_listener_who_will_come_back_is_waited_for():
    actions = (action(1.5, "pause"), action(9.0, "resume"))
    room = Room(listener=actions).to(1.0).hear(0, speech("door", 0, voice(1.0))).to(8.0)
    assert not room.speaker.finished(DOOR)


# ---- virtual time ------------------------------------------------------------------------------------------------


def play(out: Path, paced: bool, listener: tuple[ListenerAction, ...] = ()) -> Room:
    """The same three windows of speech, on the clock or as fast as they come."""
    out.mkdir()
    room = Room(out=out, paced=paced, listener=listener).to(0.01)
    for index, said in enumerate((1.0, 1.0, 0.5)):
        room.to((index + 1) * paced)
        room.hear(index, speech("door", index, voice(said), f"word {index}", end_of_turn=index == 2))
    room.to(6.0 * paced).close()
    return room


@pytest.mark.parametrize(
    "listener",
    [
        (),
        (action(1.5, "pause"), action(2.5, "resume")),
        (action(2.0, "barge_in"),),
        (action(2.5, "pause"), action(4.0, "resume")),
    ],
)
def test_in_virtual_time_the_listener_hears_the_same_at_the_same_times(
    tmp_path: Path, listener: tuple[ListenerAction, ...]
):
    real, virtual = (play(tmp_path / str(paced), paced, listener) for paced in (True, False))
    heard = [sounding(read(tmp_path / str(paced) / "door.wav")) for paced in (True, False)]
    assert heard[0] == heard[1] != []
    assert real.events("heard") == virtual.events("heard")
    assert real.acks()[-1].heard_ns == virtual.acks()[-1].heard_ns


def test_in_virtual_time_the_listener_is_there_before_the_first_window():
    assert [ack.at_ns for ack in Room(paced=False).to(0.02).acks()] == [NS_PER_S]


def test_in_virtual_time_each_window_lets_the_clock_go_on_by_one():
    room = Room(paced=False).hear(0).hear(1)
    assert room.acks()[-1].at_ns == 3 * NS_PER_S
    assert room.speaker.finished(DOOR)


def test_at_the_end_virtual_time_goes_on_until_the_last_word_and_no_further(tmp_path: Path):
    room = Room(paced=False, out=tmp_path, listener=(action(3600.0, "barge_in"),))
    room.hear(0, speech("door", 0, voice(1.0)), speech("door", 0, voice(1.0))).close()
    assert room.acks()[-1].heard_ns == 2 * NS_PER_S
    assert len(read(tmp_path / "door.wav")) == round((1 + DELAY_S + 2) * SPEECH_RATE_HZ)


# ---- outputs -----------------------------------------------------------------------------------------------------


class FakeDevice:
    """A sound card that remembers."""

    def __init__(self) -> None:
        self.samples: list[np.ndarray] = []
        self.closed_ns = 0

    def write(self, at_ns: int, samples: np.ndarray) -> list[OutputEvent]:
        self.samples.append(samples)
        return [OutputEvent("speaker_lost", {"reason": "pulled out"})] if len(self.samples) == 1 else []

    def advance(self, now_ns: int) -> list[OutputEvent]:
        return []

    def close(self, end_ns: int) -> None:
        self.closed_ns = end_ns


def test_a_device_plays_what_the_virtual_listener_hears():
    device = FakeDevice()
    room = Room(speaker=Speaker(lambda: device)).to(1.0).hear(0, speech("door", 0, voice(1.0))).to(3.0)
    room.close()
    assert sum(map(len, device.samples)) == SPEECH_RATE_HZ
    assert device.closed_ns == 3 * NS_PER_S


def test_what_an_output_has_to_tell_is_an_event():
    room = Room(speaker=Speaker(FakeDevice)).to(1.0).hear(0, speech("door", 0, voice(1.0))).to(3.0)
    assert room.events("speaker_lost") == [(DELAY_S + 1, {"type": "speaker_lost", "reason": "pulled out"})]


@pytest.mark.parametrize("paced", [True, False])
def test_silence_is_written_as_time_goes_on(tmp_path: Path, paced: bool):
    room = Room(out=tmp_path, paced=paced).to(3.5)
    for index in range(0 if paced else 3):
        room.hear(index)
    written(room)
    assert len(read(tmp_path / "door.wav")) >= 3 * SPEECH_RATE_HZ


def test_a_full_disk_ends_the_recording_and_not_the_session(tmp_path: Path):
    (tmp_path / "door.wav").symlink_to("/dev/full")
    room = Room(out=tmp_path).to(1.0).hear(0, speech("door", 0, voice(1.0), "one")).to(3.0)
    written(room)
    room.to(4.0).close()
    [(_, attrs)] = room.events("recording_failed")
    assert attrs["file"] == "door.wav"
    assert "No space left" in str(attrs["reason"])
    assert room.acks()[-1].heard_ns == NS_PER_S


def test_closing_twice_does_nothing(tmp_path: Path):
    room = Room(out=tmp_path).to(1.0)
    room.close()
    room.speaker.close_session(DOOR)
    assert len(read(tmp_path / "door.wav")) == SPEECH_RATE_HZ
