"""deploy/actor/build.py: where a stage computes, and how sessions decode."""

from __future__ import annotations

import pytest
import torch

from deploy.actor.build import device_of
from graph.sections import StageOptions
from model_shards.config import GenerationConfig
from model_shards.context import WindowConfig
from model_shards.decoding import SamplingConfig
from model_shards.duplex import DuplexConfig
from stages.llm import ContextOptions, LlmOptions, duplex_config
from stages.tensors import Runtime, runtime


@pytest.mark.parametrize(("gpus", "device"), [(0.0, "cpu"), (0.25, "cuda"), (1.0, "cuda"), (2.0, "cuda")])
def test_a_stage_with_a_gpu_computes_there(gpus: float, device: str) -> None:
    assert device_of(StageOptions(gpus=gpus)) == device


def test_a_device_that_is_written_is_taken() -> None:
    assert device_of(StageOptions(gpus=1.0, device="cpu")) == "cpu"
    assert device_of(StageOptions(device="cuda")) == "cuda"


def test_auto_dtype_follows_the_device() -> None:
    assert runtime("cuda", "auto") == Runtime("cuda", torch.bfloat16)
    assert runtime("cpu", "auto") == Runtime("cpu", torch.float32)
    assert runtime("cuda", "float32") == Runtime("cuda", torch.float32)


def test_sessions_decode_as_the_official_demo_where_nobody_says_otherwise() -> None:
    window = WindowConfig(high_tokens=4000, low_tokens=3500)
    config = duplex_config(LlmOptions(), GenerationConfig())
    assert config == DuplexConfig(SamplingConfig(), window)
    assert config.sampling.mode == "sampling"


def test_a_checkpoint_brings_its_own_way_to_decode() -> None:
    own = GenerationConfig("greedy", repetition_penalty=1.0, max_text_chars=None, high_tokens=1500, low_tokens=1100)
    config = duplex_config(LlmOptions(), own)
    assert (config.sampling.mode, config.sampling.repetition_penalty, config.max_text_chars) == ("greedy", 1.0, None)
    assert (config.window.high_tokens, config.window.low_tokens) == (1500, 1100)


def test_what_the_user_says_goes_before_the_checkpoint() -> None:
    spec = LlmOptions(decoding="sampling", context=ContextOptions(high=300, low=200))
    config = duplex_config(spec, GenerationConfig("greedy", high_tokens=1500, low_tokens=1100))
    assert (config.window.high_tokens, config.window.low_tokens) == (300, 200)
    assert config.sampling.mode == "sampling"
