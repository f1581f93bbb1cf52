"""What is to be heard in the watched room: effects, spoken requests, noise and reverberation. Needs no torch.

Rule: a sample depends on the track's seed and its own time only. So any two windows of a track that overlap agree,
whoever asks for them, in whatever order.

A request's clip begins at its happening's `start_ns` and ends `duration_ns` later; what the room adds comes after that.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from model_shards.nano.phrases import SOUNDS, Sound

Samples = npt.NDArray[np.float32]
_Floats = npt.NDArray[np.floating]

RATE_HZ: Final = 16_000
NS_PER_S: Final = 1_000_000_000
SPEECH_LEVEL: Final = 0.08  # root mean square of a clip before the room
EFFECT_PEAK: Final = 0.5
LONGEST_SOUND_SAMPLES: Final = 5 * RATE_HZ  # reverberation included; sounds before that are over
NOISE_SAMPLES: Final = 1 << 17  # 8.2 s, then it repeats: a power of two for the transform


class Happening(Protocol):
    """Something at a time. `kind`: a sound, a request or a scene event; the last makes no noise."""

    @property
    def kind(self) -> str: ...
    @property
    def start_ns(self) -> int: ...
    @property
    def clip_seed(self) -> int: ...


class Episode(Protocol):
    """What happens in a watched room from 0 to `duration_ns`; `happenings` in the order of their start."""

    @property
    def seed(self) -> int: ...
    @property
    def duration_ns(self) -> int: ...
    @property
    def happenings(self) -> Sequence[Happening]: ...


class Bank:
    """Spoken clips by what they say."""

    def __init__(self, clips: Mapping[str, Sequence[Samples]]) -> None:
        """clips: per request one or more voices, each [n] float32 at 16 kHz, without silence at its ends."""
        self._clips = clips

    def __contains__(self, kind: str) -> bool:
        return kind in self._clips

    def clip(self, request: str, clip_seed: int) -> Samples:
        """One voice's clip at a speed between 0.94 and 1.06 of its own, both drawn from the seed: [n] float32."""
        voice, num_samples = self._draw(request, clip_seed)
        at = np.linspace(0.0, len(voice) - 1.0, num_samples)
        return np.interp(at, np.arange(len(voice)), voice).astype(np.float32)

    def duration_ns(self, request: str, clip_seed: int) -> int:
        """How long `clip` is."""
        return self._draw(request, clip_seed)[1] * NS_PER_S // RATE_HZ

    def _draw(self, request: str, clip_seed: int) -> tuple[Samples, int]:
        voices = self._clips[request]
        rng = np.random.default_rng(clip_seed)
        voice = voices[int(rng.integers(len(voices)))]
        return voice, round(len(voice) / rng.uniform(0.94, 1.06))


class Track:
    """The sound of one episode: what a microphone in the room gives."""

    def __init__(self, episode: Episode, bank: Bank, seed: int | None = None, noise: Samples | None = None) -> None:
        """seed: of the room's sound; the episode's own by default. noise: a loop made before, else one is made here."""
        self._seed = episode.seed if seed is None else seed
        self._bank = bank
        self._audible = [happening for happening in episode.happenings if _is_audible(happening.kind, bank)]
        self._starts = [_sample_at(happening.start_ns) for happening in self._audible]
        rng = np.random.default_rng((self._seed, 1))
        self._noise = _scaled(noise_loop(self._seed) if noise is None else noise, _gain(rng.uniform(-36, 0)))
        self._noise_from = int(rng.integers(len(self._noise)))
        self._room = _room(rng)
        self._rendered = lru_cache(maxsize=8)(self._render)

    def samples(self, start_ns: int, end_ns: int) -> Samples:
        """What is heard from `start_ns` to `end_ns`: [n] float32 at 16 kHz, within [-1, 1]."""
        start, end = _sample_at(start_ns), _sample_at(end_ns)
        heard = self._background(start, end)
        first = bisect_left(self._starts, start - LONGEST_SOUND_SAMPLES)
        for index in range(first, bisect_left(self._starts, end)):
            _add(heard, self._rendered(index), self._starts[index] - start)
        return np.clip(heard, -1.0, 1.0, out=heard)

    def _background(self, start: int, end: int) -> Samples:
        at = np.arange(start + self._noise_from, end + self._noise_from)
        return self._noise.take(at, mode="wrap")

    def _render(self, index: int) -> Samples:
        """One sound as the room gives it: its level, then the reverberation."""
        happening = self._audible[index]
        rng = np.random.default_rng((self._seed, index, 2))
        return _convolve(_scaled(self._dry(happening), _gain(rng.uniform(-9, 5))), self._room)

    def _dry(self, happening: Happening) -> Samples:
        for sound in SOUNDS:
            if sound == happening.kind:
                return effect(sound, happening.clip_seed)
        return self._bank.clip(happening.kind, happening.clip_seed)


def _is_audible(kind: str, bank: Bank) -> bool:
    return kind in SOUNDS or kind in bank


def _sample_at(time_ns: int) -> int:
    return time_ns * RATE_HZ // NS_PER_S


def _add(heard: Samples, sound: Samples, offset: int) -> None:
    """Mix `sound` into `heard` from `offset` on, which may be before its start."""
    first, last = max(0, offset), min(len(heard), offset + len(sound))
    if first < last:
        heard[first:last] += sound[first - offset : last - offset]


def _gain(level_db: float) -> float:
    return float(10 ** (level_db / 20))


def _scaled(wave: Samples, gain: float) -> Samples:
    return wave * np.float32(gain)


# The room


def _room(rng: np.random.Generator) -> Samples:
    """An impulse response: the sound itself, then a decaying noise of 50 to 300 ms."""
    num_samples = int(RATE_HZ * rng.uniform(0.05, 0.3))
    tail = rng.standard_normal(num_samples, dtype=np.float32) * _decay(num_samples, num_samples / RATE_HZ / 5)
    tail *= np.float32(rng.uniform(0.05, 0.5)) / np.linalg.norm(tail)
    tail[: RATE_HZ // 500] = 0.0  # nothing comes back within 2 ms
    tail[0] = 1.0
    return tail


def _convolve(dry: Samples, room: Samples) -> Samples:
    num_samples = len(dry) + len(room) - 1
    size = 1 << (num_samples - 1).bit_length()
    return np.fft.irfft(np.fft.rfft(dry, size) * np.fft.rfft(room, size), size)[:num_samples].astype(np.float32)


# Noise


def noise_loop(seed: int) -> Samples:
    """A background of hum, hiss, wind and murmur in a mixture of its own, without a seam: [NOISE_SAMPLES] float32.

    Its root mean square is 12 to 20 dB below `SPEECH_LEVEL`; a track takes up to 36 dB more away.
    """
    rng = np.random.default_rng((seed, 3))
    parts = (_hum(rng), _hiss(rng), _wind(rng), _murmur(rng))
    shares = rng.dirichlet((0.3, 0.6, 0.3, 0.3)).astype(np.float32)
    mixed = _zeros(NOISE_SAMPLES)
    for share, part in zip(shares, parts, strict=True):
        mixed += share / part.std() * part
    return _scaled(mixed, SPEECH_LEVEL * _gain(rng.uniform(-20, -12)) / float(mixed.std()))


def _hum(rng: np.random.Generator) -> Samples:
    """Mains and fans: harmonics of about 50 or 60 Hz, each a whole number of times in the loop."""
    spectrum = np.zeros(NOISE_SAMPLES // 2 + 1, dtype=np.complex64)
    turns = round(rng.choice((50.0, 60.0, rng.uniform(70, 140))) * NOISE_SAMPLES / RATE_HZ)
    for harmonic in range(1, 13):
        spectrum[turns * harmonic] = rng.uniform(0, 1) / harmonic * np.exp(1j * rng.uniform(0, 2 * math.pi))
    return np.fft.irfft(spectrum).astype(np.float32)


def _hiss(rng: np.random.Generator) -> Samples:
    """Noise between white and brown."""
    return _coloured(rng, lambda hz: (hz + 40.0) ** -rng.uniform(0.0, 1.0))


def _wind(rng: np.random.Generator) -> Samples:
    """Low rumble in slow gusts."""
    corner_hz = rng.uniform(80, 300)
    return _coloured(rng, lambda hz: 1 / (1 + (hz / corner_hz) ** 2)) * _gusts(rng, 0.1, 0.8)


def _murmur(rng: np.random.Generator) -> Samples:
    """Many people far away: two bands of noise that come and go like syllables."""
    low_hz, high_hz = rng.uniform(300, 700), rng.uniform(1000, 2400)
    return _syllables(rng, low_hz) + np.float32(rng.uniform(0.2, 0.7)) * _syllables(rng, high_hz)


def _syllables(rng: np.random.Generator, centre_hz: float) -> Samples:
    band = _coloured(rng, lambda hz: np.exp(-(((hz - centre_hz) / (0.4 * centre_hz)) ** 2)))
    return _scaled(band * _gusts(rng, 2.0, 6.0), 1 / float(band.std()))


def _gusts(rng: np.random.Generator, low_hz: float, high_hz: float) -> Samples:
    """A positive envelope that moves at `low_hz` to `high_hz`, mean about 1."""
    moving = _coloured(rng, lambda hz: (hz >= low_hz) & (hz <= high_hz))
    gusts: Samples = np.exp(np.float32(0.6) * moving / moving.std())
    return gusts


def _coloured(rng: np.random.Generator, shape: Callable[[_Floats], npt.ArrayLike]) -> Samples:
    """Periodic noise whose spectrum has the magnitude `shape(hz)`."""
    hz = np.arange(NOISE_SAMPLES // 2 + 1) * (RATE_HZ / NOISE_SAMPLES)
    real, imaginary = rng.standard_normal((2, len(hz)), dtype=np.float32)
    magnitude = np.asarray(shape(hz), dtype=np.float32)
    return np.fft.irfft((real + np.complex64(1j) * imaginary) * magnitude).astype(np.float32)


# Effects


def effect(kind: Sound, seed: int) -> Samples:
    """One sound of SOUNDS, never twice the same: [n] float32 at 16 kHz, 0.2 to 1.3 s, loud within 150 ms."""
    wave = _EFFECTS[kind](np.random.default_rng((seed, 4, SOUNDS.index(kind))))
    return _scaled(wave, EFFECT_PEAK / float(np.abs(wave).max()))


def _doorbell(rng: np.random.Generator) -> Samples:
    """Ding, dong: two or three struck bars, the next lower than the last."""
    wave = _zeros(int(RATE_HZ * rng.uniform(0.8, 1.2)))
    pitch_hz, gap_s, tau_s = rng.uniform(560, 1000), rng.uniform(0.22, 0.4), rng.uniform(0.18, 0.4)
    interval = rng.choice((0.749, 0.794, 0.841))  # a fourth, a major or a minor third
    overtone = rng.uniform(0.1, 0.4)
    for note in range(int(rng.integers(2, 4))):
        rest = len(wave) - int(note * gap_s * RATE_HZ)
        if rest > RATE_HZ // 10:
            strike = _ring(rest, pitch_hz, tau_s) + np.float32(overtone) * _ring(rest, 2.76 * pitch_hz, tau_s / 3)
            _add(wave, strike, len(wave) - rest)
        pitch_hz *= interval
    return _faded(wave)


def _knock(rng: np.random.Generator) -> Samples:
    """Two to four hits on wood."""
    gap_s, num_hits = rng.uniform(0.13, 0.26), int(rng.integers(2, 5))
    wave = _zeros(int(RATE_HZ * (gap_s * num_hits + 0.12)))
    low_hz, high_hz, tau_s = rng.uniform(130, 320), rng.uniform(450, 1000), rng.uniform(0.015, 0.035)
    for hit in range(num_hits):
        size = RATE_HZ // 5
        thud = _ring(size, low_hz, tau_s) + np.float32(0.6) * _ring(size, high_hz, tau_s / 2)
        click = np.float32(0.5) * rng.standard_normal(size, dtype=np.float32) * _decay(size, 0.003)
        late_s = gap_s * hit + (rng.uniform(0, 0.02) if hit else 0.0)
        _add(wave, np.float32(rng.uniform(0.7, 1.0)) * (thud + click), int(late_s * RATE_HZ))
    return _faded(wave)


def _alarm(rng: np.random.Generator) -> Samples:
    """Two tones in turn, a siren that sweeps, or quick high beeps."""
    times_s = _times(int(RATE_HZ * rng.uniform(0.8, 1.2)))
    turns = times_s * rng.uniform(2.0, 4.0)
    style = rng.integers(3)
    loudness = np.ones(len(times_s))
    if style == 0:
        pitch_hz = np.where(turns % 1 < 0.5, 1.0, rng.uniform(1.2, 1.4)) * rng.uniform(700, 1300)
    elif style == 1:
        pitch_hz = rng.uniform(600, 900) * (1 + rng.uniform(0.5, 1.0) * np.abs(2 * (turns % 1) - 1))
    else:
        pitch_hz = np.full(len(times_s), rng.uniform(2000, 3200))
        loudness[1.5 * turns % 1 >= 0.6] = 0.0
    angle = 2 * math.pi * np.cumsum(pitch_hz) / RATE_HZ
    buzz = np.sin(angle) + rng.uniform(0.1, 0.4) * np.sin(2 * angle) + rng.uniform(0.1, 0.3) * np.sin(3 * angle)
    return _faded((loudness * buzz).astype(np.float32))


def _glass(rng: np.random.Generator) -> Samples:
    """A crash, then shards which ring as they fall."""
    wave = _zeros(int(RATE_HZ * rng.uniform(0.6, 1.1)))
    burst = np.diff(rng.standard_normal(RATE_HZ // 4 + 1, dtype=np.float32))
    _add(wave, burst * _decay(len(burst), rng.uniform(0.02, 0.06)), 0)
    for _ in range(int(rng.integers(12, 28))):
        fall_s = min(rng.exponential(0.18), 0.8 * len(wave) / RATE_HZ)
        ring = _ring(RATE_HZ // 4, rng.uniform(2000, 7200), rng.uniform(0.015, 0.07))
        _add(wave, np.float32(rng.uniform(0.2, 0.9)) * ring, int(fall_s * RATE_HZ))
    return _faded(wave)


def _bark(rng: np.random.Generator) -> Samples:
    """One to three barks of one dog."""
    gap_s, num_barks = rng.uniform(0.26, 0.4), int(rng.integers(1, 4))
    size_s, pitch_hz, mouth_hz = rng.uniform(0.13, 0.22), rng.uniform(220, 520), rng.uniform(700, 1300)
    wave = _zeros(int(RATE_HZ * (gap_s * (num_barks - 1) + size_s + 0.1)))
    for bark in range(num_barks):
        _add(wave, _one_bark(rng, size_s, pitch_hz * rng.uniform(0.95, 1.05), mouth_hz), int(bark * gap_s * RATE_HZ))
    return _faded(wave)


def _one_bark(rng: np.random.Generator, size_s: float, pitch_hz: float, mouth_hz: float) -> Samples:
    """A pitch which jumps up and falls, harmonics loudest where the mouth resonates, and breath."""
    times_s = _times(int(size_s * RATE_HZ))
    passed = times_s / size_s
    angle = 2 * math.pi * np.cumsum(pitch_hz * (0.75 + 0.9 * np.sin(math.pi * passed**0.6) - 0.35 * passed)) / RATE_HZ
    voice = np.zeros(len(times_s))
    for harmonic in range(1, 13):
        voice += np.sin(harmonic * angle) / (0.4 + ((harmonic * pitch_hz - mouth_hz) / 500) ** 2)
    breath = 0.35 * voice.std() * rng.standard_normal(len(times_s))
    sound: _Floats = (voice + breath) * np.sin(math.pi * passed**0.45) ** 1.5
    return sound.astype(np.float32)


_EFFECTS: Final = MappingProxyType[Sound, Callable[[np.random.Generator], Samples]](
    {"doorbell": _doorbell, "knock": _knock, "alarm": _alarm, "glass": _glass, "bark": _bark}
)


def _zeros(num_samples: int) -> Samples:
    return np.zeros(num_samples, dtype=np.float32)


def _times(num_samples: int) -> npt.NDArray[np.float64]:
    return np.arange(num_samples) / RATE_HZ


def _decay(num_samples: int, tau_s: float) -> Samples:
    return np.exp(-_times(num_samples) / tau_s).astype(np.float32)


def _ring(num_samples: int, pitch_hz: float, tau_s: float) -> Samples:
    """A struck thing: a sine which dies away."""
    return np.sin(2 * math.pi * pitch_hz * _times(num_samples)).astype(np.float32) * _decay(num_samples, tau_s)


def _faded(wave: Samples) -> Samples:
    """Without a click at either end: 2 ms in, 30 ms out."""
    rise, fall = RATE_HZ // 500, 3 * RATE_HZ // 100
    wave[:rise] *= np.linspace(0, 1, rise, dtype=np.float32)
    wave[-fall:] *= np.linspace(1, 0, fall, dtype=np.float32)
    return wave
