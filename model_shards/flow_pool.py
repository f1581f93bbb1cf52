"""The flow with its caches resident on the device, so that a window of many sessions is one program of fixed shapes.

For a GPU: to gather caches session by session, and to launch some 3500 kernels one by one, costs it more than what they
compute. Here a frame's keys and values stay where they were written, and all that differs between windows is one tensor
of integers, the plan: which codes, which places, which noise.

Rules:
- A frame lies at one place of a pool for as long as a turn, or a voice, sees it. What a turn sees is a list of places;
  the official trimming is done on the lists, by the same `extend`, and nothing is copied.
- Each row has room for WINDOW_CODES new codes. Shorter windows, and a turn's last one, are padded: padding is masked as
  a key, and left out of what the convolutions remember.
- Place NOWHERE takes what padding leaves, and is never seen. A program's blank rows see place BLANK, and only that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model_shards.flow import (
    HISTORY_FRAMES,
    WINDOW_CODES,
    Flow,
    FlowCache,
    FlowHistory,
    Lengths,
    Release,
    extend,
)
from model_shards.programs import LADDER, Captured, ladder_to

NOWHERE: Final = 0
BLANK: Final = 1
NUM_RESERVED: Final = 2
KEYS_MULTIPLE: Final = 16  # elsewhere, torch's kernels copy an attention mask in each layer
PER_RATE: Final = ("codes", "frames of the encoder", "frames of the DiT")
"""What there is a pool of. A plan, too, has a table of each, in this order."""


@dataclass(frozen=True, slots=True)
class _ResidentVoice:
    places: FlowHistory  # each frame is the number of its place
    slot: int  # of the convolutions' inputs
    number: int


@dataclass(slots=True)
class ResidentTurn:
    """A turn whose caches are resident. cache: as FlowCache, but each frame is the number of its place."""

    voice: _ResidentVoice
    cache: FlowCache
    slot: int
    owned: list[set[int]] = field(default_factory=lambda: [set() for _ in PER_RATE])


class ResidentChunk(NamedTuple):
    """Codes that go through the flow at once; unless `last`, the final ones are only looked at."""

    turn: ResidentTurn
    codes: Sequence[int]
    last: bool


class ResidentFlow:
    """A flow, with some voices and room for so many turns at once. It keeps the voices' histories alive.

    voices: of each its history, and its speaker (1, spk_embed_dim).
    """

    def __init__(
        self,
        flow: Flow,
        release: Release,
        voices: Sequence[tuple[FlowHistory, Tensor]],
        num_turns: int,
        ladder: Sequence[int] = LADDER,
    ) -> None:
        self.flow = flow
        self._release = release
        histories = [history for history, _ in voices]
        self._room = _Room(flow, [history.mel_kv.shape[-2] for history in histories], num_turns)
        self._pools = _Pools(histories[0], self._room.places(), num_turns + len(voices) + 1)
        self._voices = {id(history): self._place(history, number) for number, history in enumerate(histories)}
        self._histories = histories  # so that no other object gets the identity of one
        self._speakers = torch.cat([flow.spk_embed_affine_layer(F.normalize(speaker, dim=1)) for _, speaker in voices])
        self._noise = flow.decoder.rand_noise[0].T.contiguous()
        self._free_slots = list(range(len(voices) + 1, len(voices) + 1 + num_turns))
        self.ladder = ladder_to(min(num_turns, ladder[-1]), ladder)  # batch sizes of the programs
        self._program = Captured(self._run, self._blank_plan, self.ladder)

    def begin(self, voice: FlowHistory) -> ResidentTurn | None:
        """Room for a turn in this voice; None where there is none, or the voice is not resident."""
        resident = self._voices.get(id(voice))
        if resident is None or not self._free_slots:
            return None
        return ResidentTurn(resident, FlowCache(resident.places, _as_history([[], [], []]), 0), self._free_slots.pop())

    def end(self, turn: ResidentTurn) -> None:
        """Its room is free again. Call it once."""
        for pool, owned in zip(self._pools.places, turn.owned, strict=True):
            pool.release(owned)
        self._free_slots.append(turn.slot)

    def fits(self, codes: Sequence[int], last: bool) -> bool:
        """Whether a row has room for such a window."""
        return self.flow.num_frames(len(codes), last) <= self._room.num_frames

    def speak(self, batch: Sequence[ResidentChunk]) -> list[Tensor]:
        """Mel (mels, frames) of a chunk of each turn; moves the turns on.

        The batch is of any size; its chunks may differ in length, and be last or not. After a last one, its turn ends.
        """
        largest = self.ladder[-1]
        mels: list[Tensor] = []
        for start in range(0, len(batch), largest):
            some = batch[start : start + largest]
            (mel,) = self._program(self._plan(some))
            frames = [self.flow.num_frames(len(chunk.codes), chunk.last) for chunk in some]
            mels += [row[:, :num] for row, num in zip(mel.clone(), frames, strict=True)]
        return mels

    # ---- on the host -------------------------------------------------------------------------------------------------

    def _plan(self, batch: Sequence[ResidentChunk]) -> Tensor:
        """A row for each chunk; moves the turns on."""
        rows, unseen = [], []
        for chunk in batch:
            new = self._take(chunk)
            rows.append(self._room.row(chunk, new))
            if not chunk.last:
                chunk.turn.cache = extend(chunk.turn.cache, _as_history(new), self._release)
            unseen.append(_unseen(chunk.turn, new))
        # Not before: what one row sees for the last time, another one must not overwrite in the same run.
        for places_per_rate in unseen:
            for pool, places in zip(self._pools.places, places_per_rate, strict=True):
                pool.release(places)
        return torch.from_numpy(np.stack(rows))

    def _take(self, chunk: ResidentChunk) -> list[list[int]]:
        num_frames = self.flow.num_frames(len(chunk.codes), chunk.last)
        sizes = (num_frames // self.flow.config.up_stride, num_frames, num_frames)
        return [pool.take(size) for pool, size in zip(self._pools.places, sizes, strict=True)]

    def _blank_plan(self, num_rows: int) -> tuple[Tensor]:
        return (self._room.blank_plan(num_rows).to(self._noise.device),)

    def _place(self, history: FlowHistory, number: int) -> _ResidentVoice:
        """Copy a voice's history to places of its own, which are never released."""
        kept = (history.code_kv, history.mel_kv, history.dit_kv)
        places = [pool.take(kv.shape[-2]) for pool, kv in zip(self._pools.places, kept, strict=True)]
        for pool, at, kv in zip(self._pools.kv, places, kept, strict=True):
            pool[..., torch.tensor(at, device=kv.device), :, :] = kv.transpose(-2, -3)
        slot = number + 1
        self._pools.encoder_conv[slot] = history.encoder_conv
        self._pools.dit_conv[..., slot, :, :] = history.dit_conv
        return _ResidentVoice(_as_history(places), slot, number)

    # ---- on the device: nothing here looks at a value on the host ----------------------------------------------------

    def _run(self, plan: Tensor) -> tuple[Tensor, ...]:
        """Mel (rows, mels, frames of a whole window)."""
        flow, pools, room = self.flow, self._pools, self._room
        codes, numbers, by_code, by_frame, by_dit_frame = torch.split(plan, room.columns, dim=1)
        seen, noise_start, voice, read, write = numbers.unbind(dim=1)
        new = (by_code[:, -WINDOW_CODES:] != NOWHERE).sum(dim=1)
        hidden, conv = flow.encoder(
            flow.input_embedding(codes),
            _Paged(pools.kv[0], _Paging.of(by_code, WINDOW_CODES, pools.kv[0])),
            _Paged(pools.kv[1], _Paging.of(by_frame, room.num_frames, pools.kv[1])),
            pools.encoder_conv.index_select(0, read),
            last=False,
            lengths=Lengths(seen, new),
        )
        pools.encoder_conv.index_copy_(0, write, conv)
        mu = flow.encoder_proj(hidden)
        condition = flow.decoder.condition(mu, self._speakers.index_select(0, voice), torch.zeros_like(mu))
        noise = self._noise[noise_start[:, None] + torch.arange(room.num_frames, device=plan.device)]
        paging = _Paging.of(by_dit_frame, room.num_frames, pools.kv[2][0])
        steps = _ResidentSteps(pools, paging, read, write)
        num_steps = len(pools.dit_conv)
        mel = flow.decoder.integrate(noise, condition, steps, num_steps, new * flow.config.up_stride)
        return (mel.transpose(1, 2),)


class _Room:
    """How much a row of a plan holds, and how it is written."""

    NUMBERS: Final = 5  # codes that count, where the noise begins, voice, slot to read, slot to write

    def __init__(self, flow: Flow, prompts: Sequence[int], num_turns: int) -> None:
        """prompts: mel frames of each voice."""
        self.num_frames = flow.config.up_stride * WINDOW_CODES
        self._stride = flow.config.up_stride
        self._prompts = prompts
        self._num_turns = num_turns
        self._num_codes = WINDOW_CODES + flow.config.pre_lookahead_len
        num_keys = max(prompts) + HISTORY_FRAMES + self.num_frames
        by_code, by_frame = (-(-num // KEYS_MULTIPLE) * KEYS_MULTIPLE for num in (num_keys // self._stride, num_keys))
        self._tables = (by_code, by_frame, by_frame)
        self._new = (WINDOW_CODES, self.num_frames, self.num_frames)

    @property
    def columns(self) -> list[int]:
        """Of a plan: codes, numbers, and of each rate the places that are seen, those of what is new at the end."""
        return [self._num_codes, self.NUMBERS, *self._tables]

    def places(self) -> tuple[int, int, int]:
        """How many each pool needs."""
        encoder = self._num_turns * (HISTORY_FRAMES + self.num_frames) + sum(self._prompts)
        dit = self._num_turns * (max(HISTORY_FRAMES, *self._prompts) + self.num_frames) + sum(self._prompts)
        return NUM_RESERVED + encoder // self._stride, NUM_RESERVED + encoder, NUM_RESERVED + dit

    def row(self, chunk: ResidentChunk, new: Sequence[Sequence[int]]) -> np.ndarray:
        turn, cache = chunk.turn, chunk.turn.cache
        mel_seen = _numbers(cache.mel_kv())
        seen = (_numbers(cache.code_kv()), mel_seen, _numbers(cache.dit_kv(0)))
        read = turn.slot if cache.num_frames else turn.voice.slot
        # Once a history is trimmed, the noise no longer moves on (as in FlowMatching).
        numbers = (len(chunk.codes), len(mel_seen), turn.voice.number, read, turn.slot)
        codes = np.zeros(self._num_codes, np.int64)
        codes[: len(chunk.codes)] = chunk.codes
        return np.concatenate([codes, np.array(numbers), *map(_table, self._tables, self._new, seen, new)])

    def blank_plan(self, num_rows: int) -> Tensor:
        none = np.zeros(0, np.int64)
        tables = [_table(size, new, none, [BLANK] * new) for size, new in zip(self._tables, self._new, strict=True)]
        row = np.concatenate([np.zeros(self._num_codes + self.NUMBERS, np.int64), *tables])
        return torch.from_numpy(np.tile(row, (num_rows, 1)))


def _table(size: int, num_new: int, seen: np.ndarray, new: Sequence[int]) -> np.ndarray:
    """Places by column: what is seen ends where the new ones begin; the rest is NOWHERE."""
    table = np.full(size, NOWHERE, np.int64)
    start = size - num_new
    table[start - len(seen) : start] = seen
    table[start : start + len(new)] = new
    return table


def _numbers(pieces: Iterable[Tensor]) -> np.ndarray:
    """The places of a history that holds places."""
    return np.concatenate([piece.numpy()[:, 0] for piece in pieces])


def _as_history(places: Sequence[Sequence[int]]) -> FlowHistory:
    codes, frames, dit_frames = (torch.tensor(numbers, dtype=torch.int64)[:, None] for numbers in places)
    nothing = torch.empty(0)  # the convolutions' inputs are in slots
    return FlowHistory(codes, frames, nothing, dit_frames[None], nothing)


def _unseen(turn: ResidentTurn, new: Sequence[Sequence[int]]) -> list[set[int]]:
    """The places that a turn, which has moved on, owned or has taken, and that it sees no more. It owns the others."""
    kept, unseen = turn.cache.turn, []
    for index, places in enumerate((kept.code_kv, kept.mel_kv, kept.dit_kv[0])):
        held = turn.owned[index].union(new[index])
        turn.owned[index] = held.intersection(_numbers([places]).tolist())
        unseen.append(held - turn.owned[index])
    return unseen


class _Places:
    """Which places of a pool are free."""

    def __init__(self, size: int) -> None:
        self._free = list(range(NUM_RESERVED, size))

    def take(self, num: int) -> list[int]:
        assert num <= len(self._free), "there is room for every turn that may begin"
        taken = self._free[len(self._free) - num :]
        del self._free[len(self._free) - num :]
        return taken

    def release(self, places: Iterable[int]) -> None:
        self._free.extend(places)


class _Pools:
    """Keys and values by place, and the convolutions' inputs by slot; slot 0 is that of blank rows.

    kv: as FlowHistory has them, but for the two last dimensions but one: (…, places, heads, head_dim).
    encoder_conv: (slots, hidden, frames). dit_conv: (steps, depth, branches, slots, 2 * hidden, frames).
    """

    def __init__(self, like: FlowHistory, places: Sequence[int], num_slots: int) -> None:
        self.places = [_Places(size) for size in places]
        self.kv = [
            kv.new_zeros(*kv.shape[:-3], size, kv.shape[-3], kv.shape[-1])
            for size, kv in zip(places, (like.code_kv, like.mel_kv, like.dit_kv), strict=True)
        ]
        self.encoder_conv = like.encoder_conv.new_zeros(num_slots, *like.encoder_conv.shape)
        *lead, channels, frames = like.dit_conv.shape
        self.dit_conv = like.dit_conv.new_zeros(*lead, num_slots, channels, frames)


class _Paging(NamedTuple):
    """Where the rows of a batch read and write in a layer, whose groups (keys, values, of each branch) and places are
    one dimension.

    read:    (groups * rows * keys,). write: (groups * rows * new,).
    visible: (branches * rows, keys).
    """

    read: Tensor
    write: Tensor
    visible: Tensor

    @classmethod
    def of(cls, table: Tensor, num_new: int, pool: Tensor) -> _Paging:
        """table: (rows, keys) places. pool: (layers, 2, places, …) or (layers, 2, branches, places, …)."""
        num_groups, num_places = pool.shape[1:-3].numel(), pool.shape[-3]
        groups = torch.arange(num_groups, device=table.device)[:, None, None] * num_places
        visible = (table != NOWHERE).repeat(num_groups // 2, 1)
        return cls((groups + table).flatten(), (groups + table[:, -num_new:]).flatten(), visible)


class _Paged(NamedTuple):
    """A Memory whose frames lie in a pool (layers, groups, places, heads, head_dim)."""

    pool: Tensor
    paging: _Paging

    @property
    def num_keys(self) -> int:
        return self.paging.visible.shape[1]

    def layers(self) -> list[_PagedLayer]:
        return [_PagedLayer(layer.flatten(0, -3), self.paging) for layer in self.pool]


class _PagedLayer(NamedTuple):
    frames: Tensor  # (groups * places, heads, head_dim)
    paging: _Paging

    @property
    def visible(self) -> Tensor:
        return self.paging.visible

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        new = torch.stack((keys.transpose(1, 2), values.transpose(1, 2)))  # (2, rows, new, heads, head_dim)
        self.frames.index_copy_(0, self.paging.write, new.flatten(0, 2))
        seen = self.frames.index_select(0, self.paging.read).view(2, *self.visible.shape, *self.frames.shape[1:])
        keys, values = seen.transpose(2, 3)
        return keys, values


class _ResidentSteps(NamedTuple):
    """EulerMemory in the pools."""

    pools: _Pools
    paging: _Paging
    read: Tensor
    write: Tensor

    def at(self, step: int) -> tuple[_Paged, Tensor]:
        return _Paged(self.pools.kv[2][step], self.paging), self.pools.dit_conv[step].index_select(2, self.read)

    def leave(self, step: int, conv: Tensor) -> None:
        self.pools.dit_conv[step].index_copy_(2, self.write, conv)
