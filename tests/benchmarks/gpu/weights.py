"""A checkpoint that is no folder: weights of the released sizes drawn on the device, a voice, and a tokenizer.

Rule: the stages' own `load` runs (`drawn_checkpoint` gives it what it would read), so that a stage here is what it is
in a pipeline: its attention, its programs, its folding.

Rule: the model decides itself, by its weights, and obeys: one channel of what it hears last says "speak" or "listen"
(`DECISION`), and after <|speak|> come six letters and the end of the unit. Nothing of the engine is another one, nor
of how it draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, NamedTuple, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn

import model_shards.checkpoint
import model_shards.config
import model_shards.duplex
from model_shards.checkpoint import Component
from model_shards.config import RELEASED, ModelConfig
from model_shards.context import UnitSpan
from model_shards.duplex import DuplexEngine, DuplexSession, Prompt
from model_shards.errors import ModelError
from model_shards.init import SIZES
from model_shards.quantized import settle
from model_shards.tokenizer import ADDED_TOKENS, NUM_BYTES, Tokenizer
from model_shards.vocoder import Voice

MODELS: Final[dict[str, ModelConfig]] = {"full": RELEASED, **SIZES}
WORDS: Final = "abcdef"
"""What is said in a window: six tokens, as of some four words."""
DECISION: Final = 0  # the channel
OBEYED: Final = 8.0  # its value, beside about 1 in the others
_PULL: Final = 25.0  # of the next token's logit, beside about 1 of the others
_TABLES: Final = (
    *("embed_tokens.weight", "position_embedding.weight", "embed_positions.weight", "resampler.query"),
    *("emb_text.weight", "emb_code.0.weight", "input_embedding.weight"),
)
_QUIET: Final = "hift.conv_post.parametrizations.weight.original0"  # else untrained magnitudes overflow
_VOICE_CODES: Final = 75  # three seconds
UNIT_TOKENS: Final = 80  # of a window with a picture and its sound


class Added(NamedTuple):
    """A special token, as the package tokenizers tells of it."""

    special: bool = True


class Letters:
    """What `Tokenizer` asks of the package tokenizers: here a token per byte, and the special ones at their ids."""

    def __init__(self, config: ModelConfig) -> None:
        first = config.llm.vocab_size - len(ADDED_TOKENS)
        self._ids = {text: first + index for index, text in enumerate(ADDED_TOKENS)} | {"<unk>": NUM_BYTES}
        self._texts = {index: text for text, index in self._ids.items()}
        self._size = config.llm.vocab_size

    def get_vocab_size(self, with_added_tokens: bool) -> int:
        return self._size

    def get_added_tokens_decoder(self) -> dict[int, Added]:
        return dict.fromkeys(self._texts, Added())

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def id_to_token(self, token: int) -> str | None:
        return chr(token) if token < NUM_BYTES else self._texts.get(token)

    def encode(self, text: str, add_special_tokens: bool) -> SimpleNamespace:
        return SimpleNamespace(ids=list(text.encode()))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return bytes(token for token in ids if token < NUM_BYTES).decode(errors="replace")


def letters(config: ModelConfig) -> Tokenizer:
    """The tokenizer of random weights."""
    return Tokenizer(cast(Any, Letters(config)))


@contextmanager
def drawn_checkpoint(size: str, *, context_tokens: int = 0) -> Iterator[None]:
    """Whoever loads a checkpoint in here gets a drawn one. context_tokens: with which a session begins, about."""
    config = MODELS[size]

    def load_config(path: Path) -> ModelConfig:
        return config

    def load_component(path: Path, component: Component, module: nn.Module, *, dtype: torch.dtype, device: str) -> None:
        draw(module, component, config, dtype, device)

    class Filled(DuplexEngine):
        """Sessions begin with a context, as if they had run for a while: what lies in it is nothing."""

        num_begun = 0

        def begin(self, batch: Sequence[tuple[DuplexSession, Prompt]]) -> None:
            super().begin(batch)
            for session, _ in batch:
                self.num_begun += 1
                fill(self._cache, session, context_tokens + UNIT_TOKENS * (self.num_begun % 6))

    with ExitStack() as patches:
        for owner, name, instead in (
            (model_shards.checkpoint, "load_config", load_config),
            (model_shards.config, "load_config", load_config),
            (model_shards.checkpoint, "load_component", load_component),
            (model_shards.checkpoint, "load_voice", lambda path: drawn_voice(config)),
            (model_shards.checkpoint, "load_ref_audio", lambda path: drawn_sound()),
            (Tokenizer, "load", lambda path: letters(config)),
        ):
            patches.enter_context(patch.object(owner, name, instead))
        if context_tokens:
            patches.enter_context(patch.object(model_shards.duplex, "DuplexEngine", Filled))
        yield


def fill(cache: Any, session: DuplexSession, num_tokens: int) -> None:
    """Let a session that has begun have so many tokens more, in units."""
    num_units = max(num_tokens - session.sequence.length, 0) // UNIT_TOKENS
    if num_units:
        cache.extend([(session.sequence, num_units * UNIT_TOKENS)])
        session.context.units += [UnitSpan(UNIT_TOKENS, ())] * num_units


def draw(module: nn.Module, component: Component, config: ModelConfig, dtype: torch.dtype, device: str) -> None:
    """Give a hollow module weights; the same ones each time on a kind of device."""
    generator = torch.Generator(device).manual_seed(len(component))
    weights: dict[str, Tensor] = {}
    for name, hollow in module.state_dict().items():
        if not hollow.is_floating_point():
            raise ModelError(f"{name} is of {hollow.dtype}: codes of quantised weights are not drawn")
        weights[name] = _drawn(name, hollow.shape, generator, dtype)
    for name in weights:
        if name.endswith(".original0"):  # the norms of weight norm: such that the effective weight is as drawn
            weights[name] = _norms(weights[name.removesuffix("0") + "1"]).to(dtype) * (0.1 if name == _QUIET else 1.0)
    if component == "llm":
        _obey(weights, config)
    module.load_state_dict(weights, assign=True)
    module.to(device).eval().requires_grad_(False)
    settle(module)


def drawn_voice(config: ModelConfig) -> Voice:
    assert config.vocoder is not None
    flow, source = config.vocoder.flow, torch.Generator().manual_seed(0)
    return Voice(
        torch.randint(flow.vocab_size, (_VOICE_CODES,), generator=source, dtype=torch.int32),
        torch.randn(1, flow.up_stride * _VOICE_CODES, flow.output_size, generator=source) - 6,
        torch.randn(1, flow.spk_embed_dim, generator=source),
    )


def drawn_sound(num_samples: int = 48_000) -> Tensor:
    """Noise, 16 kHz: of the reference voice, or of a window."""
    return 0.1 * torch.randn(num_samples, generator=torch.Generator().manual_seed(0))


def _drawn(name: str, shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Scales are 1, biases small, and a matrix keeps the scale of what it is multiplied with."""
    last = name.rpartition(".")[2]
    if last == "alpha" or (last == "weight" and len(shape) == 1):
        return torch.ones(shape, dtype=dtype, device=generator.device)
    values = torch.empty(shape, dtype=dtype, device=generator.device).normal_(generator=generator)
    if "bias" in last:
        return values.mul_(0.02)
    return values if name.endswith(_TABLES) else values.div_(math.sqrt(max(math.prod(shape[1:]), 1)))


def _norms(weight: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(weight.float(), dim=tuple(range(1, weight.ndim)), keepdim=True)
    return norms


def _obey(weights: dict[str, Tensor], config: ModelConfig) -> None:
    """Let the decision's channel decide, and each token of what is said lead to the next one."""
    embed, head = weights["llm.model.embed_tokens.weight"], weights["llm.lm_head.weight"]
    tokenizer = letters(config)
    special, words = tokenizer.special, tokenizer.encode(WORDS)
    quieter = 1 / math.sqrt(2 * config.llm.num_hidden_layers)  # what came in last stays what is seen at the end
    for name, weight in weights.items():
        if name.startswith("llm.model.layers.") and name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.mul_(quieter)[DECISION] = 0
    embed[:, DECISION] = head[:, DECISION] = 0
    embed[[special.image_end, special.slice_end], DECISION] = -OBEYED  # without a sound it listens
    follow = dict(zip([special.speak, *words], [*words, special.chunk_eos], strict=True))
    follow |= {special.tts_bos: special.turn_eos, special.turn_eos: special.chunk_eos}
    head[[special.speak, special.listen, *follow.values()]] = 0
    for token, then in follow.items():
        head[then] += embed[token] * (_PULL / embed.shape[1])
    head[special.speak, DECISION], head[special.listen, DECISION] = _PULL / OBEYED, -_PULL / OBEYED
