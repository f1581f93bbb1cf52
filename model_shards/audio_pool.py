"""The audio encoder with its sessions' pasts resident on the device, so that a window of many is one program.

For a GPU: a session's keys and values have a slot for as long as it is open, and a second of sound is encoded by one
launch (`Captured`), whatever was heard before. What differs between seconds is one small tensor of numbers.

Rule: rows are padded to one length. The slot's column NOWHERE takes what padding leaves, and is never seen; blank rows
of a program have slot 0 for themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from model_shards.audio import AudioEncoder, AudioState, kept_frames
from model_shards.mel import MelChunk
from model_shards.programs import LADDER, ladder_to
from model_shards.shapes import ByShape

NOWHERE: Final = -1  # the last column of a slot
WINDOW_FRAMES: Final = 104  # mel frames of a second with those that the convolutions see of its neighbours
KEYS_MULTIPLE: Final = 16  # elsewhere, torch's kernels copy an attention mask in each layer


class ResidentAudio:
    """An encoder, and room for so many sessions."""

    def __init__(self, encoder: AudioEncoder, num_sessions: int, ladder: Sequence[int] = LADDER) -> None:
        """Takes 2 * layers * width values per session and position: 143 MB a session at the released size."""
        config, weight = encoder.config, encoder.apm.conv1.weight
        self._encoder = encoder
        self.num_positions = -(-(config.max_source_positions + 1) // KEYS_MULTIPLE) * KEYS_MULTIPLE
        head_dim = config.d_model // config.encoder_attention_heads
        shape = (config.encoder_layers, num_sessions + 1, self.num_positions, config.encoder_attention_heads, head_dim)
        self._keys, self._values = weight.new_zeros(shape), weight.new_zeros(shape)
        self._free = list(range(1, num_sessions + 1))
        self.ladder = ladder_to(min(num_sessions, ladder[-1]), ladder)  # batch sizes of the programs
        self._run = ByShape(self._encode, lambda _, mel, __: mel.shape[2] == WINDOW_FRAMES, self.ladder)

    def begin(self) -> AudioState | None:
        """Room for a session; None where there is none."""
        return AudioState(slot=self._free.pop()) if self._free else None

    def end(self, state: AudioState) -> None:
        """Its room is free again. Call it once."""
        assert state.slot is not None
        self._free.append(state.slot)

    def encode(self, batch: Sequence[tuple[AudioState, MelChunk]]) -> list[Tensor]:
        """As `AudioEncoder.encode`, of sessions that have room here and chunks that have frames to keep."""
        embeds: list[Tensor] = []
        for start in range(0, len(batch), self.ladder[-1]):
            embeds += self._encode_some(batch[start : start + self.ladder[-1]])
        return embeds

    def warm_up(self) -> None:
        """Make the programs of all sizes now, the largest first, and not when a session needs them."""
        for size in reversed(self.ladder):
            states = [state for state in (self.begin() for _ in range(size)) if state is not None]
            self.encode([(state, MelChunk(torch.zeros(80, WINDOW_FRAMES), 0, 2, 2)) for state in states])
            for state in states:
                self.end(state)

    def _encode_some(self, batch: Sequence[tuple[AudioState, MelChunk]]) -> list[Tensor]:
        width = max(WINDOW_FRAMES, *(chunk.frames.shape[1] for _, chunk in batch))
        mel = torch.stack([F.pad(chunk.frames, (0, width - chunk.frames.shape[1])) for _, chunk in batch])
        rows = [_Row.of(state, chunk) for state, chunk in batch]
        most = max(WINDOW_FRAMES // 2 - 2, *(row.kept for row in rows))
        device = self._keys.device
        (embeds,) = self._run(most, mel.to(device, non_blocking=True), torch.tensor(rows).to(device, non_blocking=True))
        for (state, _), row in zip(batch, rows, strict=True):
            state.num_frames += row.kept
        step = self._encoder.config.pool_step
        return [tokens[: row.kept // step] for tokens, row in zip(embeds.clone(), rows, strict=True)]

    def _encode(self, most: int, mel: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """On the device: no value is looked at on the host. Embeddings [rows, tokens, embed_dim].

        most: frames that are kept of a row, at most. A blank row's numbers are zeros.
        """
        encoder = self._encoder
        lens, first, kept, start, slot = rows.unbind(dim=1)
        frames = encoder.apm.convolve(mel, lens)
        column = torch.arange(most, device=mel.device)
        x = frames.take_along_dim((first[:, None] + column).clamp(max=frames.shape[1] - 1)[..., None], dim=1)
        positions = start[:, None] + column
        x = x + encoder.apm.embed_positions(positions.clamp(max=encoder.config.max_source_positions - 1))
        # A blank row keeps nothing; it must see something all the same, or its softmax would be of nothing.
        is_new = (column < kept[:, None]) | (slot == 0)[:, None]
        columns = torch.where(is_new, positions, self.num_positions + NOWHERE)
        ends = torch.where(slot == 0, most, start + kept)
        visible = torch.arange(self.num_positions, device=mel.device) < ends[:, None]
        write = (slot[:, None] * self.num_positions + columns).flatten()
        memory = _Slots(self._keys, self._values, slot, write, visible[:, None, None])
        embeds = encoder.audio_projection_layer(encoder.run_layers(x, memory))
        return (encoder.pool(embeds),)


class _Row(NamedTuple):
    """What a program is told of a chunk."""

    num_frames: int
    first: int  # after the convolutions, that belongs to the chunk
    kept: int
    start: int  # its position
    slot: int

    @classmethod
    def of(cls, state: AudioState, chunk: MelChunk) -> _Row:
        assert state.slot is not None
        kept = kept_frames(chunk)
        return cls(chunk.frames.shape[1], kept.start, len(kept), state.num_frames, state.slot)


class _Slots(NamedTuple):
    """Memory in slots [layers, slots, positions, heads, head_dim].

    write: (rows * new,) in slots and positions as one. visible: (rows, 1, 1, positions).
    """

    keys: Tensor
    values: Tensor
    slot: Tensor
    write: Tensor
    visible: Tensor

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._extend(self.keys[layer], k), self._extend(self.values[layer], v)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.visible)

    def _extend(self, pool: Tensor, new: Tensor) -> Tensor:
        pool.flatten(0, 1).index_copy_(0, self.write, new.transpose(1, 2).flatten(0, 1))
        return pool.index_select(0, self.slot).transpose(1, 2)
