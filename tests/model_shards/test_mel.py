"""The mel front end, against the stock extractor, against the plain rule and against itself."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor

from model_shards.errors import ModelError
from model_shards.mel import (
    HOP,
    RATE_HZ,
    Clamp,
    MelChunk,
    MelSettings,
    Samples,
    StreamingMel,
    log_mel,
    mel_filters,
    offline_mel,
    scale_mel,
)
from tests.support import plain


def noise(num_samples: int, seed: int = 0) -> Samples:
    """A tone that grows over quiet noise, so that the loudest bin changes with the buffer."""
    rng = np.random.default_rng(seed)
    time = np.arange(num_samples) / RATE_HZ
    tone = np.sin(2 * np.pi * 440 * time) * np.sin(time) ** 2
    return (0.2 * tone + 0.001 * rng.standard_normal(num_samples)).astype(np.float32)


def same_chunks(got: list[MelChunk], expected: list[MelChunk]) -> bool:
    places = [(c.first_frame, c.prefix_extra, c.suffix_extra) for c in got]
    return places == [(c.first_frame, c.prefix_extra, c.suffix_extra) for c in expected] and all(
        torch.equal(a.frames, b.frames) for a, b in zip(got, expected, strict=True)
    )


def test_filters_are_the_stock_ones() -> None:
    stock = WhisperFeatureExtractor(feature_size=80).mel_filters
    torch.testing.assert_close(mel_filters(), torch.from_numpy(stock).float(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("num_samples", [400, 12345, 5 * RATE_HZ, 30 * RATE_HZ])
def test_a_clip_gives_the_stock_features(num_samples: int) -> None:
    extract = WhisperFeatureExtractor(feature_size=80)
    stock = extract(noise(num_samples), sampling_rate=RATE_HZ, return_tensors="pt").input_features

    mel, lens = offline_mel([noise(num_samples)])

    assert lens == [-(-num_samples // HOP)]
    torch.testing.assert_close(mel, stock[:, :, : lens[0]], rtol=0, atol=2e-5)


def test_without_a_bound_silence_is_at_the_floor() -> None:
    clip = np.concatenate([noise(8000), np.zeros(8000, np.float32)])
    expected = plain.whole_mel(np.pad(clip, (0, 29 * RATE_HZ)), dynamic=False)[:, :100]
    torch.testing.assert_close(offline_mel([clip], Clamp.FIXED)[0][0], expected, rtol=0, atol=2e-5)


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 2 * RATE_HZ), min_size=1, max_size=12),
    chunk_frames=st.integers(10, 120),
    redundancy=st.integers(0, 4),
    slides=st.booleans(),
    last=st.booleans(),
)
def test_any_pieces_give_the_frames_of_the_whole_buffer(
    sizes: list[int], chunk_frames: int, redundancy: int, slides: bool, last: bool
) -> None:
    pieces = np.split(noise(sum(sizes)), np.cumsum(sizes)[:-1])
    slide = (4 * RATE_HZ, RATE_HZ) if slides else (1 << 40, RATE_HZ)
    stream = StreamingMel(MelSettings(chunk_frames * HOP, chunk_frames * HOP, redundancy, *slide))
    rule = plain.StreamRule(chunk_frames, redundancy, slide if slides else None)

    for index, (frames, info) in enumerate(plain.stream_mel(pieces, rule, last)):
        chunks = stream.process(pieces[index], last=last and index == len(pieces) - 1)
        got = torch.cat([torch.zeros(80, 0), *(chunk.frames for chunk in chunks)], dim=1)
        torch.testing.assert_close(got, frames, rtol=0, atol=2e-5)
        assert stream.snapshot().base_frame == info["base_T"]


def test_a_session_gets_102_frames_then_104() -> None:
    mel = StreamingMel()
    chunks = [chunk for second in np.split(noise(4 * RATE_HZ), 4) for chunk in mel.push(second)]
    assert [chunk.frames.shape for chunk in chunks] == [(80, 102), (80, 104), (80, 104), (80, 104)]
    assert [chunk.first_frame for chunk in chunks] == [0, 98, 198, 298]
    assert [(chunk.prefix_extra, chunk.suffix_extra) for chunk in chunks] == [(0, 2), (2, 2), (2, 2), (2, 2)]


def test_the_first_second_is_filled_up_on_its_left_and_80_samples_stay() -> None:
    mel = StreamingMel()
    mel.push(noise(RATE_HZ))
    assert np.array_equal(mel.snapshot().buffer[:560], np.zeros(560))
    assert np.array_equal(mel.snapshot().buffer[560:], noise(RATE_HZ)[:-80])
    assert len(mel.snapshot().pending) == 80


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 7 * RATE_HZ), max_size=8))
def test_how_the_rest_of_a_stream_is_cut_does_not_matter(cuts: list[int]) -> None:
    sound = noise(8 * RATE_HZ)
    whole, cut = StreamingMel(), StreamingMel()
    expected = whole.push(sound[:RATE_HZ]) + whole.push(sound[RATE_HZ:])
    got = cut.push(sound[:RATE_HZ])
    for piece in np.split(sound[RATE_HZ:], sorted(cuts)):
        got += cut.push(piece)
    assert same_chunks(got, expected)


def test_a_client_that_sends_too_much_falls_behind_only_if_asked() -> None:
    slow, fast = StreamingMel(), StreamingMel()
    assert len(slow.push(noise(3 * RATE_HZ), max_chunks=1)) == 1
    assert len(fast.push(noise(3 * RATE_HZ))) == 2
    assert same_chunks(slow.push(noise(0), max_chunks=1), [])
    assert len(slow.snapshot().pending) == 3 * RATE_HZ - 16480


def test_too_little_waits_for_more() -> None:
    mel = StreamingMel()
    mel.push(noise(RATE_HZ))
    assert mel.push(noise(7000)) == []
    assert len(mel.push(noise(9000))) == 1


def test_cached_frames_equal_the_mel_of_the_whole_buffer() -> None:
    mel, sound = StreamingMel(), noise(45 * RATE_HZ, seed=1)
    edge = 10 * RATE_HZ - 560  # where the buffer starts after it slid
    sound[edge : edge + 150] *= 40  # a click, so that the reflected frames are the loudest
    for second in np.split(sound, 45):
        chunk = mel.push(second)[-1]
        buffer, base = mel.snapshot().buffer, mel.snapshot().base_frame
        raw = log_mel(buffer, mel_filters())
        full = scale_mel(raw, float(raw.max()) if len(buffer) >= 5 * RATE_HZ else None)
        start = chunk.first_frame - base
        expected = full[:, start : start + chunk.frames.shape[1]]
        torch.testing.assert_close(chunk.frames, expected, rtol=0, atol=1e-6)


def test_memory_is_bounded() -> None:
    mel = StreamingMel()
    sizes = []
    for second in np.split(noise(65 * RATE_HZ), 65):
        mel.push(second)
        state = mel.snapshot()
        sizes.append(state.buffer.nbytes + state.pending.nbytes + state.peaks.nbytes)
    assert max(sizes) < 2_000_000


def test_a_restored_stream_goes_on_with_the_same_frames() -> None:
    first, second = StreamingMel(), StreamingMel()
    for part in np.split(noise(33 * RATE_HZ), 33):
        first.push(part)
    second.restore(first.snapshot())
    more = noise(RATE_HZ, seed=7)
    assert same_chunks(second.push(more), first.push(more))


def test_a_snapshot_does_not_change_afterwards() -> None:
    mel = StreamingMel()
    mel.push(noise(RATE_HZ))
    before = mel.snapshot()
    mel.push(noise(RATE_HZ))
    assert (len(before.buffer), before.core_end) == (16480, 100)


def test_flush_gives_the_rest_of_everything_that_was_pushed() -> None:
    mel = StreamingMel()
    mel.push(noise(RATE_HZ))
    mel.push(noise(5000))
    (tail,) = mel.flush()
    assert (tail.first_frame, tail.frames.shape[1]) == (100, (560 + RATE_HZ + 5000) // HOP - 100)
    assert mel.flush() == []


def test_an_empty_stream_has_nothing_to_flush() -> None:
    assert StreamingMel().flush() == []


def test_a_clip_longer_than_30_s_becomes_pieces() -> None:
    mel, lens = offline_mel([noise(31 * RATE_HZ)])
    assert (mel.shape, lens) == ((2, 80, 3000), [3000, 100])
    assert torch.equal(mel[1, :, 100:], torch.zeros(80, 2900))


@pytest.mark.parametrize("samples", [np.zeros((2, 400), np.float32), np.zeros(400), np.full(400, np.nan, np.float32)])
def test_what_is_no_sound_is_refused(samples: Samples) -> None:
    with pytest.raises(ModelError, match="mel: "):
        StreamingMel().push(samples)


def test_a_stride_that_leaves_no_buffer_is_refused() -> None:
    with pytest.raises(ModelError, match="stride"):
        MelSettings(slide_trigger_samples=10 * RATE_HZ)
