"""The people who speak to nano: espeak-ng's voices, and which of them nano must never have heard in training.

Rule: whoever is in ROOM or EVALUATION is never trained on: none of their variants is in VARIANTS, and the accent of two
in EVALUATION is not in ACCENTS.

Needs the command `espeak-ng`, at training time only: what the room needs at run time is in clips.npz.
"""

from __future__ import annotations

import io
import subprocess
import wave
from dataclasses import dataclass
from typing import Final

import numpy as np

from model_shards.nano.sounds import RATE_HZ, SPEECH_LEVEL, Samples


@dataclass(frozen=True, slots=True)
class Voice:
    """One way to speak. words_per_minute and pitch (0 to 99) are espeak's; stretch: of the wave, pitch and all."""

    accent: str
    variant: str
    words_per_minute: int = 160
    pitch: int = 50
    stretch: float = 1.0


ACCENTS: Final = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-rp", "en-029", "en-us-nyc")
VARIANTS: Final = (
    "adam", "Alex", "Alicia", "Andrea", "Andy", "Annie", "antonio", "aunty", "belinda", "benjamin", "boris", "david",
    "Denis", "Diogo", "ed", "edward", "edward2", "Gene", "Gene2", "gustave", "announcer", "Henrique", "Hugo", "iven",
    "iven2", "iven3", "iven4", "Jacky", "john", "kaukovalta", "Lee", "marcelo", "Marco", "Mario", "max", "michel",
    "miguel", "pablo", "paul", "pedro", "quincy", "RicishayMax", "RicishayMax2", "RicishayMax3", "rob", "robert",
    "robosoft", "robosoft2", "robosoft4", "robosoft5", "robosoft7", "robosoft8", "steph2", "steph3", "Storm",
    "Tweaky", "UniRobot", "zac", "anika", "AnxiousAndy", "fast", "f1", "f2", "f3", "f5", "grandma", "grandpa",
    "klatt", "klatt2", "klatt3", "klatt4", "klatt5", "m1", "m2", "m4", "m5", "m6", "m7", "m8", "norbert", "sandro",
    "shelby", "travis", "victor",
)  # fmt: skip
ROOM: Final = (
    Voice("en-us", "m3", 165, 45),
    Voice("en-gb", "f4", 170, 55),
    Voice("en-us", "Michael", 160, 50),
)
"""Who speaks in `synthetic://`."""
EVALUATION: Final = (
    Voice("en-gb-x-gbcwmd", "linda", 165, 50),
    Voice("en-gb-x-gbcwmd", "Mike", 160, 50),
    Voice("en-us", "steph", 170, 55),
)
"""Who speaks when nano is judged."""


def trained(rng: np.random.Generator) -> Voice:
    """Anybody who may speak in training."""
    return Voice(
        str(rng.choice(ACCENTS)),
        str(rng.choice(VARIANTS)),
        words_per_minute=int(rng.integers(135, 195)),
        pitch=int(rng.integers(35, 66)),
        stretch=float(rng.uniform(0.87, 1.13)),
    )


def say(voice: Voice, text: str) -> Samples:
    """`text` as spoken by `voice`, without silence at its ends: [n] float32 at 16 kHz, of SPEECH_LEVEL."""
    command = ["espeak-ng", "-v", f"{voice.accent}+{voice.variant}", "-s", str(voice.words_per_minute),
               "-p", str(voice.pitch), "--stdout", text]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True)
    with wave.open(io.BytesIO(done.stdout)) as file:
        rate_hz = file.getframerate()
        pcm = np.frombuffer(file.readframes(-1), dtype=np.int16)  # the header's length is not known when it is written
    spoken = _trim(_resample(pcm.astype(np.float32), voice.stretch * RATE_HZ / rate_hz))
    level: np.float32 = np.sqrt(np.mean(spoken**2))
    return spoken * (np.float32(SPEECH_LEVEL) / level)


def _resample(wave_in: Samples, ratio: float) -> Samples:
    """Band-limited, as one period: the ends are silent."""
    num_out = round(len(wave_in) * ratio)
    spectrum = np.fft.rfft(wave_in)[: num_out // 2 + 1]
    return np.fft.irfft(spectrum, num_out).astype(np.float32) * np.float32(ratio)


def _trim(spoken: Samples) -> Samples:
    """From 10 ms before the first sample within 34 dB of the loudest to 10 ms after the last."""
    loud = np.flatnonzero(np.abs(spoken) > 0.02 * np.abs(spoken).max())
    margin = RATE_HZ // 100
    return spoken[max(0, loud[0] - margin) : loud[-1] + margin]
