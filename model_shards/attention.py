"""Attention of many sequences at once, whose keys and values lie in pages of a KvCache: one question, three kernels.

The question: each sequence brings some new tokens, whose keys and values are in its pages already. The last of them
looks at all tokens up to itself, each one before it at one token less. Where new tokens overwrite earlier ones, the
tokens behind them are not there for them.

- sdpa: torch's attention, on any device. The pages are copied together, and sequences of similar size share a call;
  in a decode step that is captured, all share one.
- varlen: torch's ragged attention (`torch.nn.attention.varlen`), which reads the pages where they lie.
- flash: the same of the package flash-attn.

What the last two are handed is held by a plain reference of what their documents say: tests/support/kernels.py.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from model_shards.errors import ModelError
from model_shards.kv_cache import KvCache, KvSequence, taken, write

AttentionName = Literal["sdpa", "varlen", "flash"]
PAGE_SIZES: Final[dict[AttentionName, int]] = {"sdpa": 32, "varlen": 256, "flash": 256}
"""Tokens of a page. 256: the kernels' pages must be a multiple of it."""
HALF: Final = (torch.bfloat16, torch.float16)  # what the ragged kernels compute in

# Attention of n new tokens over a context of t costs about t * (8 + n) units (the 8: gathering keys and values), a
# call of its own costs about 4096 units more (measured on a CPU core, head_dim 32: 25 µs against 6 ns per unit).
GATHER_UNITS: Final = 8
CALL_UNITS: Final = 4096


@dataclass(frozen=True, slots=True)
class Span:
    """The new tokens of one sequence: rows [row, row + num) of the concatenation, positions from `start`."""

    sequence: KvSequence
    row: int
    start: int
    num: int

    @property
    def context(self) -> int:
        """Tokens that the last of them looks at, itself included."""
        return self.start + self.num


class Attention(Protocol):
    """What all layers of one forward ask.

    query: [tokens, heads, head_dim], of all sequences beside each other. keys, values: a layer's pool [pages,
    page_size, kv_heads, head_dim]. Returns [tokens, heads * head_dim].
    """

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor: ...


Prepare = Callable[[KvCache, Sequence[Span], int, torch.dtype], Attention]
"""From the cache, the spans, the query heads per key head and the queries' dtype."""


# ---- torch's attention -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences that share one padded attention call: b sequences, n queries and t keys each."""

    rows: Tensor  # [b * n] tokens of the concatenation; a padded query repeats its sequence's last one
    pages: Tensor  # [b * t / page_size]
    mask: Tensor  # [b, 1, queries per kv head * n, t], 0 or -inf


@dataclass(frozen=True, slots=True)
class Padded:
    """Attention in groups of sequences of similar size, padded inside a group: that costs less than a call for each
    (8 sessions of 512 tokens that decode, on one CPU core: 0.22 ms against 0.39 ms per layer)."""

    groups: list[_Group]
    unpad: Tensor  # [tokens] their rows in the concatenated outputs of the groups

    @classmethod
    def of(cls, cache: KvCache, spans: Sequence[Span], queries_per_kv: int, dtype: torch.dtype) -> Padded:
        groups, unpad, padded = [], torch.empty(sum(span.num for span in spans), dtype=torch.int64), 0
        for members in _similar(spans):
            width = max(span.num for span in members)
            for index, span in enumerate(members):
                unpad[span.row : span.row + span.num] = torch.arange(span.num) + (padded + index * width)
            padded += len(members) * width
            groups.append(_group(cache, members, width, queries_per_kv, dtype))
        return cls(groups, unpad.to(cache.device))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it is, for `of_tensors`, where all sequences share one call; else nothing."""
        if len(self.groups) > 1:
            return ()
        (group,) = self.groups
        return group.rows, group.pages, group.mask, self.unpad

    @classmethod
    def of_tensors(cls, rows: Tensor, pages: Tensor, mask: Tensor, unpad: Tensor) -> Padded:
        return cls([_Group(rows, pages, mask)], unpad)

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        padded = torch.cat([_attend(query, group, keys, values) for group in self.groups])
        return padded.index_select(0, self.unpad)


def _similar(spans: Sequence[Span]) -> list[list[Span]]:
    """Put sequences into one call as long as the padding costs less than a call of their own."""
    groups: list[list[Span]] = []
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


def _group(cache: KvCache, spans: list[Span], width: int, queries_per_kv: int, dtype: torch.dtype) -> _Group:
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
    k = taken(keys, group.pages, query.dtype).view(b, t, kv_heads, head_dim).transpose(1, 2)
    v = taken(values, group.pages, query.dtype).view(b, t, kv_heads, head_dim).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q.permute(0, 2, 3, 1, 4).reshape(b, kv_heads, rows, head_dim), k, v, group.mask
    )
    out = out.view(b, kv_heads, -1, q.shape[1], head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(b * q.shape[1], -1)


# ---- ragged kernels --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """What a ragged kernel is told of n sequences, all int32 on the pool's device.

    cu_new:  [n + 1], where the new tokens of each begin; the last is the number of all.
    cu_used: [n + 1], the same of the tokens that they look at.
    used:    [n], tokens of each that are there for its last new one.
    pages:   [n, most pages]; what lies behind a sequence's last page is not looked at.
    """

    cu_new: Tensor
    cu_used: Tensor
    used: Tensor
    pages: Tensor
    max_new: int
    max_used: int  # at least the most of `used`

    @classmethod
    def of(cls, cache: KvCache, spans: Sequence[Span]) -> RaggedBatch:
        """The spans' rows follow each other without a gap."""
        new, used = [span.num for span in spans], [span.context for span in spans]
        pages = cache.block_table([span.sequence for span in spans], max(used))

        def placed(numbers: Sequence[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int32).to(cache.device, non_blocking=True)

        return cls(
            placed([0, *itertools.accumulate(new)]),
            placed([0, *itertools.accumulate(used)]),
            placed(used),
            pages.to(torch.int32).to(cache.device, non_blocking=True),
            max(new),
            max(used),
        )

    @classmethod
    def of_steps(cls, used: Tensor, pages: Tensor, page_size: int) -> RaggedBatch:
        """One new token each, computed where `used` and `pages` lie, and of the same shape whatever they hold."""
        cu_used = F.pad(used.cumsum(0, dtype=torch.int32), (1, 0))
        cu_new = torch.arange(len(used) + 1, dtype=torch.int32, device=used.device)
        return cls(cu_new, cu_used, used, pages, max_new=1, max_used=pages.shape[1] * page_size)


Kernel = Callable[[Tensor, Tensor, Tensor, RaggedBatch], Tensor]
"""From query, keys and values as in `Attention`, and the batch: [tokens, heads, head_dim]."""


@dataclass(frozen=True, slots=True)
class Ragged:
    """Attention by one call for all sequences, which reads the pages where they lie."""

    batch: RaggedBatch
    kernel: Kernel

    @classmethod
    def by(cls, kernel: Kernel) -> Prepare:
        def prepare(cache: KvCache, spans: Sequence[Span], queries_per_kv: int, dtype: torch.dtype) -> Attention:
            return cls(RaggedBatch.of(cache, spans), kernel)

        return prepare

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.kernel(query, keys, values, self.batch).flatten(1)


def torch_varlen(query: Tensor, keys: Tensor, values: Tensor, batch: RaggedBatch) -> Tensor:
    """num_splits 1: what a sequence gets does not depend on who else is in the batch."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        query,
        keys,
        values,
        batch.cu_new,
        batch.cu_used,
        batch.max_new,
        batch.max_used,
        window_size=(-1, 0 if batch.max_new > 1 else -1),  # a single token sees all; said so, heads share what is read
        enable_gqa=query.shape[1] != keys.shape[2],
        seqused_k=batch.used,
        block_table=batch.pages,
        num_splits=1,
    )
    assert isinstance(out, Tensor)
    return out


def flash_varlen(query: Tensor, keys: Tensor, values: Tensor, batch: RaggedBatch) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    out: Tensor = flash_attn_varlen_func(
        query,
        keys,
        values,
        cu_seqlens_q=batch.cu_new,
        cu_seqlens_k=batch.cu_used,
        max_seqlen_q=batch.max_new,
        max_seqlen_k=batch.max_used,
        causal=True,
        block_table=batch.pages,
    )
    return out


def gathered(query: Tensor, keys: Tensor, values: Tensor, batch: RaggedBatch) -> Tensor:
    """torch's attention for one new token of each sequence, over all pages of the table, filled or not: of one shape,
    so that it can be captured where no ragged kernel runs. It copies what it looks at."""
    kv_heads, head_dim = keys.shape[-2:]
    shape = len(query), batch.max_used, kv_heads, head_dim
    k, v = (taken(pool, batch.pages.flatten(), query.dtype).view(shape).transpose(1, 2) for pool in (keys, values))
    hidden = torch.arange(batch.max_used, device=query.device) >= batch.used[:, None]
    mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(hidden, float("-inf"))
    out = F.scaled_dot_product_attention(query.view(len(query), kv_heads, -1, head_dim), k, v, mask[:, None, None])
    return out.flatten(1, 2)


# ---- which one -------------------------------------------------------------------------------------------------------

KERNELS: Final[dict[AttentionName, Kernel]] = {"sdpa": gathered, "varlen": torch_varlen, "flash": flash_varlen}
"""For decode steps, which are handed the same shapes each time, so that they can be captured."""
PREPARE: Final[dict[AttentionName, Prepare]] = {
    "sdpa": Padded.of,
    "varlen": Ragged.by(torch_varlen),
    "flash": Ragged.by(flash_varlen),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What all layers of one forward share."""

    rotation: tuple[Tensor, Tensor]  # of each token's position
    slots: Tensor  # [tokens] where their keys and values go in a layer's pool
    attend: Attention

    @classmethod
    def of(
        cls, cache: KvCache, spans: Sequence[Span], prepare: Prepare, queries_per_kv: int, dtype: torch.dtype
    ) -> Plan:
        """Any number of new tokens of each sequence; the cache has room for them."""
        positions = torch.cat([torch.arange(span.start, span.context) for span in spans])
        owner = torch.repeat_interleave(torch.tensor([span.num for span in spans]))
        table = cache.block_table([span.sequence for span in spans], max(span.context for span in spans))
        slots = table[owner, positions // cache.page_size] * cache.page_size + positions % cache.page_size
        rotation = cache.rotation(positions.to(cache.device), dtype)
        return cls(rotation, slots.to(cache.device), prepare(cache, spans, queries_per_kv, dtype))

    @classmethod
    def of_steps(cls, cache: KvCache, used: Tensor, pages: Tensor, kernel: Kernel, dtype: torch.dtype) -> Plan:
        """One new token of each sequence, computed on the device alone.

        used: [n] int32, tokens of each with the new one. pages: [n, most pages] int32.
        """
        positions = (used - 1).to(torch.int64)
        page = pages.gather(1, (positions // cache.page_size)[:, None])[:, 0].to(torch.int64)
        slots = page * cache.page_size + positions % cache.page_size
        batch = RaggedBatch.of_steps(used, pages, cache.page_size)
        return cls(cache.rotation(positions, dtype), slots, Ragged(batch, kernel))

    def mix(self, query: Tensor, key: Tensor, value: Tensor, pool: tuple[Tensor, Tensor]) -> Tensor:
        """Write keys and values [tokens, kv_heads, head_dim] to a layer's pool, and attend: [tokens, all heads]."""
        write(pool[0], self.slots, key)
        write(pool[1], self.slots, value)
        return self.attend(query, *pool)


def choose_attention(
    device: str, dtype: torch.dtype, requested: str | None = None, kv_dtype: torch.dtype | None = None
) -> AttentionName:
    """`requested`, or else the fastest that runs there: flash, varlen, sdpa in this order.

    dtype: of the queries. kv_dtype: of keys and values; None: the same.
    Raises ModelError where the one that is requested can't run there, saying why.
    """
    names: tuple[AttentionName, ...] = get_args(AttentionName)
    if requested is not None and requested not in names:
        raise ModelError(f"attention: {requested!r} is none of {', '.join(names)}")
    lacks = {name: _lack(name, torch.device(device), dtype, kv_dtype or dtype) for name in names}
    for name in names if requested else ("flash", "varlen", "sdpa"):
        if name == requested and lacks[name]:
            others = ", ".join(other for other in names if not lacks[other])
            raise ModelError(f"attention: {name} {lacks[name]}; here there is {others}")
        if (requested is None or name == requested) and not lacks[name]:
            return name
    raise AssertionError("sdpa runs everywhere")


def _lack(name: AttentionName, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype) -> str:
    """Why a kernel can't run there; "" where it can."""
    if name == "sdpa":
        return ""
    if kv_dtype != dtype:  # torch 2.13: only without a block table; flash-attn 2: not at all
        return f"reads keys and values of its queries' type alone, not {str(kv_dtype).removeprefix('torch.')}"
    if device.type != "cuda":
        return f"runs on a GPU, not on {device.type}"
    if dtype not in HALF:
        return f"computes in bfloat16 or float16, not in {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs a GPU of compute capability 8.0, this one has {torch.cuda.get_device_capability(device)}"
    return (_lacks_flash() if name == "flash" else _lacks_varlen()) or _failure(name, device, dtype)


def _lacks_flash() -> str:
    try:
        import flash_attn  # noqa: F401
    except ImportError as error:
        return f"needs the package flash-attn ({error})"
    return ""


def _lacks_varlen() -> str:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"needs a newer torch than {torch.__version__}"
    takes = inspect.signature(varlen_attn).parameters
    missing = [name for name in ("seqused_k", "block_table", "num_splits", "enable_gqa") if name not in takes]
    return f"needs a newer torch than {torch.__version__}: its varlen_attn takes no {missing[0]}" if missing else ""


@lru_cache
def _failure(name: AttentionName, device: torch.device, dtype: torch.dtype) -> str:
    """Why a kernel fails there; "" where it does not. What a version takes, it need not have for every device."""
    page_size = PAGE_SIZES[name]
    query = torch.zeros(2, 4, 64, dtype=dtype, device=device)
    pool = torch.zeros(2, page_size, 2, 64, dtype=dtype, device=device)
    used, pages = (torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in ([3, 200], [[0], [1]]))
    try:
        KERNELS[name](query, pool, pool, RaggedBatch.of_steps(used, pages, page_size)).cpu()
    except Exception as error:  # whatever a kernel raises
        return f"fails there: {' '.join(str(error).split())[:200]}"
    return ""
