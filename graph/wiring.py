"""What follows from the way the stages are wired: orders, ends, and which stages have nothing to do. Pure.

Rule: nobody keeps a list of stages; who needs to know which stage comes first, last or beside another one asks here.

A link is where one stage sends to another one. News from downstream (feedback) closes circles and gives no order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Link:
    """Two stages that are wired.

    is_windowed: windows pass on it. is_feedback: it carries news from downstream. is_side: no window ends behind it.
    """

    source: str
    target: str
    is_windowed: bool = True
    is_feedback: bool = False
    is_side: bool = False


class Wiring:
    """The stages, in the order in which they are described, and their links. Links must not form a circle unless one
    of them is feedback."""

    def __init__(self, stages: Iterable[str], links: Iterable[Link], makers: Collection[str] = ()) -> None:
        """makers: stages that are of use only by the windows that they make."""
        self._stages = tuple(stages)
        self._makers = frozenset(makers)
        self._forward = [link for link in links if not link.is_feedback]
        self._before = _neighbours(self._stages, ((link.target, link.source) for link in self._forward))
        windows = [link for link in self._forward if link.is_windowed]
        self._fed_by = _neighbours(self._stages, ((link.target, link.source) for link in windows))
        self._feeds = _neighbours(self._stages, ((link.source, link.target) for link in windows))
        main = [link for link in windows if not link.is_side]
        self._main = _neighbours(self._stages, ((link.source, link.target) for link in main))
        self.upstream_first = self._ordered()

    @property
    def downstream_first(self) -> tuple[str, ...]:
        return self.upstream_first[::-1]

    @property
    def sources(self) -> tuple[str, ...]:
        """Where windows begin: stages that make windows of nothing that comes to them; downstream first."""
        return tuple(stage for stage in self.downstream_first if self._feeds[stage] and not self._fed_by[stage])

    def ends(self, candidates: Iterable[str]) -> set[str]:
        """Those of the candidates behind which no other one comes on the way of the windows."""
        among = set(candidates)
        return {stage for stage in among if not self.behind(stage) & among}

    def behind(self, stage: str) -> set[str]:
        """All stages to which windows of this one come, but for side branches."""
        behind: set[str] = set()
        ways = [stage]
        while ways:
            for target in self._main[ways.pop()] - behind:
                behind.add(target)
                ways.append(target)
        return behind

    def longest(self, costs: Mapping[str, int]) -> int:
        """What the most expensive way through the stages costs. costs: those that cost something."""
        return max(self._longest({stage: costs.get(stage, 0) for stage in self._stages}).values(), default=0)

    def idle(self, off: Iterable[str], needed: Collection[str] = ()) -> set[str]:
        """These stages, and all that would have nothing to do without them: nothing comes to them any more, or nobody
        takes what they make. needed: those that are of use by themselves."""
        gone, others = set(off), set(self._stages) - set(needed)
        while newly_idle := {stage for stage in others - gone if self._has_nothing_to_do(stage, gone)}:
            gone |= newly_idle
        return gone

    def _has_nothing_to_do(self, stage: str, gone: set[str]) -> bool:
        fed_by, feeds = self._fed_by[stage], self._feeds[stage]
        return bool(fed_by and fed_by <= gone) or bool((feeds or stage in self._makers) and feeds <= gone)

    def _longest(self, costs: Mapping[str, int]) -> dict[str, int]:
        """Per stage, what the most expensive way costs that ends there."""
        longest: dict[str, int] = {}
        for stage in self.upstream_first:
            if stage in costs:
                longest[stage] = costs[stage] + max(
                    (longest.get(source, 0) for source in self._fed_by[stage]), default=0
                )
        return longest

    def _ordered(self) -> tuple[str, ...]:
        order: list[str] = []
        while len(order) < len(self._stages):
            order.append(next(s for s in self._stages if s not in order and self._before[s] <= set(order)))
        return tuple(order)


def _neighbours(stages: Iterable[str], pairs: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    neighbours: dict[str, set[str]] = {stage: set() for stage in stages}
    for stage, other in pairs:
        neighbours[stage].add(other)
    return neighbours
