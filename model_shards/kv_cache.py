"""Keys and values of all sessions of a replica, in pages.

Rule: a page is free, or belongs to one sequence, or to several that begin with the same tokens; only this file moves
pages. Nobody writes into a page that others have, too: whoever is to write takes copies first (`own`).
Rule: keys are stored rotated (RoPE) for the position at which their token lies in its own sequence. Whoever moves
tokens to other positions does it here, because the keys must turn with them.

A pool is a fixed piece of memory: sessions come and go, the pool neither grows nor shrinks. Whatever needs more pages
than are free raises KvCacheFull before anything has changed.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from model_shards.config import LlmConfig
from model_shards.errors import ModelError
from model_shards.pages import Pages

FP8: Final = torch.float8_e4m3fn
FP8_MAX: Final = 448.0


class KvCacheFull(ModelError):
    """Not enough free pages; nothing has changed. Try later, or with fewer sessions."""


@dataclass(frozen=True, slots=True)
class KvShape:
    """What one token leaves in the cache."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float

    @staticmethod
    def of(config: LlmConfig) -> KvShape:
        return KvShape(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, config.rope_theta)

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return self.num_layers * self.num_kv_heads * self.head_dim * 2 * dtype.itemsize


class KvSequence:
    """The tokens of one session: `length` of them, in `pages` (the last one may be partly filled).

    Owned by the session, changed by the KvCache only.
    """

    __slots__ = ("length", "pages")

    def __init__(self) -> None:
        self.pages: array[int] = array("q")
        self.length = 0


class KvCache:
    """A pool of `num_pages` pages of `page_size` tokens.

    32 tokens a page waste 16 tokens per session on average, and keep the page table of an 8192-token session at 256
    entries. Gathering doesn't care: 8192 tokens take 54 µs with pages of 16, 32 or 64 (one CPU core, 2 heads of 32).
    """

    def __init__(
        self,
        shape: KvShape,
        num_pages: int,
        page_size: int = 32,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_pages < 1 or page_size < 1:
            raise ModelError(f"KV cache: {num_pages} pages of {page_size} tokens hold nothing; give it more memory")
        self.shape = shape
        self.page_size = page_size
        self.num_pages = num_pages
        self.dtype = dtype
        self.device = torch.device(device)
        size = (shape.num_layers, num_pages, page_size, shape.num_kv_heads, shape.head_dim)
        self._keys = _zeros(size, dtype, self.device)
        self._values = _zeros(size, dtype, self.device)
        self._pages = Pages(num_pages)
        exponent = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device=device) / shape.head_dim
        self._inv_freq = 1.0 / shape.rope_theta**exponent

    @staticmethod
    def of_bytes(
        shape: KvShape,
        num_bytes: int,
        page_size: int = 32,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KvCache:
        """A pool that takes at most `num_bytes`. Raises ModelError when not even a page fits."""
        return KvCache(shape, num_bytes // (shape.bytes_per_token(dtype) * page_size), page_size, dtype, device)

    @property
    def num_free_pages(self) -> int:
        return self._pages.num_free

    @property
    def num_used_pages(self) -> int:
        return self.num_pages - self._pages.num_free

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def can_admit(self, num_tokens: int) -> bool:
        """Whether a new sequence of this many tokens would fit now."""
        return self.pages_for(num_tokens) <= self._pages.num_free

    def reserve(self, requests: Sequence[tuple[KvSequence, int]]) -> None:
        """Give every sequence the pages for that many tokens more, without adding tokens: all of them or none.

        Raises KvCacheFull. The sequences must be distinct.
        """
        self._make_room([(sequence, sequence.length, more) for sequence, more in requests])

    def fork(self, source: KvSequence, length: int, sequence: KvSequence) -> None:
        """The empty sequence begins with the first `length` tokens of `source`: the same pages, no copies."""
        assert sequence.length == 0 and not sequence.pages and length <= source.length
        sequence.pages = source.pages[: self.pages_for(length)]
        sequence.length = length
        self._pages.share(sequence.pages)

    def own(self, requests: Sequence[tuple[KvSequence, int]]) -> None:
        """Let every sequence be written from that position on: it gets copies of pages that others have, too.

        All of them or none. Raises KvCacheFull. The sequences must be distinct.
        """
        self._make_room([(sequence, start, 0) for sequence, start in requests])

    def is_own(self, sequence: KvSequence, start: int) -> bool:
        """Whether nobody else has a page of the tokens from `start` on."""
        return not self._pages.shared(sequence.pages, start // self.page_size)

    def _make_room(self, requests: Sequence[tuple[KvSequence, int, int]]) -> None:
        """Each is a sequence, the position from which on it is written, and tokens more."""
        assert len({id(sequence) for sequence, _, _ in requests}) == len(requests)
        missing = [max(0, self.pages_for(s.length + more) - len(s.pages)) for s, _, more in requests]
        shared = [self._pages.shared(s.pages, start // self.page_size) for s, start, _ in requests]
        needed = sum(missing) + sum(map(len, shared))
        if needed > self.num_free_pages:
            raise KvCacheFull(
                f"KV cache: {needed} pages of {self.page_size} tokens wanted for {len(requests)} sequences, "
                f"{self.num_free_pages} of {self.num_pages} are free"
            )
        for (sequence, _, _), count, indices in zip(requests, missing, shared, strict=True):
            for index in indices:
                self._replace_page(sequence, index)
            sequence.pages.extend(self._pages.take() for _ in range(count))

    def _replace_page(self, sequence: KvSequence, index: int) -> None:
        old, new = sequence.pages[index], self._pages.take()
        self._keys[:, new] = self._keys[:, old]
        self._values[:, new] = self._values[:, old]
        sequence.pages[index] = new
        self._pages.give_back(old)

    def extend(self, requests: Sequence[tuple[KvSequence, int]]) -> None:
        """Lengthen every sequence by that many tokens, whose keys and values are to be written: all or none.

        Raises KvCacheFull. The sequences must be distinct.
        """
        self.reserve(requests)
        for sequence, more in requests:
            sequence.length += more

    def truncate(self, sequence: KvSequence, length: int) -> None:
        """Keep the first `length` tokens, and no page beyond them."""
        assert 0 <= length <= sequence.length
        sequence.length = length
        while len(sequence.pages) > self.pages_for(length):
            self._pages.give_back(sequence.pages.pop())

    def free(self, sequence: KvSequence) -> None:
        """Give all pages back; the sequence is empty and may be used again."""
        self.truncate(sequence, 0)

    def drop(self, sequence: KvSequence, start: int, stop: int) -> None:
        """Forget the tokens [start, stop); later tokens move up, and their keys turn to their new positions."""
        self.move_tail(sequence, stop, start)

    def move_tail(self, sequence: KvSequence, start: int, new_start: int) -> None:
        """Move the tokens from `start` to the end, so that they begin at `new_start`; turn their keys accordingly.

        Forward, this opens a gap [start, new_start), whose keys and values are undefined until written. Backward, the
        tokens [new_start, start) are forgotten. Raises KvCacheFull (forward, or where others have the pages, too).

        A key is turned by the difference of its positions, in float32; in a pool of fewer bits every move rounds once.
        """
        assert 0 <= start <= sequence.length and new_start >= 0
        shift = new_start - start
        written = min(start, new_start) if start < sequence.length else sequence.length
        self._make_room([(sequence, written, max(shift, 0))])
        old = self._slots(sequence, start, sequence.length)
        new = self._slots(sequence, new_start, sequence.length + shift)
        cos, sin = self.rotation(torch.tensor([shift], device=self.device), torch.float32)
        for keys, values in zip(self._keys, self._values, strict=True):
            write(keys, new, rotate(taken(keys.flatten(0, 1), old, torch.float32), cos, sin))
            write(values, new, taken(values.flatten(0, 1), old, torch.float32))
        if shift > 0:
            sequence.length += shift
        else:
            self.truncate(sequence, sequence.length + shift)

    @property
    def pools(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all layers, each [layers, num_pages, page_size, num_kv_heads, head_dim]."""
        return self._keys, self._values

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, each [num_pages, page_size, num_kv_heads, head_dim]: the pool itself."""
        return self._keys[index], self._values[index]

    def read(self, sequence: KvSequence, layer: int) -> tuple[Tensor, Tensor]:
        """Copies of the keys (rotated) and values of a sequence, each [length, num_kv_heads, head_dim]."""
        slots = self._slots(sequence, 0, sequence.length)
        keys, values = (taken(pool.flatten(0, 1), slots, pool.dtype) for pool in self.layer(layer))
        return keys, values

    def block_table(self, sequences: Sequence[KvSequence], num_tokens: int) -> Tensor:
        """The pages of the first `num_tokens` tokens of each sequence: [num_sequences, pages], int64, on the CPU.

        Shorter sequences are filled up with page 0, whose content is to be masked.
        """
        table = torch.zeros(len(sequences), self.pages_for(num_tokens), dtype=torch.int64)
        for row, sequence in zip(table, sequences, strict=True):
            pages = sequence.pages[: len(row)]
            if pages:
                row[: len(pages)] = torch.frombuffer(pages, dtype=torch.int64)
        return table

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine for `rotate`: [n, 1, head_dim / 2] for n positions, computed in float32."""
        angles = (positions.to(torch.float32)[:, None] * self._inv_freq)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _slots(self, sequence: KvSequence, start: int, stop: int) -> Tensor:
        """Where the tokens [start, stop) lie in a layer's pool: [stop - start], on the pool's device."""
        positions = torch.arange(start, stop)
        table = self.block_table([sequence], stop)[0]
        slots = table[positions // self.page_size] * self.page_size + positions % self.page_size
        return slots.to(self.device)


def write(pool: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Rows [n, kv_heads, head_dim] to their places in a layer's pool, as its type has them."""
    if pool.dtype == FP8:  # beyond its range it knows no number; and torch copies bytes everywhere
        rows = rows.clamp(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8)
        pool = pool.view(torch.uint8)
    pool.flatten(0, 1).index_copy_(0, slots, rows.to(pool.dtype))


def taken(pool: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Copies of the rows or pages at `indices` of a pool [rows or pages, …]."""
    if pool.dtype == FP8:
        return pool.view(torch.uint8).index_select(0, indices).view(FP8).to(dtype)
    return pool.index_select(0, indices).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + head_dim / 2) of x: [n, heads, head_dim], by angles [n or 1, 1, head_dim / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _zeros(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not empty: padded positions are masked, but masking can't undo a NaN.

    On a CPU the memory is the system's untouched zero pages: a pool costs what is used of it.
    """
    if device.type != "cpu":
        return torch.zeros(*size, dtype=dtype, device=device)
    raw = torch.from_numpy(np.zeros(math.prod(size) * dtype.itemsize, dtype=np.uint8))
    return raw.view(dtype).view(*size)
