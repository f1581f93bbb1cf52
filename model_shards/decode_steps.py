"""The LLM's decode step as a program of fixed shapes: a token of each session is fed, and its next one is decided.

A step moves one tensor to the device and one back, and gathers nothing: a row says where its session's pages lie.

Rule: a blank row writes to a page which no sequence holds, and looks at one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from model_shards.attention import KERNELS, Kernel
from model_shards.decoding import Choice, DecisionRule
from model_shards.errors import ModelError
from model_shards.kv_cache import KvCache, KvSequence
from model_shards.llm import LanguageModel
from model_shards.programs import Captured


@dataclass(frozen=True, slots=True)
class Question:
    """What a session brings to a decision. num_draws: decisions so far; recent: the tokens that it has sampled."""

    seed: int
    num_draws: int
    recent: Sequence[int]


@dataclass(frozen=True, slots=True)
class Fed:
    """A token for a sequence, and what the next one is decided by."""

    sequence: KvSequence
    token: int
    question: Question


_QUESTION: Final = 2  # seed and draws, before what is recent
_FED: Final = 2  # token and length, before the pages


class Decider:
    """Decides on the model's device: one transfer there, one back."""

    def __init__(self, model: LanguageModel, rule: DecisionRule, device: torch.device) -> None:
        self._model, self._rule, self._device = model, rule, device

    @property
    def width(self) -> int:
        """Numbers of a question."""
        return _QUESTION + self._rule.config.repetition_window

    def __call__(self, hidden: Tensor, questions: Sequence[Question]) -> list[Choice]:
        """The next token of each session, from final hidden states [sessions, hidden_size]."""
        rows, values = host_rows(len(questions), self.width, self._device)
        for question, row in zip(questions, values, strict=True):
            self.write(question, row)
        return self.choices(self.decide(hidden, rows.to(self._device, non_blocking=True)))

    def write(self, question: Question, row: np.ndarray) -> None:
        row[:_QUESTION] = question.seed, question.num_draws
        self._rule.recent_row(question.recent, row[_QUESTION:])

    def decide(self, hidden: Tensor, questions: Tensor) -> Tensor:
        """`choices` reads it."""
        logits = self._model.logits(hidden)
        return self._rule.decide(logits, questions[:, 0], questions[:, 1], questions[:, _QUESTION:])

    def choices(self, decided: Tensor) -> list[Choice]:
        return self._rule.choices(decided)


class DecodeSteps:
    """For sequences of at most `num_pages` pages, and batches up to the ladder's last size."""

    def __init__(
        self,
        model: LanguageModel,
        cache: KvCache,
        decider: Decider,
        num_pages: int,
        ladder: Sequence[int],
        kernel: Kernel | None = None,
    ) -> None:
        """kernel: a ragged one; None: the model's. Raises KvCacheFull where no page is left for blank rows."""
        self._model, self._cache, self._decider = model, cache, decider
        self._num_pages = num_pages
        self._kernel = kernel or KERNELS[model.attention]
        self._nobody = KvSequence()
        cache.reserve([(self._nobody, 1)])
        self._program = Captured(self._step, self._blank, ladder)
        self._program.capture()

    def __call__(self, batch: Sequence[Fed]) -> tuple[Tensor, list[Choice]]:
        """Feed them; gives the final-norm hidden states [n, hidden_size] at these tokens, and the next tokens."""
        longest = max(len(fed.sequence.pages) for fed in batch)
        if longest > self._num_pages:
            raise ModelError(f"a sequence of {longest} pages; decode steps were made for at most {self._num_pages}")
        self._cache.extend([(fed.sequence, 1) for fed in batch])
        rows, values = host_rows(len(batch), self._width, self._cache.device)
        for fed, row in zip(batch, values, strict=True):
            self._write(fed, row)
        hidden, decided = self._program(rows)
        return hidden.clone(), self._decider.choices(decided)

    @property
    def _width(self) -> int:
        return _FED + self._num_pages + self._decider.width

    def _write(self, fed: Fed, row: np.ndarray) -> None:
        pages = fed.sequence.pages
        row[:_FED] = fed.token, fed.sequence.length
        row[_FED : _FED + len(pages)] = pages
        row[_FED + len(pages) : _FED + self._num_pages] = self._nobody.pages[0]
        self._decider.write(fed.question, row[_FED + self._num_pages :])

    def _blank(self, size: int) -> tuple[Tensor, ...]:
        row = np.empty(self._width, dtype=np.int64)
        self._write(Fed(self._nobody, 0, Question(0, 0, ())), row)
        row[1] = 1
        return (torch.from_numpy(row).to(self._cache.device).repeat(size, 1),)

    def _step(self, rows: Tensor) -> tuple[Tensor, ...]:
        pages, question = rows[:, _FED : _FED + self._num_pages], rows[:, _FED + self._num_pages :]
        used, pages = rows[:, 1].to(torch.int32), pages.to(torch.int32).contiguous()
        hidden = self._model.step(self._cache, rows[:, 0], used, pages, self._kernel)
        return hidden, self._decider.decide(hidden, question)


def host_rows(num_rows: int, width: int, device: torch.device) -> tuple[Tensor, np.ndarray]:
    """Rows of int64 on the host, from where they go to the device without a wait; and the same memory to write to."""
    rows = torch.empty(num_rows, width, dtype=torch.int64, pin_memory=device.type == "cuda")
    return rows, rows.numpy()
