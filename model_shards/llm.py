"""The language model: our own forward over the Qwen3 weights (`llm.`), ragged over many sessions.

One forward takes any number of sequences with any number of new tokens each (a second of video for one, a single word
for another). Linear layers run on all tokens at once; model_shards/attention.py has the attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_shards.attention import PREPARE, AttentionName, Kernel, Padded, Plan, Span
from model_shards.config import LlmConfig, Quantization
from model_shards.kv_cache import KvCache, KvSequence, KvShape, rotate
from model_shards.programs import frozen
from model_shards.quantized import QuantizedLinear


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

    attention: the kernel, see `choose_attention`; the cache's pages are of its size.
    Source: `llm.` of the checkpoint, Qwen3ForCausalLM (q_norm and k_norm per head, no biases, untied head).
    """

    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.config = config
        self.attention: AttentionName = "sdpa"
        self.llm = _CausalLm(config)
        self._program: Callable[..., Tensor] | None = None

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
        hidden = torch.cat([item.embeds for item in batch])
        plan = self._plan(cache, _place(cache, batch), hidden.dtype)
        return list(torch.split(self._run(hidden, plan, cache), [len(item.embeds) for item in batch]))

    def step(self, cache: KvCache, tokens: Tensor, used: Tensor, pages: Tensor, kernel: Kernel) -> Tensor:
        """Feed one token of each sequence, without a look at a value: [n, hidden_size], after the last norm.

        tokens: [n] int64. used: [n] int32, what each sequence holds with it; the cache has that room. pages: [n, any]
        int32, the pages of each.
        """
        hidden = self.embed(tokens)
        return self._run(hidden, Plan.of_steps(cache, used, pages, kernel, hidden.dtype), cache)

    def fold(self) -> None:
        """See `model_shards.fold`. On a CPU, a forward whose sequences share their attention becomes one program, as
        decode steps do, which are many small operations; that of a quantised model can't.
        """
        weight = self.llm.model.norm.weight
        if self.config.quantization is not None or weight.device.type != "cpu":
            return
        cache, sequences = KvCache(KvShape.of(self.config), 4, 2, weight.dtype), (KvSequence(), KvSequence())
        cache.extend([(sequence, 3) for sequence in sequences])
        plan = self._plan(cache, [Span(s, 2 * index, 1, 2) for index, s in enumerate(sequences)], weight.dtype)
        assert isinstance(plan.attend, Padded)
        hidden = weight.new_zeros(4, self.config.hidden_size)
        self._program = frozen(self._together, (hidden, *plan.rotation, plan.slots, *cache.pools, *plan.attend.tensors))

    def _plan(self, cache: KvCache, spans: Sequence[Span], dtype: torch.dtype) -> Plan:
        queries_per_kv = self.config.num_attention_heads // self.config.num_key_value_heads
        return Plan.of(cache, spans, PREPARE[self.attention], queries_per_kv, dtype)

    def _run(self, hidden: Tensor, plan: Plan, cache: KvCache) -> Tensor:
        together = plan.attend.tensors if isinstance(plan.attend, Padded) else ()
        if self._program is not None and together and cache.dtype == hidden.dtype:  # as it was traced
            return self._program(hidden, *plan.rotation, plan.slots, *cache.pools, *together)
        return self._layers(hidden, plan, *cache.pools)

    def _together(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor, *together: Tensor
    ) -> Tensor:
        return self._layers(hidden, Plan((cos, sin), slots, Padded.of_tensors(*together)), keys, values)

    def _layers(self, hidden: Tensor, plan: Plan, keys: Tensor, values: Tensor) -> Tensor:
        for index, layer in enumerate(self.llm.model.layers):
            hidden = layer(hidden, plan, (keys[index], values[index]))
        normed: Tensor = self.llm.model.norm(hidden)
        return normed


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

    def forward(self, hidden: Tensor, plan: Plan, pool: tuple[Tensor, Tensor]) -> Tensor:
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

    def forward(self, x: Tensor, plan: Plan, pool: tuple[Tensor, Tensor]) -> Tensor:
        """x: [tokens, hidden_size] of all sequences; their keys and values are written to the pool first."""
        heads = (x.shape[0], -1, self.head_dim)
        cos, sin = plan.rotation
        query = rotate(self.q_norm(self.q_proj(x).view(heads)), cos, sin)
        key = rotate(self.k_norm(self.k_proj(x).view(heads)), cos, sin)
        out: Tensor = self.o_proj(plan.mix(query, key, self.v_proj(x).view(heads), pool))
        return out


def _place(cache: KvCache, batch: Sequence[SequenceInput]) -> list[Span]:
    """Make room for the new tokens of all sequences, or of none."""
    sizes = [len(item.embeds) for item in batch]
    starts = [item.sequence.length if item.start is None else item.start for item in batch]
    cache.own([(item.sequence, item.start) for item in batch if item.start is not None])
    cache.extend(
        [
            (item.sequence, max(0, start + num - item.sequence.length))
            for item, start, num in zip(batch, starts, sizes, strict=True)
        ]
    )
    assert all(cache.is_own(item.sequence, start) for item, start in zip(batch, starts, strict=True))
    rows = itertools.accumulate(sizes, initial=0)
    return [
        Span(item.sequence, row, start, num) for item, row, start, num in zip(batch, rows, starts, sizes, strict=False)
    ]
