"""Stages from their descriptions: which class, with which part of which checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from graph.sections import LlmSpec, SpeakerSpec, StageSpec, TtsSpec, VisionEncoderSpec, VocoderSpec
from stages.stage import Stage, StageError

if TYPE_CHECKING:
    from model_shards.config import GenerationConfig
    from model_shards.duplex import DuplexConfig
    from stages.feed import Feeds


def build_stage(name: str, spec: StageSpec, checkpoint: Path, feeds: Feeds) -> Stage:
    """Build a stage and load its component; nothing else of the checkpoint is read.

    feeds: the media of this process, shared by its camera and its microphone.
    Raises StageError or ModelError; says what is wrong and what instead.
    """
    if spec.gpus and not _has_cuda():
        raise StageError(
            f"{name}: gpus is {spec.gpus:g}, but torch sees no CUDA device here; set stages.{name}.gpus: 0"
        )
    builders: dict[str, Callable[[], Stage]] = {
        "camera": lambda: _camera(feeds),
        "microphone": lambda: _microphone(feeds),
        "vision_encoder": lambda: _vision_encoder(spec, checkpoint),
        "audio_encoder": lambda: _audio_encoder(spec, checkpoint),
        "llm": lambda: _llm(spec, checkpoint),
        "tts": lambda: _tts(spec, checkpoint),
        "vocoder": lambda: _vocoder(spec, checkpoint),
        "speaker": lambda: _speaker(spec),
        "events": _events,
    }
    if name in MODEL_STAGES:
        import torch

        torch.set_num_threads(spec.threads)
        torch.manual_seed(0)
    return builders[name]()


MODEL_STAGES = {
    "vision_encoder": "vision",
    "audio_encoder": "audio",
    "llm": "llm",
    "tts": "tts",
    "vocoder": "vocoder",
}
"""Stages with a component of the checkpoint."""


def device_of(spec: StageSpec) -> str:
    """Where a stage computes, cpu or cuda; "auto": cuda where it has a GPU, or a part of one."""
    if spec.device == "auto":
        return "cuda" if spec.gpus > 0 else "cpu"
    return spec.device


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _camera(feeds: Feeds) -> Stage:
    from stages.camera import Camera

    return Camera(feeds)


def _microphone(feeds: Feeds) -> Stage:
    from stages.microphone import Microphone

    return Microphone(feeds)


def _vision_encoder(spec: StageSpec, checkpoint: Path) -> Stage:
    from model_shards.checkpoint import load_shard
    from stages.tensors import runtime
    from stages.vision_encoder import VisionEncoder

    assert isinstance(spec, VisionEncoderSpec)
    where = runtime(device_of(spec), spec.dtype)
    return VisionEncoder(load_shard(checkpoint, "vision", dtype=where.dtype, device=where.device), spec.max_slices)


def _audio_encoder(spec: StageSpec, checkpoint: Path) -> Stage:
    from model_shards.checkpoint import load_ref_audio, load_shard
    from stages.audio_encoder import AudioEncoder
    from stages.tensors import runtime

    where = runtime(device_of(spec), spec.dtype)
    voice = load_ref_audio(checkpoint)
    model = load_shard(checkpoint, "audio", dtype=where.dtype, device=where.device)
    return AudioEncoder(model, None if voice is None else voice.numpy())


def _llm(spec: StageSpec, checkpoint: Path) -> Stage:
    from model_shards.checkpoint import load_shard
    from model_shards.config import load_config
    from model_shards.duplex import DuplexEngine
    from model_shards.kv_cache import KvCache, KvShape
    from model_shards.tokenizer import Tokenizer
    from stages.llm import Llm
    from stages.tensors import runtime

    assert isinstance(spec, LlmSpec)
    told = load_config(checkpoint)
    has_codes = spec.dtype == "auto" and told.llm.quantization is not None  # kernels that read them are for bfloat16
    where = runtime(device_of(spec), "bfloat16" if has_codes else spec.dtype)
    model = load_shard(checkpoint, "llm", dtype=where.dtype, device=where.device)
    tokenizer = Tokenizer.load(checkpoint)
    config = duplex_config(spec, told.generation)
    cache = KvCache.of_bytes(KvShape.of(model.config), spec.kv_memory_bytes, dtype=where.dtype, device=where.device)
    return Llm(
        DuplexEngine(model, cache, tokenizer, config),
        cache,
        tokenizer,
        where,
        system_prompt=spec.system_prompt,
        seed=spec.seed,
        needs_pictures=told.generation.needs_pictures,
    )


def duplex_config(spec: LlmSpec, generation: GenerationConfig) -> DuplexConfig:
    """How sessions behave: as the user says, else as the checkpoint does."""
    from model_shards.context import WindowConfig
    from model_shards.decoding import SamplingConfig
    from model_shards.duplex import DuplexConfig

    high, low = spec.context.high, spec.context.low
    return DuplexConfig(
        sampling=SamplingConfig(
            mode=spec.decoding or generation.decoding,
            repetition_penalty=generation.repetition_penalty,
            length_penalty=generation.length_penalty,
            listen_prob_scale=generation.listen_prob_scale,
            listen_means_im_end=generation.listen_means_im_end,
        ),
        window=WindowConfig(
            mode=spec.context.mode,
            high_tokens=generation.high_tokens if high is None else high,
            low_tokens=generation.low_tokens if low is None else low,
        ),
        max_text_chars=generation.max_text_chars,
        force_listen_count=spec.force_listen,
    )


def _tts(spec: StageSpec, checkpoint: Path) -> Stage:
    from model_shards.checkpoint import load_shard
    from model_shards.config import load_config
    from stages.tensors import runtime
    from stages.tts import Tts

    assert isinstance(spec, TtsSpec)
    where = runtime(device_of(spec), spec.dtype)
    model = load_shard(checkpoint, "tts", dtype=where.dtype, device=where.device)
    decoding = spec.decoding or load_config(checkpoint).generation.decoding
    return Tts(model, where, spec.seed if decoding == "sampling" else None)


def _vocoder(spec: StageSpec, checkpoint: Path) -> Stage:
    import torch

    from model_shards.checkpoint import load_shard, load_voice
    from stages.tensors import runtime
    from stages.vocoder import Vocoder

    assert isinstance(spec, VocoderSpec)
    where = runtime(device_of(spec), "float32")  # the official vocoder computes in float32
    model = load_shard(checkpoint, "vocoder", dtype=where.dtype, device=where.device)
    voice = load_voice(checkpoint)
    if voice is None:
        remedy = f"give it one: pipeline shards voice {checkpoint} --from speech.wav"
        raise StageError(f"vocoder: {checkpoint} holds no voice (assets/token2wav/prompt.safetensors); {remedy}")
    model.config = dataclasses.replace(model.config, num_steps=spec.steps)
    with torch.inference_mode():
        cache = model.prepare(voice)
    return Vocoder(model, cache, spec.seed)


def _speaker(spec: StageSpec) -> Stage:
    from stages.speaker import Speaker

    assert isinstance(spec, SpeakerSpec)
    if spec.sink == "virtual":
        return Speaker()
    from stages.sound_device import SoundDevice

    return Speaker(SoundDevice)


def _events() -> Stage:
    from stages.events import Events

    return Events()
