"""The talker on a GPU: keys and values in pages of a KvCache, several codes per launch.

A step of the talker is some hundred kernels, each shorter than its launch, and a host that looks at every code waits 26
times per unit. Here a captured program feeds a code, draws the next one and feeds that, NUM_STEPS times; the host sees
them all at once. What a session drew after its EOS is forgotten: neither its cache nor its draws have gone on.

Rule: codes are those of `Talker.generate`, but drawn from the numbers of model_shards/noise.py: a session's are the
same in any batch, and however many steps a launch has.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from torch import Tensor

from model_shards.attention import KERNELS, PREPARE, AttentionName, Kernel, Plan, Span
from model_shards.config import TtsConfig
from model_shards.decode_steps import host_rows
from model_shards.kv_cache import KvCache, KvSequence, KvShape
from model_shards.noise import waits
from model_shards.programs import Captured
from model_shards.sampling import NO_CODE, REPETITION_WINDOW, numbers_only, shape_logits
from model_shards.tts import (
    ChunkRequest,
    Spoken,
    Talker,
    TalkerInput,
    TalkerState,
    duplex_sampling,
    end_units,
    refuse_twice,
)

NUM_STEPS: Final = 5  # of a launch; of a unit's 26 codes the condition gives the first, five launches the others
_DRAW: Final = 4  # numbers of a draw before the history: seed, draws before it, whether it is greedy, steps without EOS
APART: Final = 0x74616C6B6572  # of a seed, so that the language model draws other numbers with the same one
_FED: Final = 2  # code and length, before the pages


@dataclass(slots=True, kw_only=True)
class PagedState(TalkerState):
    """What the talker keeps of one session. seed None: the likeliest code each time. num_draws: codes drawn so far."""

    cache: KvCache
    seed: int | None
    num_draws: int = 0
    sequence: KvSequence = field(default_factory=KvSequence)

    def end_turn(self) -> None:
        TalkerState.end_turn(self)
        self.cache.free(self.sequence)


@dataclass(slots=True)
class _Row:
    """One session inside a running call."""

    state: PagedState
    request: ChunkRequest
    codes: list[int] = field(default_factory=list)
    last_draw: int = NO_CODE
    is_over: bool = False

    def take(self, drawn: Sequence[int], eos: int) -> int:
        """The next draws, up to the one with which it is over; returns how many those are."""
        for count, code in enumerate(drawn, 1):
            self.state.num_draws += 1
            if code == eos or len(self.codes) + 1 == self.request.max_steps:
                self.last_draw, self.is_over = code, True
                return count
            self.codes.append(code)
        return len(drawn)


class PagedTalker:
    """Speaks duplex units of the sessions of one cache, in batches up to the ladder's last size."""

    num_steps: Final = NUM_STEPS

    def __init__(
        self,
        talker: Talker,
        cache: KvCache,
        attention: AttentionName,
        ladder: Sequence[int],
        kernel: Kernel | None = None,
    ) -> None:
        """cache: see `shape_of`. kernel: a ragged one; None: that of the attention's name.

        Raises KvCacheFull where no page is left for blank rows.
        """
        self._talker, self._cache, self._prepare = talker, cache, PREPARE[attention]
        self._kernel = kernel or KERNELS[attention]
        self._sampling = duplex_sampling(talker.config)
        self._num_pages = cache.pages_for(talker.config.max_position_embeddings + NUM_STEPS)
        self._is_eos = torch.arange(talker.config.num_audio_tokens, device=cache.device) == talker.eos
        self._codes = torch.arange(talker.config.num_audio_tokens, device=cache.device)
        self._nobody = KvSequence()
        cache.reserve([(self._nobody, 1)])
        self.max_sessions: Final[int | None] = cache.num_free_pages // self._num_pages
        self._program = Captured(self._steps, self._blank, ladder)
        with torch.no_grad():
            self._program.capture()

    def new_state(self, seed: int | None) -> PagedState:
        """Of a session; None takes the likeliest code each time. With up to `max_sessions` of them the cache has room
        for all, however long their turns get."""
        return PagedState(cache=self._cache, seed=None if seed is None else seed ^ APART)

    def generate(self, batch: Sequence[tuple[TalkerState, TalkerInput]]) -> list[list[int]]:
        """As `Talker.generate`, of states of this talker. Raises KvCacheFull."""
        spoken = self.generate_chunks(self._talker.requests(batch))
        end_units(batch)
        return [chunk.codes for chunk in spoken]

    def generate_chunks(self, batch: Sequence[tuple[TalkerState, ChunkRequest]]) -> list[Spoken]:
        """As `Talker.generate_chunks`, of states of this talker. Raises KvCacheFull."""
        refuse_twice(batch)
        rows = [_Row(_paged(state), request) for state, request in batch]
        going = rows
        if rows:
            self._take(rows, self._prefill(rows))
        while going := [row for row in going if not row.is_over]:
            for row, count in zip(going, self._take(going, self._launch(going)), strict=True):
                self._cache.extend([(row.state.sequence, count)])
        for row in rows:
            self._cache.truncate(row.state.sequence, row.state.sequence.length)
            row.state.next_position = row.state.sequence.length
        return [Spoken(row.codes, row.last_draw) for row in rows]

    def _take(self, rows: Sequence[_Row], drawn: Tensor) -> list[int]:
        """drawn: [rows, any]. Returns of how many draws each row has use."""
        codes = drawn.tolist()
        numbers_only([code for row in codes for code in row], NO_CODE)
        return [row.take(own, self._talker.eos) for row, own in zip(rows, codes, strict=True)]

    def _prefill(self, rows: Sequence[_Row]) -> Tensor:
        """Feed the conditions, and draw the first code of each: [rows, 1].

        As with `Talker`, a turn that would pass `max_position_embeddings` goes on with an empty cache.
        """
        config, requests = self._talker.config, [row.request for row in rows]
        nums, sequences = [len(request.condition) for request in requests], [row.state.sequence for row in rows]
        for sequence, request, num in zip(sequences, requests, nums, strict=True):
            if sequence.length + num + request.max_steps > config.max_position_embeddings:
                self._cache.free(sequence)
        most = [num + _launches(request.max_steps) * NUM_STEPS for num, request in zip(nums, requests, strict=True)]
        self._cache.reserve(list(zip(sequences, most, strict=True)))
        starts = [sequence.length for sequence in sequences]
        self._cache.extend(list(zip(sequences, nums, strict=True)))
        firsts = itertools.accumulate(nums, initial=0)
        spans = [Span(*span) for span in zip(sequences, firsts, starts, nums, strict=False)]
        x = torch.cat([request.condition for request in requests])
        queries_per_kv = config.num_attention_heads // config.num_key_value_heads
        plan = Plan.of(self._cache, spans, self._prepare, queries_per_kv, x.dtype)
        lasts = torch.tensor(nums).cumsum(0).sub(1).to(x.device, non_blocking=True)
        hidden = self._talker.tts.model.paged(x, plan, self._cache).index_select(0, lasts)
        draws, values = host_rows(len(rows), _DRAW + REPETITION_WINDOW, self._cache.device)
        for row, numbers in zip(rows, values, strict=True):
            _write_draw(row, numbers)
        code, is_none = self._draw(self._talker.tts.logits(hidden), draws.to(x.device, non_blocking=True), 0)
        return code.masked_fill(is_none, NO_CODE)[:, None]

    def _launch(self, rows: Sequence[_Row]) -> Tensor:
        """Feed the latest code of each, and those that are drawn then: [rows, NUM_STEPS] draws."""
        inputs, values = host_rows(len(rows), self._width, self._cache.device)
        for row, numbers in zip(rows, values, strict=True):
            self._write(row.state.sequence, row.codes[-1], row.state.sequence.length + 1, numbers)
            _write_draw(row, numbers[_FED + self._num_pages :])
        (drawn,) = self._program(inputs)
        return drawn

    # ---- the program -------------------------------------------------------------------------------------------------

    @property
    def _width(self) -> int:
        return _FED + self._num_pages + _DRAW + REPETITION_WINDOW

    def _write(self, sequence: KvSequence, code: int, used: int, numbers: np.ndarray) -> None:
        num_own = _FED + len(sequence.pages)
        numbers[:_FED] = code, used
        numbers[_FED:num_own] = sequence.pages
        numbers[num_own : _FED + self._num_pages] = self._nobody.pages[0]

    def _blank(self, size: int) -> tuple[Tensor, ...]:
        """They look at no more than their page, which nobody holds."""
        numbers = np.zeros(self._width, dtype=np.int64)
        self._write(self._nobody, 0, 1, numbers)
        numbers[-REPETITION_WINDOW:] = NO_CODE
        return (torch.from_numpy(numbers).to(self._cache.device).repeat(size, 1),)

    def _steps(self, rows: Tensor) -> tuple[Tensor, ...]:
        code, used = rows[:, 0], rows[:, 1].to(torch.int32)
        pages = rows[:, _FED : _FED + self._num_pages].to(torch.int32).contiguous()
        draws = rows[:, _FED + self._num_pages :]
        drawn = []
        for step in range(NUM_STEPS):
            logits = self._talker.tts.paged_step(code, used + step, pages, self._cache, self._kernel)
            code, is_none = self._draw(logits, draws, step)
            draws = torch.cat([draws[:, :_DRAW], draws[:, _DRAW + 1 :], code[:, None]], dim=1)
            drawn.append(code.masked_fill(is_none, NO_CODE))
        return (torch.stack(drawn, dim=1),)

    def _draw(self, logits: Tensor, draws: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The next code of each [n] int64, and whether the probabilities were no numbers.

        draws: [n, _DRAW + REPETITION_WINDOW], at the launch's first step save for the history.
        """
        seeds, before, is_greedy, num_endless = draws[:, :_DRAW].unbind(1)
        shaped = shape_logits(logits, draws[:, _DRAW:], self._sampling)
        shaped = shaped.masked_fill((num_endless > step)[:, None] & self._is_eos, -torch.inf)
        own = waits(seeds, before + step, self._codes).masked_fill(is_greedy[:, None] == 1, 1.0)
        best, code = (shaped.softmax(-1) / own).max(-1)
        return code, best.isnan()


def shape_of(config: TtsConfig) -> KvShape:
    """What one position of the talker leaves in a cache."""
    head_dim = config.hidden_size // config.num_attention_heads
    return KvShape(config.num_hidden_layers, config.num_key_value_heads, head_dim, config.rope_theta)


def _paged(state: TalkerState) -> PagedState:
    assert isinstance(state, PagedState), "a state of another talker"
    return state


def _launches(max_steps: int) -> int:
    """For the draws after the first one."""
    return -(-(max_steps - 1) // NUM_STEPS)


def _write_draw(row: _Row, numbers: np.ndarray) -> None:
    state, request = row.state, row.request
    num_endless = max(request.min_steps - len(row.codes), 0)
    numbers[:_DRAW] = state.seed or 0, state.num_draws, state.seed is None, num_endless
    recent = [*request.history, *row.codes][-REPETITION_WINDOW:]
    numbers[_DRAW : len(numbers) - len(recent)] = NO_CODE
    numbers[len(numbers) - len(recent) :] = recent
