"""Effects, noise and the track they are mixed into."""

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_shards.nano.clips import load_bank
from model_shards.nano.phrases import SOUNDS, Sound
from model_shards.nano.sounds import NOISE_SAMPLES, NS_PER_S, RATE_HZ, SPEECH_LEVEL, Samples, Track, effect, noise_loop

BANK = load_bank("room")
KINDS_BY_PITCH: tuple[Sound, ...] = ("knock", "alarm", "glass")


@dataclass(frozen=True)
class Heard:
    kind: str
    start_ns: int
    clip_seed: int = 3


@dataclass(frozen=True)
class Minute:
    happenings: tuple[Heard, ...]
    seed: int = 5
    duration_ns: int = 60 * NS_PER_S


BUSY = Minute((Heard("bark", 1_300_000_000), Heard("how_many", 2_950_000_000), Heard("alarm", 5_000_000_001)))

TRACK = Track(BUSY, BANK)
WHOLE = Track(BUSY, BANK).samples(0, 10 * NS_PER_S)


def loudness(samples: Samples) -> float:
    return float(np.sqrt(np.mean(samples**2)))


def mean_hz(samples: Samples) -> float:
    power = np.abs(np.fft.rfft(samples)) ** 2
    return float((power * np.fft.rfftfreq(len(samples), 1 / RATE_HZ)).sum() / power.sum())


@pytest.mark.parametrize("kind", SOUNDS)
def test_an_effect_is_audible_at_once_short_and_never_too_loud(kind: Sound) -> None:
    for seed in range(40):
        wave = effect(kind, seed)
        assert wave.dtype == np.float32
        assert 0.2 <= len(wave) / RATE_HZ <= 1.3
        assert np.abs(wave).max() == pytest.approx(0.5)
        assert np.abs(wave[: RATE_HZ * 15 // 100]).max() > 0.2


@pytest.mark.parametrize("kind", SOUNDS)
def test_an_effect_is_the_same_for_the_same_seed_only(kind: Sound) -> None:
    np.testing.assert_array_equal(effect(kind, 1), effect(kind, 1))
    assert len(effect(kind, 1)) != len(effect(kind, 2)) or not np.array_equal(effect(kind, 1), effect(kind, 2))


def test_breaking_glass_is_high_and_a_knock_is_low() -> None:
    knock, alarm, glass = (np.median([mean_hz(effect(kind, seed)) for seed in range(9)]) for kind in KINDS_BY_PITCH)
    assert knock < 600 < alarm < 2500 < glass


def test_a_noise_loop_has_no_seam_and_a_level_well_below_speech() -> None:
    for seed in range(4):
        loop = noise_loop(seed)
        assert len(loop) == NOISE_SAMPLES
        assert 0.09 * SPEECH_LEVEL < loudness(loop) < 0.26 * SPEECH_LEVEL
        assert abs(float(loop[0] - loop[-1])) <= np.abs(np.diff(loop)).max()


@given(start=st.integers(0, 8 * NS_PER_S), length=st.integers(0, NS_PER_S))
@settings(max_examples=30, deadline=None)
def test_any_window_of_a_track_is_a_cut_of_the_whole(start: int, length: int) -> None:
    window = TRACK.samples(start, start + length)
    first = start * RATE_HZ // NS_PER_S
    np.testing.assert_array_equal(window, WHOLE[first : first + len(window)])
    assert abs(len(window) - length * RATE_HZ / NS_PER_S) <= 1


def test_a_track_goes_on_after_the_noise_has_been_used_up() -> None:
    samples = Track(BUSY, BANK).samples(40 * NS_PER_S, 41 * NS_PER_S)
    assert samples.shape == (RATE_HZ,)
    assert loudness(samples) > 0


def test_a_happening_is_heard_from_its_start_on() -> None:
    silence = np.zeros(NOISE_SAMPLES, dtype=np.float32)
    samples = Track(Minute((Heard("doorbell", NS_PER_S),)), BANK, noise=silence).samples(0, 2 * NS_PER_S)
    assert loudness(samples[:RATE_HZ]) == 0
    assert loudness(samples[RATE_HZ : RATE_HZ * 115 // 100]) > 0.01


def test_what_is_only_seen_is_silent() -> None:
    silence = np.zeros(NOISE_SAMPLES, dtype=np.float32)
    samples = Track(Minute((Heard("dog_in", NS_PER_S),)), BANK, noise=silence).samples(0, 3 * NS_PER_S)
    assert loudness(samples) == 0


def test_rooms_differ_by_seed_and_samples_stay_in_range() -> None:
    one, other = (Track(BUSY, BANK, seed).samples(0, 7 * NS_PER_S) for seed in (1, 2))
    assert not np.allclose(one, other)
    assert max(np.abs(one).max(), np.abs(other).max()) <= 1.0


def test_sounds_and_clips_need_no_torch() -> None:
    code = "import sys, model_shards.nano.sounds, model_shards.nano.clips; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
