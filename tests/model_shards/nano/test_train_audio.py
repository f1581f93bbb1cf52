"""Training hears what a session hears."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch

from model_shards.audio import AudioEncoder, AudioState
from model_shards.mel import MelChunk, StreamingMel, log_mel, mel_filters
from model_shards.nano.clips import load_bank
from model_shards.nano.phrases import REQUEST_WORDING, REQUESTS, SOUNDS
from model_shards.nano.sizes import AUDIO
from model_shards.nano.sounds import NS_PER_S, RATE_HZ, Bank, Samples, Track
from model_shards.nano.train_audio import (
    ANY,
    BUSY,
    BY_THE_RULE,
    NOISE_ONLY,
    SECONDS_BEFORE_RESET,
    Classroom,
    Lesson,
    Listener,
    hear,
    mel_units,
    plan_lesson,
)


def school_bank() -> Bank:
    room, others = load_bank("room"), load_bank("evaluation")
    clips: Mapping[str, Sequence[Samples]] = {
        request: [room.clip(request, seed) for seed in (1, 2)] for request in REQUESTS
    }
    speech = [others.clip("how_many", 3)[: RATE_HZ // 2]]
    return Bank({**clips, "decoy": speech, "murmur": speech})


BANK = school_bank()


def sound_of(seed: int, num_seconds: int) -> Samples:
    lesson = plan_lesson(seed, num_seconds, BANK, BUSY)
    return Track(lesson, BANK).samples(0, lesson.duration_ns)


def streamed(samples: Samples) -> list[MelChunk]:
    stream = StreamingMel()
    return [chunk for second in samples.reshape(-1, RATE_HZ) for chunk in stream.push(second)]


def as_batch(samples: Samples) -> torch.Tensor:
    return torch.from_numpy(samples)[None]


def test_the_mel_of_a_session_from_its_start_is_that_of_the_stream() -> None:
    samples = sound_of(1, 28)
    units = mel_units(as_batch(samples), 0)[0]
    chunks = streamed(samples)
    torch.testing.assert_close(units[0, :, 2:], chunks[0].frames, rtol=0, atol=1e-4)
    for unit, chunk in zip(units[1:], chunks[1:], strict=True):
        torch.testing.assert_close(unit, chunk.frames, rtol=0, atol=1e-4)


def test_the_mel_of_a_later_part_is_that_of_the_stream_if_the_past_peak_is_known() -> None:
    samples = sound_of(2, 20)
    past = 8
    peak = log_mel(samples[: past * RATE_HZ], mel_filters()).max()
    units = mel_units(as_batch(samples[past * RATE_HZ :]), 1, peak[None])[0]
    for unit, chunk in zip(units, streamed(samples)[past + 1 :], strict=True):
        torch.testing.assert_close(unit, chunk.frames, rtol=0, atol=1e-3)


@torch.inference_mode()
def test_training_hears_what_the_streaming_encoder_hears_across_the_reset() -> None:
    torch.manual_seed(1)
    encoder, state = AudioEncoder(AUDIO).eval(), AudioState()
    chunks = streamed(sound_of(3, SECONDS_BEFORE_RESET + 3))
    expected = torch.stack([encoder.encode([(state, chunk)])[0] for chunk in chunks])
    units = torch.stack([torch.nn.functional.pad(chunk.frames, (2 - chunk.prefix_extra, 0)) for chunk in chunks])
    torch.testing.assert_close(hear(encoder, units[None], 0, starts=True)[0], expected, rtol=1e-4, atol=1e-5)
    after = hear(encoder, units[None, SECONDS_BEFORE_RESET:], 0, starts=False)[0]
    torch.testing.assert_close(after, expected[SECONDS_BEFORE_RESET:], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_a_lesson_that_begins_late_breaks_where_the_session_does() -> None:
    torch.manual_seed(2)
    encoder = AudioEncoder(AUDIO).eval()
    units = mel_units(as_batch(sound_of(4, 6)), 0)
    across = hear(encoder, units[:, 1:], SECONDS_BEFORE_RESET - 2, starts=False)
    torch.testing.assert_close(across[:, 2:], hear(encoder, units[:, 3:], 0, starts=False), rtol=1e-4, atol=1e-5)


def audible(lesson: Lesson, kinds: Sequence[str]) -> list[tuple[str, float, float]]:
    """(kind, start, end) in seconds of what a lesson has of some kinds; a sound's end is its start."""
    return [
        (cue.kind, cue.start_ns / NS_PER_S, (cue.start_ns + _duration_ns(cue.kind, cue.clip_seed)) / NS_PER_S)
        for cue in lesson.happenings
        if cue.kind in kinds
    ]


def _duration_ns(kind: str, clip_seed: int) -> int:
    return 0 if kind in SOUNDS else BANK.duration_ns(kind, clip_seed)


@pytest.mark.parametrize("seed", range(5))
def test_labels_stand_in_the_second_in_which_a_sound_begins_and_a_request_ends(seed: int) -> None:
    lesson = plan_lesson(seed, 60, BANK, BY_THE_RULE)
    sounds, requests = audible(lesson, SOUNDS), audible(lesson, REQUESTS)
    assert {int(start): SOUNDS.index(kind) + 1 for kind, start, _ in sounds} == {
        second: label for second, label in enumerate(lesson.sound_labels) if label
    }
    assert {int(end): REQUESTS.index(kind) + 1 for kind, _, end in requests} == {
        second: label for second, label in enumerate(lesson.request_labels) if label
    }
    assert all(0.05 <= start % 1 <= 0.45 for _, start, _ in sounds)
    assert all(0.349 <= end % 1 <= 0.801 for _, _, end in requests)


@pytest.mark.parametrize("seed", range(5))
def test_speech_overlaps_with_nothing(seed: int) -> None:
    heard = audible(plan_lesson(seed, 60, BANK, BUSY), (*SOUNDS, *REQUESTS, "decoy"))
    assert all(start >= end for (_, _, end), (_, start, _) in pairwise(heard))


def test_every_word_of_a_request_has_its_pieces() -> None:
    lesson = plan_lesson(3, 60, BANK, BY_THE_RULE)
    num_words = sum(
        len(REQUEST_WORDING[kind].split()) for kind in REQUESTS for cue in lesson.happenings if cue.kind == kind
    )
    labels = [label for label in lesson.piece_labels if label not in (ANY, 0)]
    assert len(lesson.piece_labels) == 600
    assert len(labels) > num_words > 0


def test_nothing_is_claimed_about_noise() -> None:
    lesson = plan_lesson(1, 30, BANK, NOISE_ONLY)
    assert not lesson.happenings
    assert not any((*lesson.sound_labels, *lesson.request_labels, *lesson.piece_labels))


def test_a_batch_has_as_many_labels_as_the_listener_has_answers() -> None:
    batch = Classroom(BANK, first_seed=3, num_noises=2).batch(2, 3)
    sound, request, piece = Listener()(batch.units, batch.phase, starts=batch.starts)
    assert sound.shape[:2] == batch.sound_labels.shape == (2, 3)
    assert request.shape[:2] == batch.request_labels.shape == (2, 3)
    assert piece.shape[:2] == batch.piece_labels.shape == (2, 30)
    assert np.isfinite(batch.units.numpy()).all()
