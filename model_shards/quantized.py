"""Linear layers whose weights are held in 8 or 4 bits, and computed with in the activations' own type (weight-only).

    8 bits  one scale per row:                        w = code * scale,              codes -128 … 127
    4 bits  scale and zero per row and group:         w = (code - 8) * scale + zero, codes 0 … 15, two in a byte

Rule: files hold plain codes, the same for every machine; what a machine's kernels want is made of them when they are
loaded (`settle`), and `runs_with` says what that is.
- On a CPU, bfloat16 has kernels of torch's that read the codes; for other types the weights are written out once.
- On a GPU, bfloat16 in 4 bits has a kernel of torch's for the tensor cores, which is fast for a few rows. For many, the
  weights are written out for each product.
- On a GPU, 8 bits are written out for each product, which saves memory and no time: torch's own kernel (2.9 and newer)
  computes in float32, and each result by itself.
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
_ALIGNMENT: Final = 16  # bytes which the 8-bit kernel reads at once; elsewhere it dies
_WRITTEN_AT_ONCE: Final = 16_384  # rows: of the head, which has 151 748, it would be 1.2 GB more at each step
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


class Product(NamedTuple):
    """How a matrix is computed with. runs_with: for the user."""

    compute: Callable[[Tensor], Tensor]  # [rows, in] to [rows, out]
    runs_with: str


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

    @property
    def runs_with(self) -> str:
        return "" if self._product is None else self._product.runs_with

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        assert self._product is not None, "a quantised layer is settled before it computes"
        return self._product.compute(x.reshape(-1, x.shape[-1]).contiguous()).view(*x.shape[:-1], self.out_features)


def settle(module: nn.Module) -> None:
    """`QuantizedLinear.settle` of all there are."""
    for part in module.modules():
        if isinstance(part, QuantizedLinear):
            part.settle()


def runs_with(module: nn.Module) -> str:
    """What the quantised layers of a settled module are computed with, for the user; "" where there are none."""
    kinds = (part.runs_with for part in module.modules() if isinstance(part, QuantizedLinear))
    return ", ".join(dict.fromkeys(filter(None, kinds)))


def _product(codes: Codes) -> Product:
    if codes.weight.device.type == "cpu":
        return _on_cpu(codes)
    bits, dtype = 8 if codes.zero is None else 4, codes.scale.dtype
    if bits == 4 and dtype == torch.bfloat16 and not (lack := _lacks_tensor_cores(codes)):
        return for_tensor_cores(codes, TORCH_KERNEL)
    why = f" ({lack})" if bits == 4 and dtype == torch.bfloat16 else ""
    return written_out(codes, f"{bits} bits written out for each product{why}: smaller than {dtype}, not faster")


# ---- on a CPU --------------------------------------------------------------------------------------------------------


def _on_cpu(codes: Codes) -> Product:
    num_rows, dtype = codes.weight.shape[0], codes.scale.dtype
    if dtype != torch.bfloat16 or (codes.zero is not None and num_rows % _ROWS_AT_ONCE):
        plain = dequantize(codes)
        return Product(lambda x: F.linear(x, plain), f"quantised weights written out in {dtype}")
    if codes.zero is None:
        weight, scale = _aligned(codes.weight), codes.scale.flatten()
        return Product(lambda x: torch._weight_int8pack_mm(_aligned(x), weight, scale), "torch's 8-bit kernel")
    packed = torch._convert_weight_to_int4pack_for_cpu(_unpacked(codes.weight).to(torch.int32), 1)
    both, size = _scales_and_zeros(codes), _group_size(codes)
    return Product(lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, size, both), "torch's 4-bit kernel")


def _aligned(tensor: Tensor) -> Tensor:
    """Itself, or a copy: what lies in a mapped file, or is cut out of another tensor, may begin anywhere."""
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def _scales_and_zeros(codes: Codes) -> Tensor:
    """[groups, out, 2], as torch's kernels read them."""
    assert codes.zero is not None
    return torch.stack([codes.scale, codes.zero], dim=2).transpose(0, 1).contiguous()


def _group_size(codes: Codes) -> int:
    return 2 * codes.weight.shape[1] // codes.scale.shape[1]


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def written_out(codes: Codes, said: str) -> Product:
    """The codes stay; some rows of the matrix at a time are written out when they are multiplied with."""
    parts = [
        Codes(*(None if part is None else part[start : start + _WRITTEN_AT_ONCE] for part in codes))  # type: ignore[arg-type]
        for start in range(0, len(codes.weight), _WRITTEN_AT_ONCE)
    ]
    return Product(lambda x: torch.cat([_times(x, part) for part in parts], dim=1), said)


def _times(x: Tensor, codes: Codes) -> Tensor:
    if codes.zero is None:  # 8 bits are whole numbers in any type: the scales can wait for the result
        return F.linear(x, codes.weight.to(x.dtype)) * codes.scale.T
    return F.linear(x, dequantize(codes))


class TensorCoreKernel(NamedTuple):
    """torch's 4-bit kernel of a GPU.

    pack:     uint8 [out, in / 2], the first of two codes in the upper half, and the number of inner tiles, to
              int32 [out / 8, in / (16 * inner tiles), 32, inner tiles / 2], in an order of its own within each tile.
    multiply: bfloat16 [rows, in], what was packed, the size of a group, and bfloat16 [groups, out, 2] of scale and
              zero, to bfloat16 [rows, out].
    """

    pack: Callable[[Tensor, int], Tensor]
    multiply: Callable[[Tensor, Tensor, int, Tensor], Tensor]


TORCH_KERNEL: Final = TensorCoreKernel(torch._convert_weight_to_int4pack, torch._weight_int4pack_mm)
_INNER_TILES: Final = 8
_TILE: Final = (8, 16 * _INNER_TILES)  # rows and columns of the matrix whose codes are packed next to each other
FEW_ROWS: Final = 64
"""Up to so many, the kernel reads the codes; it does so again for each 16 rows. Of a matrix of 4096 by 4096 on an A6000
torchao's authors report 0.04, 0.06, 0.25 and 0.52 ms for 16, 32, 128 and 256 rows, and 0.27 to 0.33 ms for writing it
out before a plain product. A newer GPU gains more in writing than in the kernel. Not measured here."""


def _lacks_tensor_cores(codes: Codes) -> str:
    """Why torch's 4-bit kernel can't take a matrix here; "" where it can."""
    rows, columns = len(codes.weight), 2 * codes.weight.shape[1]
    if torch.cuda.get_device_capability(codes.weight.device) < (8, 0):
        return "the 4-bit kernel needs a GPU of compute capability 8.0"
    if rows % _TILE[0] or columns % _TILE[1] or columns % _group_size(codes):
        return f"the 4-bit kernel takes no matrix of {rows} by {columns}"
    return ""


def for_tensor_cores(codes: Codes, kernel: TensorCoreKernel) -> Product:
    """A few rows by the kernel. For many, the matrix is written out of what was packed: there is no second copy."""
    packed = kernel.pack((codes.weight << 4) | (codes.weight >> 4), _INNER_TILES)
    both, size = _scales_and_zeros(codes), _group_size(codes)
    order = _order_in_tile(kernel, codes.weight.device)

    def compute(x: Tensor) -> Tensor:
        if len(x) <= FEW_ROWS:
            return kernel.multiply(x, packed, size, both)
        return F.linear(x, _unpacked_tiles(packed, both, order))

    return Product(compute, f"torch's 4-bit tensor-core kernel up to {FEW_ROWS} rows, written out for more")


def _order_in_tile(kernel: TensorCoreKernel, device: torch.device) -> Tensor:
    """Which of the packed codes of a tile is at each place of it, row by row.

    Found by packing: three tiles, whose codes are the digits of each place's number.
    """
    places = torch.arange(_TILE[0] * _TILE[1], device=device)
    number = torch.zeros_like(places)
    for shift in (0, 4, 8):
        digits = ((places >> shift) & 15).to(torch.uint8).view(_TILE)
        number += (
            _codes_in(kernel.pack((digits[:, ::2] << 4) | digits[:, 1::2], _INNER_TILES)).flatten().long() << shift
        )
    return number.argsort()


def _codes_in(packed: Tensor) -> Tensor:
    """uint8 [row tiles, column tiles, codes of a tile], in the order in which they are packed."""
    return _unpacked(packed.view(torch.uint8).flatten(2).flatten(0, 1)).view(*packed.shape[:2], -1)


def _unpacked_tiles(packed: Tensor, both: Tensor, order: Tensor) -> Tensor:
    """What was packed as a matrix [out, in] of the scales' type."""
    row_tiles, column_tiles = packed.shape[:2]
    tiles = _codes_in(packed).index_select(2, order).view(row_tiles, column_tiles, *_TILE)
    scale, zero = both.transpose(0, 1).unbind(dim=2)  # [out, groups]
    codes = tiles.transpose(1, 2).reshape(*scale.shape, -1).to(both.dtype) - _MIDDLE
    return (codes * scale[..., None] + zero[..., None]).flatten(1)
