"""All five components on the runner, one bus and virtual time: what `pipeline up --speed max` does, without Ray."""

import json
import wave
from pathlib import Path

import numpy as np
import pytest

from graph.chunk import NS_PER_S, SessionId
from graph.credit import Limit
from stages.camera import Camera
from stages.events import Events
from stages.media.feeds import Feeds
from stages.microphone import Microphone
from stages.session import ListenerAction
from stages.speaker import Speaker
from stages.stage import SourceId
from tests.support.house import House
from tests.support.media import Clip, times
from tests.support.media_script import FakeMedia, FakeReader, source
from tests.support.tiny import Tiny

EDGES = (
    "camera.frames->vision_encoder.frames",
    "camera.events->events.events",
    "microphone.sound->audio_encoder.sound",
    "vision_encoder.image->llm.image",
    "audio_encoder.audio->llm.audio",
    "llm.text->tts.text",
    "llm.events->events.events",
    "tts.codes->vocoder.codes",
    "vocoder.speech->speaker.speech",
    "speaker.playback->llm.playback",
    "speaker.playback->tts.playback",
    "speaker.playback->vocoder.playback",
    "speaker.events->events.events",
)
SECONDS = 20


def run(tiny: Tiny, out: Path, *readers: FakeReader, limit: int = 8, **fields: object) -> House:
    """One session per reader, to their ends."""
    return run_feeds(tiny, out, Feeds(FakeMedia(*readers)), len(readers), limit, **fields)


def run_feeds(tiny: Tiny, out: Path, feeds: Feeds, num_sessions: int, limit: int, **fields: object) -> House:
    stages = {
        "camera": Camera(feeds),
        "microphone": Microphone(feeds),
        "vision_encoder": tiny.vision_encoder(),
        "audio_encoder": tiny.audio_encoder(voice=True),
        "llm": tiny.llm(),
        "tts": tiny.tts(),
        "vocoder": tiny.vocoder(),
        "speaker": Speaker(),
        "events": Events(),
    }
    with House(stages, EDGES, limit=Limit(limit)) as house:
        for index in range(num_sessions):
            house.open(f"cam{index}", out=out, **fields)
        house.run()
    return house


def windows(out: Path, name: str) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (out / "windows.jsonl").read_text().splitlines()]
    return [row for row in rows if row["session"] == name]


def speech(out: Path, name: str) -> np.ndarray:
    with wave.open(str(out / f"{name}.wav"), "rb") as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


@pytest.fixture(scope="module")
def plain(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[House, Path]:
    """Two cameras, and nothing happens to them."""
    out = tmp_path_factory.mktemp("plain")
    return run(tiny, out, source(SECONDS), source(SECONDS)), out


def test_every_window_comes_to_its_end_in_order(plain: tuple[House, Path]):
    for name in ("cam0", "cam1"):
        rows = windows(plain[1], name)
        assert [row["index"] for row in rows] == list(range(SECONDS))
        assert [row["missing"] for row in rows] == [[]] * SECONDS


def test_every_edge_s_account_is_exact(plain: tuple[House, Path]):
    house, _ = plain
    accounts = {edge: house.account(edge) for edge in EDGES}
    assert {edge: account.in_flight for edge, account in accounts.items()} == dict.fromkeys(EDGES, 0)
    assert {edge: sum(account.dropped.values()) for edge, account in accounts.items()} == dict.fromkeys(EDGES, 0)


def test_something_is_said_and_heard(plain: tuple[House, Path]):
    _, out = plain
    transcript = (out / "transcript.txt").read_text().splitlines()
    assert len(transcript) > 2
    assert np.abs(speech(out, "cam0")).max() > 0


def test_speech_never_runs_further_ahead_than_a_lead_and_a_window(plain: tuple[House, Path]):
    leads_s = [row["lead_s"] for name in ("cam0", "cam1") for row in windows(plain[1], name)]
    assert 0 < max(leads_s) <= 2.0


def test_another_run_says_the_same_whatever_the_credit(tiny: Tiny, plain: tuple[House, Path], tmp_path: Path):
    run(tiny, tmp_path, source(SECONDS), source(SECONDS), limit=2)
    for name in ("cam0", "cam1"):
        digests = [[row["digest"] for row in windows(out, name)] for out in (plain[1], tmp_path)]
        assert digests[0] == digests[1]
        # Which windows share a forward is up to the clock, and with it the last bit of a sample.
        heard, before = (speech(out, name).astype(int) for out in (tmp_path, plain[1]))
        assert len(heard) == len(before)
        assert np.abs(heard - before).max() <= 2


def test_a_file_whose_sound_comes_late_ends_by_itself_with_a_window_per_second(tiny: Tiny, tmp_path: Path):
    # Given: more seconds without sound than there is credit for pictures.
    clip = Clip(tmp_path / "late.mkv").video(times(26, 5)).sound(4, start_s=22).write()
    house = run_feeds(tiny, tmp_path, Feeds(), 1, limit=8, source=str(clip))
    rows = windows(tmp_path, "cam0")
    assert [row["missing"] for row in rows] == [["audio"]] * 22 + [[]] * 4
    assert {house.account(edge).in_flight for edge in EDGES} == {0}
    # Then: how the source did is in the report of its stage also when its session is over.
    report = house.runners["camera"].snapshot().sources[SourceId(SessionId("cam0"))]
    assert (report.has_delivered, report.problem) == (True, "")


def test_a_barge_in_ends_the_speech_at_once(tiny: Tiny, plain: tuple[House, Path], tmp_path: Path):
    # Given: the moment at which the plain run speaks first, and half a second.
    first = np.flatnonzero(speech(plain[1], "cam0"))[0] / 24_000
    at_ns = round((first + 0.5) * NS_PER_S)
    house = run(tiny, tmp_path, source(SECONDS), source(SECONDS), listener=(ListenerAction(at_ns, "barge_in"),))
    assert {house.account(edge).in_flight for edge in EDGES} == {0}
    assert len(windows(tmp_path, "cam0")) == SECONDS
    after = speech(tmp_path, "cam0")[round((first + 0.5) * 24_000) : round((first + 0.9) * 24_000)]
    assert not after.any()
    rows = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [row["time_s"] for row in rows if row["type"] == "barge_in"] == [at_ns / NS_PER_S] * 2


def test_a_camera_that_is_mute_or_blind_runs_with_the_others(tiny: Tiny, tmp_path: Path):
    house = run(tiny, tmp_path, source(8, sounds=False), source(8, pictures=False), source(8))
    missing = {name: {str(row["missing"]) for row in windows(tmp_path, name)} for name in ("cam0", "cam1", "cam2")}
    assert missing == {"cam0": {"['audio']"}, "cam1": {"['image']"}, "cam2": {"[]"}}
    assert {house.account(edge).in_flight for edge in EDGES} == {0}
