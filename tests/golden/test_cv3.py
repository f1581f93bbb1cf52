"""The causal vocoder of minicpmo-utils 1.0.7 gives the official numbers, call by call; alone and in any company."""

from __future__ import annotations

import functools
import random
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from model_shards.config import HiftConfig
from model_shards.fold import fold
from model_shards.hift_causal import (
    F0_HISTORY,
    F0_LOOKAHEAD,
    CausalF0Predictor,
    CausalHiftCache,
    CausalHiftGenerator,
)
from tests.support.golden import cases, close, read_json, read_tensors
from tests.support.vocoder import HIFT_SIZES, below, frozen, hift_config, leaves, with_weights

JSON, TENSORS = "cv3.json", "cv3.safetensors"
WEIGHTS = "cv3.weight."
GENERATOR, PITCH = "the generator", "f0_predictor"


class TableNoise(CausalHiftGenerator):
    """Reads noise from the recorded table, as the official code does: each turn from its start on.

    A session is known by the seed of its generator.
    """

    table: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_read: dict[int, int] = {}
        self.largest_batch = 0

    def draw_noise(self, generator: torch.Generator, num_frames: int) -> Tensor:
        session, num_samples = generator.initial_seed(), num_frames * self.hop
        start = self.num_read.get(session, 0)
        self.num_read[session] = start + num_samples
        return self.table[torch.arange(start, start + num_samples) % self.table.shape[0]]


@dataclass
class Session:
    """A recorded run, as far as it has been spoken."""

    run: str
    generator: torch.Generator
    cache: CausalHiftCache
    waves: list[Tensor] = field(default_factory=list)
    caches: list[CausalHiftCache] = field(default_factory=list)

    @property
    def row(self) -> dict[str, Any]:
        return rows_of(self.run)[len(self.waves)]

    @property
    def is_over(self) -> bool:
        return len(self.waves) == len(rows_of(self.run))

    def mel(self) -> Tensor:
        """(mels, frames) of the next call."""
        start = sum(row["frames"] for row in rows_of(self.run)[: len(self.waves)])
        return read_tensors(TENSORS)["cv3.mel"][0, :, start : start + self.row["frames"]]

    def batch_key(self) -> Hashable:
        return self.cache.batch_key, self.row["frames"], self.row["finalize"]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def config() -> HiftConfig:
    recorded = read_json(JSON)
    return hift_config(recorded["config"], recorded["f0_cond_channels"], causal=True)


def parts() -> list[str]:
    """Of what there are weights: a compact folder has those of the pitch only."""
    generator = any(name.startswith(f"{WEIGHTS}conv_pre.") for name in read_tensors(TENSORS))
    return [GENERATOR, PITCH] if generator else [PITCH]


@functools.cache
def pitch() -> CausalF0Predictor:
    return with_weights(CausalF0Predictor, config(), below(f"{WEIGHTS}{PITCH}.", read_tensors(TENSORS)))


@functools.cache
def sizes_only() -> CausalHiftGenerator:
    return CausalHiftGenerator(config())


@functools.cache
def hift() -> TableNoise:
    module = unfolded()
    (module.table,) = read_tensors(TENSORS)["cv3.noise_table"]
    fold(module)
    return module


def unfolded() -> TableNoise:
    return with_weights(TableNoise, config(), below(WEIGHTS, read_tensors(TENSORS)))


def rows_of(run: str) -> list[dict[str, Any]]:
    return [row for row in read_json(JSON)["rows"] if row["run"] == run]


def runs() -> list[str]:
    return list(dict.fromkeys(row["run"] for row in read_json(JSON)["rows"]))


def calls() -> list[str]:
    return [f"{run} {index}" for run in runs() for index in range(len(rows_of(run)))]


def open_session(run: str, number: int) -> Session:
    hift().num_read.pop(number, None)
    return Session(run, torch.Generator().manual_seed(number), hift().empty_cache())


def step(sessions: list[Session]) -> None:
    """Continue sessions of one `batch_key` by their next call."""
    mel, last = torch.stack([session.mel() for session in sessions]), sessions[0].row["finalize"]
    caches, generators = [session.cache for session in sessions], [session.generator for session in sessions]
    waves, new = hift().stream(mel, caches, generators, last)
    hift().largest_batch = max(hift().largest_batch, len(sessions))
    for session, wave, cache in zip(sessions, waves, new, strict=True):
        session.cache = cache
        session.waves.append(wave)
        session.caches.append(cache)


def step_all(sessions: list[Session]) -> None:
    """Continue sessions, together where their keys allow it."""
    groups: dict[Hashable, list[Session]] = {}
    for session in sessions:
        groups.setdefault(session.batch_key(), []).append(session)
    for group in groups.values():
        step(group)


@functools.cache
def alone(run: str) -> Session:
    session = open_session(run, number=0)
    with torch.inference_mode():
        while not session.is_over:
            step([session])
    return session


def stored(*names: str) -> list[str]:
    return [name for name in names if name in read_tensors(TENSORS)]


def sizes() -> dict[str, Any]:
    return leaves(read_json(JSON)["config"])


@cases(JSON, (f"config.{name}" for name in sizes()))
def test_a_size_is_the_official_one(case: str) -> None:
    name = case.removeprefix("config.")
    assert getattr(config(), HIFT_SIZES[name]) == frozen(sizes()[name])


@cases(JSON, (f"limits.{name}" for name in read_json(JSON)["limits"]))
def test_a_limit_of_the_bounded_stream_is_the_official_one(case: str) -> None:
    """How far a sample looks back and ahead is the model's; how much is synthesised at once is the official choice."""
    recorded, hift = read_json(JSON)["limits"], sizes_only()
    block, ahead = recorded["internal_chunk_frames"], hift.lookahead + 1
    mel, source = hift.num_history + hift.delay_frames, hift.num_history + ahead
    expected = {
        "f0_left_frames": F0_HISTORY,
        "f0_right_frames": F0_LOOKAHEAD,
        "decoder_history_frames": hift.num_history,
        "delay_frames": hift.delay_frames,
        "mel_cache_frames": mel,
        "source_cache_frames": source,
        "mel_buffer_frames": mel + block,
        "source_buffer_frames": source + block,
        "f0_input_frames": F0_HISTORY + block + F0_LOOKAHEAD,
        "decoder_input_frames": source + block,
        "cumsum_frames": block,
        "internal_chunk_frames": block,
        "phase_values": hift.config.nb_harmonics + 1,
    }
    name = case.removeprefix("limits.")
    assert recorded[name] == expected[name]


@cases(TENSORS, parts())
def test_the_weights_are_the_official_ones(case: str) -> None:
    official = below(f"{WEIGHTS}{PITCH}." if case == PITCH else WEIGHTS, read_tensors(TENSORS))
    state = (pitch() if case == PITCH else unfolded()).state_dict()
    assert state.keys() == official.keys()
    assert all(torch.equal(state[name], official[name]) for name in official)


@cases(TENSORS, ["cv3.f0_full"])
def test_f0_is_the_official_one(case: str) -> None:
    close(pitch()(read_tensors(TENSORS)["cv3.mel"], last=True), read_tensors(TENSORS)[case])


@cases(TENSORS, stored("cv3.decode_zero_source", "cv3.decode_zero_source_nofinal"))
def test_the_wave_of_a_silent_source_is_the_official_one(case: str) -> None:
    whole = read_tensors(TENSORS)["cv3.decode_zero_source"]
    mel = read_tensors(TENSORS)["cv3.mel"][..., : whole.shape[1] // hift().hop]
    last = not case.endswith("_nofinal")
    close(hift().decode(mel, torch.zeros_like(whole), last), read_tensors(TENSORS)[case], rtol=0)


@cases(TENSORS, stored("cv3.noise_table", "cv3.rand_ini"))
def test_the_oscillators_tables_are_such_as_ours(case: str) -> None:
    """Uniform, one column per harmonic. The initial phases reach no speech: the runs agree, and ours begin at zero."""
    table = read_tensors(TENSORS)[case]
    assert table.shape[-1] == hift().config.nb_harmonics + 1
    assert 0 <= table.min() <= table.max() < 1
    drawn = CausalHiftGenerator.draw_noise(hift(), torch.Generator().manual_seed(0), 4)
    assert drawn.shape == (4 * hift().hop, table.shape[-1])
    assert 0 <= drawn.min() <= drawn.max() < 1
    assert hift().empty_cache().phase.eq(0).all()


@cases(JSON, calls())
def test_a_call_is_spoken_as_officially(case: str) -> None:
    run, _, index = case.rpartition(" ")
    check_call(alone(run), int(index))


def check_call(session: Session, index: int) -> None:
    row, wave, cache = rows_of(session.run)[index], session.waves[index], session.caches[index]
    expected = read_tensors(TENSORS)[f"cv3.{session.run}.wav{index}"]
    assert expected.shape == (1, row["samples"])
    # Ours is as long as its mel: the turn's first call has silence in front, for what comes late.
    num_late = wave.shape[0] - row["samples"]
    assert num_late == (hift().delay_frames * hift().hop if index == 0 and not row["finalize"] else 0)
    assert wave[:num_late].eq(0).all()
    close(wave[None, num_late:], expected, rtol=0)
    assert {
        "mel": [1, *cache.mel.shape],
        "source": [1, 1, *cache.source.shape],
        "phase": [1, 1, *cache.phase.shape],
    } == row["cache"]
    source = f"cv3.{session.run}.source_cache{index}"
    if source in read_tensors(TENSORS):
        close(cache.source[None, None], read_tensors(TENSORS)[source], rtol=0)


@cases(JSON, (f"{run} in company, order {seed}" for seed in range(3) for run in runs()))
def test_a_run_is_spoken_the_same_in_any_company(case: str) -> None:
    seed = int(case.rpartition(" ")[2])
    finished, largest_batch = company(seed)
    ours = [session for session in finished if session.run == case.partition(" in company")[0]]
    assert ours and largest_batch > 1
    for session in ours:
        for index in range(len(session.waves)):
            check_call(session, index)


@functools.cache
def company(seed: int) -> tuple[list[Session], int]:
    """Four sessions of each run: half of them begin together, the others join later; the largest batch.

    They leave as they end, and are due in changing order, not all at each step.
    """
    order = random.Random(seed)
    sessions = [open_session(run, number) for number, run in enumerate(runs() * 4, start=1)]
    running, waiting = sessions[: len(sessions) // 2], sessions[len(sessions) // 2 :]
    finished: list[Session] = []
    hift().largest_batch = 0
    with torch.inference_mode():
        step_all(running)
        while waiting or running:
            finished += [session for session in running if session.is_over]
            running = [session for session in running if not session.is_over]
            running += [waiting.pop() for _ in range(min(len(waiting), order.randint(0, 3)))]
            step_all(order.sample(running, order.randint(min(1, len(running)), len(running))))
    return finished, hift().largest_batch
