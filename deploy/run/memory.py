"""How much memory a pipeline of its own needs here, and how much there is: the machine's, or less in a container.

Rule: what will be used counts, not what is used when it starts: the LLM's KV pool is untouched pages at first, and
fills within hours. What is on a GPU does not count here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from deploy.actor.build import device_of
from deploy.control.placement import processes_of
from graph.spec import PipelineSpec
from graph.units import format_bytes
from stages.llm import LlmOptions

MIB: Final = 1024**2
# What a process has for itself, measured with nano: its code is shared, and given back when memory is short.
ACTOR_BYTES: Final = 250 * MIB  # with torch, before its weights: 183 to 204 MiB, and what a batch takes
LIGHT_ACTOR_BYTES: Final = 120 * MIB  # without: 54 MiB, and what is on its way through it
DECODER_BYTES: Final = 80 * MIB  # of each camera: 11 MiB at 640x360, 39 to 54 MiB at 1920x1080
RAY_BYTES: Final = 400 * MIB  # its own processes, and 80 MiB of object store
LEAST_KV_BYTES: Final = 32 * MIB  # a pool worth setting
_NO_LIMIT: Final = 1 << 60  # what cgroup v1 writes for "none" is a bit less than 2**63


@dataclass(frozen=True, slots=True)
class Available:
    """Bytes that may still be taken. limit_bytes: of the container, where it is that which is short."""

    num_bytes: int
    limit_bytes: int | None = None

    def __str__(self) -> str:
        free = f"{_gb(self.num_bytes)} are free"
        return free if self.limit_bytes is None else f"{free} within this container's limit of {_gb(self.limit_bytes)}"


def available_memory(root: Path = Path("/")) -> Available:
    """What this process and its children may still take. root: where /proc and /sys are."""
    here = Available(_machine_bytes(root))
    for limit, used in _limits(root):
        if max(limit - used, 0) < here.num_bytes:
            here = Available(max(limit - used, 0), limit)
    return here


def _machine_bytes(root: Path) -> int:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):  # none, or a line without its number
        pass
    return int(psutil.virtual_memory().available)


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, what counts against it) of our memory cgroup and of those around it, in versions 1 and 2."""
    for folder in _cgroup_folders(root):
        for limit_name, used_name, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.high", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _number(folder / limit_name), _number(folder / used_name)
            if limit is not None and used is not None and limit < _NO_LIMIT:
                yield limit, max(used - _cached(folder / "memory.stat", cache), 0)


def _cgroup_folders(root: Path) -> Iterator[Path]:
    """Ours and all around it. In a container they may be mounted without the way there: then the top is ours."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        parts = [part for part in Path(path).parts if part not in ("/", "..")]
        yield from (top.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def _cached(path: Path, name: str) -> int:
    """What the kernel gives back when it is asked for memory: files that were read once."""
    try:
        return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.split()[0] == name)
    except (OSError, ValueError, IndexError, StopIteration):
        return 0


@dataclass(frozen=True, slots=True)
class Needed:
    """Bytes by what they are for."""

    weights: int
    kv_caches: int
    processes: int
    decoders: int
    ray: int
    num_kv_caches: int

    @property
    def num_bytes(self) -> int:
        return self.weights + self.kv_caches + self.processes + self.decoders + self.ray

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "KV cache (stages.llm.kv_memory)": self.kv_caches,
            "processes": self.processes,
            "decoders of the cameras": self.decoders,
            "Ray": self.ray,
        }
        breakdown = ", ".join(f"{name} {_gb(num_bytes)}" for name, num_bytes in parts.items() if num_bytes >= 50e6)
        return f"{_gb(self.num_bytes)} of memory ({breakdown})"

    def kv_memory_that_fits(self, available: Available) -> str | None:
        """What to set stages.llm.kv_memory to at most; None where a smaller one helps nothing."""
        rest = available.num_bytes - (self.num_bytes - self.kv_caches)
        if not self.num_kv_caches or rest < LEAST_KV_BYTES * self.num_kv_caches:
            return None
        return format_bytes(rest // self.num_kv_caches // MIB * MIB)


def needed_memory(spec: PipelineSpec, weights_of: Mapping[str, int]) -> Needed:
    """What a pipeline takes on a machine of its own. weights_of: by stage, bytes of one replica's weights."""
    pools = [s for s in spec.stages.values() if isinstance(s, LlmOptions) and device_of(s) == "cpu"]
    num_pools = sum(stage.replicas for stage in pools)
    loads = [process.stages.keys() & weights_of.keys() for process in processes_of(spec)]
    return Needed(
        weights=sum(weights_of[stage] for stages in loads for stage in stages),
        kv_caches=sum(stage.replicas * stage.kv_memory_bytes for stage in pools),
        processes=sum(ACTOR_BYTES if stages else LIGHT_ACTOR_BYTES for stages in loads),
        decoders=sum(len(camera.sources) for camera in spec.cameras.values()) * DECODER_BYTES,
        ray=RAY_BYTES,
        num_kv_caches=num_pools,
    )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
