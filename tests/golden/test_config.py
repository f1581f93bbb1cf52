"""The official config is read to the last size that we use, and every component loads from the official file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from model_shards.checkpoint import COMPONENTS, PREFIXES, UNUSED_PREFIXES, Component, load_shard
from model_shards.config import ModelConfig, load_config
from tests.support import golden
from tests.support.golden import cases, read_json, read_tensors

JSON, WEIGHTS = "config.json", "model.safetensors"

SECTIONS = {"": "llm", "vision_config": "vision", "audio_config": "audio", "tts_config": "tts"}
ELSEWHERE = {
    "query_num": "vision.query_num",
    "vision_batch_size": "vision.vision_batch_size",
    "audio_pool_step": "audio.pool_step",
    "audio_chunk_length": "audio.chunk_length_s",
    "slice_config.max_slice_nums": "vision.slices.max_slice_nums",
    "slice_config.patch_size": "vision.slices.patch_size",
    "slice_config.scale_resolution": "vision.slices.scale_resolution",
    "tts_config.streaming_sliding_window_audio_window_size": "tts.sliding_window_tokens",
}
"""Where we keep a size that has another name, or another place, than in the official config."""

BUILT_IN = {
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "vision_config.hidden_act": "gelu_pytorch_tanh",
    "audio_config.activation_function": "gelu",
    "tts_config.hidden_act": "silu",
    "tts_config.num_vq": 1,
    "tts_config.projector_type": "mlp",
    "tts_config.condition_type": "hidden_text_merge",
    "tts_config.backbone_model": "llama",
    "tts_config.use_text": True,
}
"""What our modules are built for, whatever the config says."""


def leaves(raw: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in raw.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def stored() -> dict[str, Any]:
    return dict(leaves(read_json(JSON)))


def ours(config: ModelConfig, leaf: str) -> Any:
    """Our value for a leaf of the official config. Raises AttributeError where we keep none."""
    section, _, name = leaf.rpartition(".")
    value: Any = config
    for part in ELSEWHERE.get(leaf, f"{SECTIONS.get(section, '-')}.{name}").split("."):
        value = getattr(value, part)
    return value


def read_leaves() -> list[str]:
    def is_read(leaf: str) -> bool:
        try:
            ours(ModelConfig(), leaf)
        except AttributeError:
            return False
        return True

    return [leaf for leaf in stored() if is_read(leaf)]


@cases(JSON, read_leaves())
def test_a_size_is_read_as_it_is_written(case: str) -> None:
    expected = stored()[case]
    if case == "vision_config.num_hidden_layers":
        expected -= stored()["drop_vision_last_layer"]
    assert ours(load_config(golden.FOLDER), case) == expected


@cases(JSON, (leaf for leaf in stored() if leaf in BUILT_IN))
def test_the_modules_are_built_for_this_model(case: str) -> None:
    assert stored()[case] == BUILT_IN[case]


@cases(JSON, (leaf for leaf in stored() if leaf.startswith("init_")))
def test_a_component_is_there_when_the_config_switches_it_on(case: str) -> None:
    assert (getattr(load_config(golden.FOLDER), case.removeprefix("init_")) is not None) == stored()[case]


def component_of(name: str) -> str:
    (owner,) = [component for component in COMPONENTS if name.startswith(PREFIXES[component])]
    return owner


def weights_of(component: str) -> dict[str, Tensor]:
    stored_weights = read_tensors(WEIGHTS)
    return {name: stored_weights[name] for name in stored_weights if component_of(name) == component}


def components() -> list[str]:
    return sorted({component_of(name) for name in read_tensors(WEIGHTS)})


@cases(WEIGHTS, components())
def test_a_component_is_loaded_strictly_with_the_official_weights(case: Component) -> None:
    listed = read_json("manifest.json")[WEIGHTS]["tensors"]

    state = load_shard(golden.FOLDER, case).state_dict()

    official = weights_of(case)
    assert set(state) <= set(official)
    assert all(name.startswith(UNUSED_PREFIXES) for name in set(official) - set(state))
    for name, tensor in state.items():
        assert [*tensor.shape] == listed[name][1:], name
        assert torch.equal(tensor, official[name]), name


@cases(WEIGHTS, ["dtypes"])
def test_the_weights_have_the_listed_types(case: str) -> None:
    listed = read_json("manifest.json")[WEIGHTS]["tensors"]
    names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    assert {name: tensor.dtype for name, tensor in read_tensors(WEIGHTS).items()} == {
        name: names[dtype] for name, (dtype, *_) in listed.items()
    }


@pytest.mark.parametrize("component", ["llm", "vision", "audio", "tts"])
def test_no_component_is_absent_from_the_file(component: str) -> None:
    assert component in components()
