"""`pipeline up` on files: what a run leaves, that two runs agree, and that nothing stays behind."""

import re
from pathlib import Path

import numpy as np
import pytest

from graph.ledger import REASONS
from tests.support.pipeline import Place, Run

pytestmark = pytest.mark.ray

NUM_WINDOWS = 10
GREEDY = ("--set", "stages.llm.decoding=greedy", "--set", "stages.tts.decoding=greedy")
RATE_HZ = 24_000
PLAYOUT_DELAY_S = 0.3


@pytest.fixture(scope="module")
def in_real_time(place: Place, clip: Path) -> Run:
    """Two sessions at their own pace."""
    cameras = ("--camera", f"door={clip}", "--camera", "yard=test://pattern?seed=3")
    return place.up(*cameras, "--for", f"{NUM_WINDOWS}s", *GREEDY, out="real")


@pytest.fixture(scope="module")
def left_behind(in_real_time: Run, place: Place) -> list[str]:
    return place.leftovers()


@pytest.fixture(scope="module")
def at_full_speed(left_behind: list[str], place: Place, clip: Path) -> Run:
    """One of the two sessions alone, in virtual time."""
    return place.up("--camera", f"door={clip}", "--for", f"{NUM_WINDOWS}s", "--speed", "max", *GREEDY, out="max")


@pytest.fixture(scope="module")
def again(at_full_speed: Run, place: Place, clip: Path) -> Run:
    """The same once more, with a neighbour."""
    cameras = ("--camera", f"door={clip}", "--camera", "yard=test://pattern?seed=3")
    return place.up(*cameras, "--for", f"{NUM_WINDOWS}s", "--speed", "max", *GREEDY, out="again")


def test_a_run_to_the_end_of_its_sources_exits_with_0(in_real_time: Run) -> None:
    assert in_real_time.returncode == 0, in_real_time.stderr
    assert in_real_time.stdout == ""
    assert "UNTRAINED" in in_real_time.stderr


@pytest.mark.parametrize("session", ["door", "yard"])
def test_every_second_of_every_camera_is_one_window(in_real_time: Run, session: str) -> None:
    windows = in_real_time.windows(session)
    assert [(w["index"], w["start_s"], w["end_s"]) for w in windows] == [(k, k, k + 1) for k in range(NUM_WINDOWS)]
    assert all(re.fullmatch("[0-9a-f]{32}", w["digest"]) for w in windows)
    assert len({w["digest"] for w in windows}) == NUM_WINDOWS
    assert all(w["missing"] == [] for w in windows)


def test_every_window_says_whether_it_was_on_time_and_where_its_time_went(in_real_time: Run) -> None:
    for window in in_real_time.rows("windows.jsonl"):
        assert window["on_time"] == (window["latency_s"] <= 1.0)
        assert bool(window["late_stage"]) != window["on_time"]
        assert {"vision_encoder", "audio_encoder", "llm"} <= window["compute"].keys()
        assert abs(sum(window["stages"].values()) - window["latency_s"]) < 1e-4


def test_every_edge_accounts_for_every_chunk(in_real_time: Run) -> None:
    ledger = in_real_time.ledger()
    assert len(ledger) == 14
    for edge, account in ledger.items():
        assert account["in_flight"] == 0, edge
        assert account["accepted"] == account["delivered"] + sum(account["dropped"][reason] for reason in REASONS), edge
    assert ledger["camera.frames->vision_encoder.frames"]["accepted"] == 2 * NUM_WINDOWS
    assert ledger["microphone.sound->audio_encoder.sound"]["accepted"] == 2 * NUM_WINDOWS


@pytest.mark.parametrize("session", ["door", "yard"])
def test_speech_is_a_wav_on_the_sessions_time_axis(in_real_time: Run, session: str) -> None:
    rate_hz, samples = in_real_time.speech(session)
    assert rate_hz == RATE_HZ
    assert len(samples) >= NUM_WINDOWS * RATE_HZ
    heard = in_real_time.events(session, "heard")
    assert heard, "the untrained model speaks, too"
    for piece in heard:
        first = round(piece["time_s"] * RATE_HZ)
        assert np.abs(samples[first : first + round(piece["seconds"] * RATE_HZ)]).max() > 0
    before = samples[: round(heard[0]["time_s"] * RATE_HZ)]
    assert not before.any(), "silence until the first word"


@pytest.mark.parametrize("session", ["door", "yard"])
def test_the_transcript_tells_what_was_heard_and_when(in_real_time: Run, session: str) -> None:
    def line(time_s: float, seconds: float, text: str) -> str:
        return f"{_clock(time_s)} - {_clock(time_s + seconds)}  [{session}] {text}"

    heard = in_real_time.events(session, "heard")
    assert in_real_time.transcript(session) == [line(h["time_s"], h["seconds"], h["text"]) for h in heard]


def test_no_process_socket_or_shared_memory_outlives_the_run(left_behind: list[str], place: Place) -> None:
    assert len(place.seen) >= 8, "Ray's processes and the actors have been seen"
    assert left_behind == []


@pytest.mark.parametrize("session", ["door", "yard"])
def test_the_same_media_gives_the_same_units_at_any_speed(in_real_time: Run, again: Run, session: str) -> None:
    assert again.returncode == 0, again.stderr
    assert again.digests(session) == in_real_time.digests(session)


def test_a_neighbour_changes_no_unit(at_full_speed: Run, again: Run) -> None:
    assert at_full_speed.returncode == 0, at_full_speed.stderr
    assert again.digests("door") == at_full_speed.digests("door")


def test_greedy_decoding_says_the_same_at_the_same_times(at_full_speed: Run, again: Run) -> None:
    assert at_full_speed.transcript("door")
    assert again.transcript("door") == at_full_speed.transcript("door")


def test_greedy_decoding_says_in_real_time_what_it_says_at_full_speed(in_real_time: Run, again: Run) -> None:
    slowest_s = max(window["latency_s"] for window in in_real_time.rows("windows.jsonl"))
    if slowest_s > PLAYOUT_DELAY_S:
        pytest.skip(f"a window took {slowest_s:.2f} s: this machine is too busy to speak at the planned times")
    for session in ("door", "yard"):
        assert in_real_time.transcript(session) == again.transcript(session)


def test_virtual_time_is_neither_on_time_nor_late(at_full_speed: Run) -> None:
    assert {(w["on_time"], w["latency_s"]) for w in at_full_speed.windows("door")} == {(None, None)}


def _clock(time_s: float) -> str:
    """Whole milliseconds, not rounded up."""
    minutes, milliseconds = divmod(round(time_s * 1e9) // 1_000_000, 60_000)
    return f"{minutes:02d}:{milliseconds / 1000:06.3f}"
