"""The voice which nano learns: espeak-ng, with the time at which each word starts.

Rule: only training uses it; nothing at run time needs espeak-ng to be installed (Debian: libespeak-ng1).
"""

from __future__ import annotations

import ctypes
import ctypes.util
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from model_shards.errors import DependencyError

RATE_HZ: Final = 24_000
CODE_SAMPLES: Final = 960  # 25 codes a second
VOICE: Final = "en-us+f3"
WORDS_PER_MINUTE: Final = 150

Samples = npt.NDArray[np.float32]

_LEAD_S: Final = 0.04
_TAIL_S: Final = 0.12
_AUDIBLE: Final = 0.003  # of full scale
_FFT_BLOCK: Final = 147  # 22 050 Hz : 24 000 Hz = 147 : 160
_SYNCHRONOUS, _UTF8, _END_PAUSE, _RATE, _BY_CHARACTER, _WORD_EVENT = 2, 1, 0x1000, 1, 1, 1


@dataclass(frozen=True, slots=True)
class Speech:
    """words; samples: float32 at 24 kHz, a whole number of codes; starts_s: of each word, from the first sample."""

    words: tuple[str, ...]
    samples: Samples
    starts_s: tuple[float, ...]

    @property
    def num_codes(self) -> int:
        return len(self.samples) // CODE_SAMPLES


class _Id(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position_ms", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    ]


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)  # wave, number of samples, events


class Teacher:
    """espeak-ng in this process. The library has one state per process, so teachers must not speak at the same time."""

    def __init__(self, voice: str = VOICE, words_per_minute: int = WORDS_PER_MINUTE) -> None:
        """Raises DependencyError when the library or the voice is missing."""
        self._library = _load_library()
        self._rate_hz: int = self._library.espeak_Initialize(_SYNCHRONOUS, 200, None, 0)
        self._pieces: list[npt.NDArray[np.int16]] = []
        self._events: list[tuple[int, int]] = []
        self._callback = _Callback(self._take)
        self._voice, self._words_per_minute = voice.encode(), words_per_minute
        if self._rate_hz <= 0 or self._library.espeak_SetVoiceByName(self._voice):
            raise DependencyError(f"espeak-ng has no voice {voice!r}; install Debian's espeak-ng-data")

    def say(self, sentence: str) -> Speech:
        """Speak words with single spaces between them."""
        self._pieces, self._events = [], []
        self._take_over()
        text = sentence.encode()
        self._library.espeak_Synth(text, len(text) + 1, 0, _BY_CHARACTER, 0, _UTF8 | _END_PAUSE, None, None)
        wave = np.concatenate(self._pieces).astype(np.float32) / np.float32(32768)
        audible = np.flatnonzero(np.abs(wave) > _AUDIBLE)
        start = max(0, int(audible[0]) - int(_LEAD_S * self._rate_hz))
        end = int(audible[-1]) + int(_TAIL_S * self._rate_hz)
        samples = _resampled(wave[start:end], self._rate_hz)
        padding = -len(samples) % CODE_SAMPLES
        starts = _word_starts(sentence, self._events)
        return Speech(
            tuple(sentence.split()),
            np.pad(samples, (0, padding)),
            tuple(max(0.0, (sample - start) / self._rate_hz) for sample in starts),
        )

    def _take_over(self) -> None:
        """Another teacher may have spoken last."""
        self._library.espeak_SetSynthCallback(self._callback)
        self._library.espeak_SetVoiceByName(self._voice)
        self._library.espeak_SetParameter(_RATE, self._words_per_minute, 0)

    def _take(self, wave: ctypes._Pointer[ctypes.c_short], count: int, events: ctypes._Pointer[_Event]) -> int:
        if count > 0:
            self._pieces.append(np.ctypeslib.as_array(wave, (count,)).copy())
        index = 0
        while events[index].type:
            if events[index].type == _WORD_EVENT:
                self._events.append((events[index].text_position - 1, events[index].sample))
            index += 1
        return 0


def _load_library() -> ctypes.CDLL:
    name = ctypes.util.find_library("espeak-ng") or "libespeak-ng.so.1"
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise DependencyError(f"nano's teacher is espeak-ng, which is not installed ({error})") from error
    library.espeak_Synth.argtypes = [
        *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint),
        *(ctypes.c_void_p, ctypes.c_void_p),
    ]
    return library


def _word_starts(sentence: str, events: list[tuple[int, int]]) -> list[int]:
    """The first sample of each word. espeak merges some words ("in the"): such a word has the one before's event."""
    starts: list[int] = []
    position = 0
    for word in sentence.split():
        own = [sample for place, sample in events if position <= place < position + len(word)]
        starts.append(own[0] if own else (starts[-1] if starts else 0))
        position += len(word) + 1
    return starts


def _resampled(wave: Samples, rate_hz: int) -> Samples:
    """At 24 kHz; the wave begins and ends in silence."""
    assert rate_hz * 160 == RATE_HZ * _FFT_BLOCK, rate_hz
    padded = np.pad(wave, (0, -len(wave) % _FFT_BLOCK))
    num_samples = len(padded) // _FFT_BLOCK * 160
    spectrum = np.fft.rfft(padded)
    return (np.fft.irfft(spectrum, num_samples) * (num_samples / len(padded))).astype(np.float32)
