"""The tiny checkpoint: made once per test run, each component loaded once; and the stages on it."""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from model_shards.checkpoint import load_ref_audio, load_shard, load_voice
from model_shards.context import WindowConfig
from model_shards.decoding import SamplingConfig
from model_shards.duplex import MAX_GENERATED, DuplexConfig, DuplexEngine
from model_shards.init import init_checkpoint
from model_shards.kv_cache import KvCache, KvShape
from model_shards.tokenizer import Tokenizer
from stages.audio_encoder import AudioEncoder
from stages.llm import Llm
from stages.tensors import Runtime
from stages.tts import Tts
from stages.vision_encoder import VisionEncoder
from stages.vocoder import Vocoder

CPU = Runtime("cpu", torch.float32)
HIGH, LOW, MAX_UNIT = 500, 400, 200
"""The LLM's context in tests, in tokens; a unit with a picture and a second of sound has 77."""


def session_tokens(max_unit: int) -> int:
    """What a session of `Tiny.llm` may hold: a full window, one more unit, and what is said in it."""
    return HIGH + max_unit + MAX_GENERATED


class Tiny:
    """An untrained checkpoint folder and what is in it. Models are shared: nobody may change them."""

    def __init__(self, path: Path) -> None:
        init_checkpoint(path, "tiny")
        torch.set_num_threads(1)
        self.path = path
        self.tokenizer = Tokenizer.load(path)
        self.model = cache(self._load)
        self.voice = load_voice(path)
        self.ref_audio = load_ref_audio(path)

    def _load(self, component: str) -> Any:
        return load_shard(self.path, component, dtype=torch.float32, device="cpu")

    def vision_encoder(self, max_slices: int = 1) -> VisionEncoder:
        return VisionEncoder(self.model("vision"), max_slices)

    def audio_encoder(self, voice: bool = False) -> AudioEncoder:
        return AudioEncoder(self.model("audio"), self.ref_audio.numpy() if voice else None)

    def llm(
        self,
        mode: Literal["greedy", "sampling"] = "greedy",
        num_sessions: int = 8,
        model: Any = None,
        max_unit: int = MAX_UNIT,
        seed: int = 0,
        system_prompt: str = "See.",
        needs_pictures: bool = False,
        captured: int = 0,
    ) -> Llm:
        model = model or self.model("llm")
        window = WindowConfig(high_tokens=HIGH, low_tokens=LOW)
        config = DuplexConfig(SamplingConfig(mode=mode), window, force_listen_count=0, max_unit_tokens=max_unit)
        tokens = session_tokens(max_unit)
        num_pages = num_sessions * -(-tokens // 32) + bool(captured)
        kv_cache = KvCache(KvShape.of(self.model("llm").config), num_pages)
        engine = DuplexEngine(model, kv_cache, self.tokenizer, config)
        return Llm(
            engine,
            kv_cache,
            self.tokenizer,
            CPU,
            system_prompt=system_prompt,
            seed=seed,
            needs_pictures=needs_pictures,
            captured=captured,
        )

    def tts(self, seed: int | None = None) -> Tts:
        return Tts(self.model("tts"), CPU, seed)

    def vocoder(self, seed: int = 0) -> Vocoder:
        model = self.model("vocoder")
        model.config = dataclasses.replace(model.config, num_steps=2)
        with torch.inference_mode():
            return Vocoder(model, model.prepare(self.voice), seed)
