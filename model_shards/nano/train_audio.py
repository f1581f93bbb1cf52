"""Teach nano's audio encoder to hear: sounds as they begin, requests as they end.

Rule: training sees what a session sees. `mel_units` gives the numbers of `StreamingMel`, and `hear` those of
`AudioEncoder.encode`, second by second, with the positions starting again after `SECONDS_BEFORE_RESET`.

Two linear heads read each second's 10 embeddings, and a third reads each embedding alone, so that there is something
to learn from at any time: the word that is being said. They are thrown away at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_shards.audio import AudioEncoder
from model_shards.mel import DYNAMIC_RANGE, HALF_WINDOW, HOP, N_FFT, mel_filters
from model_shards.nano.phrases import REQUEST_WORDING, REQUESTS, SOUNDS, remarks, sentences
from model_shards.nano.sizes import AUDIO
from model_shards.nano.sounds import NS_PER_S, RATE_HZ, Bank, Samples, Track, noise_loop
from model_shards.nano.training import Schedule, Training
from model_shards.nano.voices import EVALUATION, ROOM, Voice, say, trained

SECONDS_BEFORE_RESET: Final = 29
DYNAMIC_FROM_UNIT: Final = 4  # the first unit whose mel buffer has 5 s
FRAMES: Final = 50  # after the convolutions, per second
CHUNK_FRAMES: Final = 104  # 2 + 100 + 2 mel frames
ANY: Final = -1  # a label that is not judged

_FILL: Final = 560  # zeros before the first sample of a session, at a first chunk of 1035 ms
_FIRST_CHUNK: Final = 16_480
PIECES: Final = 10  # embeddings per second
_PIECE_S: Final = 1 / PIECES
_PIECE_CENTRE_S: Final = 0.5 * _PIECE_S - _FILL / RATE_HZ  # of the first
_WORDS: Final = sorted({word for wording in REQUEST_WORDING.values() for word in wording.split()})
_OTHER_SPEECH: Final = len(_WORDS) + 1
_PIECE_LABEL: Final = {name: index for index, name in enumerate((*_WORDS, "", *SOUNDS), start=1)}
NUM_PIECE_LABELS: Final = len(_PIECE_LABEL) + 1
_STRIKE_S: Final = 0.25  # of a sound effect, when it is surely heard
_SOUND_LABEL: Final = {sound: index for index, sound in enumerate(SOUNDS, start=1)}
_REQUEST_LABEL: Final = {request: index for index, request in enumerate(REQUESTS, start=1)}
_DECOYS: Final = (
    "hello", "good morning", "thank you", "see you later", "come over here please", "never mind", "who are you",
    "what is your name", "how are you today", "where are you going", "is the window clean", "tell me a story",
    "i do not know", "what time is it", "the train was late again", "could you help me", "there is no milk left",
    "tell me when", "where is the", "how many", "is the door", "what do you", "yes", "no", "maybe tomorrow",
)  # fmt: skip


# What happens in a training window


@dataclass(frozen=True, slots=True)
class Cue:
    """One thing to hear. See `sounds.Happening`."""

    kind: str
    start_ns: int
    clip_seed: int


@dataclass(frozen=True, slots=True)
class Lesson:
    """Some seconds of sound and what each second is to be called. See `sounds.Episode`.

    sound_labels, request_labels: per second 0 for none, ANY where it is not judged. piece_labels: the same per tenth
    of a second, for the word under way.
    """

    seed: int
    duration_ns: int
    happenings: tuple[Cue, ...]
    sound_labels: tuple[int, ...]
    request_labels: tuple[int, ...]
    piece_labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Mix:
    """How much happens: chances per second. `off_rule`: of a time which the world would not choose."""

    sound: float = 0.16
    request: float = 0.24
    decoy: float = 0.12
    murmur: float = 0.03
    off_rule: float = 0.05


BUSY: Final = Mix()
TALKATIVE: Final = Mix(sound=0.08, request=0.5, decoy=0.1)  # requests take longest to learn
SPARSE: Final = Mix(sound=0.02, request=0.02, decoy=0.05, murmur=0.02)
NOISE_ONLY: Final = Mix(sound=0.0, request=0.0, decoy=0.0, murmur=0.0)
OTHER_SPEECH: Final = Mix(sound=0.0, request=0.0, decoy=0.35, murmur=0.1)
BY_THE_RULE: Final = Mix(off_rule=0.0)


class _Planner:
    """Places cues one after the other, so that speech overlaps with nothing (murmurs excepted)."""

    def __init__(self, seed: int, num_seconds: int, bank: Bank, mix: Mix) -> None:
        self.rng = np.random.default_rng((seed, 5))
        self.bank, self.mix, self.num_seconds = bank, mix, num_seconds
        self.spoken_until = self.sounding_until = 0.0
        self.cues: list[Cue] = []
        self.sound_labels, self.request_labels = [0] * num_seconds, [0] * num_seconds
        self.piece_labels = [0] * (PIECES * num_seconds)

    def plan(self, second: int) -> None:
        mix, drawn = self.mix, self.rng.random()
        if drawn < mix.sound:
            self._sound(second)
        elif drawn < mix.sound + mix.request:
            self._request(second)
        elif drawn < mix.sound + mix.request + mix.decoy:
            self._decoy(second)
        if self.rng.random() < mix.murmur:
            self._cue("murmur", second + self.rng.random())

    def _cue(self, kind: str, start_s: float) -> None:
        self.cues.append(Cue(kind, round(start_s * NS_PER_S), self._clip_seed()))

    def _clip_seed(self) -> int:
        return int(self.rng.integers(1 << 40))

    def _fraction(self, low: float, high: float) -> float:
        return float(self.rng.random() if self.rng.random() < self.mix.off_rule else self.rng.uniform(low, high))

    def _sound(self, second: int) -> None:
        fraction = self._fraction(0.05, 0.45)
        if second + fraction < self.spoken_until + 0.2:
            return
        kind = str(self.rng.choice(SOUNDS))
        self._cue(kind, second + fraction)
        self.sounding_until = second + fraction + 1.3
        self._name(second + fraction, second + fraction + _STRIKE_S, _PIECE_LABEL[kind])
        self._name(second + fraction + _STRIKE_S, self.sounding_until, ANY)
        self.sound_labels[second] = _SOUND_LABEL[kind]
        if fraction > 0.6:
            _blur(self.sound_labels, second, second + 1)

    def _request(self, second: int) -> None:
        fraction, clip_seed = self._fraction(0.35, 0.8), self._clip_seed()
        kind = REQUESTS[int(self.rng.integers(len(REQUESTS)))]
        start_s = second + fraction - self.bank.duration_ns(kind, clip_seed) / NS_PER_S
        if start_s < max(0.0, self.spoken_until + 0.05, self.sounding_until + 0.1):
            return
        self.cues.append(Cue(kind, round(start_s * NS_PER_S), clip_seed))
        self.spoken_until = second + fraction
        self.request_labels[second] = _REQUEST_LABEL[kind]
        self._name_words(start_s, self.spoken_until, REQUEST_WORDING[kind].split())
        if fraction < 0.2:
            _blur(self.request_labels, second - 1, second)
        elif fraction > 0.88:
            _blur(self.request_labels, second, second + 1)

    def _decoy(self, second: int) -> None:
        start_s, clip_seed = second + self.rng.random(), self._clip_seed()
        if start_s < max(self.spoken_until, self.sounding_until) + 0.1:
            return
        self.cues.append(Cue("decoy", round(start_s * NS_PER_S), clip_seed))
        self.spoken_until = start_s + self.bank.duration_ns("decoy", clip_seed) / NS_PER_S
        self._name(start_s, self.spoken_until, _OTHER_SPEECH)

    def _name_words(self, start_s: float, end_s: float, words: Sequence[str]) -> None:
        """As if every letter took the same time, and the gap after a word as long as a letter."""
        lengths = np.array([0, *(len(word) + 1 for word in words)]).cumsum()
        times_s = start_s + (end_s - start_s) * lengths / lengths[-1]
        for word, begin_s, stop_s in zip(words, times_s[:-1], times_s[1:], strict=True):
            self._name(float(begin_s), float(stop_s), _PIECE_LABEL[word])

    def _name(self, start_s: float, end_s: float, label: int) -> None:
        """Label the pieces whose centre lies in the time given."""
        first = max(0, math.ceil((start_s - _PIECE_CENTRE_S) * PIECES))
        for piece in range(first, min(len(self.piece_labels), math.ceil((end_s - _PIECE_CENTRE_S) * PIECES))):
            self.piece_labels[piece] = label


def _blur(labels: list[int], *seconds: int) -> None:
    """Near a border it is a matter of taste in which second something happened."""
    for second in seconds:
        if 0 <= second < len(labels):
            labels[second] = ANY


def plan_lesson(seed: int, num_seconds: int, bank: Bank, mix: Mix) -> Lesson:
    """`bank` also has "decoy", speech that asks nothing, and "murmur", the same from far away."""
    planner = _Planner(seed, num_seconds, bank, mix)
    for second in range(num_seconds):
        planner.plan(second)
    cues = sorted(planner.cues, key=lambda cue: cue.start_ns)
    return Lesson(
        seed,
        num_seconds * NS_PER_S,
        tuple(cues),
        tuple(planner.sound_labels),
        tuple(planner.request_labels),
        tuple(planner.piece_labels),
    )


# As a session hears it


@cache
def _filters() -> Tensor:
    return mel_filters()


def mel_units(samples: Tensor, from_second: int, past_peak: Tensor | None = None) -> Tensor:
    """The mel chunks of a stream's seconds, as `StreamingMel` cuts them from the stream's first 29 s.

    samples:     [batch, seconds * 16000] float32, at most 29 s.
    from_second: how many seconds to leave out.
    past_peak:   [batch], the loudest log-mel bin of what came before `samples`, which then aren't the stream's first
                 and have a clamp from the beginning. None: they are the first.
    returns:     [batch, seconds - from_second, 80, 104] float32; the two columns before a stream are 0.
    """
    num_seconds = samples.shape[1] // RATE_HZ
    stream = F.pad(samples, (_FILL, 0))
    raw = _log_mel(F.pad(stream[:, None], (HALF_WINDOW, 0), mode="reflect")[:, 0])
    peaks = _peaks(stream, raw, num_seconds)
    if past_peak is None:
        peaks[:, :DYNAMIC_FROM_UNIT] = -torch.inf
    else:
        peaks = torch.maximum(peaks, past_peak[:, None])
    chunks = F.pad(raw[:, :, : 100 * num_seconds + 2], (2, 0)).unfold(2, CHUNK_FRAMES, 100).transpose(1, 2)
    scaled = (torch.maximum(chunks, (peaks - DYNAMIC_RANGE)[:, :, None, None]) + 4.0) / 4.0
    scaled[:, 0, :, :2] = 0.0
    return scaled[:, from_second:]


def stream_peak(samples: Tensor) -> Tensor:
    """The loudest log-mel bin of what was heard, [batch, n] float32: [batch]. See `past_peak` of `mel_units`."""
    return _log_mel(samples).amax(dim=(1, 2))


def _log_mel(padded: Tensor) -> Tensor:
    """[batch, n] -> [batch, 80, frames]; the frame t begins at sample 160 t."""
    spectrum = torch.stft(padded, N_FFT, HOP, window=torch.hann_window(N_FFT), center=False, return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()
    return (_filters().T @ power).clamp(min=1e-10).log10()


def _peaks(stream: Tensor, raw: Tensor, num_seconds: int) -> Tensor:
    """The loudest bin in the buffer at each second: of all frames so far, the last of which is reflected."""
    ends = [_FIRST_CHUNK + RATE_HZ * second for second in range(num_seconds)]
    tails = torch.stack([stream[:, end - 360 : end] for end in ends], dim=1)
    edges = _log_mel(torch.cat([tails, tails[..., -41:-1].flip(2)], dim=2).flatten(0, 1)).amax(dim=(1, 2))
    so_far = raw.amax(dim=1).cummax(dim=1).values
    frames = torch.arange(num_seconds) * 100 + 101
    return torch.maximum(so_far[:, frames], edges.view(len(stream), num_seconds))


def hear(encoder: AudioEncoder, units: Tensor, phase: int, *, starts: bool) -> Tensor:
    """Encode consecutive seconds of sessions which have used up `phase` of their 29 s, with no memory of those.

    units:   [batch, seconds, 80, 104], see `mel_units`; `starts`: the first of them is a stream's first.
    returns: [batch, seconds, 10, embed_dim], with gradients.
    """
    num_seconds = units.shape[1]
    x = _convolve(encoder, units, starts)
    position = (torch.arange(num_seconds * FRAMES) + phase * FRAMES) % (SECONDS_BEFORE_RESET * FRAMES)
    x = x + encoder.apm.embed_positions(position)
    for layer in encoder._layers():
        q, k, v = layer.self_attn.heads(layer.self_attn_layer_norm(x))
        x = x + layer.self_attn.out_proj(_attend(q, k, v, phase).transpose(1, 2).flatten(2))
        x = x + layer.mlp(x)
    embeds = encoder.audio_projection_layer(encoder.apm.layer_norm(x))
    return embeds.view(len(units), num_seconds, 10, encoder.config.pool_step, -1).mean(dim=3)  # type: ignore[no-any-return]


def _attend(q: Tensor, k: Tensor, v: Tensor, phase: int) -> Tensor:
    """Second by second: each sees itself and what is before it since the last reset.

    Plain softmax: on a CPU the backward pass of the fused kernel takes 4 times as long at these sizes.
    """
    q = q * q.shape[3] ** -0.5
    mixed: list[Tensor] = []
    for second in range(q.shape[2] // FRAMES):
        since_reset = (phase + second) % SECONDS_BEFORE_RESET
        seen = slice(max(0, second - since_reset) * FRAMES, (second + 1) * FRAMES)
        weights = (q[:, :, second * FRAMES : seen.stop] @ k[:, :, seen].transpose(2, 3)).softmax(dim=3)
        mixed.append(weights.to(v.dtype) @ v[:, :, seen])
    return torch.cat(mixed, dim=2)


def _convolve(encoder: AudioEncoder, units: Tensor, starts: bool) -> Tensor:
    """[batch, seconds, 80, 104] -> [batch, seconds * 50, width], the overlap cut off."""
    num_sessions, num_seconds = units.shape[:2]
    x = F.gelu(encoder.apm.conv1(units.flatten(0, 1))).view(num_sessions, num_seconds, -1, CHUNK_FRAMES)
    if starts:  # what isn't there is as silent as the padding of the convolution
        there = torch.ones(num_seconds, 1, CHUNK_FRAMES)
        there[0, :, :2] = 0.0
        x = x * there
    frames = F.gelu(encoder.apm.conv2(x.flatten(0, 1)))[:, :, 1 : 1 + FRAMES]
    return frames.transpose(1, 2).reshape(num_sessions, num_seconds * FRAMES, -1)


class Listener(nn.Module):
    """The encoder and the two heads it is taught with."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = AudioEncoder(AUDIO)
        self.sound_head = nn.Linear(10 * AUDIO.embed_dim, len(SOUNDS) + 1)
        self.request_head = nn.Linear(10 * AUDIO.embed_dim, len(REQUESTS) + 1)
        self.piece_head = nn.Linear(AUDIO.embed_dim, NUM_PIECE_LABELS)

    def forward(self, units: Tensor, phase: int, *, starts: bool) -> tuple[Tensor, Tensor, Tensor]:
        """See `hear`; returns the logits of sounds begun, of requests ended, and of words under way.

        They are [batch, seconds, classes] twice, and [batch, seconds * 10, classes].
        """
        heard = hear(self.encoder, units, phase, starts=starts)
        whole = heard.flatten(2)
        return self.sound_head(whole), self.request_head(whole), self.piece_head(heard.flatten(1, 2))


# Lessons in batches


@dataclass(frozen=True, slots=True)
class Batch:
    """Lessons of equal length. units: see `mel_units`; labels [batch, seconds], of pieces [batch, seconds * 10]."""

    units: Tensor
    phase: int
    starts: bool
    sound_labels: Tensor
    request_labels: Tensor
    piece_labels: Tensor


class Classroom:
    """Fresh lessons without end: bank and noises are its own, the rest is drawn for each."""

    def __init__(self, bank: Bank, first_seed: int, num_noises: int = 96) -> None:
        """num_noises: how many backgrounds there are at a time; every fourth batch brings a new one."""
        self._bank = bank
        self._seed = first_seed
        self._num_batches = 0
        self._noises = [noise_loop(first_seed + number) for number in range(num_noises)]

    def batch(self, num_lessons: int, num_seconds: int, mix: Mix | None = None) -> Batch:
        """mix: of all lessons; by default busy ones, sparse ones and quiet ones."""
        self._seed += num_lessons
        rng = np.random.default_rng((self._seed, 6))
        self._num_batches += 1
        if self._num_batches % 4 == 0:
            self._noises[self._num_batches // 4 % len(self._noises)] = noise_loop(self._seed)
        starts = bool(rng.random() < 0.3)
        heard = num_seconds if starts else num_seconds + 1  # a second of what came before
        lessons = [
            plan_lesson(self._seed + row, heard, self._bank, mix or _draw_mix(rng)) for row in range(num_lessons)
        ]
        samples = torch.from_numpy(np.stack([self._sound(lesson, rng) for lesson in lessons]))
        peak = None if starts else _past_peak(samples, rng)
        units = mel_units(samples, heard - num_seconds, peak)
        phase = 0 if starts else int(rng.integers(SECONDS_BEFORE_RESET))
        return Batch(
            units,
            phase,
            starts,
            _labels([lesson.sound_labels[-num_seconds:] for lesson in lessons]),
            _labels([lesson.request_labels[-num_seconds:] for lesson in lessons]),
            _labels([lesson.piece_labels[-PIECES * num_seconds :] for lesson in lessons]),
        )

    def _sound(self, lesson: Lesson, rng: np.random.Generator) -> Samples:
        noise = self._noises[int(rng.integers(len(self._noises)))]
        if rng.random() < 0.04:
            noise = np.zeros_like(noise)  # a microphone that gives nothing between the sounds
        return Track(lesson, self._bank, noise=noise).samples(0, lesson.duration_ns)


def _draw_mix(rng: np.random.Generator) -> Mix:
    mixes = (TALKATIVE, BUSY, SPARSE, OTHER_SPEECH, NOISE_ONLY)
    return mixes[int(rng.choice(len(mixes), p=(0.5, 0.2, 0.12, 0.1, 0.08)))]


def _past_peak(samples: Tensor, rng: np.random.Generator) -> Tensor:
    """Some sessions were before as quiet as their first second here, others as loud as the batch's next one is."""
    own = _log_mel(samples[:, :RATE_HZ]).amax(dim=(1, 2))
    other = _log_mel(samples[:, : 4 * RATE_HZ]).amax(dim=(1, 2)).roll(1)
    loud = torch.from_numpy(rng.random(len(samples)) < 0.6)
    return torch.where(loud, torch.maximum(own, other), own)


def _labels(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


# Who speaks in training


def train_bank(folder: Path, clips_per_request: int = 420, num_decoys: int = 2600) -> Bank:
    """The clips of hundreds of trained voices, spoken once and kept in `folder`."""
    file = folder / "voices.npz"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(7)
        texts = {request: [REQUEST_WORDING[request]] * clips_per_request for request in REQUESTS}
        others = [*sentences(), *remarks(), *_DECOYS * 6]
        said = {**texts, "decoy": [str(rng.choice(others)) for _ in range(num_decoys)]}
        _write_bank(file, {kind: [say(_voice_of(rng, kind), text) for text in spoken] for kind, spoken in said.items()})
    return _read_bank(file)


def _voice_of(rng: np.random.Generator, kind: str) -> Voice:
    """Every fifth decoy is nano's own voice, which its microphone may hear."""
    return Voice("en-us", "f3", 150) if kind == "decoy" and rng.random() < 0.2 else trained(rng)


def _write_bank(file: Path, clips: Mapping[str, Sequence[Samples]]) -> None:
    packed: dict[str, npt.NDArray[np.int16] | npt.NDArray[np.int64]] = {}
    for kind, spoken in clips.items():
        joined = np.concatenate(list(spoken))
        packed[kind] = np.rint(joined.clip(-1, 1) * 32767).astype(np.int16)
        packed[f"{kind} lens"] = np.array([len(clip) for clip in spoken])
    with file.open("wb") as out:
        np.savez(out, allow_pickle=False, **packed)


def _read_bank(file: Path) -> Bank:
    with np.load(file) as packed:
        clips = {
            kind: np.split(packed[kind].astype(np.float32) / 32767, packed[f"{kind} lens"].cumsum()[:-1])
            for kind in (*REQUESTS, "decoy")
        }
    return _with_murmurs(clips)


def unheard_bank() -> Bank:
    """The voices of both casts that are never trained on."""
    cast = (*ROOM, *EVALUATION)
    clips = {request: [say(voice, REQUEST_WORDING[request]) for voice in cast] for request in REQUESTS}
    others = [*_DECOYS, *sentences()[::9]]
    return _with_murmurs({**clips, "decoy": [say(cast[n % len(cast)], text) for n, text in enumerate(others)]})


def _with_murmurs(clips: Mapping[str, Sequence[Samples]]) -> Bank:
    return Bank({**clips, "murmur": [np.float32(0.12) * clip for clip in clips["decoy"]]})


# Scores


def score(listener: Listener, bank: Bank, first_seed: int, num_batches: int) -> dict[str, float]:
    """How well a listener hears what it never heard before.

    sound, request: share of exact class and second, over seconds in which something is or is claimed; *_recall: over
    those in which something is. false_noise, false_speech: share of seconds in which something is claimed though
    there is only noise, or only speech that asks nothing.
    """
    room = Classroom(bank, first_seed)
    busy = [_judge(listener, room.batch(8, 14, BY_THE_RULE)) for _ in range(num_batches)]
    quiet = [_judge(listener, room.batch(8, 28, NOISE_ONLY)) for _ in range(num_batches)]
    spoken = [_judge(listener, room.batch(8, 28, OTHER_SPEECH)) for _ in range(num_batches)]
    sound, request = (torch.cat([judged[head] for judged in busy]) for head in (0, 1))
    return {
        "sound": _exact(sound),
        "sound_recall": _recall(sound),
        "request": _exact(request),
        "request_recall": _recall(request),
        "false_noise": _claims(quiet),
        "false_speech": _claims(spoken),
    }


@torch.inference_mode()
def _judge(listener: Listener, batch: Batch) -> tuple[Tensor, Tensor]:
    """Per head the pairs (said, true), [seconds, 2], of the seconds that are judged."""
    logits = listener(batch.units, batch.phase, starts=batch.starts)[:2]
    pairs = [
        torch.stack([said.argmax(dim=2), true], dim=2)[true != ANY]
        for said, true in zip(logits, (batch.sound_labels, batch.request_labels), strict=True)
    ]
    return pairs[0], pairs[1]


def _exact(pairs: Tensor) -> float:
    counted = pairs[(pairs > 0).any(dim=1)]
    return float((counted[:, 0] == counted[:, 1]).float().mean())


def _recall(pairs: Tensor) -> float:
    counted = pairs[pairs[:, 1] > 0]
    return float((counted[:, 0] == counted[:, 1]).float().mean())


def _claims(judged: Sequence[tuple[Tensor, Tensor]]) -> float:
    claimed = torch.cat([(sound[:, 0] > 0) | (request[:, 0] > 0) for sound, request in judged])
    return float(claimed.float().mean())


# The training


def train(folder: Path, minutes: float) -> None:
    """Teach the encoder for `minutes` in `folder`, or go on where it stands there."""
    torch.manual_seed(0)
    listener = Listener()
    training = Training(folder, listener, Schedule(minutes=minutes, rate=1.5e-3))
    room = Classroom(train_bank(folder), first_seed=1_000_000_000 + 1_000 * training.step)
    unheard = unheard_bank()

    def loss(step: int, passed: float) -> tuple[Tensor, Mapping[str, float]]:
        num_lessons, num_seconds = _shape(step, passed)
        batch = room.batch(num_lessons, num_seconds)
        with torch.autocast("cpu", torch.bfloat16):
            sound, request, piece = listener(batch.units, batch.phase, starts=batch.starts)
        sound_loss = _cross_entropy(sound, batch.sound_labels)
        request_loss = _cross_entropy(request, batch.request_labels)
        piece_loss = _cross_entropy(piece, batch.piece_labels)
        parts = {"sound": sound_loss, "request": request_loss, "piece": piece_loss}
        return sound_loss + request_loss + piece_loss, {name: float(part.detach()) for name, part in parts.items()}

    training.run(loss, lambda averaged: score(averaged, unheard, first_seed=1, num_batches=6))  # type: ignore[arg-type]


def _shape(step: int, passed: float) -> tuple[int, int]:
    """Lessons and their seconds: short ones, later also some as long as the way to the reset."""
    if passed < 0.4:
        return 12, 6
    return (4, 28) if step % 8 == 7 else (10, 9)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=ANY)
