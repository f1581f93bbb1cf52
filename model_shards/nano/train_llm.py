"""Stage "llm": teaches nano when to speak and what to say.

Rule: what is scored is nano set free (`rehearsal`), never what it would say after a perfect past.

Lessons get longer, as sessions are: short ones in which nobody speaks, then everything, then minutes with little to
tell. In the last part nano also learns from its own mistakes: it is set free, and the oracle says at each unit what
should come after what nano really said.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_shards.duplex import MAX_TEXT_TOKENS, UnitOutput
from model_shards.llm import LanguageModel
from model_shards.nano import sizes
from model_shards.nano.lessons import CHOICES, FLAGS, Lesson, Senses, from_tokens, teach, to_tokens
from model_shards.nano.oracle import Oracle, Output
from model_shards.nano.phrases import SCENE_EVENTS
from model_shards.nano.rehearsal import rehearse
from model_shards.nano.score import Score, Utterance, score, summary
from model_shards.nano.sequences import NO_TARGET, Batch, Unit, collate, hidden_states, prompt_ids
from model_shards.nano.train_audio import Listener, train_bank, unheard_bank
from model_shards.nano.train_vision import ATTRIBUTES, UNKNOWN, Seeing
from model_shards.nano.training import Schedule, Training, load_averaged
from model_shards.nano.truth import truth_of
from model_shards.nano.vocabulary import build_tokenizer
from model_shards.nano.world import NS_PER_S, SIMPLE, UNSEEN, Activity, Episode, Mix, plan_episode
from model_shards.tokenizer import Tokenizer

TOKENS_PER_STEP: Final = 5000
TOKENS_PER_UNIT: Final = 33
POOL_UNITS: Final = 30_000  # embedded, 10 KB each
CLASSES_AHEAD: Final = 6  # steps whose lessons are being made
MOST_REPLAYED: Final = 1  # steps in a row without anything fresh
HINT_WEIGHT: Final = 0.5
MIN_SESSIONS: Final = 3
OWN_MISTAKES_FROM: Final = 0.7  # of the time; from then on hints count for a third
SLOW_LISTENER: Final = 0.08  # how often, in units
HEARD_AFTER_NS: Final = 340_000_000  # a unit's first word, after its window's end: playout delay and lead-in
MUON_SCALE: Final = 3.0
LOOK_EVERY: Final = 50  # steps
REFRESH_S: Final = 480.0
FROZEN_FROM: Final = 0.5  # of the time
PLAIN_MIX: Final = Mix()
TRYING: Final = Mix(rush=0.2, twin=0.05, standing=2.5)
"""More of what is hard: things that happen while others are told, and promises."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How lessons look. num_units: of a session. activities and mix: see `plan_episode`."""

    num_units: int
    activities: Mapping[Activity, float]
    mix: Mix = PLAIN_MIX

    @property
    def num_sessions(self) -> int:
        return num_sessions(self.num_units)


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


class Behaving(nn.Module):
    """The language model, and heads which read at each decision what is there to know. They are thrown away."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        config = sizes.llm_config(vocab_size)
        self.llm = LanguageModel(config)
        self.heads = nn.Linear(config.hidden_size, sum(_HEAD_SIZES))
        _initialise(self.llm)

    def hints(self, hidden: Tensor) -> list[Tensor]:
        """hidden [units, dim] to the logits of each of the CHOICES, and of all FLAGS."""
        return list(self.heads(hidden).float().split(_HEAD_SIZES, dim=1))


_HEAD_SIZES: Final = [*CHOICES, len(FLAGS)]


def _initialise(llm: LanguageModel) -> None:
    depth = llm.config.num_hidden_layers
    for name, parameter in llm.named_parameters():
        if parameter.ndim > 1:
            writes_back = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.5 if "embed_tokens" in name else parameter.shape[1] ** -0.5
            nn.init.normal_(parameter, std=std / (2 * depth) ** 0.5 if writes_back else std)
            if ".layers." in name:
                parameter.by_muon, parameter.rate_scale = True, MUON_SCALE  # type: ignore[attr-defined]


class School:
    """Lessons without end, made by a process beside this one, and kept in a pool so that each comes about twice."""

    def __init__(self, trainings: Path, first_seed: int) -> None:
        """trainings: see `Encoders`."""
        self._trainings, self._seed = trainings, first_seed
        self._rng = Random(first_seed)
        self._pool: dict[int, deque[Lesson]] = {}
        self._num_replayed = 0
        self._begin()

    def _begin(self) -> None:
        self._classes: deque[Future[bytes]] = deque()
        self._maker = ProcessPoolExecutor(1, get_context("spawn"), _open_eyes, (self._trainings, self._seed))

    def refresh(self) -> None:
        """Go on with the eyes and ears of now, and forget what the old ones saw and heard."""
        self.close()
        self._pool.clear()
        self._begin()

    def close(self) -> None:
        self._maker.shutdown(cancel_futures=True)

    def lessons(self, passed: float) -> list[Lesson]:
        """Sessions of equal length for one step: half of them fresh, or, when none are ready, none."""
        while len(self._classes) < CLASSES_AHEAD:
            plan = plan_at(passed, self._rng)
            num_fresh = (plan.num_sessions + 1) // 2
            self._classes.append(self._maker.submit(_make_lessons, self._seed, num_fresh, plan))
            self._seed += num_fresh
        if not self._classes[0].done() and self._num_replayed < MOST_REPLAYED and self._pool:
            self._num_replayed += 1
            pool = self._rng.choice(list(self._pool.values()))
            return self._rng.sample(pool, min(len(pool), num_sessions(len(pool[0].windows))))
        self._num_replayed = 0
        fresh: list[Lesson] = pickle.loads(self._classes.popleft().result())
        num_units = len(fresh[0].windows)
        pool = self._pool.setdefault(num_units, deque(maxlen=POOL_UNITS // num_units // 4))
        replayed = self._rng.sample(pool, min(len(pool), num_sessions(num_units) - len(fresh)))
        pool.extend(fresh)
        return [*fresh, *replayed]


_senses: Senses | None = None  # of the process that makes lessons


def _open_eyes(trainings: Path, seed: int) -> None:
    global _senses
    torch.set_num_threads(1)
    _senses = Encoders(trainings).senses(unheard=False, seed=seed)


def _make_lessons(first_seed: int, count: int, plan: Plan) -> bytes:
    """Pickled: tensors that come from another process as they are hold a file open, each."""
    assert _senses is not None
    return pickle.dumps([make_lesson(seed, plan, _senses) for seed in range(first_seed, first_seed + count)])


def make_lesson(seed: int, plan: Plan, senses: Senses) -> Lesson:
    """One lesson as planned."""
    activity = Random(seed).choices(list(plan.activities), list(plan.activities.values()))[0]
    episode = plan_episode(seed, plan.num_units * NS_PER_S, activity, senses.bank.duration_ns, plan.mix)
    return teach(episode, senses, build_tokenizer())


# Learning


def loss_of(model: Behaving, batch: Batch, hints: Tensor, weight: float) -> tuple[Tensor, dict[str, float]]:
    """hints: [units, NUM_HINTS] of all units of the batch, in the order of its decisions."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = hidden_states(model.llm, batch)
        learnt = batch.targets != NO_TARGET
        logits = model.llm.logits(hidden[learnt]).float()
        known = model.hints(hidden[batch.decisions[:, 0], batch.decisions[:, 1]])
    targets = batch.targets[learnt]
    words = F.cross_entropy(logits, targets)
    hinted = _hint_loss(known, hints)
    with torch.no_grad():
        right = float((logits.argmax(-1) == targets).float().mean())
        happened = hints[:, len(CHOICES) : len(CHOICES) + len(SCENE_EVENTS)].bool()
        said = known[-1][:, : len(SCENE_EVENTS)] > 0
        seen = said[happened].float().mean() if happened.any() else torch.tensor(0.0)
    numbers = {"words": float(words.detach()), "hints": float(hinted.detach()), "right": right, "events": float(seen)}
    return words + weight * hinted, numbers


def _hint_loss(known: Sequence[Tensor], hints: Tensor) -> Tensor:
    *choices, flags = known
    losses = [F.cross_entropy(logits, hints[:, i], ignore_index=UNKNOWN) for i, logits in enumerate(choices)]
    seen, heard = losses[: len(ATTRIBUTES)], losses[len(ATTRIBUTES) :]
    true = F.binary_cross_entropy_with_logits(flags, hints[:, len(CHOICES) :].float()) * len(FLAGS)
    return 3 * torch.stack(seen).nanmean() + 2 * true + torch.stack(heard).sum()


# Set free


@torch.inference_mode()
def own_words(model: LanguageModel, tokenizer: Tokenizer, lessons: Sequence[Lesson], rng: Random) -> list[list[Unit]]:
    """The lessons as nano lived them: what it said, and what it should have said after that.

    Now and then so little may be said in a unit as a slow listener allows.
    """
    oracles = [Oracle(max_tries=1) for _ in lessons]
    before: list[Output | None] = [None] * len(lessons)
    units: list[list[Unit]] = [[] for _ in lessons]

    def max_tokens(row: int, unit: int) -> int:
        return rng.randint(1, 4) if rng.random() < SLOW_LISTENER else MAX_TEXT_TOKENS

    outputs = rehearse(model, tokenizer, [lesson.embedded for lesson in lessons], max_tokens)
    for index, unit_outputs in enumerate(outputs):
        for row, output in enumerate(unit_outputs):
            lesson = lessons[row]
            label = oracles[row].step(lesson.windows[index], before[row])
            wanted = () if oracles[row].is_lost else to_tokens(label, tokenizer)
            said = _said(output, tokenizer)
            before[row] = from_tokens(output.is_listen, output.token_ids, output.end_of_turn, tokenizer)
            images, audio = lesson.embedded.images[index].float(), lesson.embedded.audio[index].float()
            units[row].append(Unit(images, audio, said, wanted))
    return units


def _said(output: UnitOutput, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a unit as they stand in the cache."""
    special = tokenizer.special
    if output.is_listen:
        return [special.listen]
    return [special.speak, *output.token_ids, special.chunk_eos]


@torch.inference_mode()
def judge(model: LanguageModel, tokenizer: Tokenizer, lessons: Sequence[Lesson]) -> Score:
    """Set nano free on lessons of equal length and hold what it says against the truth."""
    turns: list[list[Utterance]] = [[] for _ in lessons]
    open_words: list[list[tuple[int, str]] | None] = [None for _ in lessons]
    outputs = rehearse(model, tokenizer, [lesson.embedded for lesson in lessons], lambda row, unit: MAX_TEXT_TOKENS)
    for index, unit_outputs in enumerate(outputs):
        for row, output in enumerate(unit_outputs):
            words = open_words[row]
            if output.is_listen:
                continue
            words = [] if words is None or output.turn_start else words
            if output.text.strip():
                words.append((index, output.text.strip()))
            open_words[row] = words
            if output.end_of_turn or index == len(lessons[row].windows) - 1:
                turns[row] += _turn(words, index, ended=output.end_of_turn)
                open_words[row] = None
    judged = [score(truth_of(lesson.episode), said) for lesson, said in zip(lessons, turns, strict=True)]
    return sum(judged, Score())


def _turn(words: list[tuple[int, str]], last: int, *, ended: bool) -> Iterator[Utterance]:
    if words:
        yield Utterance(tuple(words), (words[0][0] + 1) * NS_PER_S + HEARD_AFTER_NS, last, ended)


def exam(senses: Senses, tokenizer: Tokenizer, num_units: int, count: int, first_seed: int) -> list[Lesson]:
    """Unseen episodes, heard from unheard voices: a quarter of them quiet, a quarter calm, the others busy."""
    kinds: tuple[Activity, ...] = ("busy", "quiet", "busy", "calm")
    episodes: list[Episode] = [
        plan_episode(first_seed + i, num_units * NS_PER_S, kinds[i % 4], senses.bank.duration_ns) for i in range(count)
    ]
    return [teach(episode, senses, tokenizer) for episode in episodes]


class Encoders:
    """The eyes and ears of the trainings "vision" and "audio", which may still go on."""

    def __init__(self, trainings: Path) -> None:
        self._vision, self._audio = trainings / "vision", trainings / "audio"
        self._loaded = 0.0

    def have_changed(self) -> bool:
        """Whether both trainings have saved anew, some time ago."""
        return min(self._saved_at(folder) for folder in (self._vision, self._audio)) > self._loaded + REFRESH_S

    def senses(self, *, unheard: bool, seed: int) -> Senses:
        """unheard: with voices that no training has."""
        self._loaded = max(self._saved_at(folder) for folder in (self._vision, self._audio))
        seeing, listening = load_averaged(self._vision, Seeing()), load_averaged(self._audio, Listener())
        assert isinstance(seeing, Seeing) and isinstance(listening, Listener)
        bank = unheard_bank() if unheard else train_bank(self._audio)
        return Senses(seeing.encoder, listening.encoder, bank, seed)

    @staticmethod
    def _saved_at(folder: Path) -> float:
        return (folder / "state.pt").stat().st_mtime


def train(folder: Path, minutes: float) -> None:
    """Teach in `folder`, with the eyes and ears of the folders beside it, or go on where it stands there."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = Behaving(len(tokenizer))
    training = Training(folder, model, Schedule(minutes=minutes, rate=1.2e-3, average=0.997, eval_every_minutes=6.0))
    prompt = prompt_ids(tokenizer)
    seed = 1000 * training.step
    encoders = Encoders(folder.parent)
    school = School(folder.parent, seed)
    lessons = exam(encoders.senses(unheard=True, seed=UNSEEN), tokenizer, 40, 24, UNSEEN)
    rng = Random(seed)

    def loss(step: int, passed: float) -> tuple[Tensor, Mapping[str, float]]:
        nonlocal lessons
        if step % LOOK_EVERY == 0 and passed < FROZEN_FROM and encoders.have_changed():
            school.refresh()
            lessons = exam(encoders.senses(unheard=True, seed=UNSEEN), tokenizer, 40, 24, UNSEEN)
        taken = school.lessons(passed)
        units = [lesson.units() for lesson in taken]
        if passed > OWN_MISTAKES_FROM and step % 2:
            units = own_words(training.averaged.llm, tokenizer, taken, rng)  # type: ignore[arg-type]
        batch = collate(units, prompt, tokenizer, sizes.EMBED_DIM)
        hints = torch.cat([lesson.hints for lesson in taken])
        return loss_of(model, batch, hints, HINT_WEIGHT if passed <= OWN_MISTAKES_FROM else HINT_WEIGHT / 3)

    def evaluate(averaged: nn.Module) -> Mapping[str, float]:
        assert isinstance(averaged, Behaving)
        told = summary([judge(averaged.llm, tokenizer, lessons)])
        return {name: float(value) for name, value in told.items() if isinstance(value, int | float)}

    try:
        training.run(loss, evaluate)
    finally:
        school.close()
