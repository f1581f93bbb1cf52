"""What a process takes of its GPU, stage by stage, and which settings would make it less.

Rule: what will be used counts, not what is used when it starts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from deploy.actor.build import device_of
from deploy.control.placement import Process
from graph.sections import StageOptions
from graph.spec import PipelineSpec
from graph.units import format_bytes
from stages.audio_encoder import AudioOptions
from stages.llm import LlmOptions
from stages.tts import TtsOptions
from stages.vision_encoder import VisionOptions
from stages.vocoder import VocoderOptions

if TYPE_CHECKING:
    import torch

    from model_shards.checkpoint import Component
    from model_shards.config import ModelConfig
    from model_shards.memory import Use

MIB: Final = 1024**2
CUDA_CONTEXT_BYTES: Final = 500 * MIB  # of each process: driver, kernels and libraries; not measured here
PROMPT_TOKENS: Final = 400
LARGE: Final = 100 * MIB  # what a setting has to save, to be named


@dataclass(frozen=True, slots=True)
class Pool:
    """Memory for the keys and values of a stage's sessions, in pages, of which one is nobody's.

    session_pages: that a session may take; None: no bound, so no session is sure of its room. copied_tokens: that a
    decode step copies of each session.
    """

    stage: str
    num_bytes: int
    page_bytes: int
    session_pages: int | None
    copied_tokens: int = 0

    @property
    def setting(self) -> str:
        return f"stages.{self.stage}.kv_memory"

    @property
    def session_bytes(self) -> int:
        return (self.session_pages or 0) * self.page_bytes

    @property
    def num_sessions(self) -> int:
        """That it has room for, however long they get."""
        return 0 if self.session_pages is None else max(self.num_bytes // self.page_bytes - 1, 0) // self.session_pages

    def bytes_for(self, num_sessions: int) -> int:
        return -(-(num_sessions * self.session_bytes + self.page_bytes) // MIB) * MIB

    @property
    def lowered_by(self) -> str:
        """What else there is to set, where it is too small."""
        return f", or lower stages.{self.stage}.context.high" if self.stage == "llm" else ""


@dataclass(frozen=True, slots=True)
class Saving:
    """What a setting saves at its least value. pool: bytes that it gives now, if anything between will do as well."""

    setting: str
    num_bytes: int
    least: int
    pool: int = 0

    def to_save(self, missing: int) -> str:
        if not self.pool:
            return f"{self.setting} to {self.least}"
        return f"{self.setting} to at most {format_bytes((self.pool - min(missing, self.num_bytes)) // MIB * MIB)}"


@dataclass(frozen=True, slots=True)
class Part:
    """What a process takes of its GPU. shared: by its sessions, as the voice that the vocoder has heard.

    pool: its size is part of it. each: what each session keeps; for `resident` of them it is taken when the process
    loads, however few there are. has_16_bits: of weights which may have 4. savings: what could be less for as many
    sessions.
    """

    process: str
    weights: int = 0
    pool: Pool | None = None
    shared: int = 0
    workspace: int = 0
    context: int = CUDA_CONTEXT_BYTES
    each: int = 0
    resident: int = 0
    has_16_bits: bool = False
    savings: tuple[Saving, ...] = ()

    @property
    def kv_pool(self) -> int:
        return 0 if self.pool is None else self.pool.num_bytes

    def total(self, num_sessions: int) -> int:
        fixed = self.weights + self.kv_pool + self.shared + self.workspace + self.context
        return fixed + max(num_sessions, self.resident) * self.each


def stages_on_gpu(process: Process) -> list[str]:
    return [name for name, stage in process.stages.items() if device_of(stage) == "cuda"]


def part_of(spec: PipelineSpec, config: ModelConfig, process: Process, num_sessions: int) -> Part:
    """num_sessions: of each replica. A process has one stage with a part of the checkpoint, or none."""
    from model_shards.checkpoint import COMPONENTS

    for name in stages_on_gpu(process):
        for component in COMPONENTS:
            if component == spec.types[name].component:
                return _part(process.name, name, spec.stages[name], component, config, num_sessions)
    return Part(process.name)


def _part(
    process: str, name: str, stage: StageOptions, component: Component, config: ModelConfig, num_sessions: int
) -> Part:
    from model_shards import memory
    from stages.tensors import runtime

    has_codes = component == "llm" and config.llm.quantization is not None
    dtype = runtime("cuda", "bfloat16" if has_codes else stage.dtype).dtype
    config, pool = _as_set(config, stage), _pool(name, stage, config)
    copied_tokens = 0 if pool is None else pool.copied_tokens
    use = memory.Use(stage.batch, _unit_tokens(stage, config), copied_tokens, _resident(stage))
    each = memory.session_bytes(component, config, dtype, memory.VOICE_FRAMES) if pool is None else 0
    savings = (
        *(() if pool is None else (_of_pool(pool, num_sessions),)),
        _of_resident(name, each, use.resident, num_sessions),
        _of_batch(name, component, config, dtype, use, num_sessions),
    )
    return Part(
        process,
        weights=memory.weight_bytes(component, config, dtype),
        pool=pool,
        shared=memory.shared_bytes(component, config, dtype, memory.VOICE_FRAMES, use.resident > 0),
        workspace=memory.workspace_bytes(component, config, dtype, use),
        each=each,
        resident=use.resident,
        has_16_bits=component == "llm" and not has_codes,
        savings=tuple(saving for saving in savings if saving.num_bytes >= LARGE),
    )


def _of_pool(pool: Pool, num_sessions: int) -> Saving:
    least = pool.bytes_for(num_sessions)
    return Saving(pool.setting, pool.num_bytes - least, least, pool.num_bytes)


def _of_resident(stage: str, each: int, resident: int, num_sessions: int) -> Saving:
    return Saving(f"stages.{stage}.resident", (resident - num_sessions) * each, num_sessions)


def _of_batch(
    stage: str, component: Component, config: ModelConfig, dtype: torch.dtype, use: Use, num_sessions: int
) -> Saving:
    from model_shards.memory import workspace_bytes

    least = min(use.batch, num_sessions)
    now, then = (
        workspace_bytes(component, config, dtype, each) for each in (use, dataclasses.replace(use, batch=least))
    )
    return Saving(f"stages.{stage}.batch", now - then, least)


def _as_set(config: ModelConfig, stage: StageOptions) -> ModelConfig:
    """With what the description wants otherwise: Euler steps, of which each has a history, and slices of a picture."""
    if isinstance(stage, VocoderOptions) and stage.steps is not None and (vocoder := config.vocoder) is not None:
        return dataclasses.replace(config, vocoder=dataclasses.replace(vocoder, num_steps=stage.steps))
    if isinstance(stage, VisionOptions) and (vision := config.vision) is not None:
        slices = dataclasses.replace(vision.slices, max_slice_nums=stage.max_slices)
        return dataclasses.replace(config, vision=dataclasses.replace(vision, slices=slices))
    return config


def _resident(stage: StageOptions) -> int:
    return stage.resident if isinstance(stage, AudioOptions | VocoderOptions) else 0


def _unit_tokens(stage: StageOptions, config: ModelConfig) -> int:
    from stages.llm import duplex_config

    return duplex_config(stage, config.generation).max_unit_tokens if isinstance(stage, LlmOptions) else 0


def _pool(name: str, stage: StageOptions, config: ModelConfig) -> Pool | None:
    """What the stage takes for keys and values."""
    import torch

    from model_shards.kv_cache import KvShape
    from model_shards.tts_paged import NUM_STEPS, shape_of
    from stages.tensors import runtime

    dtype = runtime("cuda", stage.dtype).dtype
    if isinstance(stage, LlmOptions):
        kv_dtype = torch.float8_e4m3fn if stage.kv_dtype == "fp8" else dtype
        return _pool_of(name, stage, KvShape.of(config.llm).bytes_per_token(kv_dtype), _session_tokens(stage, config))
    if isinstance(stage, TtsOptions) and config.tts is not None:
        most = config.tts.max_position_embeddings + NUM_STEPS
        return _pool_of(name, stage, shape_of(config.tts).bytes_per_token(dtype), most)
    return None


def _pool_of(name: str, stage: LlmOptions | TtsOptions, token_bytes: int, session_tokens: int | None) -> Pool:
    """In pages of a ragged kernel, unless it can only be sdpa: it is the one that copies."""
    from model_shards.attention import PAGE_SIZES

    is_sdpa = stage.attention == "sdpa" or (isinstance(stage, LlmOptions) and stage.kv_dtype == "fp8")
    page_tokens = PAGE_SIZES["sdpa" if is_sdpa else "varlen"]
    pages = None if session_tokens is None else -(-session_tokens // page_tokens)
    copied_tokens = (pages or 0) * page_tokens if is_sdpa else 0
    return Pool(name, stage.kv_memory_bytes, page_tokens * token_bytes, pages, copied_tokens)


def _session_tokens(stage: LlmOptions, config: ModelConfig) -> int | None:
    from model_shards.duplex import max_session_tokens
    from stages.llm import duplex_config

    return max_session_tokens(duplex_config(stage, config.generation), PROMPT_TOKENS)
