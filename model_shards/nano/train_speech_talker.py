"""Nano's talker: words, second by second, to speech codes.

Rule: `projector_semantic` gives exactly zero, so that how nano speaks does not depend on the language model's hidden
states; `projector_spk` is never used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_shards.flow import split_heads
from model_shards.nano.phrases import sentences
from model_shards.nano.speech_codes import load_codes
from model_shards.nano.speech_data import Utterance, corpus_beside
from model_shards.nano.speech_pacing import SpokenTurn, SpokenUnit, on_time, some_pacing, turn_of
from model_shards.nano.speech_sizes import talker_config
from model_shards.nano.training import Schedule, Training
from model_shards.nano.vocabulary import build_tokenizer, words_as_text
from model_shards.tokenizer import Tokenizer
from model_shards.tts import Backbone, CodeHead, Layer, Talker, rope, rotate

_BATCH: Final = 16
_REAL: Final = 0.75  # of the turns are sentences which nano really says
_NEIGHBOURS: Final = 200  # turns of similar length, from which a batch is drawn
_WRONG_CODES: Final = 0.08
_TABLE_STD: Final = 0.5
_NO_TARGET: Final = -100
_SEED: Final = 41


@dataclass(frozen=True, slots=True)
class Rows:
    """What one turn feeds, row by row. ids: of the text table or of the code table; targets: the next code."""

    ids: list[int]
    is_code: list[bool]
    targets: list[int]


class TurnRows:
    """How units become rows: [words] [audio begin] [codes], and <|turn_eos|> behind the last words."""

    def __init__(self, tokenizer: Tokenizer, talker: Talker) -> None:
        self._tokenizer = tokenizer
        self._begin, self._end_of_speech = talker.config.audio_bos_token_id, talker.eos

    def token_ids(self, unit: SpokenUnit, is_last: bool) -> list[int]:
        """What the talker is given in a unit."""
        return self._tokenizer.encode(words_as_text(list(unit.words))) + [self._tokenizer.special.turn_eos] * is_last

    def of(self, units: Sequence[SpokenUnit]) -> Rows:
        """After the 25 codes of a unit that is not the last, nothing is asked for."""
        rows = Rows([], [], [])
        for unit in units:
            is_last = unit is units[-1]
            text = [*self.token_ids(unit, is_last), self._begin]
            rows.ids.extend([*text, *unit.codes])
            rows.is_code.extend([False] * len(text) + [True] * len(unit.codes))
            end = self._end_of_speech if is_last else _NO_TARGET
            rows.targets.extend([_NO_TARGET] * (len(text) - 1) + [*unit.codes, end])
        return rows


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Turns side by side, filled up at their end: each [batch, rows]."""

    ids: Tensor
    is_code: Tensor
    targets: Tensor

    @classmethod
    def of(cls, turns: Sequence[Rows]) -> RowBatch:
        longest = max(len(turn.ids) for turn in turns)

        def filled(rows: Sequence[int], value: int) -> list[int]:
            return [*rows, *[value] * (longest - len(rows))]

        return cls(
            torch.tensor([filled(turn.ids, 0) for turn in turns]),
            torch.tensor([filled(turn.is_code, 0) for turn in turns]).bool(),
            torch.tensor([filled(turn.targets, _NO_TARGET) for turn in turns]),
        )


def new_talker(tokenizer: Tokenizer) -> Talker:
    torch.manual_seed(_SEED)
    talker = Talker(talker_config(tokenizer))
    for table in (talker.tts.emb_text, cast(nn.Embedding, talker.tts.emb_code[0])):
        nn.init.normal_(table.weight, std=_TABLE_STD)
    for projector in (talker.tts.projector_spk, talker.tts.projector_semantic):
        for parameter in projector.parameters():
            nn.init.zeros_(parameter).requires_grad_(False)
    return talker


def train(folder: Path, minutes: float) -> None:
    tokenizer = build_tokenizer()
    schedule = Schedule(minutes=minutes, rate=2e-3, final=0.02)
    training = Training(folder, new_talker(tokenizer), schedule)
    talker = training.module
    assert isinstance(talker, Talker)
    codes = load_codes(folder)
    drawn = _Draw(corpus_beside(folder).utterances, codes.corpus, codes.silence)
    rows = TurnRows(tokenizer, talker)
    tests = corpus_beside(folder, "test").utterances
    num_real = len(sentences())
    known, novel = (_fixed(part, codes.test, rows) for part in (tests[:num_real:5], tests[num_real::2]))

    def loss(step: int, passed: float) -> tuple[Tensor, Mapping[str, float]]:
        random = Random(step * 1000 + _SEED)
        batch = RowBatch.of([rows.of(units) for units in drawn.batch(random)])
        with torch.autocast("cpu", torch.bfloat16):
            return talker_loss(talker, batch, torch.Generator().manual_seed(step))

    def evaluate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, Talker)
        with torch.no_grad():
            scores = {name: talker_loss(module, part, None)[1] for name, part in (("known", known), ("novel", novel))}
        return {f"{name}_{key}": value for name, score in scores.items() for key, value in score.items()}

    training.run(loss, evaluate)


class _Draw:
    """Draws turns of similar length."""

    def __init__(self, utterances: Sequence[Utterance], codes: np.ndarray, silence: int) -> None:
        self._codes, self._silence = codes, silence
        real = frozenset(sentences())
        ordered = sorted(utterances, key=lambda utterance: utterance.num_codes)
        self._real = [utterance for utterance in ordered if " ".join(utterance.words) in real]
        self._all = ordered

    def batch(self, random: Random) -> list[list[SpokenUnit]]:
        pool = self._real if random.random() < _REAL else self._all
        begin = random.randrange(max(1, len(pool) - _NEIGHBOURS))
        chosen = random.choices(pool[begin : begin + _NEIGHBOURS], k=_BATCH)
        return [some_pacing(_turn(utterance, self._codes), self._silence, random) for utterance in chosen]


def _turn(utterance: Utterance, codes: np.ndarray) -> SpokenTurn:
    own = codes[utterance.first_code : utterance.first_code + utterance.num_codes]
    return turn_of(utterance.words, utterance.starts_s, [int(code) for code in own])


def _fixed(utterances: Sequence[Utterance], codes: np.ndarray, rows: TurnRows) -> RowBatch:
    return RowBatch.of([rows.of(on_time(_turn(utterance, codes))) for utterance in utterances])


def talker_loss(talker: Talker, batch: RowBatch, wrong: torch.Generator | None) -> tuple[Tensor, dict[str, float]]:
    """wrong: draws codes that are fed in place of the right ones, so that the talker learns to go on after its own
    mistakes; None feeds the right ones."""
    logits = talker_logits(talker, batch, wrong)
    is_target = batch.targets != _NO_TARGET
    loss = F.cross_entropy(logits[is_target], batch.targets[is_target])
    right = (logits[is_target].argmax(-1) == batch.targets[is_target]).float().mean()
    return loss, {"loss": float(loss.detach()), "right": float(right)}


def talker_logits(talker: Talker, batch: RowBatch, wrong: torch.Generator | None = None) -> Tensor:
    """[batch, rows, codes + 1]: what `Talker.generate` would choose from after each row, computed for all at once."""
    tower = talker.tts
    codes = torch.where(batch.is_code, batch.ids, 0)
    if wrong is not None:
        replaced = torch.rand(codes.shape, generator=wrong) < _WRONG_CODES
        codes = torch.where(replaced, torch.randint(talker.eos, codes.shape, generator=wrong), codes)
    text = tower.emb_text(torch.where(batch.is_code, 0, batch.ids))
    x = torch.where(batch.is_code[..., None], tower.emb_code[0](codes), text)
    return F.linear(_run_backbone(tower.model, x), cast(CodeHead, tower.head_code[0]).weight())


def _run_backbone(backbone: Backbone, x: Tensor) -> Tensor:
    cos, sin = rope(torch.arange(x.shape[1]), backbone.head_dim, backbone.config.rope_theta)
    for layer in backbone.layers:
        assert isinstance(layer, Layer)
        attention, normed = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (
            split_heads(proj(normed), backbone.config.num_attention_heads)
            for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        mixed = _attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return backbone.norm(x)  # type: ignore[no-any-return]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, (batch, heads, rows, dim). Written out, as the fused one takes longer to go back through than
    all else in a step (in bfloat16 on a CPU: 0.26 s a step against 0.19 s)."""
    rows = q.shape[2]
    later = torch.ones(rows, rows, dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).masked_fill(later, -math.inf)
    mixed: Tensor = scores.softmax(-1) @ v
    return mixed
