"""model_shards/config.py: what differs from the released checkpoint is named; what can't be obeyed is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from model_shards.config import (
    RELEASED,
    GenerationConfig,
    HiftConfig,
    LlmConfig,
    TtsConfig,
    VisionConfig,
    VocoderConfig,
    differences,
    load_config,
)
from model_shards.errors import ModelError
from model_shards.init import TINY, official_config

OFFICIAL: dict[str, Any] = official_config(RELEASED)


def written(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_released_checkpoint_does_not_differ_from_itself(tmp_path: Path):
    config = load_config(written(tmp_path, OFFICIAL))
    assert config.official
    assert differences(config) == []


def test_the_sizes_of_the_reference_are_the_released_ones():
    # reference/minicpmo-4.5.md §1.1 to §1.5
    assert RELEASED.llm == LlmConfig(151748, 4096, 12288, 36, 32, 8, 128, 1e-6, 1e6, 40960)
    vision, audio, tts = RELEASED.vision, RELEASED.audio, RELEASED.tts
    assert vision is not None and audio is not None and tts is not None
    assert (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers) == (1152, 4304, 26)
    assert (vision.num_attention_heads, vision.image_size, vision.query_num) == (16, 980, 64)
    assert (vision.slices.max_slice_nums, vision.slices.patch_size, vision.slices.scale_resolution) == (9, 14, 448)
    assert (audio.d_model, audio.encoder_layers, audio.encoder_attention_heads, audio.encoder_ffn_dim) == (
        *(1024, 24, 16, 4096),
    )
    assert (tts.hidden_size, tts.intermediate_size, tts.num_hidden_layers, tts.num_attention_heads) == (
        *(768, 3072, 20, 12),
    )
    assert (tts.num_audio_tokens, tts.num_text_tokens, tts.audio_bos_token_id, tts.text_eos_token_id) == (
        *(6562, 152064, 151687, 151692),
    )


def test_a_checkpoint_says_how_it_is_to_be_decoded(tmp_path: Path):
    config = load_config(written(tmp_path, OFFICIAL | {"generation": {"repetition_penalty": 1.0, "other": 1}}))
    assert config.generation == GenerationConfig(repetition_penalty=1.0)


def test_nano_is_not_taken_for_the_released_checkpoint(tmp_path: Path):
    config = load_config(written(tmp_path, OFFICIAL | {"nano": True}))
    assert (config.nano, config.official, config.untrained) == (True, False, False)


def test_every_difference_is_named_with_both_values():
    config = dataclasses.replace(
        RELEASED,
        llm=LlmConfig(hidden_size=128, rope_theta=10000.0),
        vision=dataclasses.replace(RELEASED.vision or VisionConfig(), layer_norm_eps=1e-5),
        audio=None,
        tts=TtsConfig(normalize_projected_hidden=False, attention_type="full_attention"),
    )
    assert differences(config) == [
        "llm.hidden_size is 128, released: 4096",
        "llm.rope_theta is 10000.0, released: 1000000.0",
        "vision.layer_norm_eps is 1e-05, released: 1e-06",
        "audio is off, released: on",
        "tts.normalize_projected_hidden is False, released: True",
    ]


def test_both_released_vocoders_are_as_released():
    causal = dataclasses.replace(RELEASED, vocoder=VocoderConfig(hift=HiftConfig(causal=True), num_steps=10))
    assert differences(causal) == []


@pytest.mark.parametrize(
    "change", [{"untrained": True}, {"nano": True}, {"architectures": ["Other"]}, {"version": None}]
)
def test_a_checkpoint_of_ones_own_does_not_claim_to_be_the_released_one(tmp_path: Path, change: dict[str, Any]):
    config = {key: value for key, value in (OFFICIAL | change).items() if value is not None}
    assert not load_config(written(tmp_path, config)).official
    assert not TINY.official


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("", {"model_type": "qwen3"}, "model_type is 'qwen3', expected 'minicpmo'"),
        ("", {"version": "2.6"}, "version is '2.6', expected '4.5'"),
        ("", {"hidden_act": "relu"}, "hidden_act is 'relu', expected 'silu'"),
        ("", {"attention_bias": True}, "attention_bias is True, expected False"),
        ("", {"tie_word_embeddings": True}, "tie_word_embeddings is True, expected False"),
        ("", {"rope_scaling": {"type": "yarn"}}, "rope_scaling is {'type': 'yarn'}, expected None"),
        ("", {"rope_parameters": {"rope_type": "yarn"}}, "rope_scaling is {'rope_type': 'yarn'}, expected None"),
        ("vision_config", {"hidden_act": "gelu"}, "vision_config.hidden_act is 'gelu', expected 'gelu_pytorch_tanh'"),
        ("audio_config", {"activation_function": "relu"}, "audio_config.activation_function is 'relu', expected"),
        ("audio_config", {"num_mel_bins": 128}, "audio_config.num_mel_bins is 128, expected 80"),
        ("tts_config", {"num_vq": 4}, "tts_config.num_vq is 4, expected 1"),
        ("tts_config", {"condition_type": "text"}, "tts_config.condition_type is 'text', expected 'hidden_text_merge'"),
        ("tts_config", {"backbone_model": "qwen"}, "tts_config.backbone_model is 'qwen', expected 'llama'"),
        ("tts_config", {"projector_type": "minicpm"}, "tts_config.projector_type is 'minicpm', expected 'mlp'"),
    ],
)
def test_what_the_modules_would_not_obey_is_refused_by_its_name(
    tmp_path: Path, section: str, change: dict[str, Any], message: str
):
    config = OFFICIAL | ({section: OFFICIAL[section] | change} if section else change)
    with pytest.raises(ModelError) as refused:
        load_config(written(tmp_path, config))
    assert str(refused.value).startswith(f"{tmp_path / 'config.json'}: not a model that is run here: {message}")


def test_all_that_is_refused_is_told_at_once(tmp_path: Path):
    with pytest.raises(ModelError, match=r"hidden_act is 'relu', expected 'silu'; attention_bias is True"):
        load_config(written(tmp_path, OFFICIAL | {"hidden_act": "relu", "attention_bias": True}))


def test_rope_theta_is_read_as_transformers_5_writes_it(tmp_path: Path):
    config = {key: value for key, value in OFFICIAL.items() if key != "rope_theta"}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
    assert load_config(written(tmp_path, config)).llm.rope_theta == 5000.0


def test_a_section_that_is_no_object_is_told(tmp_path: Path):
    with pytest.raises(ModelError, match=r"not a MiniCPM-o 4.5 config"):
        load_config(written(tmp_path, OFFICIAL | {"tts_config": "none"}))
