"""Streams and clips have the official mel frames, in every recorded chunking."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model_shards.mel import (
    HALF_WINDOW,
    HOP,
    N_FFT,
    N_MELS,
    RATE_HZ,
    Clamp,
    MelSettings,
    Samples,
    StreamingMel,
    mel_filters,
    num_frames,
    offline_mel,
)
from tests.support.golden import cases, close, read_json, read_tensors

JSON, TENSORS = "mel.json", "mel.safetensors"
SIGNAL = "sigA"
LEAK_HEAD_SAMPLES, LEAK_SILENCE_SAMPLES = 12000, 8000  # as the folder's README tells; no file repeats it
NEVER = 1 << 40
# The official README's, for another transform than its own: on a CPU with other vector units, the same library's is one
# (measured with AVX-512: 8e-6, where the recording machine had 1e-6).
MEL_ATOL = 2e-5


@dataclass(frozen=True)
class Step:
    """What came out for one piece, and where the stream was before and after it."""

    frames: Tensor
    core_start: int
    core_end: int
    base_frame: int
    num_buffered: int


@dataclass(frozen=True)
class Run:
    steps: list[Step]
    first_chunk_samples: int
    flushed: Tensor


def table() -> dict[str, Any]:
    return read_json(JSON)


def streams() -> list[str]:
    return [name for name, recorded in table().items() if "infos" in recorded]


def clips() -> list[str]:
    """Offline recordings: of one clip (`n_samples`) or of several (`slices`)."""
    return [name for name, recorded in table().items() if "lens" in recorded]


def leaks() -> list[str]:
    return [name for name in table() if f"{name}_after_stream.mel" in read_tensors(TENSORS)]


def signal(num_samples: int) -> Samples:
    """The recorded signal, repeated as often as needed."""
    return np.resize(read_tensors(TENSORS)[SIGNAL].numpy(), num_samples)


def settings_of(config: dict[str, Any]) -> MelSettings:
    """The settings that a recorded config describes."""
    assert (config["sample_rate"], config["n_fft"], config["hop_length"]) == (RATE_HZ, N_FFT, HOP)
    trigger, stride = (int(config[key] * RATE_HZ) for key in ("trigger_seconds", "slide_seconds"))
    return MelSettings(
        chunk_samples=config["chunk_ms"] * RATE_HZ // 1000,
        first_chunk_samples=config["first_chunk_ms"] * RATE_HZ // 1000,
        redundancy_frames=config["cnn_redundancy_frames"],
        slide_trigger_samples=trigger if config["enable_sliding_window"] else NEVER,
        slide_stride_samples=stride,
    )


def is_last(info: dict[str, Any], redundancy: int) -> bool:
    """Whether a piece was told to be the last: its frames came out although their right side wasn't stable."""
    return info["emitted_frames"] > 0 and info["stable_T_global"] < info["core_end"] + redundancy


@functools.cache
def run(name: str) -> Run:
    config, infos = table()[name]["config"], table()[name]["infos"]
    mel = StreamingMel(settings_of(config))
    first_chunk_samples = mel.chunk_size()
    ends = list(itertools.accumulate(info["n_samples_in"] for info in infos))
    sound = signal(ends[-1])
    steps = []
    for info, end in zip(infos, ends, strict=True):
        start = mel.snapshot().core_end
        last = is_last(info, config["cnn_redundancy_frames"])
        chunks = mel.process(sound[end - info["n_samples_in"] : end], last=last)
        after = mel.snapshot()
        steps.append(Step(joined(chunks), start, after.core_end, after.base_frame, len(after.buffer)))
    return Run(steps, first_chunk_samples, joined(mel.flush()))


def joined(chunks: list[Any]) -> Tensor:
    return torch.cat([torch.zeros(N_MELS, 0), *(chunk.frames for chunk in chunks)], dim=1)


@cases(JSON, (f"{name}.{index}" for name in streams() for index in range(len(table()[name]["infos"]))))
def test_a_piece_of_a_stream_gives_the_official_frames(case: str) -> None:
    name, index = case.rsplit(".", 1)
    recorded, info, step = table()[name], table()[name]["infos"][int(index)], run(name).steps[int(index)]
    chunk_frames = recorded["config"]["chunk_ms"] * RATE_HZ // 1000 // HOP

    assert step.frames.shape == (N_MELS, info["emitted_frames"])
    assert step.num_buffered == info["buffer_len_samples"]
    assert (step.base_frame, step.base_frame * HOP) == (info["base_T"], info["left_samples_dropped"])
    assert (step.core_start, step.core_start + chunk_frames) == (info["core_start"], info["core_end"])
    assert step.core_end == info["core_end" if info["emitted_frames"] else "core_start"]
    assert num_frames(step.num_buffered) == info["T_full"]
    stable = sum(HOP * frame + HALF_WINDOW <= step.num_buffered for frame in range(info["T_full"]))
    assert (stable, step.base_frame + stable) == (info["stable_T"], info["stable_T_global"])
    if info.get("saved"):
        close(step.frames, read_tensors(TENSORS)[f"{name}.mel.{index}"], rtol=0, atol=MEL_ATOL)


@cases(JSON, (f"{name}.config" for name in streams()))
def test_a_stream_is_cut_by_its_settings(case: str) -> None:
    name = case.removesuffix(".config")
    recorded = table()[name]
    assert run(name).first_chunk_samples * 1000 / RATE_HZ == recorded["config"]["effective_first_chunk_ms"]
    assert [info["chunk_number"] for info in recorded["infos"]] == list(range(1, len(run(name).steps) + 1))


@cases(JSON, (f"{name}.flush" for name in streams() if f"{name}.flush" in read_tensors(TENSORS)))
def test_the_end_of_a_stream_gives_the_official_frames(case: str) -> None:
    close(run(case.removesuffix(".flush")).flushed, read_tensors(TENSORS)[case], rtol=0, atol=MEL_ATOL)


@cases(JSON, clips())
def test_a_clip_has_the_official_frames(case: str) -> None:
    recorded, expected = table()[case], read_tensors(TENSORS)[f"{case}.mel"]
    slices = recorded.get("slices", [[0, recorded.get("n_samples")]])

    mel, lens = offline_mel([signal(stop)[start:] for start, stop in slices])

    assert lens == list(itertools.chain.from_iterable(recorded["lens"]))
    close(mel, expected if expected.dim() == 3 else expected[None], rtol=0, atol=MEL_ATOL)


@cases(JSON, (f"{name}_{when}" for name in leaks() for when in ("fresh", "after_stream")))
def test_the_clamp_that_a_stream_leaves_behind_is_an_argument(case: str) -> None:
    clamp = Clamp.FIXED if case.endswith("after_stream") else Clamp.DYNAMIC
    mel, _ = offline_mel([leak_clip()], clamp)
    close(mel[0], read_tensors(TENSORS)[f"{case}.mel"], rtol=0, atol=MEL_ATOL)


@cases(JSON, leaks())
def test_the_two_clamps_differ_as_much_as_officially(case: str) -> None:
    fixed, dynamic = (offline_mel([leak_clip()], clamp)[0] for clamp in (Clamp.FIXED, Clamp.DYNAMIC))
    assert len(leak_clip()) == table()[case]["n_samples"]
    assert float((fixed - dynamic).abs().max()) == pytest.approx(table()[case]["max_abs_diff"], abs=2e-5)


def leak_clip() -> Samples:
    sound, silence = signal(2 * LEAK_HEAD_SAMPLES), np.zeros(LEAK_SILENCE_SAMPLES, np.float32)
    return np.concatenate([sound[:LEAK_HEAD_SAMPLES], silence, sound[LEAK_HEAD_SAMPLES:]])


@cases(TENSORS, ["mel_filters"])
def test_the_filters_are_the_official_ones(case: str) -> None:
    assert torch.equal(mel_filters(), read_tensors(TENSORS)[case])
