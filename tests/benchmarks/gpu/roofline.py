"""What a device could do at best: the larger of bytes over bandwidth and operations over peak.

Bytes are weights, each time that they are read, and keys and values; activations are left out. Operations are counted
by torch as the call runs (matrix products, convolutions, attention); of the LLM they are reckoned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from model_shards.checkpoint import Component, build_hollow
from model_shards.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Device:
    """Bytes per second of its memory; dense operations per second in half precision, in TF32 and in float32."""

    bandwidth: float
    half: float
    tf32: float
    single: float


DEVICES: Final = {
    "B200": Device(8.0e12, 2250e12, 1125e12, 75e12),
    "H200": Device(4.8e12, 989e12, 494e12, 67e12),
    "H100 PCIe": Device(2.0e12, 756e12, 378e12, 51e12),
    "H100 NVL": Device(3.9e12, 835e12, 417e12, 60e12),
    "H100": Device(3.35e12, 989e12, 494e12, 67e12),
    "A100-SXM4-80GB": Device(2.04e12, 312e12, 156e12, 19.5e12),
    "A100": Device(1.56e12, 312e12, 156e12, 19.5e12),
    "L40S": Device(0.864e12, 362e12, 183e12, 91e12),
    "L4": Device(0.3e12, 121e12, 60e12, 30e12),
    "RTX 4090": Device(1.01e12, 165e12, 82e12, 82e12),
    "RTX 5090": Device(1.79e12, 209e12, 104e12, 104e12),
}
"""By a part of the name that torch tells; the first that fits."""


def known_device() -> Device | None:
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((device for part, device in DEVICES.items() if part in name), None)


def roofline_ms(num_bytes: float, num_operations: float, dtype: torch.dtype) -> float | None:
    """None where the device isn't known."""
    device = known_device()
    if device is None:
        return None
    single = device.single if torch.get_float32_matmul_precision() == "highest" else device.tf32
    peak = single if dtype == torch.float32 else device.half
    return 1000 * max(num_bytes / device.bandwidth, num_operations / peak)


UNREAD: Final[Mapping[Component, tuple[str, ...]]] = {
    "llm": ("embed_tokens",),
    "tts": ("emb_text", "emb_code", "projector"),
    "vocoder": ("input_embedding", "adaLN"),
    "vision": ("position_embedding",),
    "audio": ("embed_positions",),
}
"""Parts of names of weights that a call does not read, or single rows of: tables, and what is computed once at load."""


def num_bytes(component: Component, config: ModelConfig, dtype: torch.dtype, of: str = "") -> int:
    """Of the weights that a call reads, as the checkpoint has them: a loaded module has folded some, and hides them.

    of: how their names begin.
    """
    named = build_hollow(component, config).state_dict().items()
    read = [each for name, each in named if name.startswith(of) and not any(part in name for part in UNREAD[component])]
    num_elements: int = sum(each.numel() for each in read)
    return num_elements * dtype.itemsize


def num_operations(call: Callable[[], Any]) -> float:
    """Floating-point operations of a call, as torch counts them; 0 where this torch can't."""
    try:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            call()
        return float(counter.get_total_flops())
    except Exception:  # it counts by itself, and kernels that it doesn't know raise what they like
        return 0.0
