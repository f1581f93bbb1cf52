"""Lessons without end for the language model, made by a process beside its training.

Lessons get longer, as sessions are: short ones in which nobody speaks, then everything, then minutes with little to
tell. In the last part nano lives through them itself: it is set free, and learns what the oracle would have said after
what it really said.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Final

import torch

from model_shards.duplex import MAX_TEXT_TOKENS, UnitOutput
from model_shards.llm import LanguageModel
from model_shards.nano import sizes
from model_shards.nano.lessons import Lesson, Senses, from_tokens, teach, to_tokens
from model_shards.nano.oracle import Oracle, Output
from model_shards.nano.rehearsal import rehearse
from model_shards.nano.train_audio import Listener, train_bank, unheard_bank
from model_shards.nano.train_vision import Seeing
from model_shards.nano.training import load_averaged, load_averaged_tensors, saved_at
from model_shards.nano.vocabulary import build_tokenizer
from model_shards.nano.world import NS_PER_S, SIMPLE, Activity, Mix, plan_episode
from model_shards.tokenizer import Tokenizer

TOKENS_PER_STEP: Final = 5000
TOKENS_PER_UNIT: Final = 33
MIN_SESSIONS: Final = 3
POOL_UNITS: Final = 30_000  # embedded, 10 KB each
CLASSES_AHEAD: Final = 3  # that are being made; each is for two steps
MOST_REPLAYED: Final = 1  # steps in a row without anything fresh
OWN_MISTAKES_FROM: Final = 0.6  # of the time
SLOW_LISTENER: Final = 0.08  # in how many units less may be said than there is to say
REFRESH_S: Final = 480.0
PLAIN_MIX: Final = Mix()
TRYING: Final = Mix(request=0.5, rush=0.2, twin=0.05, standing=1.2, people=2.0)
"""More of what is hard: questions, things that happen while others are told, and which of the people it was."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How lessons look. num_units: of a session. activities and mix: see `plan_episode`."""

    num_units: int
    activities: Mapping[Activity, float]
    mix: Mix = PLAIN_MIX


def num_sessions(num_units: int) -> int:
    """How many sessions of this length make one step."""
    return max(MIN_SESSIONS, round(TOKENS_PER_STEP / TOKENS_PER_UNIT / num_units))


def plan_at(passed: float, rng: Random) -> Plan:
    """What lessons look like after this part of the time."""
    if passed < 0.1:
        return Plan(16, {"busy": 1.0}, SIMPLE)
    if passed < 0.55:
        return Plan(rng.choice((16, 20, 24, 40)), {"busy": 0.85, "calm": 0.1, "quiet": 0.05}, TRYING)
    return Plan(rng.choice((24, 40, 60)), {"busy": 0.6, "calm": 0.25, "quiet": 0.15}, TRYING)


def make_lesson(seed: int, plan: Plan, senses: Senses, tokenizer: Tokenizer) -> Lesson:
    """One lesson as planned."""
    activity = Random(seed).choices(list(plan.activities), list(plan.activities.values()))[0]
    episode = plan_episode(seed, plan.num_units * NS_PER_S, activity, senses.bank.duration_ns, plan.mix)
    return teach(episode, senses, tokenizer)


class School:
    """What the training asks: sessions of equal length for each step. Each comes about twice."""

    def __init__(self, trainings: Path, pupil: Path, first_seed: int) -> None:
        """trainings: see `Encoders`. pupil: the language model's training, whose weights of now are set free."""
        self._trainings, self._pupil, self._seed = trainings, pupil, first_seed
        self._rng = Random(first_seed)
        self._pool: dict[int, deque[Lesson]] = {}  # by length
        self._num_replayed = 0
        self._begin()

    def _begin(self) -> None:
        self._classes: deque[Future[bytes]] = deque()
        self._fresh: deque[Lesson] = deque()  # of one length
        self._maker = ProcessPoolExecutor(1, get_context("spawn"), _open, (self._trainings, self._pupil, self._seed))

    def refresh(self) -> None:
        """Go on with the eyes and ears of now, and forget what the old ones saw and heard."""
        self.close()
        self._pool.clear()
        self._begin()

    def close(self) -> None:
        self._maker.shutdown(cancel_futures=True)

    def lessons(self, passed: float) -> list[Lesson]:
        """For one step: half of them fresh; where none are ready, now and then none."""
        self._order(passed)
        if not self._fresh and not self._classes[0].done() and self._num_replayed < MOST_REPLAYED and self._pool:
            self._num_replayed += 1
            return self._replay(self._rng.choice(list(self._pool)), 0)
        self._num_replayed = 0
        if not self._fresh:
            self._fresh.extend(pickle.loads(self._classes.popleft().result()))
        num_units = len(self._fresh[0].windows)
        taken = [self._fresh.popleft() for _ in range(min(len(self._fresh), (num_sessions(num_units) + 1) // 2))]
        replayed = self._replay(num_units, len(taken))
        pool = self._pool.setdefault(num_units, deque(maxlen=POOL_UNITS // num_units // 4))
        pool.extend(replace(lesson, lived=None) for lesson in taken)  # the next time as the oracle says
        return [*taken, *replayed]

    def _order(self, passed: float) -> None:
        while len(self._classes) < CLASSES_AHEAD:
            plan = plan_at(passed, self._rng)
            count = num_sessions(plan.num_units)
            self._classes.append(self._maker.submit(_make, self._seed, count, plan, passed > OWN_MISTAKES_FROM))
            self._seed += count

    def _replay(self, num_units: int, num_taken: int) -> list[Lesson]:
        pool = self._pool.get(num_units, ())
        return self._rng.sample(list(pool), min(len(pool), num_sessions(num_units) - num_taken))


# The process that makes them


class _Maker:
    def __init__(self, trainings: Path, pupil: Path, seed: int) -> None:
        torch.set_num_threads(1)
        self._senses = Encoders(trainings).senses(unheard=False, seed=seed)
        self._tokenizer = build_tokenizer()
        self._pupil, self._loaded = pupil, 0.0
        self._model = LanguageModel(sizes.llm_config(len(self._tokenizer))).eval().requires_grad_(False)

    def make(self, first_seed: int, count: int, plan: Plan, is_lived: bool) -> list[Lesson]:
        made = [make_lesson(first_seed + k, plan, self._senses, self._tokenizer) for k in range(count)]
        if not is_lived:
            return made
        self._look_at_pupil()
        return live(self._model, self._tokenizer, made, Random(first_seed))

    def _look_at_pupil(self) -> None:
        if saved_at(self._pupil) > self._loaded:
            self._loaded = saved_at(self._pupil)
            tensors = load_averaged_tensors(self._pupil)
            own = {name.removeprefix("llm."): tensor for name, tensor in tensors.items() if name.startswith("llm.")}
            self._model.load_state_dict(own)


_maker: _Maker | None = None


def _open(trainings: Path, pupil: Path, seed: int) -> None:
    global _maker
    _maker = _Maker(trainings, pupil, seed)


def _make(first_seed: int, count: int, plan: Plan, is_lived: bool) -> bytes:
    """Pickled: tensors that come from another process as they are hold a file open, each."""
    assert _maker is not None
    return pickle.dumps(_maker.make(first_seed, count, plan, is_lived))


# Set free


@torch.inference_mode()
def live(model: LanguageModel, tokenizer: Tokenizer, lessons: Sequence[Lesson], rng: Random) -> list[Lesson]:
    """Lessons of equal length as nano lives them: what it says, and what it should have said after that.

    Now and then so little may be said in a unit as a slow listener allows.
    """
    oracles = [Oracle(max_tries=1) for _ in lessons]
    before: list[Output | None] = [None] * len(lessons)
    lived: list[list[tuple[tuple[int, ...], tuple[int, ...]]]] = [[] for _ in lessons]

    def max_tokens(row: int, unit: int) -> int:
        return rng.randint(1, 4) if rng.random() < SLOW_LISTENER else MAX_TEXT_TOKENS

    outputs = rehearse(model, tokenizer, [lesson.embedded for lesson in lessons], max_tokens)
    for index, unit_outputs in enumerate(outputs):
        for row, output in enumerate(unit_outputs):
            label = oracles[row].step(lessons[row].windows[index], before[row])
            expected = () if oracles[row].is_lost else to_tokens(label, tokenizer)
            lived[row].append((_said(output, tokenizer), expected))
            before[row] = from_tokens(output.is_listen, output.token_ids, output.end_of_turn, tokenizer)
    return [replace(lesson, lived=tuple(units)) for lesson, units in zip(lessons, lived, strict=True)]


def _said(output: UnitOutput, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens of a unit as they stand in the cache."""
    special = tokenizer.special
    if output.is_listen:
        return (special.listen,)
    return (special.speak, *output.token_ids, special.chunk_eos)


# Eyes and ears


class Encoders:
    """The eyes and ears of the trainings "vision" and "audio", which may still go on."""

    def __init__(self, trainings: Path) -> None:
        self._vision, self._audio = trainings / "vision", trainings / "audio"
        self._loaded = 0.0

    def have_changed(self) -> bool:
        """Whether both trainings have saved anew, some time ago."""
        return min(saved_at(folder) for folder in (self._vision, self._audio)) > self._loaded + REFRESH_S

    def senses(self, *, unheard: bool, seed: int) -> Senses:
        """unheard: with voices that no training has."""
        self._loaded = max(saved_at(folder) for folder in (self._vision, self._audio))
        seeing, listening = load_averaged(self._vision, Seeing()), load_averaged(self._audio, Listener())
        assert isinstance(seeing, Seeing) and isinstance(listening, Listener)
        bank = unheard_bank() if unheard else train_bank(self._audio)
        return Senses(seeing.encoder, listening.encoder, bank, seed)
