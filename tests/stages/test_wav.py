"""stages/wav.py: the recording, however long it gets."""

import shutil
import tracemalloc
import wave
from pathlib import Path

import numpy as np
import pytest

from graph.chunk import NS_PER_S
from stages.rates import SPEECH_RATE_HZ
from stages.wav import MAX_PART_S, OutputEvent, WavOutput


def samples(path: Path) -> np.ndarray:
    with wave.open(str(path), "rb") as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


def test_a_part_is_smaller_than_2_gib():
    assert MAX_PART_S * SPEECH_RATE_HZ * 2 + 44 < 2**31


def test_a_long_silence_is_written_in_small_blocks(tmp_path: Path):
    output = WavOutput(tmp_path / "door.wav")
    tracemalloc.start()
    output.write(600 * NS_PER_S, np.ones(1))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    output.close(600 * NS_PER_S)
    assert peak < 4 * SPEECH_RATE_HZ * 2
    assert len(samples(tmp_path / "door.wav")) == 600 * SPEECH_RATE_HZ + 1


def test_a_recording_goes_on_in_the_next_file_where_the_last_ended(tmp_path: Path):
    output = WavOutput(tmp_path / "front.door.wav", max_part_s=2)
    spoken = np.arange(1, 5 * SPEECH_RATE_HZ + 1) % 30_000
    events = output.write(NS_PER_S, spoken / 32767.0)
    output.close(6 * NS_PER_S)
    names = ["front.door.wav", "front.door.2.wav", "front.door.3.wav"]
    parts = [samples(tmp_path / name) for name in names]
    assert [len(part) for part in parts] == [2 * SPEECH_RATE_HZ] * 3
    assert np.abs(np.concatenate(parts)[SPEECH_RATE_HZ:] - spoken).max() <= 1
    assert events == [
        OutputEvent("recording_continues", {"file": names[1], "seconds": 2.0}),
        OutputEvent("recording_continues", {"file": names[2], "seconds": 4.0}),
    ]


def test_no_file_is_begun_before_there_is_something_to_write(tmp_path: Path):
    output = WavOutput(tmp_path / "door.wav", max_part_s=2)
    assert output.advance(2 * NS_PER_S) == []
    output.close(2 * NS_PER_S)
    assert [path.name for path in tmp_path.iterdir()] == ["door.wav"]


def test_a_recording_that_is_removed_is_told_of_made_anew_and_goes_on(tmp_path: Path):
    out = tmp_path / "run"
    output = WavOutput(out / "door.wav")
    events = output.advance(2 * NS_PER_S)
    shutil.rmtree(out)
    events += output.advance(3 * NS_PER_S)
    events += output.advance(4 * NS_PER_S)
    output.close(5 * NS_PER_S)
    assert events == [
        OutputEvent("recording_lost", {"file": "door.wav", "seconds": 2.0, "reason": "was removed"}),
        OutputEvent("recording_continues", {"file": "door.wav", "seconds": 2.0}),
    ]
    assert len(samples(out / "door.wav")) == 3 * SPEECH_RATE_HZ


def test_a_later_part_that_is_removed_is_made_anew_by_its_name(tmp_path: Path):
    output = WavOutput(tmp_path / "door.wav", max_part_s=2)
    output.advance(3 * NS_PER_S)
    (tmp_path / "door.2.wav").unlink()
    events = output.advance(5 * NS_PER_S)
    output.close(5 * NS_PER_S)
    assert [(event.kind, event.attrs["file"], event.attrs["seconds"]) for event in events] == [
        ("recording_lost", "door.2.wav", 1.0),
        ("recording_continues", "door.2.wav", 3.0),
    ]
    assert [len(samples(tmp_path / name)) for name in ("door.wav", "door.2.wav")] == [2 * SPEECH_RATE_HZ] * 2


def test_a_recording_closed_before_it_began_leaves_nothing(tmp_path: Path):
    output = WavOutput(tmp_path / "n1.wav")
    output.close(0)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_told_of_once(tmp_path: Path):
    (tmp_path / "door.2.wav").symlink_to("/dev/full")
    output = WavOutput(tmp_path / "door.wav", max_part_s=1)
    events = [event for at_s in range(1, 5) for event in output.advance(at_s * NS_PER_S)]
    output.close(5 * NS_PER_S)
    assert [(event.kind, event.attrs["file"]) for event in events] == [("recording_failed", "door.2.wav")]
    assert len(samples(tmp_path / "door.wav")) == SPEECH_RATE_HZ


def test_a_folder_that_cannot_be_written_to_is_told_at_once(tmp_path: Path):
    (tmp_path / "out").touch()
    with pytest.raises(OSError):
        WavOutput(tmp_path / "out" / "door.wav")
