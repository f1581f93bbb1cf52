"""Linear layers whose weights are held in 8 or 4 bits, and computed with in the activations' own type (weight-only).

    8 bits  one scale per row:                        w = code * scale,              codes -128 … 127
    4 bits  scale and zero per row and group:         w = (code - 8) * scale + zero, codes 0 … 15, two in a byte

Rule: files hold plain codes, the same for every machine; what a machine's kernels want is made of them when they are
loaded (`settle`). On a CPU, bfloat16 has kernels of torch's that read the codes; for other types the weights are
written out once. On a GPU there is one for 4 bits in bfloat16, made for few rows, as decode steps have; its time grows
with the rows. Otherwise the weights are written out there for each forward, which saves memory and no time.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_shards.config import Quantization

GROUPS: Final = (128, 64, 32)
"""Sizes of groups which torch's 4-bit kernel knows, the preferred first."""
_MIDDLE: Final = 8  # the code of `zero`
_ROWS_AT_ONCE: Final = 16  # the 4-bit kernel's: a matrix has a multiple of them
_GPU_ROWS_AT_ONCE: Final = 8  # the same of the GPU's 4-bit kernel
_GPU_TILE: Final = 16  # columns
_ALIGNMENT: Final = 16  # bytes which the 8-bit kernel reads at once; elsewhere it dies
_DTYPES: Final = MappingProxyType({8: torch.int8, 4: torch.uint8})


class Codes(NamedTuple):
    """A matrix [out, in] as it is stored. scale, zero: [out, groups]; zero is None with 8 bits."""

    weight: Tensor  # int8 [out, in], or uint8 [out, in / 2], the first of two codes in the lower half
    scale: Tensor
    zero: Tensor | None


def quantize(weight: Tensor, bits: int, group_size: int) -> Codes:
    """[out, in] to its codes, to the nearest; scale and zero are of the weight's type."""
    exact = weight.float()
    if bits == 8:
        scale = (exact.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-8).to(weight.dtype)
        return Codes((exact / scale.float()).round().clamp(-128, 127).to(torch.int8), scale, None)
    groups = exact.view(len(exact), -1, group_size)
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    scale = ((high - low) / 15).clamp(min=1e-8).to(weight.dtype)
    zero = (low + _MIDDLE * scale.float()).to(weight.dtype)
    codes = ((groups - zero.float()[..., None]) / scale.float()[..., None]).round() + _MIDDLE
    codes = codes.clamp(0, 15).to(torch.uint8).flatten(1)
    return Codes(codes[:, ::2] | (codes[:, 1::2] << 4), scale, zero)


def dequantize(codes: Codes) -> Tensor:
    """Back to [out, in], in the type of the scales."""
    if codes.zero is None:
        return codes.weight.to(codes.scale.dtype) * codes.scale
    groups = _unpacked(codes.weight).view(*codes.scale.shape, -1).to(codes.scale.dtype) - _MIDDLE
    return (groups * codes.scale[..., None] + codes.zero[..., None]).flatten(1)


def _unpacked(pairs: Tensor) -> Tensor:
    return torch.stack([pairs & 15, pairs >> 4], dim=2).flatten(1)


Product = Callable[[Tensor], Tensor]  # [rows, in] to [rows, out]


class QuantizedLinear(nn.Module):
    """A linear layer without bias, in its file's codes until it is settled. It takes one row or more."""

    def __init__(self, in_features: int, out_features: int, quantization: Quantization) -> None:
        super().__init__()
        self.out_features = out_features
        four = quantization.bits == 4
        groups = in_features // quantization.group_size if four else 1
        weight = torch.empty(out_features, in_features // 2 if four else in_features, dtype=_DTYPES[quantization.bits])
        self.weight: Tensor
        self.weight_scale: Tensor
        self.weight_zero: Tensor | None
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", torch.empty(out_features, groups))
        self.register_buffer("weight_zero", torch.empty(out_features, groups) if four else None)
        self._product: Product | None = None

    def settle(self) -> None:
        """Make of the codes what the kernels want where they lie, and forget what they don't. Call it once."""
        self._product = _product(Codes(self.weight, self.weight_scale, self.weight_zero))
        self.weight = self.weight_scale = self.weight.new_empty(0)
        self.weight_zero = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        assert self._product is not None, "a quantised layer is settled before it computes"
        return self._product(x.reshape(-1, x.shape[-1]).contiguous()).view(*x.shape[:-1], self.out_features)


def settle(module: nn.Module) -> None:
    """`QuantizedLinear.settle` of all there are."""
    for part in module.modules():
        if isinstance(part, QuantizedLinear):
            part.settle()


def _aligned(tensor: Tensor) -> Tensor:
    """Itself, or a copy: what lies in a mapped file, or is cut out of another tensor, may begin anywhere."""
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def _product(codes: Codes) -> Product:
    num_rows, dtype = codes.weight.shape[0], codes.scale.dtype
    if codes.weight.device.type != "cpu":
        tiles = _tiles(codes)
        return tiled_product(codes, tiles) if tiles else written_out_product(codes)
    if dtype != torch.bfloat16 or (codes.zero is not None and num_rows % _ROWS_AT_ONCE):
        plain = dequantize(codes)
        return lambda x: F.linear(x, plain)
    if codes.zero is None:
        weight, scale = _aligned(codes.weight), codes.scale.flatten()
        return lambda x: torch._weight_int8pack_mm(_aligned(x), weight, scale)
    packed = torch._convert_weight_to_int4pack_for_cpu(_unpacked(codes.weight).to(torch.int32), 1)
    both = torch.stack([codes.scale, codes.zero], dim=2).transpose(0, 1).contiguous()
    group_size = 2 * codes.weight.shape[1] // codes.scale.shape[1]
    return lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, group_size, both)


def written_out_product(codes: Codes) -> Product:
    """In 8 bits a row's scale is the result's as well: it takes one pass less over the matrix."""
    if codes.zero is not None:
        return lambda x: F.linear(x, dequantize(codes))
    weight, scale = codes.weight, codes.scale.flatten()
    return lambda x: F.linear(x, weight.to(x.dtype)) * scale


def _tiles(codes: Codes) -> int:
    """How many tiles of columns a GPU's 4-bit kernel takes together; 0 where it can't compute this."""
    num_rows, num_columns = len(codes.weight), 2 * codes.weight.shape[1]
    device = codes.weight.device
    if codes.zero is None or codes.scale.dtype != torch.bfloat16 or num_rows % _GPU_ROWS_AT_ONCE:
        return 0
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return 0
    return next((tiles for tiles in (8, 4, 2) if num_columns % (tiles * _GPU_TILE) == 0), 0)


def tiled_product(codes: Codes, tiles: int) -> Product:
    """On a GPU, whose kernel wants the first of two codes in the upper half of a byte."""
    assert codes.zero is not None
    packed = torch._convert_weight_to_int4pack((codes.weight & 15) << 4 | codes.weight >> 4, tiles)
    both = torch.stack([codes.scale, codes.zero], dim=2).transpose(0, 1).contiguous()
    group_size = 2 * codes.weight.shape[1] // codes.scale.shape[1]
    return lambda x: torch._weight_int4pack_mm(x, packed, group_size, both)
