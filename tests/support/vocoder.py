"""The vocoder as the golden folder has it: sizes from the official nested dicts, weights by official names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from model_shards.config import FlowConfig, HiftConfig, VocoderConfig
from model_shards.hift import HiftGenerator

Module = TypeVar("Module", bound=nn.Module)

FLOW_SIZES = {
    "flow.input_size": "input_size",
    "flow.output_size": "output_size",
    "flow.spk_embed_dim": "spk_embed_dim",
    "flow.vocab_size": "vocab_size",
    "encoder.pre_lookahead_len": "pre_lookahead_len",
    "encoder.num_blocks": "encoder_num_blocks",
    "encoder.num_up_blocks": "encoder_num_up_blocks",
    "encoder.up_stride": "up_stride",
    "encoder.attention_heads": "encoder_attention_heads",
    "encoder.linear_units": "encoder_linear_units",
    "decoder.inference_cfg_rate": "inference_cfg_rate",
    "dit.mlp_ratio": "dit_mlp_ratio",
    "dit.depth": "dit_depth",
    "dit.num_heads": "dit_num_heads",
    "dit.head_dim": "dit_head_dim",
    "dit.hidden_size": "dit_hidden_size",
}
"""Where a size of the official flow is in our FlowConfig."""

HIFT_SIZES = {
    "in_channels": "in_channels",
    "base_channels": "base_channels",
    "nb_harmonics": "nb_harmonics",
    "sampling_rate": "sampling_rate_hz",
    "nsf_alpha": "nsf_alpha",
    "nsf_sigma": "nsf_sigma",
    "nsf_voiced_threshold": "nsf_voiced_threshold",
    "upsample_rates": "upsample_rates",
    "upsample_kernel_sizes": "upsample_kernel_sizes",
    "istft_params.n_fft": "istft_n_fft",
    "istft_params.hop_len": "istft_hop_len",
    "resblock_kernel_sizes": "resblock_kernel_sizes",
    "resblock_dilation_sizes": "resblock_dilation_sizes",
    "source_resblock_kernel_sizes": "source_resblock_kernel_sizes",
    "source_resblock_dilation_sizes": "source_resblock_dilation_sizes",
    "lrelu_slope": "lrelu_slope",
    "audio_limit": "audio_limit",
    "conv_pre_look_right": "conv_pre_look_right",
}
"""Where a size of the official HiFT is in our HiftConfig."""


def leaves(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as `{"a.b": value}`."""
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def flow_config(raw: Mapping[str, Any]) -> FlowConfig:
    """From `{"flow": …, "encoder": …, "decoder": …, "dit": …}`."""
    return FlowConfig(**{FLOW_SIZES[name]: value for name, value in leaves(raw).items() if name in FLOW_SIZES})


def hift_config(raw: Mapping[str, Any], f0_cond_channels: int, *, causal: bool = False) -> HiftConfig:
    """From the arguments of the official generator, and the width of its F0 predictor."""
    sizes = {HIFT_SIZES[name]: frozen(value) for name, value in leaves(raw).items() if name in HIFT_SIZES}
    return HiftConfig(**sizes, f0_cond_channels=f0_cond_channels, causal=causal)


def vocoder_config(raw: Mapping[str, Any], num_steps: int) -> VocoderConfig:
    """From the `config` of token2wav.json."""
    return VocoderConfig(flow_config(raw), hift_config(raw["hift"], raw["f0"]["cond_channels"]), num_steps)


def frozen(value: Any) -> Any:
    return tuple(frozen(item) for item in value) if isinstance(value, list) else value


def with_weights(kind: Callable[[Any], Module], config: Any, weights: Mapping[str, Tensor]) -> Module:
    """A module of the weights' own tensors; each name must fit."""
    module = kind(config)
    module.load_state_dict(weights, strict=True, assign=True)
    return module.eval()


def below(prefix: str, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): stored[name] for name in stored if name.startswith(prefix)}


def official_draws(generator: torch.Generator, num_samples: int, num_harmonics: int) -> Tensor:
    """The noise (samples, harmonics) that the official code draws where ours draws the sum of it.

    It draws two more things, which never reach the wave: initial phases, as the phase is read in the middle of a frame,
    and a noise branch.
    """
    torch.rand(1, num_harmonics, generator=generator)
    # Transposed, as the official tensor is: torch fills such memory by another sequence of draws.
    noise = torch.empty(num_harmonics, num_samples).T.normal_(generator=generator)
    torch.randn(num_samples, generator=generator)
    return noise


def with_official_draws(hift: HiftGenerator) -> HiftGenerator:
    """The generator, whose seeds give the official noise from now on."""

    def draw_noise(generator: torch.Generator, num_frames: int) -> Tensor:
        num_harmonics = hift.config.nb_harmonics + 1
        return hift.m_source.weigh(official_draws(generator, num_frames * hift.hop, num_harmonics))

    hift.draw_noise = draw_noise  # type: ignore[method-assign]
    return hift
