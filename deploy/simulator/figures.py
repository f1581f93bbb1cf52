"""What was seen of simulated windows: of one seed, or of many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deploy.simulator.costly import Spoilt
from graph.chunk import NS_PER_S, Chunk, SessionId
from graph.kinds import Kind
from stages.session import Session


@dataclass(slots=True)
class Figures:
    """What was seen, of one seed or of many."""

    num_windows: int = 0
    num_late: int = 0
    latencies_s: list[float] = field(default_factory=list)
    late_stages: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    drops: Counter[str] = field(default_factory=Counter)
    levels: Counter[int] = field(default_factory=Counter)  # windows, by the level of the shedding ladder
    num_deaths: int = 0  # of actors
    num_underruns: int = 0
    num_pieces: int = 0
    spoken_s: float = 0.0
    stalled_s: float = 0.0  # inside turns
    batches: Counter[tuple[str, int]] = field(default_factory=Counter)  # by stage and size
    unsaid: set[SessionId] = field(default_factory=set)  # sessions that ended with something left to say, unheard
    unheard_max_ns: int = 0
    wasted_tokens: list[float] = field(default_factory=list)

    def add(self, other: Figures) -> None:
        self.num_windows += other.num_windows
        self.num_late += other.num_late
        self.latencies_s += other.latencies_s
        self.late_stages += other.late_stages
        self.missing += other.missing
        self.drops += other.drops
        self.levels += other.levels
        self.num_deaths += other.num_deaths
        self.num_underruns += other.num_underruns
        self.num_pieces += other.num_pieces
        self.spoken_s += other.spoken_s
        self.stalled_s += other.stalled_s
        self.batches += other.batches
        self.unsaid |= other.unsaid
        self.unheard_max_ns = max(self.unheard_max_ns, other.unheard_max_ns)
        self.wasted_tokens += other.wasted_tokens

    def mean_batch(self, stage: str) -> float:
        """Units that a stage took at once, on average; 0 where it took none."""
        batches = {size: number for (name, size), number in self.batches.items() if name == stage}
        return sum(size * number for size, number in batches.items()) / max(sum(batches.values()), 1)

    def as_dict(self) -> dict[str, object]:
        p50, p99 = np.percentile(self.latencies_s, [50, 99]) if self.latencies_s else (0.0, 0.0)
        return {
            "windows": self.num_windows,
            "on_time": 1 - self.num_late / max(self.num_windows, 1),
            "latency_p50_s": round(float(p50), 4),
            "latency_p99_s": round(float(p99), 4),
            "late_stages": dict(self.late_stages),
            "missing": dict(self.missing),
            "drops": dict(self.drops),
            "deaths": self.num_deaths,
            "levels": {str(level): number for level, number in sorted(self.levels.items())},
            "unheard_max_s": self.unheard_max_ns / NS_PER_S,
            "underruns": self.num_underruns / max(self.num_pieces, 1),
            "wasted_tokens_per_barge_in": round(float(np.mean(self.wasted_tokens)), 2) if self.wasted_tokens else None,
        }


class VirtualMeter:
    """What deploy/actor/measure.py's StageMeter is told, kept for one seed."""

    def __init__(
        self, stage: str, figures: Figures, violated: Callable[[str, str], None], ended: Counter[SessionId]
    ) -> None:
        """ended: windows of each session that have come to their end."""
        self._stage, self._figures, self._violated, self._ended = stage, figures, violated, ended

    def opened(self, session: Session, ended: Collection[str] | None) -> None: ...
    def closed(self, session: Session) -> None: ...
    def processed(self, num_units: int, queue_s: float, compute_s: float, cpu_s: float) -> None:
        self._figures.batches[self._stage, num_units] += 1

    def passed(self, num_units: int) -> None: ...
    def carried(self, num_chunks: int) -> None: ...
    def made(self, session: Session, chunk: Chunk, kind: Kind[Any]) -> None: ...
    def unit_done(self, session: Session, end_ns: int) -> None: ...
    def moved(self, session: Session, level: int) -> None: ...
    def unsaid(self, session: Session) -> None:
        self._figures.unsaid.add(session.id)

    def failed(self, session: Session, error: BaseException, where: str) -> None:
        """Nothing of ours may raise, but for what a scenario spoils."""
        if not isinstance(error, Spoilt):
            raise error

    def played(self, session: Session, heard_ns: int, received_ns: int) -> None:
        unheard_ns = received_ns - heard_ns
        self._figures.unheard_max_ns = max(self._figures.unheard_max_ns, unheard_ns)
        if unheard_ns > session.lead_ns + session.window_ns:
            self._violated("TAIL", f"{session.id}: {unheard_ns / NS_PER_S:.3f} s of speech wait unheard")

    def window(self, session: Session, latency_s: float, late_stage: str, missing: tuple[str, ...]) -> None:
        self._figures.num_windows += 1
        self._ended[session.id] += 1
        self._figures.latencies_s.append(latency_s)
        self._figures.num_late += bool(late_stage)
        self._figures.late_stages.update([late_stage] if late_stage else [])
        self._figures.missing.update(missing)
