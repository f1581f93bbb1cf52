"""Tensors on the edges: numpy arrays on the wire, torch in the model stages. bfloat16 travels as uint16."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graph.chunk import Chunk, Scalar
from model_shards.attention import AttentionName, choose_attention
from model_shards.errors import ModelError
from stages.stage import Site, StageError

BFLOAT16 = "bfloat16"


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where a component computes, and in what."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.device} {str(self.dtype).removeprefix('torch.')}"


def runtime(device: str, dtype: str) -> Runtime:
    """device: cpu or cuda. dtype "auto": bfloat16 on cuda, float32 on a CPU."""
    if dtype == "auto":
        dtype = BFLOAT16 if device.startswith("cuda") else "float32"
    return Runtime(device, torch.bfloat16 if dtype == BFLOAT16 else torch.float32)


def cpu_dtype(dtype: str) -> torch.dtype:
    """What a CPU computes in where either will do. dtype "auto": bfloat16 where it has instructions for it."""
    if dtype == "auto":
        has = torch.cpu.get_capabilities()
        dtype = BFLOAT16 if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"
    return torch.bfloat16 if dtype == BFLOAT16 else torch.float32


def attention_for(site: Site, where: Runtime, requested: str | None, kv_dtype: torch.dtype) -> AttentionName:
    """Which attention a stage's model has. Raises StageError where the one that is wanted can't run there."""
    try:
        return choose_attention(where.device, where.dtype, requested, kv_dtype)
    except ModelError as error:
        raise StageError(f"{site.name}: stages.{site.name}.{error}") from error


def to_arrays(name: str, tensor: Tensor) -> tuple[dict[str, np.ndarray], dict[str, Scalar]]:
    """(arrays, attrs) for a chunk; the tensor's memory is copied to the host."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return {name: tensor.view(torch.uint16).cpu().numpy()}, {"dtype": BFLOAT16}
    return {name: tensor.to(torch.float32).cpu().numpy()}, {}


def to_tensor(chunk: Chunk, name: str, where: Runtime) -> Tensor:
    """The array `name` of a chunk as a tensor of `where`'s dtype, on its device."""
    array = torch.from_numpy(np.array(chunk.arrays[name]))  # a copy: the frame's memory is read-only
    if chunk.attrs.get("dtype") == BFLOAT16:
        array = array.view(torch.bfloat16)
    return array.to(where.device, where.dtype)
