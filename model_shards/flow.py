"""Flow model of the vocoder: speech codes (25 Hz) become mel frames (50 Hz) in the voice of a prompt.

Rules:
- A cache is immutable. A chunk gives a new one; nothing here writes into a tensor that a cache holds, so that sessions
  share the voice's part, and going back to it costs nothing.
- A chunk's frames see the whole history and each other. Sessions with unequal histories share a forward: histories are
  right-aligned, so that relative positions agree, and the padding on the left is masked.
- Whole utterances are one chunk with an empty history: there is one code path.

Source: minicpmo-utils 1.0.6, `stepaudio2` (Token2wav, CausalMaskedDiffWithXvec, UpsampleConformerEncoderV2,
CausalConditionalCFM, DiT); reference/minicpmo-4.5.md §6.3 and §6.4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_shards.config import FlowConfig
from model_shards.errors import ModelError
from model_shards.fold import fold

WINDOW_CODES = 25  # new codes of a window: one second
HISTORY_FRAMES = 100  # mel frames of a turn that are kept besides as many as the prompt has (stepaudio2 `stream`)
NOISE_FRAMES = 30_000  # 600 s at 50 Hz
NOISE_SEED = 20_260_107
CONV_HISTORY = 2  # both convolutions with a kernel of 3 look two frames back


class Release(Enum):
    """Which minicpmo-utils the streaming follows where they differ."""

    V1_0_6 = "1.0.6"  # and 1.0.5: silence as the prompt's look-ahead; code-rate layers trimmed as if at mel rate
    V1_0_7 = "1.0.7"  # the prompt's first codes as its look-ahead; each rate trimmed for itself


@dataclass(frozen=True, slots=True)
class FlowHistory:
    """What a stretch of speech leaves for later chunks. Frames are in order of time, but for `dit_kv`.

    code_kv:      (blocks, 2, heads, codes, head_dim), keys and values of the encoder at code rate.
    mel_kv:       (up_blocks, 2, heads, frames, head_dim), at mel rate.
    encoder_conv: (hidden, 2 + 2 * up_stride): inputs of the look-ahead and of the up-sampling convolution.
    dit_kv:       (steps, depth, 2, branches, heads, frames, head_dim). Branches: with and without condition. The
                  newest chunk is first, and in it the oldest frame: the official trimming depends on it.
    dit_conv:     (steps, depth, branches, 2 * hidden, 2): inputs of a block's two convolutions.
    """

    code_kv: Tensor
    mel_kv: Tensor
    encoder_conv: Tensor
    dit_kv: Tensor
    dit_conv: Tensor


@dataclass(frozen=True, slots=True)
class FlowCache:
    """What a session's next chunk sees: the voice, shared by all who speak with it, and the turn so far."""

    voice: FlowHistory
    turn: FlowHistory  # its convolution inputs are the current ones, also before the turn's first chunk
    num_frames: int  # mel frames of this turn, also those which are no longer kept

    @property
    def num_steps(self) -> int:
        return self.voice.dit_kv.shape[0]

    def code_kv(self) -> tuple[Tensor, ...]:
        return self.voice.code_kv, self.turn.code_kv

    def mel_kv(self) -> tuple[Tensor, ...]:
        return self.voice.mel_kv, self.turn.mel_kv

    def dit_kv(self, step: int) -> tuple[Tensor, ...]:
        """Pieces of one Euler step's history, in any order, as the DiT knows no positions.

        As the turn grows, it takes the place of the prompt, from the frame before the last HISTORY_FRAMES on.
        """
        voice = self.voice.dit_kv[step]
        num_prompt = voice.shape[-2]
        first_end = max(0, num_prompt - max(HISTORY_FRAMES, self.num_frames))
        last_start = max(0, num_prompt - HISTORY_FRAMES)
        return voice[..., :first_end, :], voice[..., last_start:, :], self.turn.dit_kv[step]


class LayerMemory(Protocol):
    """What the rows of a batch see in one layer. visible: (rows, keys) bool; None where every row sees everything."""

    @property
    def visible(self) -> Tensor | None: ...

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take in a chunk's, each (rows, heads, new, head_dim); gives all there are, the new ones at the end."""


class Memory(Protocol):
    """What the rows of a batch see in all layers. num_keys: of each row, with the chunk's own and any padding."""

    @property
    def num_keys(self) -> int: ...

    def layers(self) -> Sequence[LayerMemory]: ...


class LayerPast(NamedTuple):
    """kv: (2, rows, heads, keys, head_dim), whose last frames become those of the chunk."""

    kv: Tensor
    visible: Tensor | None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        num_new = keys.shape[-2]
        self.kv[0, ..., -num_new:, :] = keys
        self.kv[1, ..., -num_new:, :] = values
        return self.kv[0], self.kv[1]


class Past(NamedTuple):
    """Keys and values of a batch, with room for the chunk's own at the end; see `gather`."""

    kv: Tensor
    visible: Tensor | None

    @property
    def num_keys(self) -> int:
        return self.kv.shape[-2]

    def layers(self) -> list[LayerPast]:
        return [LayerPast(kv, self.visible) for kv in self.kv]


class Lengths(NamedTuple):
    """How much of each row of a padded chunk counts, (rows,): codes, those looked ahead at included, and frames made
    of each code."""

    seen: Tensor
    new: Tensor


def gather(histories: Sequence[Sequence[Tensor]], num_new: int) -> Past:
    """Right-align histories of unequal length in one buffer.

    histories: per session the pieces of its history, in order, each (..., heads, frames, head_dim).
    returns:   kv (..., sessions, heads, longest + num_new, head_dim): padding is zero, the last `num_new` are not set;
               visible (sessions, longest + num_new) bool, or None where every session sees everything.
    """
    lengths = [sum(piece.shape[-2] for piece in pieces) for pieces in histories]
    longest = max(lengths)
    like = histories[0][0]
    *lead, heads, _, dim = like.shape
    kv = like.new_empty(*lead, len(histories), heads, longest + num_new, dim)
    for index, (pieces, length) in enumerate(zip(histories, lengths, strict=True)):
        row, start = kv[..., index, :, :, :], longest - length
        row[..., :start, :] = 0.0
        for piece in pieces:
            row[..., start : start + piece.shape[-2], :] = piece
            start += piece.shape[-2]
    if min(lengths) == longest:
        return Past(kv, None)
    first_visible = torch.tensor([longest - length for length in lengths], device=kv.device)
    return Past(kv, torch.arange(longest + num_new, device=kv.device) >= first_visible[:, None])


def extend(cache: FlowCache, new: FlowHistory, release: Release) -> FlowCache:
    """Append a chunk to a session's cache and forget what the official streaming forgets.

    Bound: the turn keeps HISTORY_FRAMES frames in the encoder and max(HISTORY_FRAMES, prompt frames) in the DiT.
    """
    num_prompt = cache.voice.mel_kv.shape[-2]
    mel_kv = torch.cat((cache.turn.mel_kv, new.mel_kv), dim=-2)
    turn = FlowHistory(
        code_kv=_trim_codes(cache, new, num_prompt + mel_kv.shape[-2], release),
        mel_kv=_newest(mel_kv, HISTORY_FRAMES),
        encoder_conv=new.encoder_conv,
        dit_kv=_trim_dit(torch.cat((new.dit_kv, cache.turn.dit_kv), dim=-2), num_prompt),
        dit_conv=new.dit_conv,
    )
    return FlowCache(cache.voice, turn, cache.num_frames + new.mel_kv.shape[-2])


def _trim_codes(cache: FlowCache, new: FlowHistory, num_frames: int, release: Release) -> Tensor:
    """The turn's part of the code-rate history, after a chunk which made the mel-rate history `num_frames` long.

    1.0.6 stores the code-rate layers twice in a row, so that they are as long as the mel-rate layers, cuts both as mel
    frames, and reads the first half back: they see the oldest codes from then on (reference §6.4).
    """
    turn = torch.cat((cache.turn.code_kv, new.code_kv), dim=-2)
    num_prompt = cache.voice.mel_kv.shape[-2]
    if num_frames <= num_prompt + HISTORY_FRAMES:
        return turn
    num_voice = cache.voice.code_kv.shape[-2]
    num_kept = num_prompt + HISTORY_FRAMES
    up_stride = num_prompt // num_voice
    if release is Release.V1_0_7:
        return _newest(turn, HISTORY_FRAMES // up_stride)
    cut = [*range(num_prompt), *range(num_frames - HISTORY_FRAMES, num_frames)]
    read_back = [index % (num_frames // up_stride) for index in cut[: num_kept // up_stride]]
    codes = torch.cat((cache.voice.code_kv, turn), dim=-2)
    return codes[..., torch.tensor(read_back[num_voice:], device=turn.device), :]  # the rest is the voice


def _trim_dit(turn: Tensor, num_prompt: int) -> Tensor:
    """The turn's part of the DiT history. Official: of turn and prompt in this order, the first `num_prompt` and the
    last HISTORY_FRAMES frames stay; the turn begins with its newest chunk.
    """
    if turn.shape[-2] <= HISTORY_FRAMES:
        return turn
    num_last = max(0, HISTORY_FRAMES - num_prompt)
    return torch.cat((turn[..., :num_prompt, :], turn[..., turn.shape[-2] - num_last :, :]), dim=-2)


def _newest(history: Tensor, limit: int) -> Tensor:
    """The last `limit` frames, in memory of their own."""
    num_dropped = max(0, history.shape[-2] - limit)
    return history[..., num_dropped:, :].clone() if num_dropped else history


class RelPosAttention(nn.Module):
    """Self-attention with relative positions (Transformer-XL); the relative position of a key is at most ours."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.linear_q = nn.Linear(hidden_size, hidden_size)
        self.linear_k = nn.Linear(hidden_size, hidden_size)
        self.linear_v = nn.Linear(hidden_size, hidden_size)
        self.linear_out = nn.Linear(hidden_size, hidden_size)
        self.linear_pos = nn.Linear(hidden_size, hidden_size, bias=False)
        self.pos_bias_u = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_heads, hidden_size // num_heads)))
        self.pos_bias_v = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_heads, hidden_size // num_heads)))

    def forward(self, x: Tensor, positions: Tensor, memory: LayerMemory) -> Tensor:
        """Attend to what is there, and to x (batch, new, hidden) itself, which becomes part of it.

        positions: (keys + new - 1, hidden), from the largest distance query − key to the smallest.
        """
        num_new = x.shape[1]
        q, k, v = (split_heads(part(x), self.num_heads) for part in (self.linear_q, self.linear_k, self.linear_v))
        k, v = memory.extend(k, v)
        num_keys = k.shape[-2]
        position_keys = split_heads(self.linear_pos(positions)[None], self.num_heads)
        by_distance = (q + self.pos_bias_v[:, None]) @ position_keys.transpose(-2, -1)
        # Row i, key j is distance index j + new - 1 - i: in flat memory each row starts one earlier than the last.
        bias = by_distance.flatten(-2)[..., num_new - 1 :].unfold(-1, num_keys, num_keys + num_new - 2)
        bias = bias * q.shape[-1] ** -0.5
        if memory.visible is not None:
            bias = bias.masked_fill(~memory.visible[:, None, None], -math.inf)
        out = F.scaled_dot_product_attention(q + self.pos_bias_u[:, None], k, v, attn_mask=bias)
        return self.linear_out(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(batch, frames, heads * dim) as (batch, heads, frames, dim)."""
    return x.view(*x.shape[:2], num_heads, -1).transpose(1, 2)


def distance_embedding(num_keys: int, num_new: int, like: Tensor) -> Tensor:
    """Sinusoids of the distances query − key, from num_keys − 1 down to 1 − num_new: (keys + new − 1, hidden).

    like: any tensor with `hidden` as its last size; gives device and dtype.
    """
    hidden = like.shape[-1]
    distance = torch.arange(num_keys - 1, -num_new, -1.0, device=like.device)
    rate = torch.exp(torch.arange(0, hidden, 2.0, device=like.device) * (-math.log(10000.0) / hidden))
    angle = distance[:, None] * rate
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).to(like.dtype)


class FeedForward(nn.Module):
    def __init__(self, hidden_size: int, linear_units: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(hidden_size, linear_units)
        self.w_2 = nn.Linear(linear_units, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(F.silu(self.w_1(x)))  # type: ignore[no-any-return]


class ConformerLayer(nn.Module):
    """A pre-norm transformer layer; the official one has neither convolution nor macaron part."""

    def __init__(self, hidden_size: int, num_heads: int, linear_units: int) -> None:
        super().__init__()
        self.self_attn = RelPosAttention(hidden_size, num_heads)
        self.feed_forward = FeedForward(hidden_size, linear_units)
        self.norm_mha = nn.LayerNorm(hidden_size, eps=1e-12)
        self.norm_ff = nn.LayerNorm(hidden_size, eps=1e-12)

    def forward(self, x: Tensor, positions: Tensor, memory: LayerMemory) -> Tensor:
        x = x + self.self_attn(self.norm_mha(x), positions, memory)
        return x + self.feed_forward(self.norm_ff(x))  # type: ignore[no-any-return]


class InputLayer(nn.Module):
    """Linear and LayerNorm, scaled by sqrt(hidden) as the relative positions expect it."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.LayerNorm(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x) * math.sqrt(x.shape[-1])  # type: ignore[no-any-return]


class PreLookahead(nn.Module):
    """Let each code see the next `lookahead` ones, which are consumed."""

    def __init__(self, hidden_size: int, lookahead: int) -> None:
        super().__init__()
        self.lookahead = lookahead
        self.conv1 = nn.Conv1d(hidden_size, hidden_size, lookahead + 1)
        self.conv2 = nn.Conv1d(hidden_size, hidden_size, CONV_HISTORY + 1)

    def forward(self, x: Tensor, history: Tensor, ends: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(batch, n + lookahead, hidden), history (batch, hidden, 2): (batch, n, hidden), next history."""
        seen = torch.cat((history, F.leaky_relu(self.conv1(x.transpose(1, 2)))), dim=2)
        out = self.conv2(seen).transpose(1, 2) + x[:, : x.shape[1] - self.lookahead]
        return out, _last_frames(seen, CONV_HISTORY, ends)


def _last_frames(seen: Tensor, num: int, ends: Tensor | None) -> Tensor:
    """The last `num` of frames that lie behind `num` old ones: (batch, channels, num + n) as (batch, channels, num).

    ends: (batch,), how many of the n count; None: all.
    """
    if ends is None:
        return seen[..., -num:]
    return seen.take_along_dim((ends[:, None] + torch.arange(num, device=ends.device))[:, None], dim=2)


class UpSample(nn.Module):
    """Repeat each code `stride` times, then smooth causally."""

    def __init__(self, hidden_size: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv1d(hidden_size, hidden_size, 2 * stride + 1)

    def forward(self, x: Tensor, history: Tensor, ends: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(batch, n, hidden), history (batch, hidden, 2 * stride): (batch, stride * n, hidden), next history."""
        seen = torch.cat((history, x.transpose(1, 2).repeat_interleave(self.stride, dim=2)), dim=2)
        return self.conv(seen).transpose(1, 2), _last_frames(seen, 2 * self.stride, ends)


class FlowEncoder(nn.Module):
    """Embedded codes at 25 Hz become hidden states at 50 Hz."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        hidden, heads, units = config.input_size, config.encoder_attention_heads, config.encoder_linear_units
        self.embed = InputLayer(hidden)
        self.pre_lookahead_layer = PreLookahead(hidden, config.pre_lookahead_len)
        self.encoders = nn.ModuleList(ConformerLayer(hidden, heads, units) for _ in range(config.encoder_num_blocks))
        self.up_layer = UpSample(hidden, config.up_stride)
        self.up_embed = InputLayer(hidden)
        self.up_encoders = nn.ModuleList(
            ConformerLayer(hidden, heads, units) for _ in range(config.encoder_num_up_blocks)
        )
        self.after_norm = nn.LayerNorm(hidden)

    def forward(
        self,
        x: Tensor,
        codes: Memory,
        frames: Memory,
        conv: Tensor,
        last: bool,
        lengths: Lengths | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode a chunk; its keys and values go to `codes` and `frames`.

        x:       (batch, n, hidden), embedded codes. The last `lookahead` are only looked at, unless `last`.
        codes:   of the layers at code rate, frames: of those at mel rate.
        conv:    (batch, hidden, 2 + 2 * up_stride), the convolutions' last inputs.
        lengths: where the rows are padded, each to its own length. A row that is `last` has nothing to look ahead at,
                 so that all it sees is new; `last` is False then.
        returns: (batch, t, hidden), t = up_stride * n', n' = n or n − lookahead, and the next `conv`.
        """
        x = self.embed(x)
        if last:
            x = F.pad(x, (0, 0, 0, self.pre_lookahead_layer.lookahead))
        ends = None
        if lengths is not None:
            x = x * (torch.arange(x.shape[1], device=x.device) < lengths.seen[:, None])[..., None]
            ends = lengths.new
        x, conv1 = self.pre_lookahead_layer(x, conv[..., :CONV_HISTORY], ends)
        x = _run_layers(self.encoders, x, codes)
        x, conv2 = self.up_layer(x, conv[..., CONV_HISTORY:], None if ends is None else ends * self.up_layer.stride)
        x = _run_layers(self.up_encoders, self.up_embed(x), frames)
        return self.after_norm(x), torch.cat((conv1, conv2), dim=2)


def _run_layers(layers: nn.ModuleList, x: Tensor, memory: Memory) -> Tensor:
    positions = distance_embedding(memory.num_keys, x.shape[1], x)
    for layer, seen in zip(layers, memory.layers(), strict=True):
        x = layer(x, positions, seen)
    return x


class TimeEmbedding(nn.Module):
    """Euler time in [0, 1] as a hidden vector."""

    NUM_FREQUENCIES = 128
    SCALE = 1000.0

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * self.NUM_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, time: Tensor) -> Tensor:
        """(batch,) as (batch, hidden)."""
        step = -math.log(10000.0) / self.NUM_FREQUENCIES
        rate = torch.exp(step * torch.arange(self.NUM_FREQUENCIES, device=time.device)).to(time.dtype)
        angle = (time * self.SCALE)[:, None] * rate
        return self.mlp(torch.cat((angle.cos(), angle.sin()), dim=-1))  # type: ignore[no-any-return]


class DitAttention(nn.Module):
    """Attention without positions; queries and keys are normalised per head."""

    _qkv: tuple[Tensor, Tensor] | None = None

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.num_heads = config.dit_num_heads
        inner = config.dit_num_heads * config.dit_head_dim
        self.to_q = nn.Linear(config.dit_hidden_size, inner)
        self.to_k = nn.Linear(config.dit_hidden_size, inner)
        self.to_v = nn.Linear(config.dit_hidden_size, inner)
        self.q_norm = nn.LayerNorm(config.dit_head_dim)
        self.k_norm = nn.LayerNorm(config.dit_head_dim)
        self.proj = nn.Linear(inner, config.dit_hidden_size)

    def forward(self, x: Tensor, memory: LayerMemory) -> Tensor:
        """Attend to what is there, and to x (batch, new, dim) itself, which becomes part of it."""
        all_three = (self.to_q(x), self.to_k(x), self.to_v(x)) if self._qkv is None else _three(x, self._qkv)
        q, k, v = (split_heads(part, self.num_heads) for part in all_three)
        q = self.q_norm(q)
        k, v = memory.extend(self.k_norm(k), v)
        mask = None if memory.visible is None else memory.visible[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def fold(self) -> None:
        parts = (self.to_q, self.to_k, self.to_v)
        self._qkv = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])


def _three(x: Tensor, matrix: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Three linear layers at once."""
    return F.linear(x, *matrix).chunk(3, dim=-1)


class FrameConv(nn.Conv1d):
    """A causal convolution over frames whose channels come last, as one matrix product of three frames each."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, CONV_HISTORY + 1)
        self._matrix: Tensor | None = None

    def forward(  # type: ignore[override]
        self, x: Tensor, history: Tensor, ends: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(batch, t, channels), history (batch, channels, 2): (batch, t, channels), next history."""
        seen = torch.cat((history.transpose(1, 2), x), dim=1)
        frames = torch.cat([seen[:, at : at + x.shape[1]] for at in range(CONV_HISTORY + 1)], dim=2)
        matrix = self._as_matrix() if self._matrix is None else self._matrix
        return F.linear(frames, matrix, self.bias), _last_frames(seen.transpose(1, 2), CONV_HISTORY, ends)

    def fold(self) -> None:
        self._matrix = self._as_matrix()

    def _as_matrix(self) -> Tensor:
        """[channels, 3 * channels]: what the weight says of the oldest frame comes first."""
        return self.weight.transpose(1, 2).flatten(1)


class DitConv(nn.Module):
    """Two causal convolutions. The keys are the official positions in a Sequential: conv, norm, conv."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        parts = {"1": FrameConv(hidden_size), "3": nn.LayerNorm(hidden_size), "6": FrameConv(hidden_size)}
        self.block = nn.ModuleDict(parts)

    def forward(self, x: Tensor, history: Tensor, ends: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(batch, t, hidden), history (batch, 2 * hidden, 2): the same of this chunk."""
        history1, history2 = history.chunk(2, dim=1)
        x, next1 = self.block["1"](x, history1, ends)
        x, next2 = self.block["6"](F.mish(self.block["3"](x)), history2, ends)
        return x, torch.cat((next1, next2), dim=1)


class DitMlp(nn.Module):
    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))  # type: ignore[no-any-return]


class Modulation(NamedTuple):
    """What a time makes of one part of a block (adaLN): each (batch, 1, hidden), or (hidden,), the same for all rows.

    scale: of the normalised input. gate: of the part's output.
    """

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def apply(self, x: Tensor) -> Tensor:
        if self.scale.dim() == 1:
            return F.layer_norm(x, x.shape[-1:], self.scale, self.shift, eps=1e-6)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * self.scale + self.shift

    @classmethod
    def of(cls, shift: Tensor, scale: Tensor, gate: Tensor) -> Modulation:
        """Each (batch or 1, 1, hidden)."""
        if len(shift) > 1:
            return cls(shift, 1 + scale, gate)
        return cls(shift.flatten(), 1 + scale.flatten(), gate.flatten())


class Modulations(NamedTuple):
    """What a time makes of all layers."""

    blocks: list[tuple[Modulation, Modulation, Modulation]]  # of attention, MLP, convolution
    final: Modulation


class DitBlock(nn.Module):
    """Attention, convolution, MLP; each shifted, scaled and gated by the time (adaLN-zero)."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        hidden = config.dit_hidden_size
        self.attn = DitAttention(config)
        self.mlp = DitMlp(hidden, int(hidden * config.dit_mlp_ratio))
        self.conv = DitConv(hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 9 * hidden))

    def modulations(self, time: Tensor) -> tuple[Modulation, Modulation, Modulation]:
        """Of an embedded time (batch or 1, 1, hidden)."""
        parts = self.adaLN_modulation(time).chunk(9, dim=-1)
        return Modulation.of(*parts[:3]), Modulation.of(*parts[3:6]), Modulation.of(*parts[6:])

    def forward(
        self,
        x: Tensor,
        modulations: tuple[Modulation, Modulation, Modulation],
        memory: LayerMemory,
        conv: Tensor,
        ends: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """x (batch, t, hidden), conv (batch, 2 * hidden, 2): x, next conv."""
        attention, mlp, convolution = modulations
        x = torch.addcmul(x, attention.gate, self.attn(attention.apply(x), memory))
        convolved, conv = self.conv(convolution.apply(x), conv, ends)
        x = torch.addcmul(x, convolution.gate, convolved)
        return torch.addcmul(x, mlp.gate, self.mlp(mlp.apply(x))), conv


class DitFinal(nn.Module):
    def __init__(self, hidden_size: int, out_channels: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
        self.linear = nn.Linear(hidden_size, out_channels)

    def modulation(self, time: Tensor) -> Modulation:
        shift, scale = self.adaLN_modulation(time).chunk(2, dim=-1)
        return Modulation.of(shift, scale, torch.ones_like(scale))  # nothing is added: no gate

    def forward(self, x: Tensor, modulation: Modulation) -> Tensor:
        return self.linear(modulation.apply(x))  # type: ignore[no-any-return]


class Dit(nn.Module):
    """Velocity of the flow at one time."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.t_embedder = TimeEmbedding(config.dit_hidden_size)
        self.in_proj = nn.Linear(4 * config.output_size, config.dit_hidden_size)
        self.blocks = nn.ModuleList(DitBlock(config) for _ in range(config.dit_depth))
        self.final_layer = DitFinal(config.dit_hidden_size, config.output_size)

    def forward(
        self, x: Tensor, time: Tensor, memory: Memory, conv: Tensor, ends: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Velocity of a chunk; its keys and values go to `memory`.

        x:       (batch, t, 4 * mels): noisy mel, encoder output, speaker, condition.
        time:    (batch or 1,) in [0, 1].
        conv:    (depth, batch, 2 * hidden, 2), the convolutions' last inputs.
        ends:    (batch,), how many frames of each row count; None: all.
        returns: (batch, t, mels), and the next `conv`.
        """
        return self.run(x, self.modulations(time), memory, conv, ends)

    def modulations(self, time: Tensor) -> Modulations:
        embedded = self.t_embedder(time)[:, None]
        blocks = cast("Iterable[DitBlock]", self.blocks)
        return Modulations([block.modulations(embedded) for block in blocks], self.final_layer.modulation(embedded))

    def run(
        self, x: Tensor, modulations: Modulations, memory: Memory, conv: Tensor, ends: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`forward` at a time whose modulations are known."""
        x = self.in_proj(x)
        new_conv = []
        for block, *args in zip(self.blocks, modulations.blocks, memory.layers(), conv, strict=True):
            x, seen = block(x, *args, ends)
            new_conv.append(seen)
        return self.final_layer(x, modulations.final), torch.stack(new_conv)


class EulerMemory(Protocol):
    """What each Euler step sees, and what it leaves. Rows of a step: branch after branch, in each the batch."""

    def at(self, step: int) -> tuple[Memory, Tensor]:
        """Keys and values, and the convolutions' inputs (depth, branches, batch, 2 * hidden, 2)."""

    def leave(self, step: int, conv: Tensor) -> None:
        """The step was computed, and these are the convolutions' next inputs."""


class _Gathered:
    """The caches of a batch, gathered for each step; and what the steps leave, session by session."""

    def __init__(self, caches: Sequence[FlowCache], num_new: int) -> None:
        self._caches = caches
        self._num_new = num_new
        self._kv: list[Tensor] = []
        self._conv: list[Tensor] = []
        self._past: Tensor  # of the step that is being computed

    def at(self, step: int) -> tuple[Past, Tensor]:
        self._past, visible = gather([cache.dit_kv(step) for cache in self._caches], self._num_new)
        past = Past(self._past.flatten(2, 3), None if visible is None else visible.repeat(self._past.shape[2], 1))
        return past, torch.stack([cache.turn.dit_conv[step] for cache in self._caches], dim=2)

    def leave(self, step: int, conv: Tensor) -> None:
        self._kv.append(self._past[..., -self._num_new :, :].clone())
        self._conv.append(conv)

    def kv(self) -> list[Tensor]:
        """Per session its `dit_kv` (see FlowHistory)."""
        return [torch.stack([kv[..., i, :, :, :] for kv in self._kv]) for i in range(len(self._caches))]

    def conv(self) -> list[Tensor]:
        """Per session its `dit_conv`."""
        return [torch.stack([conv[..., i, :, :] for conv in self._conv]) for i in range(len(self._caches))]


class FlowMatching(nn.Module):
    """Euler integration from noise to mel, with classifier-free guidance."""

    rand_noise: Tensor

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.estimator = Dit(config)
        self.guidance = config.inference_cfg_rate
        self._known: dict[int, tuple[Tensor, list[Modulations]]] | None = None  # by number of steps, where folded
        # The official buffer is drawn anew in every process and never saved. A fixed seed makes speech reproducible.
        # It is on the CPU even where the weights are built on `meta`, as no checkpoint fills it.
        source = torch.Generator(device="cpu").manual_seed(NOISE_SEED)
        noise = torch.randn(1, config.output_size, NOISE_FRAMES, generator=source, device="cpu")
        self.register_buffer("rand_noise", noise, persistent=False)

    @property
    def num_branches(self) -> int:
        """With and, where there is guidance, without condition."""
        return 2 if self.guidance > 0 else 1

    def forward(
        self, mu: Tensor, speakers: Tensor, cond: Tensor, caches: Sequence[FlowCache]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Integrate one chunk for a batch of sessions whose caches have the same number of Euler steps.

        mu, cond: (batch, t, mels); speakers (batch, mels).
        returns:  mel (batch, t, mels), and per session the chunk's `dit_kv` and `dit_conv` (see FlowHistory).
        """
        gathered = _Gathered(caches, mu.shape[1])
        x = torch.cat([self._noise(cache, mu.shape[1]) for cache in caches])
        x = self.integrate(x, self.condition(mu, speakers, cond), gathered, caches[0].num_steps)
        return x, gathered.kv(), gathered.conv()

    def condition(self, mu: Tensor, speakers: Tensor, cond: Tensor) -> Tensor:
        """What each branch knows of the mel: (branches, batch, t, 3 * mels)."""
        conditioned = torch.cat((mu, speakers[:, None].expand(-1, mu.shape[1], -1), cond), dim=-1)
        return torch.stack((conditioned, torch.zeros_like(conditioned))[: self.num_branches])

    def integrate(
        self, x: Tensor, condition: Tensor, memory: EulerMemory, num_steps: int, ends: Tensor | None = None
    ) -> Tensor:
        """From noise x (batch, t, mels) to mel, of which `ends` (batch,) frames count."""
        times, modulations = self._times(num_steps, x)
        for step in range(num_steps):
            velocity = self._velocity(x, condition, modulations[step], memory, step, ends)
            x = x + (times[step + 1] - times[step]) * velocity
        return x

    def fold(self) -> None:
        fold(self.estimator)
        self._known = {}

    def _times(self, num_steps: int, like: Tensor) -> tuple[Tensor, list[Modulations]]:
        """The times of Euler steps, and what they make of the layers; computed once where that is folded."""
        known = None if self._known is None else self._known.get(num_steps)
        if known is None:
            fractions = torch.linspace(0, 1, num_steps + 1, device=like.device, dtype=like.dtype)
            times = 1 - torch.cos(fractions * 0.5 * torch.pi)
            known = times, [self.estimator.modulations(time[None]) for time in times[:-1]]
            if self._known is not None:
                self._known[num_steps] = known
        return known

    def _noise(self, cache: FlowCache, num_new: int) -> Tensor:
        """(1, num_new, mels), starting at the cached length: once a history is trimmed, it no longer moves on."""
        start = sum(piece.shape[-2] for piece in cache.mel_kv())
        if start + num_new > self.rand_noise.shape[2]:
            raise ModelError(f"flow: {start + num_new} mel frames at once; the noise has {self.rand_noise.shape[2]}")
        return self.rand_noise[:, :, start : start + num_new].transpose(1, 2)

    def _velocity(
        self,
        x: Tensor,
        condition: Tensor,
        modulations: Modulations,
        memory: EulerMemory,
        step: int,
        ends: Tensor | None,
    ) -> Tensor:
        """Guided velocity (batch, t, mels)."""
        branches = condition.shape[0]
        rows = torch.cat((x.expand(branches, *x.shape), condition), dim=-1).flatten(0, 1)
        frames = None if ends is None else ends.repeat(branches)
        past, conv = memory.at(step)
        velocity, new_conv = self.estimator.run(rows, modulations, past, conv.flatten(1, 2), frames)
        memory.leave(step, torch.unflatten(new_conv, 1, (branches, -1)))
        velocity = torch.unflatten(velocity, 0, (branches, -1))
        guided: Tensor = velocity[0]
        return guided if branches == 1 else (1 + self.guidance) * guided - self.guidance * velocity[1]


class Flow(nn.Module):
    """Codes to mel. The module holds weights only; see FlowCache for a session's state."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        self.input_embedding = nn.Embedding(config.vocab_size, config.input_size)
        self.spk_embed_affine_layer = nn.Linear(config.spk_embed_dim, config.output_size)
        self.encoder = FlowEncoder(config)
        self.encoder_proj = nn.Linear(config.input_size, config.output_size)
        self.decoder = FlowMatching(config)

    def num_frames(self, num_codes: int, last: bool) -> int:
        """Mel frames of a chunk: all but a turn's last one look ahead."""
        return self.config.up_stride * (num_codes - (0 if last else self.config.pre_lookahead_len))

    def empty_history(self, num_steps: int) -> FlowHistory:
        """The history of a session that has not begun; convolutions see zeros before the first frame."""
        c, weight = self.config, self.encoder_proj.weight
        head_dim, branches = c.input_size // c.encoder_attention_heads, self.decoder.num_branches
        return FlowHistory(
            code_kv=weight.new_zeros(c.encoder_num_blocks, 2, c.encoder_attention_heads, 0, head_dim),
            mel_kv=weight.new_zeros(c.encoder_num_up_blocks, 2, c.encoder_attention_heads, 0, head_dim),
            encoder_conv=weight.new_zeros(c.input_size, CONV_HISTORY + 2 * c.up_stride),
            dit_kv=weight.new_zeros(num_steps, c.dit_depth, 2, branches, c.dit_num_heads, 0, c.dit_head_dim),
            dit_conv=weight.new_zeros(num_steps, c.dit_depth, branches, 2 * c.dit_hidden_size, CONV_HISTORY),
        )

    def forward(
        self, codes: Tensor, speakers: Tensor, cond: Tensor, caches: Sequence[FlowCache], last: bool
    ) -> tuple[Tensor, list[FlowHistory]]:
        """Turn one chunk of codes into mel, for a batch of sessions with chunks of the same length.

        codes:    (batch, n) int; the last `pre_lookahead_len` are only looked at, unless `last`.
        speakers: (batch, spk_embed_dim), not normalised.
        cond:     (batch, t, mels), the known mel (of the prompt), zeros where there is none; t = num_frames(n, last).
        caches:   per session what the chunk sees; histories may differ in length, but not in Euler steps.
        returns:  mel (batch, mels, t), and per session what this chunk adds to its history.
        """
        speakers = self.spk_embed_affine_layer(F.normalize(speakers, dim=1))
        mu, code_kv, mel_kv, conv = self.encode(codes, caches, last)
        mel, dit_kv, dit_conv = self.decoder(mu, speakers, cond, caches)
        new = [
            FlowHistory(code_kv[..., i, :, :, :], mel_kv[..., i, :, :, :], conv[i].clone(), dit_kv[i], dit_conv[i])
            for i in range(len(caches))
        ]
        return mel.transpose(1, 2), new

    def encode(self, codes: Tensor, caches: Sequence[FlowCache], last: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """mu (batch, t, mels), and the chunk's code_kv, mel_kv and encoder_conv (see FlowHistory), batched."""
        num_new = self.num_frames(codes.shape[1], last)
        num_new_codes = num_new // self.config.up_stride
        code_past = gather([cache.code_kv() for cache in caches], num_new_codes)
        mel_past = gather([cache.mel_kv() for cache in caches], num_new)
        conv = torch.stack([cache.turn.encoder_conv for cache in caches])
        hidden, conv = self.encoder(self.input_embedding(codes), code_past, mel_past, conv, last)
        new_code_kv, new_mel_kv = code_past.kv[..., -num_new_codes:, :], mel_past.kv[..., -num_new:, :]
        return self.encoder_proj(hidden), new_code_kv, new_mel_kv, conv
