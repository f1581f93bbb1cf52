"""The mel front end, against the numbers of the official extractor and against itself."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

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

PLACES = [Path(__file__).parents[up] / "shared" / "golden" for up in (2, 3)]
GOLDEN = Path(os.environ.get("OMNI_GOLDEN") or next((place for place in PLACES if place.is_dir()), PLACES[0]))
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden data; OMNI_GOLDEN names its folder")

STREAMS = ["duplex", "noredund", "half", "c100", "ragged", "last", "slow_start", "long"]


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(GOLDEN / "mel.safetensors")


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    return json.loads((GOLDEN / "mel.json").read_text(encoding="utf-8"))


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


@golden
def test_filters_are_those_of_whisper(tensors: dict[str, Tensor]) -> None:
    assert torch.equal(mel_filters(), tensors["mel_filters"])


@golden
@pytest.mark.parametrize("name", STREAMS)
def test_streaming_gives_the_official_frames(name: str, tensors: dict[str, Tensor], cases: dict[str, Any]) -> None:
    config, infos = cases[name]["config"], cases[name]["infos"]
    sound = np.tile(tensors["sigA"].numpy(), 5 if name == "long" else 1)
    chosen = MelSettings(config["chunk_ms"] * 16, config["first_chunk_ms"] * 16, config["cnn_redundancy_frames"])
    mel, start = StreamingMel(chosen), 0
    for index, info in enumerate(infos):
        end = start + info["n_samples_in"]
        chunks = mel.process(sound[start:end], last=name == "last" and index == len(infos) - 1)
        start = end
        frames = chunks[0].frames if chunks else torch.zeros(80, 0)
        assert frames.shape[1] == info["emitted_frames"]
        assert mel.snapshot().base_frame == info["base_T"]
        assert len(mel.snapshot().buffer) == info["buffer_len_samples"]
        torch.testing.assert_close(frames, tensors.get(f"{name}.mel.{index}", frames), rtol=0, atol=1e-6)
    if f"{name}.flush" in tensors:
        torch.testing.assert_close(mel.flush()[0].frames, tensors[f"{name}.flush"], rtol=0, atol=1e-6)


@golden
@pytest.mark.parametrize("name", ["off_8s", "off_3p333s", "off_400samples"])
def test_a_clip_gives_the_official_frames(name: str, tensors: dict[str, Tensor], cases: dict[str, Any]) -> None:
    mel, lens = offline_mel([tensors["sigA"].numpy()[: cases[name]["n_samples"]]])
    assert [lens] == cases[name]["lens"]
    torch.testing.assert_close(mel[0], tensors[f"{name}.mel"], rtol=0, atol=1e-6)


@golden
def test_clips_of_unequal_length_are_padded_with_zeros(tensors: dict[str, Tensor], cases: dict[str, Any]) -> None:
    mel, lens = offline_mel([tensors["sigA"].numpy()[a:b] for a, b in cases["off_batch"]["slices"]])
    assert [lens] == cases["off_batch"]["lens"]
    torch.testing.assert_close(mel, tensors["off_batch.mel"], rtol=0, atol=1e-6)


@golden
@pytest.mark.parametrize(("clamp", "name"), [(Clamp.DYNAMIC, "leak_fresh"), (Clamp.FIXED, "leak_after_stream")])
def test_the_clamp_left_by_an_earlier_stream_is_an_argument(
    clamp: Clamp, name: str, tensors: dict[str, Tensor]
) -> None:
    sound = tensors["sigA"].numpy()
    clip = np.concatenate([sound[:12000], np.zeros(8000, dtype=np.float32), sound[12000:24000]])
    torch.testing.assert_close(offline_mel([clip], clamp)[0][0], tensors[f"{name}.mel"], rtol=0, atol=1e-6)


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
