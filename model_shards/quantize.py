"""A checkpoint with the LLM's weights in 8 or 4 bits, written as a split folder. Read by model_shards/quantized.py.

The LLM is nine tenths of the released checkpoint; the other components stay as they are, as do embeddings and norms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model_shards.checkpoint import Component, check
from model_shards.config import Quantization, load_config
from model_shards.errors import ModelError
from model_shards.quantized import GROUPS, Codes, QuantizedLinear, dequantize, quantize
from model_shards.split import split_checkpoint

Bits = Literal[8, 4]
LAYERS = "llm.model.layers."
HEAD = "llm.lm_head.weight"
_ROWS_AT_ONCE = 1024  # of a matrix: what is reckoned with takes several times their size


@dataclass(slots=True)
class Quantized:
    """What has become of a checkpoint: bytes of the LLM before and after, and the sums of squares of its weights and of
    what they are off."""

    quantization: Quantization
    before_bytes: int = 0
    after_bytes: int = 0
    largest: Tensor | None = None  # of its layers' matrices
    squares: float = field(default=0.0, repr=False)
    errors: float = field(default=0.0, repr=False)

    @property
    def relative_error(self) -> float:
        """RMS of what the weights are off, by the RMS of the weights."""
        return sqrt(self.errors / self.squares) if self.squares else 0.0


@torch.inference_mode()
def quantize_checkpoint(checkpoint: Path, out: Path, bits: Bits) -> Quantized:
    """Write `checkpoint` with the matrices of its LLM's layers in `bits`, and the head in 8. Holds the LLM's codes in
    memory, and the largest matrix once more.

    Raises ModelError where `check` and `split_checkpoint` do, and for a checkpoint that is quantised already, or whose
    sizes no group divides.
    """
    config = load_config(checkpoint).llm
    if config.quantization is not None:
        raise ModelError(f"{checkpoint}: its LLM is quantised already, {config.quantization}; take the original")
    sizes = {config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim}
    group_size = next((group for group in GROUPS if not any(size % group for size in sizes)), None)
    if group_size is None:
        raise ModelError(f"{checkpoint}: no group of {GROUPS} weights divides {sorted(sizes)}")
    check(checkpoint, ["llm"])
    done = Quantized(Quantization(bits, group_size))

    def change(component: Component, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if component != "llm":
            return tensors
        changed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            changed |= _quantized(name, tensor, done)
        done.before_bytes, done.after_bytes = _num_bytes(tensors), _num_bytes(changed)
        return changed

    split_checkpoint(checkpoint, out, change, {"quantization": {"bits": bits, "group_size": group_size}})
    return done


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a product takes on this machine's CPU, in bfloat16, before and after."""

    num_rows: int
    before_s: float
    after_s: float


@torch.inference_mode()
def compare_speed(matrix: Tensor, quantization: Quantization, rows: Sequence[int] = (1, 64)) -> list[Timing]:
    """Time a matrix [out, in] with one row, as in decoding one session, and with more, as where a unit is fed."""
    plain = matrix.to(torch.bfloat16)
    layer = QuantizedLinear(matrix.shape[1], matrix.shape[0], quantization)
    codes = quantize(plain, quantization.bits, quantization.group_size)
    layer.weight, layer.weight_scale, layer.weight_zero = codes
    layer.settle()
    inputs = [torch.randn(num_rows, matrix.shape[1], dtype=torch.bfloat16) for num_rows in rows]
    return [
        Timing(len(x), seconds(lambda x=x: F.linear(x, plain)), seconds(lambda x=x: layer(x)))  # type: ignore[misc]
        for x in inputs
    ]


def seconds(work: Callable[[], object], repetitions: int = 7) -> float:
    """The median of some; the first warms up."""
    taken = []
    for _ in range(repetitions + 1):
        begin_s = perf_counter()
        work()
        taken.append(perf_counter() - begin_s)
    return median(taken[1:])


def _quantized(name: str, tensor: Tensor, done: Quantized) -> dict[str, Tensor]:
    """A tensor of the LLM as it will be stored."""
    in_layers = name.startswith(LAYERS) and tensor.dim() == 2
    if not (in_layers or name == HEAD):
        return {name: tensor}
    if tensor.dtype.itemsize == 1:  # a scale would not fit into 8 bits
        tensor = tensor.to(torch.bfloat16)
    if in_layers and (done.largest is None or tensor.numel() > done.largest.numel()):
        done.largest = tensor
    parts: list[Codes] = []
    for rows in torch.split(tensor, _ROWS_AT_ONCE):
        parts.append(quantize(rows, done.quantization.bits if in_layers else 8, done.quantization.group_size))
        done.squares += float(rows.float().square().sum())
        done.errors += float((dequantize(parts[-1]).float() - rows.float()).square().sum())
    stored = {name: [part.weight for part in parts], f"{name}_scale": [part.scale for part in parts]}
    if zeros := [part.zero for part in parts if part.zero is not None]:
        stored[f"{name}_zero"] = zeros
    return {key: torch.cat(pieces) for key, pieces in stored.items()}


def _num_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
