"""What a window costs at each stage, as measured on one machine: `t = fixed + n · each` for a batch of n.

Rule: pure. `pipeline bench stages` measures, `pipeline plan` reckons with it (deploy/control/capacity.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

from graph.chunk import NS_PER_S
from graph.errors import GraphError
from graph.wording import clipped, listed

VERSION: Final = 1
MAX_CORES: Final = 1 << 16
NUM_RATIOS: Final = 20


class ProfileError(GraphError):
    """A profile can't be read, or lacks something; says what and where."""


@dataclass(frozen=True, slots=True)
class StageCost:
    """What a batch of n units takes at one replica: fixed + n · each as a rule, `spread` of that more at p99.

    picture_ns: of each picture of a window beyond its first, which is part of `each`.
    age_ns: of each window that its session has had before it, of `most_age` at most; not part of `each`. token_ns: of
    each text token of the session that says most in the batch; not part of it, either.
    ratios: what was measured over the rule, as often as each was; none: anything between the rule and `spread` more.
    """

    fixed_ns: int
    each_ns: int
    spread: float = 0.0
    picture_ns: int = 0
    age_ns: int = 0
    most_age: int = 0
    token_ns: int = 0
    ratios: tuple[float, ...] = ()

    def times(self, factor: float) -> StageCost:
        """The same where everything takes so much longer."""
        names = ("fixed_ns", "each_ns", "picture_ns", "age_ns", "token_ns")
        return replace(self, **{name: round(factor * getattr(self, name)) for name in names})

    def batch_ns(self, num_units: int) -> int:
        return self.fixed_ns + num_units * self.each_ns

    def aged_ns(self, indices: Iterable[int]) -> int:
        """What the windows cost more for those that their sessions have had before. indices: of the windows."""
        return self.age_ns * sum(min(index, self.most_age) for index in indices) if self.age_ns else 0

    def window_ns(self, num_sessions: int, batch: int, num_more: int = 0) -> int:
        """One window of each of `num_sessions`, in batches of at most `batch`.

        num_more: pictures of all these windows, beyond the first of each.
        """
        return -(-num_sessions // batch) * self.fixed_ns + num_sessions * self.each_ns + num_more * self.picture_ns


def fit(samples: Sequence[tuple[int, int]]) -> StageCost:
    """The cost that explains what was measured: (units, ns) of each batch.

    Least squares through the median of each size, neither part below zero; spread: p99 over that.
    Raises ProfileError without samples.
    """
    if not samples:
        raise ProfileError("nothing was measured")
    sizes = sorted({units for units, _ in samples})
    medians = [median(ns for units, ns in samples if units == size) for size in sizes]
    each = _slope(sizes, medians)
    fixed = sum(medians) / len(sizes) - each * sum(sizes) / len(sizes)
    if fixed < 0:
        fixed, each = 0.0, sum(ns * n for ns, n in zip(medians, sizes, strict=True)) / sum(n * n for n in sizes)
    over = sorted(ns / max(fixed + each * units, 1.0) for units, ns in samples)
    p99 = over[min(len(over) - 1, int(0.99 * len(over)))]
    return StageCost(round(fixed), round(each), round(max(p99 - 1.0, 0.0), 3), ratios=quantiles(over))


def quantiles(ratios: Sequence[float]) -> tuple[float, ...]:
    """NUM_RATIOS of them that stand for all."""
    ordered = sorted(ratios)
    return tuple(round(ordered[(2 * k + 1) * len(ordered) // (2 * NUM_RATIOS)], 3) for k in range(NUM_RATIOS))


def _slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    mean_size, mean = sum(sizes) / len(sizes), sum(values) / len(values)
    square = sum((size - mean_size) ** 2 for size in sizes)
    if not square:
        return mean / mean_size
    slope = sum((size - mean_size) * (value - mean) for size, value in zip(sizes, values, strict=True)) / square
    return max(slope, 0.0)


@dataclass(frozen=True, slots=True)
class Speaking:
    """How much is said: how often a silent window begins a turn, and on average its windows, the tokens of each of
    them, and the speech of a token."""

    begins: float
    windows: float
    tokens: float
    token_ns: int


@dataclass(frozen=True, slots=True)
class ActorCost:
    """What a process takes of a core beside its stages: in each second, and for each chunk that comes in."""

    idle_ns: int = 0
    chunk_ns: int = 0


@dataclass(frozen=True, slots=True)
class Overheads:
    """What a run takes of the cores beside its stages. actors: by the name of their group. source_ns: of a camera, its
    decoder and what reads it, in each second; other_ns: of all else that belongs to a run."""

    actors: Mapping[str, ActorCost] = field(default_factory=dict)
    source_ns: int = 0
    other_ns: int = 0


@dataclass(frozen=True, slots=True)
class Profile:
    """What was measured, and on what. num_cores: of the machine, for the stages without a GPU.

    speaking, overheads: None where they were not measured.
    """

    model: str
    machine: Mapping[str, object]
    num_cores: int
    stages: Mapping[str, StageCost]
    speaking: Speaking | None = None
    overheads: Overheads | None = None

    def of(self, stage: str) -> StageCost:
        """Raises ProfileError when it was not measured."""
        if stage not in self.stages:
            raise ProfileError(f"the profile says nothing of {stage}; it has: {listed(self.stages)}")
        return self.stages[stage]

    def as_json(self) -> str:
        stages = {
            name: {"fixed_ns": cost.fixed_ns, "each_ns": cost.each_ns, "spread": cost.spread}
            | ({"picture_ns": cost.picture_ns} if cost.picture_ns else {})
            | ({"age_ns": cost.age_ns, "most_age": cost.most_age} if cost.age_ns else {})
            | ({"token_ns": cost.token_ns} if cost.token_ns else {})
            | ({"ratios": list(cost.ratios)} if cost.ratios else {})
            for name, cost in self.stages.items()
        }
        header = {"version": VERSION, "model": self.model, "machine": dict(self.machine), "num_cores": self.num_cores}
        measured = {"speaking": self.speaking, "overheads": self.overheads}
        beside = {name: asdict(each) for name, each in measured.items() if each is not None}
        return json.dumps(header | {"stages": stages} | beside, indent=2)


def read_profile(path: Path) -> Profile:
    """What `pipeline bench stages --json` wrote. Raises ProfileError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"{path}: can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{path}: not JSON: {clipped(str(error))}") from None
    raw = raw.get("profile", raw) if isinstance(raw, dict) else raw
    if not isinstance(raw, dict) or raw.get("version") != VERSION or not isinstance(raw.get("stages"), dict):
        raise ProfileError(f"{path}: no profile of version {VERSION}; make one: pipeline bench stages --json > {path}")
    stages = {name: _cost(path, name, entry) for name, entry in raw["stages"].items()}
    num_cores, machine = raw.get("num_cores"), raw.get("machine") or {}
    if type(num_cores) is not int or not 1 <= num_cores <= MAX_CORES:  # `true` is an int, too
        raise ProfileError(f"{path}: num_cores must be a whole number from 1 to {MAX_CORES}")
    if not isinstance(machine, dict):
        raise ProfileError(f"{path}: machine must be a mapping")
    speaking = _speaking(path, raw["speaking"]) if "speaking" in raw else None
    overheads = _overheads(path, raw["overheads"]) if "overheads" in raw else None
    return Profile(str(raw.get("model", "")), machine, num_cores, stages, speaking, overheads)


def _cost(path: Path, stage: str, entry: Any) -> StageCost:
    """A day is longer than any batch takes."""
    fields = (
        {"picture_ns": 0, "age_ns": 0, "most_age": 0, "token_ns": 0, "ratios": [], **entry}
        if isinstance(entry, dict)
        else {}
    )
    where = f"{path}: stages.{stage}"
    must = (
        f"{where}: fixed_ns, each_ns and spread must be numbers from 0 on, and so must the others where they are given"
    )
    names = ("fixed_ns", "each_ns", "spread", "picture_ns", "age_ns", "most_age", "token_ns")
    fixed_ns, each_ns, spread, *more = _numbers(must, map(fields.get, names))
    ratios = fields["ratios"] if isinstance(fields["ratios"], list) else [None]
    ratios = _numbers(f"{where}: ratios must be a list of numbers from 0 on", ratios)
    picture_ns, age_ns, most_age, token_ns = map(round, more)
    return StageCost(
        round(fixed_ns), round(each_ns), spread, picture_ns, age_ns, most_age, token_ns, ratios=tuple(ratios)
    )


def _speaking(path: Path, entry: Any) -> Speaking:
    fields = entry if isinstance(entry, dict) else {}
    must = f"{path}: speaking: begins, windows, tokens and token_ns must be numbers from 0 on"
    begins, windows, tokens, token_ns = _numbers(must, map(fields.get, ("begins", "windows", "tokens", "token_ns")))
    return Speaking(begins, windows, tokens, round(token_ns))


def _overheads(path: Path, entry: Any) -> Overheads:
    fields = entry if isinstance(entry, dict) else {}
    must = f"{path}: overheads: source_ns, other_ns and, of each of the actors, idle_ns and chunk_ns must be numbers"
    actors = fields.get("actors", {})
    if not isinstance(actors, dict) or not all(isinstance(actor, dict) for actor in actors.values()):
        raise ProfileError(must)
    source_ns, other_ns = _numbers(must, map(fields.get, ("source_ns", "other_ns")))
    costs = {name: _numbers(must, map(actor.get, ("idle_ns", "chunk_ns"))) for name, actor in actors.items()}
    actor_costs = {name: ActorCost(round(idle_ns), round(chunk_ns)) for name, (idle_ns, chunk_ns) in costs.items()}
    return Overheads(actor_costs, round(source_ns), round(other_ns))


def _numbers(must: str, values: Iterable[Any]) -> list[float]:
    """Raises ProfileError, which says `must`, where one is no number from 0 on, or more than a day is long."""
    raw = list(values)
    numbers = [value for value in raw if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(raw) or not all(0 <= number < 86_400 * NS_PER_S for number in numbers):
        raise ProfileError(must)
    return list(map(float, numbers))
