"""How much memory a pipeline needs on each GPU, and how many sessions fit: reckoned before anything is loaded.

Rule: processes are put on GPUs in their order, each where there is room for its share, as Ray does it.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from deploy.actor.build import device_of
from deploy.control.placement import Process, processes_of
from deploy.run.gpu_parts import Part, Pool, part_of, stages_on_gpu
from graph.errors import GraphError
from graph.spec import PipelineSpec
from graph.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from model_shards.config import ModelConfig

GIB: Final = 1024**3
USABLE: Final = 0.97  # what is left when the allocator's blocks don't fit each other
MOST_SESSIONS: Final = 100_000  # that are thought of for a GPU
GPUS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "h200": 141_000 * 10**6,
        "h100": 80 * GIB,
        "a100": 80 * GIB,
        "l40s": 48 * GIB,
        "l4": 24 * GIB,
        "4090": 24 * GIB,
        "5090": 32 * GIB,
    }
)
"""What their makers say."""


class GpuMemoryError(GraphError):
    """It does not fit; says where, and what to change."""


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """gpus: what is on each. num_sessions: of each replica."""

    gpus: tuple[tuple[Part, ...], ...]
    gpu_bytes: int
    num_sessions: int

    @property
    def usable(self) -> int:
        return round(USABLE * self.gpu_bytes)

    @property
    def pools(self) -> Mapping[str, Pool]:
        """By stage: those of its replicas are alike."""
        return {pool.stage: pool for pool in _pools(part for parts in self.gpus for part in parts)}

    @property
    def most_sessions(self) -> int | None:
        """That fit with all they keep; None: without end."""
        fit = [self._room(parts) for parts in self.gpus]
        bounds = [most for most in (*fit, *(pool.num_sessions for pool in self.pools.values())) if most is not None]
        return min(bounds, default=None)

    def _room(self, parts: Sequence[Part]) -> int | None:
        if not any(part.each for part in parts):
            return None if sum(part.total(0) for part in parts) <= self.usable else 0
        numbers = range(MOST_SESSIONS + 1)
        too_many = bisect.bisect_right(numbers, self.usable, key=lambda num: sum(part.total(num) for part in parts))
        return max(too_many - 1, 0)

    @property
    def problems(self) -> list[str]:
        """Why this does not fit, and what to change; empty when it does."""
        problems = []
        for number, parts in enumerate(self.gpus):
            needed = sum(part.total(self.num_sessions) for part in parts)
            if needed > self.usable:
                names = ", ".join(f"{part.process} {_gb(part.total(self.num_sessions))}" for part in parts)
                problems.append(
                    f"GPU {number} would hold {_gb(needed)}, and an otherwise empty GPU has {_gb(self.usable)} for it "
                    f"({names}); {self._instead(parts, needed - self.usable)}"
                )
        problems += [
            f"the KV cache of {pool.stage} has room for {pool.num_sessions} sessions, not {self.num_sessions}; "
            f"set {pool.setting} to {format_bytes(pool.bytes_for(self.num_sessions))}{pool.lowered_by}"
            for pool in self.pools.values()
            if pool.num_sessions < self.num_sessions
        ]
        return problems

    def _instead(self, parts: Iterable[Part], too_much: int) -> str:
        """What saves most, as far as it is needed; pools that are too small have to grow besides."""
        on_it = list(parts)
        pools = _pools(on_it)
        missing = too_much + sum(max(pool.bytes_for(self.num_sessions) - pool.num_bytes, 0) for pool in pools)
        changes = []
        savings = Counter(saving for part in on_it for saving in part.savings)
        for saving, times in sorted(savings.items(), key=lambda item: -item[0].num_bytes * item[1]):
            if missing > 0:
                changes.append(saving.to_save(-(-missing // times)))
                missing -= times * saving.num_bytes
        settings = [f"set {', '.join(changes)}"] if changes else []
        if missing <= 0:
            return settings[0]
        if any(part.has_16_bits for part in on_it):
            settings.append("take weights of 4 bits (`pipeline shards quantize`)")
        return "; ".join([*settings, "take larger GPUs, or more of them by larger shares"])

    def as_dict(self) -> dict[str, object]:
        gpus = [
            {
                part.process: {
                    "weights": part.weights,
                    "kv_pool": part.kv_pool,
                    "shared": part.shared,
                    "workspace": part.workspace,
                    "context": part.context,
                    "each_session": part.each,
                    "all": part.total(self.num_sessions),
                }
                for part in parts
            }
            for parts in self.gpus
        ]
        pools = {
            stage: {"bytes": pool.num_bytes, "each_session": pool.session_bytes, "sessions": pool.num_sessions}
            for stage, pool in self.pools.items()
        }
        return {
            "gpu_bytes": self.gpu_bytes,
            "sessions": self.num_sessions,
            "fits": not self.problems,
            "problems": self.problems,
            "kv_pools": pools,
            "most_sessions": self.most_sessions,
            "gpus": gpus,
        }


def gpu_plan(spec: PipelineSpec, config: ModelConfig, gpu_bytes: int, num_cameras: int | None) -> GpuPlan | None:
    """What the processes on GPUs of this size take; None where none is on one. num_cameras None: as many as fit, or
    one where none does."""
    processes = [process for process in processes_of(spec) if stages_on_gpu(process)]
    if not processes:
        return None
    replicas = min(stage.replicas for process in processes for stage in process.stages.values())
    if num_cameras is None:
        most = _plan(spec, config, gpu_bytes, processes, 1).most_sessions
        num_cameras = max(len(spec.cameras) if most is None else most * replicas, 1)
    return _plan(spec, config, gpu_bytes, processes, -(-num_cameras // max(replicas, 1)))


def _plan(
    spec: PipelineSpec, config: ModelConfig, gpu_bytes: int, processes: Iterable[Process], num_sessions: int
) -> GpuPlan:
    gpus: list[list[Part]] = []
    taken = 1.0
    for process in processes:
        share = sum(stage.gpus for stage in process.stages.values())
        if taken + share > 1 + 1e-6:
            gpus.append([])
            taken = 0.0
        taken += share
        gpus[-1].append(part_of(spec, config, process, num_sessions))
    return GpuPlan(tuple(map(tuple, gpus)), gpu_bytes, num_sessions)


def _pools(parts: Iterable[Part]) -> list[Pool]:
    return [part.pool for part in parts if part.pool is not None]


def has_gpus(spec: PipelineSpec) -> bool:
    return any(device_of(stage) == "cuda" for stage in spec.stages.values())


def gpu_bytes_of(text: str) -> int:
    """`h200`, or a size such as 141GiB. Raises GpuMemoryError."""
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise GpuMemoryError(f"no such GPU or size of memory: {text!r}; known: {', '.join(GPUS)}; {error}") from None


def gpu_bytes_here() -> int | None:
    """Of the smallest GPU here; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    return min(
        int(torch.cuda.get_device_properties(number).total_memory) for number in range(torch.cuda.device_count())
    )


def check_gpu_memory(spec: PipelineSpec, config: ModelConfig, num_cameras: int) -> None:
    """Raises GpuMemoryError where a pipeline will not fit on the GPUs here, were they empty: what others hold there is
    not looked at."""
    gpu_bytes = gpu_bytes_here() if has_gpus(spec) else None
    plan = gpu_plan(spec, config, gpu_bytes, num_cameras) if gpu_bytes is not None else None
    if plan is not None and plan.problems:
        raise GpuMemoryError("; ".join(plan.problems))


def lines_of(plan: GpuPlan) -> list[str]:
    """For a person: what is on each GPU."""
    rows = [["GPU", "process", "weights", "KV", "shared", "workspace", "context", "each session", "all"]]
    for number, parts in enumerate(plan.gpus):
        rows += [
            [
                str(number),
                part.process,
                *map(_gb, (part.weights, part.kv_pool, part.shared, part.workspace, part.context)),
                _gb(part.each, 2),
                _gb(part.total(plan.num_sessions)),
            ]
            for part in parts
        ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for number, parts in enumerate(plan.gpus):
        needed = sum(part.total(plan.num_sessions) for part in parts)
        lines.append(
            f"GPU {number}: {_gb(needed)} of {_gb(plan.usable)} with {plan.num_sessions} sessions of a replica"
        )
    lines += [
        f"the KV cache of {stage} has room for {pool.num_sessions} sessions, {_gb(pool.session_bytes, 2)} each at most"
        for stage, pool in plan.pools.items()
    ]
    if plan.most_sessions is not None:
        lines.append(f"so {plan.most_sessions} sessions fit")
    return lines


def _gb(num_bytes: int, digits: int = 1) -> str:
    return f"{num_bytes / 1e9:.{digits}f} GB"
