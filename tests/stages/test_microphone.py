"""stages/microphone.py: one chunk of sound per window, gapless, on the session's axis."""

import numpy as np
import pytest

from graph.chunk import NS_PER_MS, NS_PER_S
from stages.media.reader import Ended
from stages.rates import SOUND_RATE_HZ
from tests.support.media_script import (
    Door,
    FakeMedia,
    FakeReader,
    data,
    ends,
    progress,
    seconds,
    sound,
    source,
    watermarks,
)

CAMERA = "frames"


def samples(chunks) -> np.ndarray:
    return np.concatenate([chunk.arrays["samples"] for chunk in data(chunks, "sound")])


@pytest.mark.parametrize("paced", [True, False])
def test_a_window_has_one_chunk_and_no_sample_is_lost_or_doubled(paced: bool):
    said = Door(FakeMedia(source(20)), paced=paced).until(21)
    assert [(c.start_ns, c.duration_ns) for c in data(said, "sound")] == [(k * NS_PER_S, NS_PER_S) for k in range(20)]
    assert np.array_equal(samples(said), np.arange(20 * SOUND_RATE_HZ, dtype=np.float32))
    assert watermarks(said, "sound") == [(k + 1) * NS_PER_S for k in range(20)]


def test_in_real_time_a_window_leaves_at_its_end():
    door = Door(FakeMedia(source(20)))
    assert data(door.until(0.9), "sound") == []
    assert len(data(door.at(1.0), "sound")) == 1


def test_the_last_window_may_be_a_part_of_one():
    items = [*seconds(0, 2), sound(2 * SOUND_RATE_HZ, 12_000), progress(None, None), Ended("over")]
    said = Door(FakeMedia(FakeReader(*items))).until(4)
    last = data(said, "sound")[-1]
    assert (last.start_ns, last.duration_ns) == (2 * NS_PER_S, 750 * NS_PER_MS)
    assert ends(said)["sound"] == [2750 * NS_PER_MS]


def test_windows_of_half_a_second_hold_half_the_samples():
    said = Door(FakeMedia(source(3)), window_ns=NS_PER_S // 2).until(4)
    assert [len(chunk.arrays["samples"]) for chunk in data(said, "sound")] == [SOUND_RATE_HZ // 2] * 6


def test_a_source_without_sound_ends_its_stream_at_once():
    said = Door(FakeMedia(source(20, sounds=False))).at(0.0)
    assert ends(said)["sound"] == [0]
    assert data(said, "sound") == []


def test_sound_that_ends_before_the_pictures_is_all_heard():
    items = [progress(0, 0), *seconds(0, 2), progress(2, None), *seconds(2, 5, sounds=False)]
    door = Door(FakeMedia(FakeReader(*items, progress(None, None), Ended("over"))))
    said = door.until(6)
    assert len(samples(said)) == 2 * SOUND_RATE_HZ
    assert ends(said)["sound"] == [2 * NS_PER_S]


def test_a_muted_microphone_lets_its_windows_go_after_the_lateness():
    door = Door(FakeMedia(FakeReader(*seconds(0, 1), live=True)), lateness_ns=200 * NS_PER_MS)
    assert watermarks(door.until(2.1), "sound") == [NS_PER_S]
    later = door.at(2.2)
    assert (watermarks(later, "sound"), data(later, "sound")) == ([2 * NS_PER_S], [])


def test_sound_that_comes_too_late_goes_on_where_it_stopped():
    # Given: 0.6 s of window 1 come in time, the rest with window 2.
    reader = FakeReader(*seconds(0, 1), sound(SOUND_RATE_HZ, 9_600), live=True)
    door = Door(FakeMedia(reader))
    said = door.until(2.5)
    reader.give(sound(SOUND_RATE_HZ + 9_600, 22_400), progress(3, 3))
    said += door.until(3.1, start_s=2.6)
    assert np.array_equal(samples(said), np.arange(3 * SOUND_RATE_HZ, dtype=np.float32))
    assert [chunk.start_ns for chunk in data(said, "sound")] == [0, NS_PER_S, 1600 * NS_PER_MS]


def test_after_its_end_a_microphone_is_silent():
    door = Door(FakeMedia(source(2)))
    assert len(ends(door.until(3))["sound"]) == 1
    assert door.microphone.advance(door.session.id, 9 * NS_PER_S) == []
