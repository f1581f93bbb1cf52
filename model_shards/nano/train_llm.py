"""Stage "llm": teaches nano when to speak and what to say.

Rule: what is scored is nano set free (`rehearsal`), never what it would say after a perfect past.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_shards.duplex import MAX_TEXT_TOKENS
from model_shards.llm import LanguageModel
from model_shards.nano import sizes
from model_shards.nano.lessons import CHOICES, FLAGS, SEEN, Lesson, Senses, teach
from model_shards.nano.phrases import SCENE_EVENTS
from model_shards.nano.rehearsal import rehearse
from model_shards.nano.school import OWN_MISTAKES_FROM, Encoders, School
from model_shards.nano.score import Score, Utterance, score, summary
from model_shards.nano.sequences import NO_TARGET, Batch, collate, hidden_states, prompt_ids
from model_shards.nano.train_vision import UNKNOWN
from model_shards.nano.training import Schedule, Training
from model_shards.nano.truth import truth_of
from model_shards.nano.vocabulary import build_tokenizer
from model_shards.nano.world import NS_PER_S, UNSEEN, Activity, Episode, plan_episode
from model_shards.tokenizer import Tokenizer

HINT_WEIGHT: Final = 0.5
LAST_HINT_WEIGHT: Final = 0.3  # once nano learns from its own mistakes
EARLY_LAYERS: Final = 3  # of 6
NUM_AWAITED: Final = 3
HEARD_AFTER_NS: Final = 340_000_000  # a unit's first word, after its window's end: playout delay and lead-in
MUON_SCALE: Final = 3.0
LOOK_EVERY: Final = 50  # steps
FROZEN_FROM: Final = 0.5  # of the time


class Behaving(nn.Module):
    """The language model, and heads which read at each decision what is there to know. They are thrown away."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        config = sizes.llm_config(vocab_size)
        self.llm = LanguageModel(config)
        self.heads = nn.Linear(config.hidden_size, sum(_HEAD_SIZES))
        self.early_heads = nn.Linear(config.hidden_size, sum(CHOICES))
        _initialise(self.llm)

    def hints(self, hidden: Tensor) -> list[Tensor]:
        """hidden [units, dim] to the logits of each of the CHOICES, and of all FLAGS."""
        return list(self.heads(hidden).float().split(_HEAD_SIZES, dim=1))

    def early_hints(self, hidden: Tensor) -> list[Tensor]:
        """The same of the CHOICES, from hidden states after EARLY_LAYERS.

        A later window attends to what is known in the layers below its own; so what is to be compared must be known
        early.
        """
        scaled = F.rms_norm(hidden.float(), hidden.shape[-1:])
        return list(self.early_heads(scaled).float().split(list(CHOICES), dim=1))


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


# Learning


def loss_of(model: Behaving, batch: Batch, hints: Tensor, weight: float) -> tuple[Tensor, dict[str, float]]:
    """hints: [units, NUM_HINTS] of all units of the batch, in the order of its decisions."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden, early = hidden_states(model.llm, batch, EARLY_LAYERS)
        learnt = batch.targets != NO_TARGET
        logits = model.llm.logits(hidden[learnt]).float()
        places = batch.decisions[:, 0], batch.decisions[:, 1]
        known, known_early = model.hints(hidden[places]), model.early_hints(early[places])
    targets = batch.targets[learnt]
    words = F.cross_entropy(logits, targets)
    *choices, flags = known
    true = F.binary_cross_entropy_with_logits(flags, hints[:, len(CHOICES) :].float()) * len(FLAGS)
    hinted = _choice_loss(choices, hints) + _choice_loss(known_early, hints) + 2 * true
    with torch.no_grad():
        right = (logits.argmax(-1) == targets).float().mean()
        happened = hints[:, len(CHOICES) : len(CHOICES) + len(SCENE_EVENTS)].bool()
        said = flags[:, : len(SCENE_EVENTS)] > 0
        seen = said[happened].float().mean() if happened.any() else torch.tensor(0.0)
        whom, whose = (table[:, len(SCENE_EVENTS) : -NUM_AWAITED] for table in (flags, hints[:, len(CHOICES) :]))
        met = (whom > 0)[whose.bool()].float().mean() if whose.any() else torch.tensor(0.0)
    measures = {"words": words, "hints": hinted, "flags": true, "right": right, "events": seen, "whom": met}
    return words + weight * hinted, {name: float(value.detach()) for name, value in measures.items()}


def _choice_loss(known: Sequence[Tensor], hints: Tensor) -> Tensor:
    losses = [F.cross_entropy(logits, hints[:, i], ignore_index=UNKNOWN) for i, logits in enumerate(known)]
    return 3 * torch.stack(losses[: len(SEEN)]).nanmean() + torch.stack(losses[len(SEEN) :]).sum()


# Set free


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


def train(folder: Path, minutes: float) -> None:
    """Teach in `folder`, with the eyes and ears of the folders beside it, or go on where it stands there."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = Behaving(len(tokenizer))
    training = Training(
        folder, model, Schedule(minutes=minutes, rate=1.2e-3, constant=0.8, average=0.997, eval_every_minutes=6.0)
    )
    prompt = prompt_ids(tokenizer)
    seed = 1000 * training.step
    encoders = Encoders(folder.parent)
    school = School(folder.parent, folder, seed)
    lessons = exam(encoders.senses(unheard=True, seed=UNSEEN), tokenizer, 40, 24, UNSEEN)

    def loss(step: int, passed: float) -> tuple[Tensor, Mapping[str, float]]:
        nonlocal lessons
        if step % LOOK_EVERY == 0 and passed < FROZEN_FROM and encoders.have_changed():
            school.refresh()
            lessons = exam(encoders.senses(unheard=True, seed=UNSEEN), tokenizer, 40, 24, UNSEEN)
        taken = school.lessons(passed)
        batch = collate([lesson.units() for lesson in taken], prompt, tokenizer, sizes.EMBED_DIM)
        hints = torch.cat([lesson.hints for lesson in taken])
        return loss_of(model, batch, hints, HINT_WEIGHT if passed <= OWN_MISTAKES_FROM else LAST_HINT_WEIGHT)

    def evaluate(averaged: nn.Module) -> Mapping[str, float]:
        assert isinstance(averaged, Behaving)
        scores = summary([judge(averaged.llm, tokenizer, lessons)])
        return {name: float(value) for name, value in scores.items() if isinstance(value, int | float)}

    try:
        training.run(loss, evaluate)
    finally:
        school.close()
