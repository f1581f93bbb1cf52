"""What the links of nano's speech learn from: sentences as the teacher speaks them, with mel, pitch and word times.

Rule: nano's mel is the official one (24 kHz, 50 frames a second, natural logarithm), centred and scaled by MEL_MEAN and
MEL_SCALE, so that the flow's noise has the scale of what it becomes. Everything that is called mel here is that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model_shards.nano.phrases import sentences, vocabulary
from model_shards.nano.teacher import CODE_SAMPLES, RATE_HZ, Samples, Speech, Teacher
from model_shards.vocoder import NUM_MELS, mel_spectrogram

MEL_MEAN: Final = -4.0
MEL_SCALE: Final = 2.0
FRAMES_PER_CODE: Final = 2
FRAME_SAMPLES: Final = CODE_SAMPLES // FRAMES_PER_CODE
NUM_HELD_OUT: Final = 80
NUM_SENTENCES: Final = 12_000
INDEX: Final = "utterances.json"  # written last

_FLOOR: Final = math.log(1e-5)  # of a mel
_HELD_OUT_SEED, _CORPUS_SEED = 11, 12
_F0_RATE_HZ: Final = RATE_HZ // 3
_F0_WINDOW: Final = 320  # 40 ms
_F0_LAGS: Final = (18, 90)  # 444 to 89 Hz
_VOICED: Final = 0.6

Pitch = npt.NDArray[np.float32]


def nano_mel(samples: Tensor) -> Tensor:
    """(samples,) at 24 kHz as (samples // 480, 80)."""
    return (mel_spectrogram(samples) - MEL_MEAN) / MEL_SCALE


def nano_silence(num_frames: int) -> Tensor:
    """(frames, 80)."""
    return torch.full((num_frames, NUM_MELS), (_FLOOR - MEL_MEAN) / MEL_SCALE)


def held_out_sentences() -> list[str]:
    """Sentences which nano never says and no link ever learns: real ones with one or two words swapped."""
    random, real = Random(_HELD_OUT_SEED), sentences()
    chosen: dict[str, None] = {}
    while len(chosen) < NUM_HELD_OUT:
        sentence = _swapped(random, real)
        if sentence not in real:
            chosen[sentence] = None
    return list(chosen)


def corpus_sentences(count: int, seed: int = _CORPUS_SEED) -> list[str]:
    """All real sentences, then words swapped, random words, two sentences joined; none that is held out."""
    random, real = Random(seed), sentences()
    taken = dict.fromkeys(real)
    forbidden = frozenset(held_out_sentences())
    while len(taken) < count:
        sentence = _invented(random, real)
        if sentence not in forbidden:
            taken[sentence] = None
    return list(taken)


def _invented(random: Random, real: list[str]) -> str:
    kind = random.random()
    if kind < 0.55:
        return _swapped(random, real)
    if kind < 0.85:
        return " ".join(random.choices(vocabulary(), k=random.randint(2, 7)))
    return f"{random.choice(real)} {random.choice(real)}"


def _swapped(random: Random, real: list[str]) -> str:
    words = random.choice(real).split()
    for _ in range(random.randint(1, 2)):
        words[random.randrange(len(words))] = random.choice(vocabulary())
    return " ".join(words)


@dataclass(frozen=True, slots=True)
class Utterance:
    """One sentence of a corpus. first_code: where it begins in the corpus; starts_s: of its words."""

    words: tuple[str, ...]
    starts_s: tuple[float, ...]
    first_code: int
    num_codes: int

    @property
    def frames(self) -> slice:
        return slice(self.first_code * FRAMES_PER_CODE, (self.first_code + self.num_codes) * FRAMES_PER_CODE)

    @property
    def samples(self) -> slice:
        return slice(self.first_code * CODE_SAMPLES, (self.first_code + self.num_codes) * CODE_SAMPLES)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Sentences one after the other.

    wave: (samples,) int16; mel: (frames, 80) float16; f0: (frames,) float16 in Hz, 0 where there is no voice.
    """

    utterances: tuple[Utterance, ...]
    wave: npt.NDArray[np.int16]
    mel: npt.NDArray[np.float16]
    f0: npt.NDArray[np.float16]

    def mel_of(self, utterance: Utterance) -> Tensor:
        """(frames, 80) float32."""
        return torch.from_numpy(self.mel[utterance.frames].astype(np.float32))


def train(folder: Path, minutes: float) -> None:
    """Let the teacher speak: `corpus` is learnt from, `test` is what scores are measured on. However long it takes."""
    if not (folder / "test" / INDEX).is_file():
        build_corpus(folder / "test", [*sentences(), *held_out_sentences()])
    if not (folder / "corpus" / INDEX).is_file():
        build_corpus(folder / "corpus", corpus_sentences(NUM_SENTENCES))


def corpus_beside(folder: Path, which: Literal["corpus", "test"] = "corpus") -> Corpus:
    """What a training in `folder` learns from or is measured on: the stage `speech-data` has written it beside."""
    return load_corpus(folder.parent / "speech-data" / which)


def build_corpus(folder: Path, texts: list[str]) -> None:
    """Let the teacher speak and write `folder`, which becomes readable when all is there."""
    folder.mkdir(parents=True, exist_ok=True)
    utterances: list[Utterance] = []
    waves: list[npt.NDArray[np.int16]] = []
    mels: list[npt.NDArray[np.float16]] = []
    pitches: list[npt.NDArray[np.float16]] = []
    for speech in _spoken(texts):
        begin = utterances[-1].first_code + utterances[-1].num_codes if utterances else 0
        utterances.append(Utterance(speech.words, speech.starts_s, begin, speech.num_codes))
        waves.append((speech.samples * 32767).astype(np.int16))
        mels.append(nano_mel(torch.from_numpy(speech.samples)).numpy().astype(np.float16))
        pitches.append(pitch(speech.samples).astype(np.float16))
    for name, pieces in (("wave", waves), ("mel", mels), ("f0", pitches)):
        np.save(folder / f"{name}.npy", np.concatenate(pieces))
    rows = [asdict(utterance) for utterance in utterances]
    (folder / INDEX).write_text(json.dumps(rows), encoding="utf-8")


def load_corpus(folder: Path) -> Corpus:
    rows = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    utterances = tuple(
        Utterance(tuple(row["words"]), tuple(row["starts_s"]), row["first_code"], row["num_codes"]) for row in rows
    )
    return Corpus(utterances, *(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("wave", "mel", "f0")))


def pitch(samples: Samples) -> Pitch:
    """Fundamental frequency in Hz, of each mel frame; 0 where there is no voice. From the normalised autocorrelation:
    the first peak that comes near the highest, so that no multiple of the period is taken."""
    slow = _slowed(samples)
    num_frames = len(samples) // FRAME_SAMPLES
    longest, hop = _F0_LAGS[1], FRAME_SAMPLES // 3
    padded = np.pad(slow, ((_F0_WINDOW + longest - hop) // 2, _F0_WINDOW + longest))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _F0_WINDOW + longest + 1)[: num_frames * hop : hop]
    lags = np.arange(_F0_LAGS[0] - 1, longest + 1)
    head = frames[:, :_F0_WINDOW]
    energy = np.sqrt((head**2).sum(1))
    correlation = np.stack([_correlation(head, frames[:, lag : lag + _F0_WINDOW], energy) for lag in lags], axis=1)
    inner = correlation[:, 1:-1]
    peaks = (inner >= correlation[:, :-2]) & (inner >= correlation[:, 2:])
    near = peaks & (inner >= 0.88 * inner.max(axis=1, keepdims=True))
    first = near.argmax(axis=1)
    rows = np.arange(num_frames)
    voiced = near.any(axis=1) & (inner[rows, first] > _VOICED) & (energy > 0.02)
    left, mid, right = (correlation[rows, first + shift] for shift in range(3))
    bend = np.minimum(left - 2 * mid + right, -1e-6)
    exact = lags[1:-1][first] + np.clip(0.5 * (left - right) / bend, -0.5, 0.5)
    return np.where(voiced, _F0_RATE_HZ / exact, 0.0).astype(np.float32)


def _correlation(head: Samples, shifted: Samples, energy: Samples) -> Samples:
    both = energy * np.sqrt((shifted**2).sum(1))
    return np.asarray((head * shifted).sum(1) / np.maximum(both, 1e-4), dtype=np.float32)


def _slowed(samples: Samples) -> Samples:
    """At 8 kHz."""
    spectrum = np.fft.rfft(samples)
    return np.asarray(np.fft.irfft(spectrum[: len(samples) // 6 + 1], len(samples) // 3) / 3, dtype=np.float32)


def _spoken(texts: list[str]) -> Iterator[Speech]:
    teacher = Teacher()
    return map(teacher.say, texts)
