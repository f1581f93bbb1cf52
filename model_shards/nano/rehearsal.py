"""Nano set free on many sessions at once: the real duplex engine, greedy, on embeddings that were made before.

For judging a language model in the middle of its training, and for learning from its own mistakes. There is no TTS
and no listener here: `pipeline nano eval` has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model_shards.context import WindowConfig
from model_shards.decoding import SamplingConfig
from model_shards.duplex import DuplexConfig, DuplexEngine, Prompt, UnitInput, UnitOutput
from model_shards.kv_cache import KvCache, KvShape
from model_shards.llm import LanguageModel
from model_shards.nano.sequences import prompt_ids
from model_shards.tokenizer import Tokenizer

CACHE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Embedded:
    """A session as the encoders give it: images [units, queries, dim], audio [units, tokens, dim]."""

    images: Tensor
    audio: Tensor

    def __len__(self) -> int:
        return len(self.images)


MaxTokens = Callable[[int, int], int]
"""(session, unit) to how much may be said."""


def rehearse(
    model: LanguageModel, tokenizer: Tokenizer, sessions: Sequence[Embedded], max_tokens: MaxTokens
) -> Iterator[list[UnitOutput]]:
    """Run sessions of equal length, unit by unit; gives what each did in it, in the order of `sessions`."""
    config = DuplexConfig(sampling=GREEDY, window=WindowConfig(mode="basic", high_tokens=1500, low_tokens=1100))
    cache = KvCache.of_bytes(KvShape.of(model.config), CACHE_BYTES, dtype=torch.float32, device="cpu")
    engine = DuplexEngine(model, cache, tokenizer, replace(config, max_text_chars=None))
    running = [engine.new_session(index) for index in range(len(sessions))]
    with torch.inference_mode():
        engine.begin([(session, Prompt(prompt_ids(tokenizer))) for session in running])
        for unit in range(len(sessions[0])):
            yield engine.step(
                [(running[row], _input(sessions[row], unit, max_tokens(row, unit))) for row in range(len(running))]
            )


GREEDY = SamplingConfig(mode="greedy", repetition_penalty=1.0, length_penalty=1.0)


def _input(session: Embedded, unit: int, max_tokens: int) -> UnitInput:
    return UnitInput([[session.images[unit].float()]], session.audio[unit].float(), max_tokens)
