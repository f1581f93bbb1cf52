"""stages/media/sound.py: what stamps beside the sample count do to the sound, which is nothing unless they mean it."""

import random
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graph.chunk import NS_PER_MS, NS_PER_S
from stages.media.sound import GAP_NS, SoundTrack
from stages.media.tracks import FileAxis, LiveAxis
from stages.media.wire import MediaItem, MediaRequest, Sound

RATE_HZ = 16_000
FRAME = 320  # 20 ms, as G.711 cameras send


def request(piece_ns: int = NS_PER_S // 20) -> MediaRequest:
    return MediaRequest("rtsp://door", 1.0, 448 * 448, True, True, piece_ns, None)


class Recorder:
    """A sound track at 16 kHz, so that nothing is resampled, and what came out of it."""

    def __init__(self, *, live: bool = False) -> None:
        self.items: list[MediaItem] = []
        self.track = SoundTrack(request(), LiveAxis() if live else FileAxis(0), self.items.append)
        self.sent = (np.arange(60 * RATE_HZ) % 1000 + 1).astype(np.float32) / 2000  # never zero

    def play(self, stamps_ms: Sequence[float], arrivals_ms: Sequence[float] | None = None) -> None:
        """Frame after frame of what is sent, with these stamps."""
        for index, stamp_ms in enumerate(stamps_ms):
            samples = self.sent[index * FRAME : (index + 1) * FRAME]
            frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), "flt", "mono")
            frame.rate, frame.pts, frame.time_base = RATE_HZ, round(stamp_ms * 1000), Fraction(1, 1_000_000)
            self.track.add(frame, round((arrivals_ms or stamps_ms)[index] * NS_PER_MS))

    def heard(self) -> np.ndarray:
        self.track.finish()
        sounds = [item for item in self.items if isinstance(item, Sound)]
        ends = [sound.first_sample + sound.samples.size for sound in sounds]
        assert [sound.first_sample for sound in sounds[1:]] == ends[:-1]
        return np.concatenate([sound.samples for sound in sounds])


def on_time(num_frames: int) -> list[float]:
    return [index * 20.0 for index in range(num_frames)]


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("reach_ms", [60, 80, 100])
@pytest.mark.parametrize("seed", range(3))
def test_stamps_which_stray_leave_the_sound_whole(reach_ms, seed, live):
    stray = random.Random(seed)
    recorder = Recorder(live=live)
    stamps = [200 + at + stray.uniform(-reach_ms, reach_ms) for at in on_time(1000)]
    recorder.play(stamps, [200 + at for at in on_time(1000)])
    heard = recorder.heard()
    lead = int(np.flatnonzero(heard)[0])
    assert np.array_equal(heard[lead:], recorder.sent[: 1000 * FRAME])
    assert recorder.track.num_gaps == 0


@pytest.mark.parametrize("first_ms", [-80, 80])
def test_a_first_stamp_at_the_edge_leaves_the_sound_whole(first_ms):
    recorder = Recorder()
    recorder.play([200 + at + first_ms * (-1) ** index for index, at in enumerate(on_time(500))])
    heard = recorder.heard()
    assert np.array_equal(heard[int(np.flatnonzero(heard)[0]) :], recorder.sent[: 500 * FRAME])


def test_stamps_which_come_in_groups_leave_the_sound_whole():
    # Given: a camera which stamps five frames at once.
    recorder = Recorder()
    recorder.play([at // 100 * 100 for at in on_time(500)])
    assert np.array_equal(recorder.heard(), recorder.sent[: 500 * FRAME])


@pytest.mark.parametrize("hole_ms", [60, 200, 900])
def test_a_hole_is_so_many_zeros_where_it_was(hole_ms):
    recorder = Recorder()
    recorder.play([at + hole_ms * (at >= 1000) for at in on_time(200)])
    heard = recorder.heard()
    zeros = np.zeros(hole_ms * RATE_HZ // 1000, np.float32)
    assert np.array_equal(heard, np.concatenate([recorder.sent[:RATE_HZ], zeros, recorder.sent[RATE_HZ : 200 * FRAME]]))
    assert recorder.track.num_gaps == 1


def test_a_hole_in_straying_sound_is_filled_all_the_same():
    stray = random.Random(5)
    recorder = Recorder()
    recorder.play([200 + at + stray.uniform(-80, 80) + 600 * (at >= 4000) for at in on_time(600)])
    num_zeros = int((recorder.heard()[RATE_HZ:] == 0).sum())
    assert num_zeros / RATE_HZ == pytest.approx(0.6, abs=0.17)
    assert recorder.track.num_gaps <= 2


@pytest.mark.parametrize("overlap_ms", [60, 200, 400])
def test_an_overlap_is_cut_once(overlap_ms):
    recorder = Recorder()
    recorder.play([at - overlap_ms * (at >= 1000) for at in on_time(200)])
    cut = overlap_ms * RATE_HZ // 1000
    expected = np.concatenate([recorder.sent[:RATE_HZ], recorder.sent[RATE_HZ + cut : 200 * FRAME]])
    assert np.array_equal(recorder.heard(), expected)
    assert recorder.track.num_gaps == 1


@pytest.mark.parametrize("per_mille", [1, -1, 5, -5])
def test_a_clock_which_drifts_stays_within_a_gap(per_mille):
    recorder = Recorder()
    for index in range(3000):
        stamp_ms = index * 20 * (1 + per_mille / 1000)
        samples = recorder.sent[:FRAME].reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(samples, "flt", "mono")
        frame.rate, frame.pts, frame.time_base = RATE_HZ, round(stamp_ms * 1000), Fraction(1, 1_000_000)
        recorder.track.add(frame, round(stamp_ms * NS_PER_MS))
        count_ns = recorder.track._num_samples * NS_PER_S // RATE_HZ
        assert abs(count_ns - (stamp_ms + 20) * NS_PER_MS) <= GAP_NS
    assert 1 <= recorder.track.num_gaps <= 3000 * 20 * abs(per_mille) / 1000 / 30


def test_a_packet_which_is_lost_leaves_a_hole_of_its_length():
    # Given: every fifth of the 20 ms packets is damaged, which is less than any jitter.
    recorder = Recorder()
    for index, at_ms in enumerate(on_time(500)):
        if index % 5 == 4:
            recorder.track.lose(20 * NS_PER_MS)
            continue
        frame = av.AudioFrame.from_ndarray(np.full((1, FRAME), 0.5, np.float32), "flt", "mono")
        frame.rate, frame.pts, frame.time_base = RATE_HZ, round(at_ms * 1000), Fraction(1, 1_000_000)
        recorder.track.add(frame, round(at_ms * NS_PER_MS))
    by_frame = recorder.heard().reshape(-1, FRAME).max(axis=1)
    assert [float(loud) for loud in by_frame] == [0.0 if index % 5 == 4 else 0.5 for index in range(499)]


def test_of_a_long_hole_nothing_is_made_up():
    # Given: sound until 1 s, and then from 31.25 s on.
    recorder = Recorder()
    recorder.play([at + 30_250 * (at >= 1000) for at in on_time(100)])
    recorder.track.finish()
    sounds = [item for item in recorder.items if isinstance(item, Sound)]
    assert {sound.first_sample // RATE_HZ for sound in sounds} == {0, 31, 32}
    (after,) = [sound for sound in sounds if sound.first_sample == 31_250 * RATE_HZ // 1000]
    assert np.array_equal(after.samples, recorder.sent[RATE_HZ : RATE_HZ + after.samples.size])


def test_sound_of_no_sounds_rate_is_damage():
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 10), np.float32), "flt", "mono")
    frame.rate = 5
    with pytest.raises(ValueError, match="5 Hz"):
        Recorder().track.add(frame, 0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-3000, 5000), min_size=1, max_size=60), st.booleans())
def test_whatever_the_stamps_say_pieces_follow_each_other_or_leave_a_second(steps_ms, live):
    recorder, stamps, at_ms = Recorder(live=live), [], 0
    for step_ms in steps_ms:
        at_ms = max(at_ms + step_ms, 0)
        stamps += [at_ms + 20 * frame for frame in range(10)]
    recorder.play(stamps, on_time(len(stamps)))
    recorder.track.finish()
    end = 0
    for sound in (item for item in recorder.items if isinstance(item, Sound)):
        assert sound.first_sample == end or sound.first_sample >= end + RATE_HZ
        end = sound.first_sample + sound.samples.size


def tone_in_all_channels(layout: str, kind: str, amplitude: float) -> av.AudioFrame:
    """A second of 440 Hz at 48 kHz, the same in every channel, in this sample format."""
    wave = amplitude * np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000)
    samples = np.tile(wave, (av.AudioLayout(layout).nb_channels, 1))
    packed = samples.T.reshape(1, -1)
    whole = packed.astype(np.float32) if kind == "flt" else np.round(packed * 32767).astype(np.int16)
    frame = av.AudioFrame.from_ndarray(whole, kind, layout)
    frame.rate, frame.pts, frame.time_base = 48_000, 0, Fraction(1, 48_000)
    return frame


@pytest.mark.parametrize("kind", ["s16", "flt"])
@pytest.mark.parametrize("layout", ["mono", "stereo", "2.1", "quad", "5.0", "5.1", "6.1", "7.1"])
def test_sound_that_is_not_clipped_in_its_channels_is_not_clipped_in_their_mix(layout, kind):
    # Given: music as loud as it is usually mastered, alike in all channels.
    recorder = Recorder()
    recorder.track.add(tone_in_all_channels(layout, kind, 0.95), 0)
    heard = recorder.heard()
    assert np.abs(heard).max() == pytest.approx(0.95, abs=0.001)
    assert np.sqrt((heard**2).mean()) == pytest.approx(0.95 / np.sqrt(2), abs=0.01)


def test_a_tone_in_one_of_two_channels_has_half_its_height_in_the_mix():
    frame = tone_in_all_channels("stereo", "flt", 0.8)
    samples = frame.to_ndarray()
    samples[:, 1::2] = 0
    one_sided = av.AudioFrame.from_ndarray(samples, "flt", "stereo")
    one_sided.rate, one_sided.pts, one_sided.time_base = 48_000, 0, frame.time_base
    recorder = Recorder()
    recorder.track.add(one_sided, 0)
    assert np.abs(recorder.heard()).max() == pytest.approx(0.4, abs=0.001)


def test_sound_that_turns_from_mono_to_stereo_keeps_its_loudness():
    recorder = Recorder()
    recorder.track.add(tone_in_all_channels("mono", "s16", 0.9), 0)
    later = tone_in_all_channels("stereo", "s16", 0.9)
    later.pts = 48_000
    recorder.track.add(later, NS_PER_S)
    heard = recorder.heard()
    assert [np.abs(heard[at : at + 8000]).max() for at in (4000, 20_000)] == pytest.approx([0.9, 0.9], abs=0.001)


# --- a live camera whose stamps are no times: what arrives now has not been before --------------------------------


@pytest.mark.parametrize("back_ms", [200, 350, 4_000, 9_000, 60_000])
def test_live_sound_whose_stamps_go_back_is_heard_on(back_ms):
    recorder = Recorder(live=True)
    recorder.play([at + 100_000 - back_ms * (at >= 8_000) for at in on_time(1000)], on_time(1000))
    assert np.array_equal(recorder.heard(), recorder.sent[: 1000 * FRAME])


def test_live_sound_whose_stamps_go_back_is_told_with_the_first_of_them():
    recorder = Recorder(live=True)
    recorder.play([at + 100_000 - 4_000 * (at >= 8_000) for at in on_time(401)], on_time(401))
    assert recorder.track.num_gaps == 1


@pytest.mark.parametrize("late_ms", [0, 60])
def test_live_sound_whose_stamps_stand_still_is_heard_by_its_arrival_and_told(late_ms):
    # Given: a camera which stamps all with 0, over a network which delays some.
    jitter = random.Random(1)
    recorder = Recorder(live=True)
    recorder.play([0.0] * 1000, [at + jitter.uniform(0, late_ms) for at in on_time(1000)])
    assert (recorder.track.axis.num_jumps, recorder.track.num_gaps) == (1, 1)
    heard = recorder.heard()
    lead = int(np.flatnonzero(heard)[0])
    assert np.array_equal(heard[lead:], recorder.sent[: 1000 * FRAME])


def test_live_sound_whose_stamps_run_slow_is_not_cut():
    # Given: a camera whose stamps count at half the rate of its samples.
    recorder = Recorder(live=True)
    recorder.play([at / 2 for at in on_time(1000)], on_time(1000))
    heard = recorder.heard()
    assert np.array_equal(heard[heard > 0], recorder.sent[: 1000 * FRAME])


def test_a_pause_of_live_sound_whose_stamps_stand_still_is_silent():
    recorder = Recorder(live=True)
    recorder.play([0.0] * 200, [at + 900 * (at >= 2_000) for at in on_time(200)])
    heard = recorder.heard()
    assert (heard.size, int((heard == 0).sum())) == (200 * FRAME + 900 * 16, 900 * 16)
