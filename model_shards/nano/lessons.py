"""Episodes of the watched room as the language model lives them: what the encoders make of them, and what to say.

Rule: the encoders are frozen here. So an episode is embedded once, and the language model's training never waits for
gradients through pictures and sound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from model_shards.audio import AudioEncoder
from model_shards.nano.oracle import Listen, Oracle, Output, Speak, Window
from model_shards.nano.painter import Painter
from model_shards.nano.phrases import ANIMALS, COLOURS, PERSON_EVENTS, REQUESTS, SCENE_EVENTS, SOUNDS
from model_shards.nano.rehearsal import Embedded
from model_shards.nano.sequences import Unit
from model_shards.nano.sounds import RATE_HZ, Bank, Samples, Track, noise_loop
from model_shards.nano.train_audio import SECONDS_BEFORE_RESET, hear, mel_units, stream_peak
from model_shards.nano.train_vision import UNKNOWN, attribute_classes, describe, plain_attention, shrink, to_patches
from model_shards.nano.vocabulary import words_as_text
from model_shards.nano.world import NS_PER_S, PICTURE_NS, Episode
from model_shards.tokenizer import Tokenizer
from model_shards.vision import VisionEncoder

NUM_ROOMS: Final = 48  # looks of a room that take turns, and as many noises: a new one costs as much as ten pictures
ROOM_LASTS: Final = 4  # episodes, on average
BUFFER_S: Final = 19  # of sound before a reset which the next seconds' clamp still knows


@dataclass(frozen=True, slots=True)
class Lesson:
    """An episode, embedded.

    labels: what to say in each unit, as tokens, if all before was said right. hints: [units, NUM_HINTS] int64, what
    can be known in each unit: the classes of CHOICES, then whether each of FLAGS is so.
    lived: what nano said in each unit, and what it should have said then; None: it has not been set free.
    """

    episode: Episode
    windows: tuple[Window, ...]
    embedded: Embedded
    labels: tuple[tuple[int, ...], ...]
    hints: Tensor
    lived: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] | None = None

    def units(self) -> list[Unit]:
        units = self.lived or [(label, label) for label in self.labels]
        rows = zip(self.embedded.images.float(), self.embedded.audio.float(), units, strict=True)
        return [Unit(image, audio, said, expected) for image, audio, (said, expected) in rows]


SEEN: Final = (*attribute_classes(), *(2 for _ in COLOURS))
"""How many classes each has: what `describe` tells, and whether the person in each of the COLOURS has fallen."""
CHOICES: Final = (*SEEN, len(SOUNDS) + 1, len(SOUNDS) + 1, len(REQUESTS) + 1)
"""… then the sound that began, the last sound, the request that ended."""
FLAGS: Final = (
    *SCENE_EVENTS,
    *(f"{event} {colour}" for event in PERSON_EVENTS for colour in COLOURS),
    *ANIMALS,
    "person",
)
"""Which event is seen, with whom, and who is awaited."""
NUM_HINTS: Final = len(CHOICES) + len(FLAGS)


class Senses:
    """Nano's eyes and ears, and the rooms they are put into."""

    def __init__(self, vision: VisionEncoder, audio: AudioEncoder, bank: Bank, seed: int) -> None:
        """bank: who speaks. seed: of the looks and noises that episodes are given in turn."""
        self._vision, self._audio, self._bank = vision, audio, bank
        self._rng = np.random.default_rng((seed, 7))
        self._next_room = seed
        self._painters = [self._new_painter() for _ in range(NUM_ROOMS)]
        self._noises = [noise_loop(seed + index) for index in range(NUM_ROOMS)]

    @property
    def bank(self) -> Bank:
        return self._bank

    @torch.inference_mode()
    def embed(self, episode: Episode) -> Embedded:
        """What the encoders make of each window of an episode, in bfloat16."""
        images = self._see(episode)
        audio = self._hear(episode)
        return Embedded(images.bfloat16(), audio.bfloat16())

    def _see(self, episode: Episode) -> Tensor:
        painter = self._painters[self._draw()]
        times = [index * NS_PER_S + PICTURE_NS for index in range(episode.num_windows)]
        pixels = shrink(np.stack([painter.paint(episode.scene_at(time), time) for time in times]))
        with plain_attention(), torch.autocast("cpu", torch.bfloat16):
            return self._vision.encode_batch(to_patches(pixels))

    def _hear(self, episode: Episode) -> Tensor:
        track = Track(episode, self._bank, noise=self._noises[self._draw()])
        samples = track.samples(0, episode.num_windows * NS_PER_S)
        with torch.autocast("cpu", torch.bfloat16):
            return embed_sound(self._audio, samples)

    def _draw(self) -> int:
        index = int(self._rng.integers(NUM_ROOMS))
        if self._rng.random() < 1 / ROOM_LASTS:
            self._painters[index] = self._new_painter()
            self._noises[index] = noise_loop(self._next_room)
        return index

    def _new_painter(self) -> Painter:
        self._next_room += 1
        return Painter(self._next_room)


def embed_sound(encoder: AudioEncoder, samples: Samples) -> Tensor:
    """A session's whole sound, [seconds * 16000] float32, as the streaming encoder hears it: [seconds, 10, dim]."""
    num_seconds = len(samples) // RATE_HZ
    sound = torch.from_numpy(samples)[None]
    pieces, peak = [], None
    for start in range(0, num_seconds, SECONDS_BEFORE_RESET):
        end = min(start + SECONDS_BEFORE_RESET, num_seconds)
        before = min(start, 1)  # a second, for the frames which reach across the border
        units = mel_units(sound[:, (start - before) * RATE_HZ : end * RATE_HZ], before, peak)
        pieces.append(hear(encoder, units, 0, starts=start == 0))
        peak = stream_peak(sound[:, max(0, end - BUFFER_S) * RATE_HZ : end * RATE_HZ])
    return torch.cat(pieces, dim=1)[0]


def teach(episode: Episode, senses: Senses, tokenizer: Tokenizer) -> Lesson:
    """An episode with everything that is to be learnt from it."""
    windows = tuple(episode.windows())
    oracle, labels, hints = Oracle(), [], []
    for window in windows:
        labels.append(to_tokens(oracle.step(window), tokenizer))
        hints.append(_hints(window, oracle))
    return Lesson(episode, windows, senses.embed(episode), tuple(labels), torch.tensor(hints))


def to_tokens(output: Output, tokenizer: Tokenizer) -> tuple[int, ...]:
    """A unit's output as the engine samples it."""
    special = tokenizer.special
    if isinstance(output, Listen):
        return (special.listen,)
    words = tokenizer.encode(words_as_text(list(output.words)))
    return (special.speak, *words, *[special.turn_eos] * output.end_of_turn, special.chunk_eos)


def from_tokens(is_listen: bool, token_ids: Sequence[int], end_of_turn: bool, tokenizer: Tokenizer) -> Output:
    """What the engine gave out, as the oracle knows it."""
    if is_listen:
        return Listen()
    return Speak(tuple(tokenizer.decode(token_ids, skip_special=True).split()), end_of_turn)


def _hints(window: Window, oracle: Oracle) -> list[int]:
    """oracle: after this window."""
    true: set[str] = {change.event for change in window.changes} | oracle.awaited
    true |= {f"{change.event} {change.colour}" for change in window.changes}
    fallen = {person.colour for person in window.scene.people if person.fallen}
    return [
        *describe(window.scene),
        *(UNKNOWN if window.scene.lens_covered else int(colour in fallen) for colour in COLOURS),
        _place_in(SOUNDS, window.sounds[-1] if window.sounds else None),
        _place_in(SOUNDS, oracle.last_sound),
        _place_in(REQUESTS, window.requests[-1] if window.requests else None),
        *(int(flag in true) for flag in FLAGS),
    ]


def _place_in(names: Sequence[str], name: str | None) -> int:
    return 0 if name is None else names.index(name) + 1
