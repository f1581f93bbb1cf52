"""The audio encoder gives the official numbers: streams, pieces of any size, clips; alone and in any company."""

from __future__ import annotations

import copy
import functools
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model_shards.audio import AudioEncoder, AudioState
from model_shards.checkpoint import load_shard
from model_shards.mel import MelChunk
from tests.support import golden
from tests.support.golden import cases, close, read_json, read_tensors

JSON, TENSORS = "audio.json", "audio.safetensors"
KINDS = {"chunk": "stream", "plain": "plain"}  # a row's key: the name of its tensors


@dataclass(frozen=True)
class Row:
    """One chunk of a session, and what the official code made of it."""

    entry: dict[str, Any]
    chunk: MelChunk
    hidden: Tensor
    embeds: Tensor


@dataclass(frozen=True)
class Step:
    """What we made of it."""

    hidden: Tensor
    embeds: Tensor
    past: int
    after: int


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@functools.cache
def encoder() -> AudioEncoder:
    return load_shard(golden.FOLDER, "audio")


@functools.cache
def rows(key: str) -> list[Row]:
    tensors, name = read_tensors(TENSORS), KINDS[key]
    return [
        Row(
            entry,
            chunk_of(entry),
            tensors[f"{name}.apm_last_hidden.{entry[key]}"],
            tensors[f"{name}.embeds.{entry[key]}"],
        )
        for entry in read_json(JSON)["rows"]
        if key in entry
    ]


def chunk_of(entry: dict[str, Any]) -> MelChunk:
    tensors = read_tensors(TENSORS)
    if "chunk" in entry:
        frames = tensors[f"stream.mel.{entry['chunk']}"]
        assert frames.shape[1] == entry["mel_frames"]
        return MelChunk(frames, 0, entry["prefix_extra_frames"], entry["suffix_extra_frames"])
    match = re.fullmatch(r"(\S+)\[:, :(\d+)\]", entry["mel"])
    assert match, f"audio.json: which frames are {entry['mel']!r}?"
    frames = tensors[match[1]][:, : int(match[2])]
    assert set(entry["kw"]) <= {"cnn_min_length"}
    # Officially silence behind the piece, whose frames are cut off after the convolutions.
    short = max(0, entry["kw"].get("cnn_min_length", 0) - frames.shape[1])
    return MelChunk(F.pad(frames, (0, short)), 0, 0, short // 2 * 2)


@functools.cache
def run(key: str) -> tuple[list[Step], AudioState]:
    """One session alone, chunk after chunk, and the state at its end."""
    state, steps = AudioState(), []
    for row in rows(key):
        past, before = state.num_frames, copy.deepcopy(state)
        (embeds,) = encoder().encode([(state, row.chunk)])
        hidden, (length,) = encoder().hidden([(before, row.chunk)])
        steps.append(Step(hidden[0, :length], embeds, past, state.num_frames))
    return steps, state


def row_ids(key: str) -> list[str]:
    entries = read_json(JSON)["rows"]
    return [f"{KINDS[key]}.{index}" for index in range(sum(key in row for row in entries))]


def names(pattern: str) -> list[str]:
    keys = list(read_tensors(TENSORS))
    return [key for key in keys if re.fullmatch(pattern, key)]


@cases(JSON, [*row_ids("chunk"), *row_ids("plain")])
def test_a_chunk_gives_the_official_embeddings(case: str) -> None:
    name, index = case.split(".")
    key = next(key for key, kind in KINDS.items() if kind == name)
    row, step = rows(key)[int(index)], run(key)[0][int(index)]

    assert (step.after, len(step.embeds)) == (row.entry["kv_after"], row.entry["n_tokens"])
    assert step.past == row.entry.get("past_before", step.past)
    close(step.hidden, row.hidden)
    close(step.embeds, row.embeds)


@cases(JSON, names(r"stream\.kv_final\.[kv]\d+"))
def test_the_cache_at_the_end_is_the_official_one(case: str) -> None:
    state = run("chunk")[1]
    assert state.kv is not None
    kind, layer = case.rsplit(".", 1)[1][0], int(re.findall(r"\d+", case)[-1])
    close(state.kv[layer, "kv".index(kind), None, :, : state.num_frames], read_tensors(TENSORS)[case])


# --- together with others ---


@dataclass
class Session:
    """A session of recorded chunks, and how far it has come."""

    rows: Sequence[Row]
    state: AudioState = field(default_factory=AudioState)
    num_done: int = 0

    @property
    def open(self) -> bool:
        return self.num_done < len(self.rows)


@cases(JSON, (f"company {seed}" for seed in range(10)))
def test_a_sessions_embeddings_do_not_depend_on_its_company(case: str) -> None:
    """At every step some sessions, in any order, bring their next chunk; others pause, are over, or haven't begun."""
    order = random.Random(int(case.removeprefix("company ")))
    sessions = [Session(rows(order.choice(list(KINDS)))) for _ in range(order.randint(2, 6))]
    while waiting := [session for session in sessions if session.open]:
        present = order.sample(waiting, order.randint(1, len(waiting)))
        together = encoder().encode([(session.state, session.rows[session.num_done].chunk) for session in present])
        for session, embeds in zip(present, together, strict=True):
            row = session.rows[session.num_done]
            session.num_done += 1
            assert session.state.num_frames == row.entry["kv_after"]
            close(embeds, row.embeds)


# --- whole clips ---


def chunk_lengths() -> list[str]:
    matches = (re.fullmatch(r"off\.chunk(.+)\.embeds\.\d+", name) for name in names(r"off\.chunk.+\.embeds\.\d+"))
    return sorted({match[1] for match in matches if match})


def clip_lens() -> list[int]:
    return list(itertools.chain.from_iterable(read_json(JSON)["off_lens"]))


def encode_clips(length: str, chosen: Sequence[int]) -> list[Tensor]:
    seconds = float(length)
    lens = [clip_lens()[row] for row in chosen]
    mel = read_tensors(TENSORS)["off.mel"][list(chosen)]
    return encoder().encode_offline(mel, lens, seconds if seconds > 0 else None)


@functools.cache
def encoded_clips(length: str) -> list[Tensor]:
    return encode_clips(length, range(len(clip_lens())))


@cases(JSON, (f"off.chunk{length}.embeds.{row}" for length in chunk_lengths() for row in range(len(clip_lens()))))
def test_a_clip_gives_the_official_embeddings(case: str) -> None:
    match = re.fullmatch(r"off\.chunk(.+)\.embeds\.(\d+)", case)
    assert match
    close(encoded_clips(match[1])[int(match[2])], read_tensors(TENSORS)[case])


@cases(JSON, names(r"off\.chunk.+\.apm_last_hidden"))
def test_a_clip_leaves_the_official_hidden_states(case: str) -> None:
    match = re.fullmatch(r"off\.chunk(.+)\.apm_last_hidden", case)
    assert match
    seen: list[Tensor] = []
    hook = encoder().apm.layer_norm.register_forward_hook(lambda module, args, out: seen.append(out))
    try:
        encode_clips(match[1], range(len(clip_lens())))
    finally:
        hook.remove()
    close(seen[0], read_tensors(TENSORS)[case])


@cases(JSON, (f"off.chunk{length} in order {seed}" for length in chunk_lengths() for seed in range(3)))
def test_the_order_of_clips_does_not_matter(case: str) -> None:
    length, seed = case.removeprefix("off.chunk").split(" in order ")
    order = list(range(len(clip_lens())))
    random.Random(int(seed)).shuffle(order)
    for row, embeds in zip(order, encode_clips(length, order), strict=True):
        close(embeds, read_tensors(TENSORS)[f"off.chunk{length}.embeds.{row}"])


@cases(JSON, (f"off.chunk{length} alone" for length in chunk_lengths()))
def test_without_the_official_padding_mask_a_clip_is_the_same_alone_and_in_a_batch(case: str) -> None:
    seconds = float(case.removeprefix("off.chunk").removesuffix(" alone"))
    chunk_length_s = seconds if seconds > 0 else None
    mel, lens = read_tensors(TENSORS)["off.mel"], clip_lens()

    together = encoder().encode_offline(mel, lens, chunk_length_s, hear_padding=False)

    for row, embeds in enumerate(together):
        own = mel[row : row + 1, :, : lens[row]]
        close(embeds, encoder().encode_offline(own, [lens[row]], chunk_length_s)[0])
