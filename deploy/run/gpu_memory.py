"""How much memory a pipeline needs on each GPU, and how many sessions fit: reckoned before anything is loaded.

Rule: what will be used counts, not what is used when it starts. Processes are put on GPUs in their order, each where
there is room for its share, as Ray does it.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from deploy.actor.build import device_of
from deploy.control.placement import Process, processes_of
from graph.errors import GraphError
from graph.spec import PipelineSpec
from graph.units import format_bytes, parse_bytes
from stages.audio_encoder import AudioOptions
from stages.llm import LlmOptions
from stages.tts import TtsOptions
from stages.vocoder import VocoderOptions

if TYPE_CHECKING:
    from model_shards.config import ModelConfig

MIB: Final = 1024**2
GIB: Final = 1024**3
CUDA_CONTEXT_BYTES: Final = 500 * MIB  # of each process: driver, kernels and libraries; not measured here
USABLE: Final = 0.97  # what is left when the allocator's blocks don't fit each other
KV_PAGE_TOKENS: Final = 256
PROMPT_TOKENS: Final = 400
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
class Part:
    """What a process takes of its GPU. each: of every session; the others don't depend on how many there are.

    kv_pool: the LLM's. shared: the talker's pool, and the voice as the vocoder has heard it. resident: for so many
    sessions it takes memory when it loads, however few there are.
    """

    process: str
    weights: int = 0
    kv_pool: int = 0
    shared: int = 0
    workspace: int = 0
    context: int = CUDA_CONTEXT_BYTES
    each: int = 0
    resident: int = 0

    @property
    def fixed(self) -> int:
        return self.weights + self.kv_pool + self.shared + self.workspace + self.context

    def total(self, num_sessions: int) -> int:
        return self.fixed + max(num_sessions, self.resident) * self.each


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """gpus: what is on each. num_sessions: of each replica. kv_sessions: that a pool has room for; None: none on a GPU.

    session_kv: what a session may take of a pool.
    """

    gpus: tuple[tuple[Part, ...], ...]
    gpu_bytes: int
    num_sessions: int
    kv_sessions: int | None = None
    session_kv: int = 0

    @property
    def usable(self) -> int:
        return round(USABLE * self.gpu_bytes)

    @property
    def most_sessions(self) -> int | None:
        """That fit with all they keep; None: without end."""
        fit = [self._room(parts) for parts in self.gpus]
        bounds = [most for most in (*fit, self.kv_sessions) if most is not None]
        return min(bounds, default=None)

    def _room(self, parts: Iterable[Part]) -> int | None:
        on_it = list(parts)
        if not any(part.each for part in on_it):
            return None
        numbers = range(MOST_SESSIONS + 1)
        too_many = bisect.bisect_right(numbers, self.usable, key=lambda num: sum(part.total(num) for part in on_it))
        return max(too_many - 1, 0)

    @property
    def problems(self) -> list[str]:
        """Why this does not fit, and what to change; empty when it does."""
        found = []
        for number, parts in enumerate(self.gpus):
            needed = sum(part.total(self.num_sessions) for part in parts)
            if needed > self.usable:
                names = ", ".join(f"{part.process} {_gb(part.total(self.num_sessions))}" for part in parts)
                found.append(
                    f"GPU {number} would hold {_gb(needed)} of {_gb(self.usable)} ({names}); "
                    f"{self._instead(parts, needed - self.usable)}"
                )
        if self.kv_sessions is not None and self.kv_sessions < self.num_sessions:
            needed_kv = format_bytes(-(-self.num_sessions * self.session_kv // MIB) * MIB)
            found.append(
                f"the KV cache has room for {self.kv_sessions} sessions, not {self.num_sessions}; "
                f"set stages.llm.kv_memory to {needed_kv}, or lower stages.llm.context.high"
            )
        return found

    def _instead(self, parts: Iterable[Part], too_much: int) -> str:
        pools = [part.kv_pool for part in parts if part.kv_pool]
        if pools and (rest := pools[0] - -(-too_much // len(pools))) >= max(self.session_kv, 1):
            return f"set stages.llm.kv_memory to at most {format_bytes(rest // MIB * MIB)}"
        return "take weights of 4 bits (`pipeline shards quantize`), larger GPUs, or more of them by larger shares"

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
                }
                for part in parts
            }
            for parts in self.gpus
        ]
        return {
            "gpu_bytes": self.gpu_bytes,
            "sessions": self.num_sessions,
            "fits": not self.problems,
            "problems": self.problems,
            "kv_sessions": self.kv_sessions,
            "most_sessions": self.most_sessions,
            "gpus": gpus,
        }


def gpu_plan(spec: PipelineSpec, config: ModelConfig, gpu_bytes: int, num_cameras: int) -> GpuPlan | None:
    """What the processes on GPUs of this size take; None where none is on one."""
    gpus: list[list[Part]] = []
    taken = 1.0
    processes = [process for process in processes_of(spec) if _stages_on_gpu(process)]
    if not processes:
        return None
    for process in processes:
        share = sum(stage.gpus for stage in process.stages.values())
        if taken + share > 1 + 1e-6:
            gpus.append([])
            taken = 0.0
        taken += share
        gpus[-1].append(_part(spec, config, process))
    replicas = min(stage.replicas for process in processes for stage in process.stages.values())
    num_sessions = -(-num_cameras // max(replicas, 1))
    session_kv, kv_sessions = _kv(spec, config)
    return GpuPlan(tuple(map(tuple, gpus)), gpu_bytes, num_sessions, kv_sessions, session_kv)


def has_gpus(spec: PipelineSpec) -> bool:
    return any(device_of(stage) == "cuda" for stage in spec.stages.values())


def _stages_on_gpu(process: Process) -> list[str]:
    return [name for name, stage in process.stages.items() if device_of(stage) == "cuda"]


def _part(spec: PipelineSpec, config: ModelConfig, process: Process) -> Part:
    from model_shards import memory
    from model_shards.checkpoint import COMPONENTS
    from stages.tensors import runtime

    part = Part(process.name)
    on_gpu = {name: spec.types[name].component for name in _stages_on_gpu(process)}
    for name, component in [(name, known) for name, its in on_gpu.items() for known in COMPONENTS if known == its]:
        stage = spec.stages[name]
        has_codes = component == "llm" and config.llm.quantization is not None
        dtype = runtime("cuda", "bfloat16" if has_codes else stage.dtype).dtype
        has_pool = isinstance(stage, LlmOptions) or (isinstance(stage, TtsOptions) and stage.attention != "sdpa")
        pool = stage.kv_memory_bytes if isinstance(stage, LlmOptions | TtsOptions) and has_pool else 0
        part = Part(
            part.process,
            weights=part.weights + memory.weight_bytes(component, config, dtype),
            kv_pool=part.kv_pool + (pool if isinstance(stage, LlmOptions) else 0),
            shared=part.shared
            + (pool if isinstance(stage, TtsOptions) else 0)
            + memory.shared_bytes(component, config, memory.VOICE_FRAMES),
            workspace=part.workspace
            + memory.workspace_bytes(component, config, dtype, stage.batch, _unit_tokens(stage, config)),
            resident=max(part.resident, _resident(stage)),
            each=part.each + (0 if pool else memory.session_bytes(component, config, dtype, memory.VOICE_FRAMES)),
        )
    return part


def _resident(stage: object) -> int:
    return stage.resident if isinstance(stage, AudioOptions | VocoderOptions) else 0


def _unit_tokens(stage: object, config: ModelConfig) -> int:
    from stages.llm import duplex_config

    return duplex_config(stage, config.generation).max_unit_tokens if isinstance(stage, LlmOptions) else 0


def _kv(spec: PipelineSpec, config: ModelConfig) -> tuple[int, int | None]:
    """What a session may take of the LLM's pool, and how many it has room for."""
    import torch

    from model_shards.duplex import max_session_tokens
    from model_shards.memory import kv_token_bytes
    from stages.llm import duplex_config
    from stages.tensors import runtime

    for stage in spec.stages.values():
        if isinstance(stage, LlmOptions) and device_of(stage) == "cuda":
            tokens = max_session_tokens(duplex_config(stage, config.generation), PROMPT_TOKENS)
            if tokens is None:
                return 0, 0
            pages = -(-tokens // KV_PAGE_TOKENS)
            kv_dtype = torch.float8_e4m3fn if stage.kv_dtype == "fp8" else runtime("cuda", stage.dtype).dtype
            session = pages * KV_PAGE_TOKENS * kv_token_bytes(config.llm, kv_dtype)
            return session, stage.kv_memory_bytes // session
    return 0, None


def gpu_bytes_of(told: str) -> int:
    """`h200`, or a size such as 141GiB. Raises GpuMemoryError."""
    if told.lower() in GPUS:
        return GPUS[told.lower()]
    try:
        return parse_bytes(told)
    except ValueError as error:
        raise GpuMemoryError(f"no such GPU or size of memory: {told!r}; known: {', '.join(GPUS)}; {error}") from None


def gpu_bytes_here() -> int | None:
    """Of the smallest GPU here; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    return min(
        int(torch.cuda.get_device_properties(number).total_memory) for number in range(torch.cuda.device_count())
    )


def check_gpu_memory(spec: PipelineSpec, config: ModelConfig, num_cameras: int) -> None:
    """Raises GpuMemoryError where a pipeline will not fit on the GPUs here."""
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
    told = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for number, parts in enumerate(plan.gpus):
        needed = sum(part.total(plan.num_sessions) for part in parts)
        told.append(f"GPU {number}: {_gb(needed)} of {_gb(plan.usable)} with {plan.num_sessions} sessions of a replica")
    if plan.kv_sessions is not None:
        told.append(f"the KV cache has room for {plan.kv_sessions} sessions, {_gb(plan.session_kv, 2)} each at most")
    if plan.most_sessions is not None:
        told.append(f"so {plan.most_sessions} sessions fit")
    return told


def _gb(num_bytes: int, digits: int = 1) -> str:
    return f"{num_bytes / 1e9:.{digits}f} GB"
