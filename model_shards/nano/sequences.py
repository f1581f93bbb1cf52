"""A duplex session as one training sequence: the tokens and embeddings that DuplexEngine would have fed, unit by unit.

    system prompt, then per unit:  <unit> <image> 16 </image> 10 of sound
                                   then <|listen|> </unit>
                                   or   <|speak|> words [<|turn_eos|>] <|chunk_eos|> </unit>

Rule: what is learnt are the tokens that the engine samples, and nothing else: they are the targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from model_shards.kv_cache import rotate
from model_shards.llm import DecoderAttention, DecoderLayer, LanguageModel
from model_shards.tokenizer import Tokenizer

NO_TARGET = -100
QUERY_BLOCK = 128
SYSTEM_PROMPT = "Streaming Omni Conversation."


@dataclass(frozen=True, slots=True)
class Unit:
    """One window. image: [queries, dim] or None where the camera gave nothing; audio: [tokens, dim] or None.

    said: the sampled tokens, from <|listen|> or <|speak|> to the one that ends the unit. expected: what should have
    been sampled, where that is something else; it is learnt up to the first token that differs.
    """

    image: Tensor | None
    audio: Tensor | None
    said: Sequence[int]
    expected: Sequence[int] | None = None

    def targets(self) -> list[int]:
        """As many as `said`: the token that is learnt at each place."""
        expected = self.said if self.expected is None else self.expected
        same = next((i for i, pair in enumerate(zip(self.said, expected, strict=False)) if pair[0] != pair[1]), None)
        learnt = list(expected[: len(self.said) if same is None else same + 1])
        return learnt + [NO_TARGET] * (len(self.said) - len(learnt))


@dataclass(frozen=True, slots=True)
class Batch:
    """B sequences, padded to the longest.

    embeds:    [B, L, dim]; token embeddings are added where `ids` is not negative.
    ids:       [B, L] int64, -1 where `embeds` holds what was seen or heard.
    targets:   [B, L] int64, the next token where it is sampled; NO_TARGET elsewhere.
    decisions: [units, 2] int64: sequence and position of each unit's last input, from which it is decided; in order of
               sequences, then units.
    """

    embeds: Tensor
    ids: Tensor
    targets: Tensor
    decisions: Tensor


def prompt_ids(tokenizer: Tokenizer, system_prompt: str = SYSTEM_PROMPT) -> list[int]:
    """The system prompt of a session without a reference voice, as stages/llm.py feeds it."""
    special = tokenizer.special
    return [special.im_start, *tokenizer.encode(f"system\n{system_prompt}"), special.im_end]


def collate(sessions: Sequence[Sequence[Unit]], prompt: Sequence[int], tokenizer: Tokenizer, dim: int) -> Batch:
    """Lay out sessions as the engine feeds them."""
    rows = [_lay_out(units, prompt, tokenizer) for units in sessions]
    longest = max(len(ids) for ids, _, _, _ in rows)
    embeds = torch.zeros(len(rows), longest, dim)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    targets = torch.full((len(rows), longest), NO_TARGET)
    decisions: list[tuple[int, int]] = []
    for row, (row_ids, row_targets, features, places) in enumerate(rows):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        targets[row, : len(row_ids)] = torch.tensor(row_targets)
        for start, feature in features:
            embeds[row, start : start + len(feature)] = feature
        decisions += [(row, place) for place in places]
    return Batch(embeds, ids, targets, torch.tensor(decisions, dtype=torch.int64).reshape(-1, 2))


def hidden_states(model: LanguageModel, batch: Batch, num_early: int = 0) -> tuple[Tensor, Tensor]:
    """[B, L, dim] after the last norm: what DuplexEngine computes over its cache, in one differentiable piece.

    The second one is after the first `num_early` layers.
    """
    decoder = model.llm.model
    is_token = batch.ids >= 0
    x = batch.embeds + decoder.embed_tokens(batch.ids.clamp(min=0)) * is_token[..., None]
    cos, sin = _rotation(model, x.shape[1])
    early = x
    for index, layer in enumerate(cast(Iterable[DecoderLayer], decoder.layers)):
        x = x + _attend(layer.self_attn, _normalise(layer.input_layernorm, x), cos, sin)
        x = x + layer.mlp(_normalise(layer.post_attention_layernorm, x))
        early = x if index + 1 == num_early else early
    return _normalise(decoder.norm, x), early


def _lay_out(
    units: Sequence[Unit], prompt: Sequence[int], tokenizer: Tokenizer
) -> tuple[list[int], list[int], list[tuple[int, Tensor]], list[int]]:
    """Ids, targets, (position, embeddings), and decision positions of one session."""
    special = tokenizer.special
    ids, targets = list(prompt), [NO_TARGET] * len(prompt)
    features: list[tuple[int, Tensor]] = []
    places: list[int] = []
    for unit in units:
        ids.append(special.unit)
        if unit.image is not None:
            features.append((len(ids) + 1, unit.image))
            ids += [special.image, *[-1] * len(unit.image), special.image_end]
        if unit.audio is not None:
            features.append((len(ids), unit.audio))
            ids += [-1] * len(unit.audio)
        places.append(len(ids) - 1)
        targets += [NO_TARGET] * (len(ids) - 1 - len(targets))
        ids += [*unit.said, special.unit_end]
        targets += [*unit.targets(), NO_TARGET, NO_TARGET]
    return ids, targets, features, places


def _rotation(model: LanguageModel, length: int) -> tuple[Tensor, Tensor]:
    config = model.config
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.arange(length, dtype=torch.float32)[:, None] / config.rope_theta**exponents
    return angles.cos(), angles.sin()


def _attend(attention: DecoderAttention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Causal attention, a block of queries after the other: half of the products would be masked, and torch's own
    kernel for CPUs takes twice as long on its way back.

    The query heads that share a key head are rows of one product, as in model_shards/llm.py.
    """
    length, head_dim = x.shape[1], attention.head_dim
    q, k, v = (
        projection(x).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q = rotate(_normalise(attention.q_norm, q), cos, sin).to(v.dtype) * head_dim**-0.5
    k = rotate(_normalise(attention.k_norm, k), cos, sin).to(v.dtype)
    shared = q.shape[1] // k.shape[1]
    q = q.unflatten(1, (-1, shared)).transpose(2, 3).flatten(0, 1)  # [batch * kv heads, length, shared, head_dim]
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    blocks = [
        _attend_block(q[:, start : start + QUERY_BLOCK].flatten(1, 2), k, v, start, shared)
        for start in range(0, length, QUERY_BLOCK)
    ]
    heads = torch.cat(blocks, dim=1).view(len(x), -1, length, shared, head_dim).transpose(2, 3)
    out: Tensor = attention.o_proj(heads.flatten(1, 2).transpose(1, 2).flatten(2))
    return out


def _attend_block(q: Tensor, k: Tensor, v: Tensor, start: int, shared: int) -> Tensor:
    """q: [rows, queries * shared, head_dim], the queries from `start` on; they see keys up to their own."""
    end = start + q.shape[1] // shared
    mask = torch.full((end - start, end), float("-inf"), dtype=q.dtype).triu(start + 1).repeat_interleave(shared, 0)
    weights = torch.baddbmm(mask[None], q, k[:, :end].transpose(1, 2)).softmax(-1)
    return weights @ v[:, :end]


def _normalise(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    assert norm.eps is not None
    normalised: Tensor = _RootMeanSquare.apply(x.float(), norm.weight, norm.eps)  # type: ignore[no-untyped-call]
    return normalised


class _RootMeanSquare(torch.autograd.Function):
    """RMSNorm whose way back is one formula: torch's takes four times as long on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normalised, towards = x * scale, grads[0] * weight
        along = (towards * normalised).mean(-1, keepdim=True)
        weights = (grads[0] * normalised).flatten(0, -2).sum(0)
        return torch.addcmul(towards, normalised, along, value=-1).mul_(scale), weights, None
