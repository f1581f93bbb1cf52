"""The flow's forward as it is trained: whole turns at once, seen as the streaming sees them window by window.

Rules:
- A sequence is the voice's prompt, then one turn (which begins with codes of silence). The prompt sees itself. A window
  of the turn sees the prompt, itself, and the KEPT_CODES before it; convolutions run through.
- What is computed here equals `Vocoder.stream` with `release` 1.0.7 and a prompt of at least KEPT_CODES codes, whose
  first codes are silence (tests/model_shards/nano/test_speech_turns.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from model_shards.flow import (
    CONV_HISTORY,
    HISTORY_FRAMES,
    WINDOW_CODES,
    ConformerLayer,
    Dit,
    DitAttention,
    DitBlock,
    FlowEncoder,
    RelPosAttention,
    distance_embedding,
    split_heads,
)
from model_shards.vocoder import LOOKAHEAD_CODES, MIN_WINDOW_CODES

UP: Final = 2  # frames per code
KEPT_CODES: Final = HISTORY_FRAMES // UP


def window_starts(num_codes: int) -> list[int]:
    """Where the windows of a turn begin which is given a unit of 25 codes at a time, silence included."""
    spoken = num_codes - LOOKAHEAD_CODES
    rest = (spoken - 1) % WINDOW_CODES + 1
    starts = list(range(0, spoken - rest + 1, WINDOW_CODES))
    return [*starts, starts[-1] + rest] if rest >= MIN_WINDOW_CODES else starts


@dataclass(frozen=True)
class Turns:
    """A batch of sequences. prompt: its codes; lengths: codes of each turn. Shorter ones have holes at their end."""

    prompt: int
    lengths: tuple[int, ...]

    @property
    def num_codes(self) -> int:
        return self.prompt + max(self.lengths)

    def turn_frames(self) -> Tensor:
        """1 where a frame belongs to a turn, 0 in holes: (batch, frames of the longest turn)."""
        return self._filled(UP)[:, self.prompt * UP :].float()

    def filled_codes(self) -> Tensor:
        """True where there is a code: (batch, codes)."""
        return self._filled(1)

    def _filled(self, rate: int) -> Tensor:
        ends = torch.tensor(self.lengths) + self.prompt
        return torch.arange(self.num_codes * rate) < (ends * rate)[:, None]

    @cached_property
    def _windows(self) -> tuple[Tensor, Tensor]:
        """Start and end of each code's window: two of (batch, codes)."""
        begins = torch.zeros(len(self.lengths), self.num_codes, dtype=torch.int64)
        ends = torch.full_like(begins, self.prompt)
        for row, length in enumerate(self.lengths):
            starts = window_starts(length)
            for start, end in zip(starts, [*starts[1:], self.num_codes - self.prompt], strict=True):
                begins[row, self.prompt + start : self.prompt + end] = self.prompt + start
                ends[row, self.prompt + start : self.prompt + end] = self.prompt + min(end, length)
        return begins, ends

    def mask(self, rate: int) -> Tensor:
        """What each position sees, at `rate` positions a code: (batch, positions, positions) bool. A hole sees what
        the last window sees, so that its result is a number."""
        begins, ends = (bound.repeat_interleave(rate, dim=1)[..., None] * rate for bound in self._windows)
        key = torch.arange(self.num_codes * rate)
        prompt = self.prompt * rate
        return ((key < prompt) | (key >= begins - KEPT_CODES * rate)) & (key < ends)

    def distances(self, rate: int) -> Tensor:
        """query − key: (batch, positions, positions) int64. What lies between the prompt and what is kept of a turn is
        forgotten, so the prompt comes nearer."""
        begins = self._windows[0].repeat_interleave(rate, dim=1)[..., None] * rate
        position = torch.arange(self.num_codes * rate)
        prompt = self.prompt * rate
        forgotten = (begins - KEPT_CODES * rate - prompt).clamp(min=0)
        return position[:, None] - position - torch.where(position < prompt, forgotten, 0)


def encode(encoder: FlowEncoder, rows: Tensor, turns: Turns) -> Tensor:
    """rows: (batch, codes, hidden), embedded codes; returns (batch, frames, hidden)."""
    x = encoder.embed(rows) * turns.filled_codes()[..., None]
    x = _look_ahead(encoder, x)
    x = _run_layers(encoder.encoders, x, turns, 1)
    seen = x.transpose(1, 2).repeat_interleave(UP, dim=2)
    x = encoder.up_layer.conv(F.pad(seen, (2 * UP, 0))).transpose(1, 2)
    x = _run_layers(encoder.up_encoders, encoder.up_embed(x), turns, UP)
    return encoder.after_norm(x)  # type: ignore[no-any-return]


def _look_ahead(encoder: FlowEncoder, x: Tensor) -> Tensor:
    layer = encoder.pre_lookahead_layer
    seen = F.leaky_relu(layer.conv1(F.pad(x.transpose(1, 2), (0, layer.lookahead))))
    out: Tensor = layer.conv2(F.pad(seen, (CONV_HISTORY, 0))).transpose(1, 2) + x
    return out


def _run_layers(layers: torch.nn.ModuleList, x: Tensor, turns: Turns, rate: int) -> Tensor:
    num = x.shape[1]
    positions = distance_embedding(num, num, x)
    index, mask = num - 1 - turns.distances(rate), turns.mask(rate)
    for layer in layers:
        assert isinstance(layer, ConformerLayer)
        x = x + _attend(layer.self_attn, layer.norm_mha(x), positions, index, mask)
        x = x + layer.feed_forward(layer.norm_ff(x))
    return x


def _attend(attention: RelPosAttention, x: Tensor, positions: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    projections = (attention.linear_q, attention.linear_k, attention.linear_v)
    q, k, v = (split_heads(projection(x), attention.num_heads) for projection in projections)
    keys = split_heads(attention.linear_pos(positions)[None], attention.num_heads)
    by_distance = (q + attention.pos_bias_v[:, None]) @ keys.transpose(-2, -1)
    index = index.clamp(0, positions.shape[0] - 1)[:, None].expand(-1, attention.num_heads, -1, -1)
    bias = by_distance.gather(-1, index) * q.shape[-1] ** -0.5
    bias = bias.masked_fill(~mask[:, None], -math.inf)
    out = F.scaled_dot_product_attention(q + attention.pos_bias_u[:, None], k, v, attn_mask=bias)
    return attention.linear_out(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def velocity(dit: Dit, x: Tensor, time: Tensor, turns: Turns) -> Tensor:
    """x: (batch, frames, 4 * mels); time: (batch,) in [0, 1]; returns (batch, frames, mels)."""
    embedded_time = dit.t_embedder(time)[:, None]
    x, mask = dit.in_proj(x), turns.mask(UP)
    for block in dit.blocks:
        assert isinstance(block, DitBlock)
        x = _run_block(block, x, embedded_time, mask)
    return dit.final_layer(x, dit.final_layer.modulation(embedded_time))  # type: ignore[no-any-return]


def _run_block(block: DitBlock, x: Tensor, time: Tensor, mask: Tensor) -> Tensor:
    attention, mlp, convolution = block.modulations(time)
    x = torch.addcmul(x, attention.gate, _attend_plainly(block.attn, attention.apply(x), mask))
    nothing = x.new_zeros(x.shape[0], 2 * x.shape[2], CONV_HISTORY)
    convolved, _ = block.conv(convolution.apply(x), nothing)
    x = torch.addcmul(x, convolution.gate, convolved)
    return torch.addcmul(x, mlp.gate, block.mlp(mlp.apply(x)))


def _attend_plainly(attention: DitAttention, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (split_heads(proj(x), attention.num_heads) for proj in (attention.to_q, attention.to_k, attention.to_v))
    out = F.scaled_dot_product_attention(attention.q_norm(q), attention.k_norm(k), v, attn_mask=mask[:, None])
    return attention.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
