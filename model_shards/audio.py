"""The streaming Whisper encoder and its projector: mel chunks of many sessions in, LLM embeddings out.

Rule: everything that a session's next second depends on is in its `AudioState`; the modules hold weights only.

A new chunk is seen whole by each of its frames, and sees every cached frame; nothing looks back from the cache. When
the positions are used up (29 s at the released size) the cache is dropped and the session starts again from position
0, with no history but two mel frames. That is the official behaviour, and what the LLM was trained on.

Source: MiniCPM-o 4.5 `modeling_minicpmo.py` (MiniCPMWhisperEncoder, get_audio_embedding_streaming,
get_audio_embedding, MultiModalProjector).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_shards.config import AudioConfig
from model_shards.errors import ModelError
from model_shards.mel import MelChunk
from model_shards.programs import LADDER

if TYPE_CHECKING:
    from model_shards.audio_pool import ResidentAudio


class Memory(Protocol):
    """Where keys and values of a batch's sessions are kept."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each is [batch, heads, frames, head_dim]. Keep the keys and values of the new frames, and let these attend to
        all that there are of their session; gives what q is."""


@dataclass(slots=True)
class AudioState:
    """What the encoder keeps of one session: keys and values of the frames so far, which are also its position.

    kv: [layers, 2, heads, capacity, head_dim], of which the first `num_frames` frames count. The encoder writes into
    it and replaces it by a larger one when it is full, up to `max_source_positions`.
    """

    kv: Tensor | None = None
    num_frames: int = 0
    slot: int | None = None  # where it is kept in place of `kv`; see audio_pool.py

    def reset(self) -> None:
        """Forget the past; the memory stays for the next frames."""
        self.num_frames = 0


class Projector(nn.Module):
    """Two linear layers with a ReLU between: [..., width_in] -> [..., width_out]."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width_in, width_out)
        self.linear2 = nn.Linear(width_out, width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.relu(self.linear1(x)))  # type: ignore[no-any-return]


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: [batch, frames, width] -> three of [batch, heads, frames, head_dim]."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self._split(q), self._split(k), self._split(v)

    def join(self, mixed: Tensor) -> Tensor:
        """[batch, heads, frames, head_dim] -> [batch, frames, width]."""
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)


class _Layer(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config.d_model, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def mlp(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))  # type: ignore[no-any-return]


class WhisperTower(nn.Module):
    """The weights under `apm.`, and what one chunk of frames goes through."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.d_model, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_source_positions, config.d_model)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.encoder_layers))
        self.layer_norm = nn.LayerNorm(config.d_model)

    def convolve(self, mel: Tensor, lens: Tensor | None = None) -> Tensor:
        """[batch, 80, frames] -> [batch, ceil(frames / 2), width].

        With `lens` [batch] each row is computed as if it ended at its own length; without, padding is heard as silence.
        """
        x = F.gelu(self.conv1(mel.to(self.conv1.weight)))
        if lens is not None:
            x = x * (torch.arange(mel.shape[2], device=x.device) < lens[:, None])[:, None]
        return F.gelu(self.conv2(x)).transpose(1, 2)


class AudioEncoder(nn.Module):
    """`apm.` and `audio_projection_layer.`: 10 embeddings per second of sound."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        self.apm = WhisperTower(config)
        self._resident: ResidentAudio | None = None
        # The official width here is encoder_ffn_dim // 4, which is d_model at every size that was released.
        self.audio_projection_layer = Projector(config.d_model, config.embed_dim)

    def make_resident(self, num_sessions: int, ladder: Sequence[int] = LADDER) -> None:
        """From now on `num_sessions` sessions at a time are encoded by programs of fixed shapes, as a GPU wants them;
        what is beyond that, as before. On a CPU this is slower than without.
        """
        from model_shards.audio_pool import ResidentAudio

        self._resident = ResidentAudio(self, num_sessions, ladder)
        self._resident.warm_up()

    @property
    def runs_with(self) -> str:
        """For the user: where seconds are graphs; else "" (nothing is chosen)."""
        if self._resident is None:
            return ""
        return f"{self.apm.conv1.weight.device.type}, graphs for up to {self._resident.ladder[-1]} sessions"

    def open(self) -> AudioState:
        """The state of a session that has heard nothing. `close` it."""
        state = None if self._resident is None else self._resident.begin()
        return AudioState() if state is None else state

    def close(self, state: AudioState) -> None:
        """The session is over: what it kept on the device is free for another one. Call it once."""
        if self._resident is not None and state.slot is not None:
            self._resident.end(state)

    def encode(self, batch: Sequence[tuple[AudioState, MelChunk]]) -> list[Tensor]:
        """Encode the next chunk of several sessions and move their states on.

        returns: per session [tokens, embed_dim], 10 tokens for a duplex second; none for less than `pool_step` frames.

        A chunk which is nothing but overlap changes nothing. A session may come once per batch.
        """
        if len({id(state) for state, _ in batch}) < len(batch):
            raise ModelError("audio: a session's chunks must be encoded one after the other, not in one batch")
        rows = [(state, chunk) for state, chunk in batch if len(kept_frames(chunk)) > 0]
        done: dict[int, Tensor] = {}
        for encode, of_kind in (
            (self._encode_rows, [row for row in rows if row[0].slot is None]),
            (self._encode_resident, [row for row in rows if row[0].slot is not None]),
        ):
            if of_kind:
                done |= zip((id(state) for state, _ in of_kind), encode(of_kind), strict=True)
        empty = self.audio_projection_layer.linear1.weight.new_zeros(0, self.config.embed_dim)
        return [done.get(id(state), empty) for state, _ in batch]

    def encode_offline(
        self, mel: Tensor, lens: Sequence[int], chunk_length_s: float | None, *, hear_padding: bool = True
    ) -> list[Tensor]:
        """Encode whole clips of at most 30 s, e.g. the voice in a system prompt.

        mel:  [batch, 80, frames] with zeros after each clip's end; lens: its mel frames per clip.
        chunk_length_s: a frame sees its own chunk of so many seconds and all before; None: it sees everything.
        hear_padding: the official mask over the padding counts mel frames where it should count frames after the
        convolutions (half as many), so that a shorter clip in a batch hears silence up to twice its length. True, as
        the reference numbers have it; False gives every clip what it gets on its own, where there is no padding.
        returns: per clip [tokens, embed_dim], tokens = ((len - 1) // 2 + 1) // pool_step.
        """
        after_conv = [(length - 1) // 2 + 1 for length in lens]
        frames = self.apm.convolve(
            mel, None if hear_padding else torch.tensor(lens, device=self.apm.conv1.weight.device)
        )
        total = frames.shape[1]
        if total > self.config.max_source_positions:
            raise ModelError(f"audio: a clip of {total} frames; the encoder has {self.config.max_source_positions}")
        index = torch.arange(total, device=frames.device)
        heard = torch.tensor(lens if hear_padding else after_conv, device=frames.device)
        mask = (index < heard[:, None])[:, None, None, :]
        if chunk_length_s is not None:
            chunk = index // int(chunk_length_s * 50)
            mask = mask & (chunk[None, :] <= chunk[:, None])
        x = frames + self.apm.embed_positions.weight[:total]
        for layer in self._layers():
            q, k, v = layer.self_attn.heads(layer.self_attn_layer_norm(x))
            x = x + layer.self_attn.join(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
            x = x + layer.mlp(x)
        return self._project(x, after_conv)

    def hidden(self, batch: Sequence[tuple[AudioState, MelChunk]]) -> tuple[Tensor, list[int]]:
        """The tower's output, after its last norm and before the projector, and the frames per row.

        returns: [batch, max frames, d_model]; a row's frames come first, what follows them means nothing.

        Every chunk must have frames to keep. Moves the states on.
        """
        states = [state for state, _ in batch]
        for state, chunk in batch:
            self._make_room(state, chunk)
        x, lens = self._frames(batch)
        hidden = self.run_layers(x, _Grown(states, lens))
        for state, length in zip(states, lens, strict=True):
            state.num_frames += length
        return hidden, lens

    def run_layers(self, x: Tensor, memory: Memory) -> Tensor:
        """Frames [batch, frames, width] after the convolutions, with their positions: the tower's output."""
        for index, layer in enumerate(self._layers()):
            q, k, v = layer.self_attn.heads(layer.self_attn_layer_norm(x))
            x = x + layer.self_attn.join(memory.attend(index, q, k, v))
            x = x + layer.mlp(x)
        return self.apm.layer_norm(x)  # type: ignore[no-any-return]

    def _encode_resident(self, rows: Sequence[tuple[AudioState, MelChunk]]) -> list[Tensor]:
        assert self._resident is not None
        for state, chunk in rows:
            self._drop_what_passes(state, chunk)
        return self._resident.encode(rows)

    def _encode_rows(self, rows: Sequence[tuple[AudioState, MelChunk]]) -> list[Tensor]:
        x, lens = self.hidden(rows)
        return self._pool(self.audio_projection_layer(x), lens)

    def _layers(self) -> Sequence[_Layer]:
        return list(self.apm.layers)  # type: ignore[arg-type]

    def _frames(self, batch: Sequence[tuple[AudioState, MelChunk]]) -> tuple[Tensor, list[int]]:
        """Frames after the convolutions, overlap cut, positions added: [batch, max frames, width], zero-padded."""
        mel = nn.utils.rnn.pad_sequence([chunk.frames.T for _, chunk in batch], batch_first=True).transpose(1, 2)
        lens = [chunk.frames.shape[1] for _, chunk in batch]
        padded = min(lens) < max(lens)
        frames = self.apm.convolve(mel, torch.tensor(lens, device=self.apm.conv1.weight.device) if padded else None)
        kept = [frames[row, kept_frames(c).start : kept_frames(c).stop] for row, (_, c) in enumerate(batch)]
        last = self.config.max_source_positions - 1
        for row, (state, _) in enumerate(batch):
            positions = torch.arange(state.num_frames, state.num_frames + len(kept[row]), device=frames.device)
            kept[row] = kept[row] + self.apm.embed_positions(positions.clamp(max=last))
        return nn.utils.rnn.pad_sequence(kept, batch_first=True), [len(row) for row in kept]

    def _drop_what_passes(self, state: AudioState, chunk: MelChunk) -> None:
        """Drop a cache that would pass the positions; the overlap counts, too."""
        if state.num_frames and state.num_frames + _after_conv(chunk) >= self.config.max_source_positions:
            state.reset()

    def _make_room(self, state: AudioState, chunk: MelChunk) -> None:
        """Reserve memory for the chunk."""
        self._drop_what_passes(state, chunk)
        needed = state.num_frames + len(kept_frames(chunk))
        if state.kv is not None and state.kv.shape[3] >= needed:
            return
        heads = self.config.encoder_attention_heads
        doubled = min(2 * state.num_frames, self.config.max_source_positions)
        shape = (self.config.encoder_layers, 2, heads, max(needed, doubled), self.config.d_model // heads)
        grown = self.apm.conv1.weight.new_zeros(shape)
        if state.kv is not None:
            grown[:, :, :, : state.num_frames] = state.kv[:, :, :, : state.num_frames]
        state.kv = grown

    def _project(self, x: Tensor, lens: Sequence[int]) -> list[Tensor]:
        return self._pool(self.audio_projection_layer(self.apm.layer_norm(x)), lens)

    def pool(self, embeds: Tensor) -> Tensor:
        """Average `pool_step` embeddings into one. What is less than that gives one, too, which means nothing."""
        step = self.config.pool_step
        padded = F.pad(embeds.transpose(1, 2), (0, step - 1))
        return F.avg_pool1d(padded, step).transpose(1, 2)

    def _pool(self, embeds: Tensor, lens: Sequence[int]) -> list[Tensor]:
        """The tokens of each row; the rest of it is dropped."""
        step, pooled = self.config.pool_step, self.pool(embeds)
        return [pooled[row, : length // step] for row, length in enumerate(lens)]


def _after_conv(chunk: MelChunk) -> int:
    return (chunk.frames.shape[1] + 1) // 2


def kept_frames(chunk: MelChunk) -> range:
    """Frames after the convolutions that belong to the chunk; the overlap is halved like the frames, rounded up."""
    return range((chunk.prefix_extra + 1) // 2, _after_conv(chunk) - (chunk.suffix_extra + 1) // 2)


@dataclass(frozen=True, slots=True)
class _Grown:
    """Memory in the sessions' own caches, which have room for the new frames."""

    states: Sequence[AudioState]
    lens: Sequence[int]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Session by session: to bring unequal pasts to one length takes longer than a call for each (16 sessions of
        `nano` on one core, with all around it: 5.3 ms a session, so 3.6)."""
        mixed = []
        for row, (state, length) in enumerate(zip(self.states, self.lens, strict=True)):
            assert state.kv is not None
            past = state.kv[layer, :, :, : state.num_frames + length]
            past[0, :, state.num_frames :] = k[row, :, :length]
            past[1, :, state.num_frames :] = v[row, :, :length]
            mixed.append(F.scaled_dot_product_attention(q[row, None], past[0, None], past[1, None]))
        return torch.cat(mixed)
