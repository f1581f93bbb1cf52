"""The language model: our own forward over the Qwen3 weights (`llm.`), ragged over many sessions.

One forward takes any number of sequences with any number of new tokens each (a second of video for one, a single word
for another). Linear layers run on all tokens at once; attention runs on groups of sequences of similar size, padded
inside a group, because a padded call costs less than a call per session (measured on one CPU core with 8 sessions of
512 tokens that decode: 0.22 ms against 0.39 ms per layer). flash-attn's varlen call may take the place of `_attend`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_shards.config import LlmConfig, Quantization
from model_shards.kv_cache import KvCache, KvSequence, rotate
from model_shards.quantized import QuantizedLinear

# Attention of n new tokens over a context of t costs about t * (8 + n) units (the 8: gathering keys and values), a
# call of its own costs about 4096 units more (measured on a CPU core, head_dim 32: 25 µs against 6 ns per unit).
GATHER_UNITS = 8
CALL_UNITS = 4096


@dataclass(frozen=True, slots=True)
class SequenceInput:
    """New tokens for one sequence: embeds [n, hidden_size], n > 0.

    start: None appends them. A position overwrites the tokens [start, start + n), which see what lies before
    themselves only; later tokens stay as they are.
    """

    sequence: KvSequence
    embeds: Tensor
    start: int | None = None


class LanguageModel(nn.Module):
    """Qwen3 decoder with its head. Holds weights only; keys and values live in a KvCache, sessions with the caller.

    Source: `llm.` of the checkpoint, Qwen3ForCausalLM (q_norm and k_norm per head, no biases, untied head).
    """

    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.config = config
        self.llm = _CausalLm(config)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [n] to embeddings [n, hidden_size]."""
        embeds: Tensor = self.llm.model.embed_tokens(ids)
        return embeds

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states [..., hidden_size] to logits [..., vocab_size]."""
        logits: Tensor = self.llm.lm_head(hidden)
        return logits

    def forward(self, cache: KvCache, batch: Sequence[SequenceInput]) -> list[Tensor]:
        """Feed new tokens of many sequences; returns the final-norm hidden states [n, hidden_size] of each.

        A result doesn't depend on who else is in the batch, beyond float rounding. No sequence may appear twice.
        Raises KvCacheFull before anything has changed.
        """
        if not batch:
            return []
        plan = _plan(cache, batch, self.config.num_attention_heads // self.config.num_key_value_heads)
        hidden = torch.cat([item.embeds for item in batch])
        for index, layer in enumerate(self.llm.model.layers):
            hidden = layer(hidden, plan, cache.layer(index))
        return list(torch.split(self.llm.model.norm(hidden), [len(item.embeds) for item in batch]))


def _linear(in_features: int, out_features: int, quantization: Quantization | None) -> nn.Module:
    if quantization is None:
        return nn.Linear(in_features, out_features, bias=False)
    return QuantizedLinear(in_features, out_features, quantization)


class _CausalLm(nn.Module):
    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.model = _Decoder(config)
        head = None if config.quantization is None else Quantization(8, config.hidden_size)
        self.lm_head = _linear(config.hidden_size, config.vocab_size, head)


class _Decoder(nn.Module):
    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class DecoderLayer(nn.Module):
    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.self_attn = DecoderAttention(config)
        self.mlp = _Mlp(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: Tensor, plan: _Plan, pool: tuple[Tensor, Tensor]) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), plan, pool)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class _Mlp(nn.Module):
    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.gate_proj = _linear(config.hidden_size, config.intermediate_size, config.quantization)
        self.up_proj = _linear(config.hidden_size, config.intermediate_size, config.quantization)
        self.down_proj = _linear(config.intermediate_size, config.hidden_size, config.quantization)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderAttention(nn.Module):
    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = _linear(config.hidden_size, heads, config.quantization)
        self.k_proj = _linear(config.hidden_size, kv_heads, config.quantization)
        self.v_proj = _linear(config.hidden_size, kv_heads, config.quantization)
        self.o_proj = _linear(heads, config.hidden_size, config.quantization)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, plan: _Plan, pool: tuple[Tensor, Tensor]) -> Tensor:
        """x: [tokens, hidden_size] of all sequences; their keys and values are written to the pool first."""
        heads = (len(x), -1, self.head_dim)
        cos, sin = plan.rotation
        query = rotate(self.q_norm(self.q_proj(x).view(heads)), cos, sin)
        key = rotate(self.k_norm(self.k_proj(x).view(heads)), cos, sin)
        keys, values = pool
        keys.flatten(0, 1).index_copy_(0, plan.slots, key)
        values.flatten(0, 1).index_copy_(0, plan.slots, self.v_proj(x).view(heads))
        padded = torch.cat([_attend(query, group, keys, values) for group in plan.groups])
        out: Tensor = self.o_proj(padded.index_select(0, plan.unpad))
        return out


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences that share one padded attention call: b sequences, n queries and t keys each."""

    rows: Tensor  # [b * n] tokens of the concatenation; a padded query repeats its sequence's last one
    pages: Tensor  # [b * t / page_size]
    mask: Tensor  # [b, 1, queries per kv head * n, t], 0 or -inf


@dataclass(frozen=True, slots=True)
class _Plan:
    """What all layers of one forward share."""

    rotation: tuple[Tensor, Tensor]  # of each token's position
    slots: Tensor  # [tokens] where their keys and values go in a layer's pool
    groups: list[_Group]
    unpad: Tensor  # [tokens] their rows in the concatenated outputs of the groups


@dataclass(frozen=True, slots=True)
class _Span:
    """The new tokens of one sequence: rows [row, row + num) of the concatenation, positions from `start`."""

    sequence: KvSequence
    row: int
    start: int
    num: int

    @property
    def context(self) -> int:
        return self.start + self.num


def _plan(cache: KvCache, batch: Sequence[SequenceInput], queries_per_kv: int) -> _Plan:
    spans = _place(cache, batch)
    embeds = batch[0].embeds
    positions = torch.cat([torch.arange(span.start, span.context) for span in spans])
    owner = torch.repeat_interleave(torch.tensor([span.num for span in spans]))
    table = cache.block_table([span.sequence for span in spans], max(span.context for span in spans))
    slots = table[owner, positions // cache.page_size] * cache.page_size + positions % cache.page_size
    groups, unpad, padded = [], torch.empty_like(positions), 0
    for members in _similar(spans):
        width = max(span.num for span in members)
        for index, span in enumerate(members):
            unpad[span.row : span.row + span.num] = torch.arange(span.num) + (padded + index * width)
        padded += len(members) * width
        groups.append(_group(cache, members, width, queries_per_kv, embeds.dtype))
    rotation = cache.rotation(positions.to(cache.device), embeds.dtype)
    return _Plan(rotation, slots.to(cache.device), groups, unpad.to(cache.device))


def _place(cache: KvCache, batch: Sequence[SequenceInput]) -> list[_Span]:
    """Make room for the new tokens of all sequences, or of none."""
    sizes = [len(item.embeds) for item in batch]
    starts = [item.sequence.length if item.start is None else item.start for item in batch]
    cache.extend(
        [
            (item.sequence, max(0, start + num - item.sequence.length))
            for item, start, num in zip(batch, starts, sizes, strict=True)
        ]
    )
    rows = itertools.accumulate(sizes, initial=0)
    return [
        _Span(item.sequence, row, start, num) for item, row, start, num in zip(batch, rows, starts, sizes, strict=False)
    ]


def _similar(spans: Sequence[_Span]) -> list[list[_Span]]:
    """Put sequences into one call as long as the padding costs less than a call of their own."""
    groups: list[list[_Span]] = []
    width = context = 0
    for span in sorted(spans, key=lambda s: (s.num, s.context), reverse=True):
        if groups:
            size, longer = len(groups[-1]), max(context, span.context)
            padding = (
                (size + 1) * _units(width, longer) - size * _units(width, context) - _units(span.num, span.context)
            )
            if padding <= CALL_UNITS:
                groups[-1].append(span)
                context = longer
                continue
        groups.append([span])
        width, context = span.num, span.context
    return groups


def _units(num: int, context: int) -> int:
    return context * (GATHER_UNITS + num)


def _group(cache: KvCache, spans: list[_Span], width: int, queries_per_kv: int, dtype: torch.dtype) -> _Group:
    table = cache.block_table([span.sequence for span in spans], max(span.context for span in spans))
    column = torch.arange(width)
    offset = torch.minimum(column, torch.tensor([[span.num - 1] for span in spans]))  # [b, width]
    rows = offset + torch.tensor([[span.row] for span in spans])
    positions = (offset + torch.tensor([[span.start] for span in spans])).to(cache.device)
    hidden = torch.arange(table.shape[1] * cache.page_size, device=cache.device) > positions[..., None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=cache.device).masked_fill_(hidden, float("-inf"))
    return _Group(
        rows.flatten().to(cache.device), table.flatten().to(cache.device), mask.repeat(1, queries_per_kv, 1)[:, None]
    )


def _attend(query: Tensor, group: _Group, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of a group: query [tokens, heads, head_dim], a layer's pool; returns [b * n, heads * head_dim].

    The query heads that share a key head become more rows of one head, so that nothing is repeated for grouped-query
    attention and every SDPA kernel will do.
    """
    b, _, rows, t = group.mask.shape
    kv_heads, head_dim = keys.shape[-2:]
    q = query.index_select(0, group.rows).view(b, -1, kv_heads, query.shape[1] // kv_heads, head_dim)
    k = keys.index_select(0, group.pages).view(b, t, kv_heads, head_dim).transpose(1, 2)
    v = values.index_select(0, group.pages).view(b, t, kv_heads, head_dim).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q.permute(0, 2, 3, 1, 4).reshape(b, kv_heads, rows, head_dim), k, v, group.mask
    )
    out = out.view(b, kv_heads, -1, q.shape[1], head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(b * q.shape[1], -1)
