"""What a session remembers: its system prompt and as many past units as the window lets it keep.

In the cache lie, in this order: prefix (with the reference voice), previous (in "context" mode only, once there is
any), suffix, units. Prefix and suffix stay for ever; the oldest units go.

- off: nothing goes. The session ends when the pages do.
- basic: when a session holds more than `high_tokens`, its oldest units go until it holds `low_tokens` or fewer.
- context: when a session holds more than `max_units` units, the oldest go, and what was said in them is kept as text
  ("previous") inside the system prompt.

Rule: a window slides between units only, when the last unit has been fed to its end.

Source: MiniCPM-o 4.5 `utils.py` (StreamDecoder), reference/minicpmo-4.5.md §4.6.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Literal

import torch

from model_shards.errors import ModelError
from model_shards.kv_cache import KvCache, KvSequence
from model_shards.llm import LanguageModel, SequenceInput


@dataclass(frozen=True, slots=True)
class WindowConfig:
    """How much is kept. Officially off by default; here basic, because a camera looks for ever and memory doesn't grow.

    8000 and 6000 are the official values of basic mode, below the 8192 tokens for which the model was trained;
    24 units and 500 tokens those of context mode.
    """

    mode: Literal["off", "basic", "context"] = "basic"
    high_tokens: int = 8000
    low_tokens: int = 6000
    max_units: int = 24
    max_previous_tokens: int = 500
    previous_marker: str = "\n\nprevious: "

    def __post_init__(self) -> None:
        if self.mode not in ("off", "basic", "context"):
            raise ModelError(f"window: mode is {self.mode!r}, it can be 'off', 'basic' or 'context'")
        if not 0 < self.low_tokens <= self.high_tokens:
            raise ModelError(f"window: low_tokens {self.low_tokens} must be in 1 .. high_tokens {self.high_tokens}")
        if self.max_units < 1 or self.max_previous_tokens < 1:
            raise ModelError("window: max_units and max_previous_tokens must be 1 or more")


@dataclass(frozen=True, slots=True)
class UnitSpan:
    """A unit in the cache: how many tokens it takes, and what was said in it."""

    length: int
    spoken_ids: tuple[int, ...]


@dataclass(slots=True)
class Context:
    """What lies in a session's part of the cache. Changed by begin(), SlidingWindow and the end of each unit."""

    sequence: KvSequence = field(default_factory=KvSequence)
    prefix_length: int = 0
    previous_ids: list[int] = field(default_factory=list)  # with its marker
    suffix_ids: list[int] = field(default_factory=list)
    units: deque[UnitSpan] = field(default_factory=deque)

    @property
    def system_length(self) -> int:
        return self.prefix_length + len(self.previous_ids) + len(self.suffix_ids)


def is_due(config: WindowConfig, context: Context, num_pending: int) -> bool:
    """Whether units have to go once the last unit is over, of which `num_pending` tokens are still to be fed."""
    if config.mode == "context":
        return len(context.units) + (num_pending > 0) > config.max_units
    return config.mode == "basic" and context.sequence.length + num_pending > config.high_tokens


def units_to_drop(config: WindowConfig, context: Context) -> int:
    """How many of the oldest units have to go now; 0 while the window isn't due."""
    if not is_due(config, context, 0):
        return 0
    if config.mode == "context":
        return len(context.units) - config.max_units
    lengths = itertools.accumulate((-unit.length for unit in context.units), initial=context.sequence.length)
    return next((count for count, length in enumerate(lengths) if length <= config.low_tokens), len(context.units))


@dataclass(frozen=True, slots=True)
class _Slide:
    """All between the prefix and `stop` gives way to `previous_ids` and the suffix; `num_units` units are gone then."""

    context: Context
    num_units: int
    stop: int
    previous_ids: list[int]

    @property
    def shift(self) -> int:
        context = self.context
        return context.prefix_length + len(self.previous_ids) + len(context.suffix_ids) - self.stop


class SlidingWindow:
    """Slides the contexts of many sessions at once, by one policy."""

    def __init__(
        self,
        config: WindowConfig,
        model: LanguageModel,
        cache: KvCache,
        marker_ids: Sequence[int],
        special_ids: Set[int],
    ) -> None:
        """marker_ids: what comes before the previous text. special_ids: never part of it."""
        self.config = config
        self._model = model
        self._cache = cache
        self._marker_ids = list(marker_ids)
        self._special_ids = special_ids

    def slide(self, contexts: Sequence[Context]) -> None:
        """Let every context forget what the policy wants forgotten; at most one forward for all of them.

        Raises KvCacheFull, before anything has changed, when previous texts grow by more than their units give back
        and the pages for it aren't free.
        """
        slides = [self._plan(context) for context in contexts if units_to_drop(self.config, context)]
        self._cache.reserve([(slide.context.sequence, max(0, slide.shift)) for slide in slides])
        self._model(self._cache, [reread for slide in slides if (reread := self._apply(slide)) is not None])

    def _plan(self, context: Context) -> _Slide:
        units = list(itertools.islice(context.units, units_to_drop(self.config, context)))
        stop = context.system_length + sum(unit.length for unit in units)
        said = [token for unit in units for token in unit.spoken_ids if token not in self._special_ids]
        if self.config.mode == "basic" or not said:
            return _Slide(context, len(units), stop, context.previous_ids)
        content = context.previous_ids[len(self._marker_ids) :] + said
        previous_ids = self._marker_ids + content[-self.config.max_previous_tokens :]
        return _Slide(context, len(units), stop, previous_ids)

    def _apply(self, slide: _Slide) -> SequenceInput | None:
        """Returns what the model has to read again: the previous text, and the suffix which now comes after it."""
        context = slide.context
        self._cache.move_tail(context.sequence, slide.stop, slide.stop + slide.shift)
        for _ in range(slide.num_units):
            context.units.popleft()
        if slide.previous_ids is context.previous_ids:
            return None
        context.previous_ids = slide.previous_ids
        ids = torch.tensor(slide.previous_ids + context.suffix_ids, device=self._cache.device)
        return SequenceInput(context.sequence, self._model.embed(ids), start=context.prefix_length)
