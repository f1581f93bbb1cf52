"""A matrix of the released LLM in 8 and in 4 bits, beside the same in bfloat16: how fast on this CPU, and how large.

The matrix is a layer's `gate_proj`, 12288 by 4096, with random weights; one row is a session that decodes, 64 rows are
a picture. Where torchao is installed (pip install torchao==0.18.0), its int8 weight-only layer is a second rival.

Options: OMNI_BENCH_WIDTH, the matrix's columns (default: 4096; it has three times as many rows).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deploy.evaluate.bench import Row, command_of, less_is_better, option
from model_shards.config import Quantization
from model_shards.quantize import Timing, compare_speed, seconds
from model_shards.quantized import Codes, quantize

NAME = "quantized"
RIVAL = "the same in bfloat16"
ROWS = (1, 4, 16, 64)
GROUP_SIZE = 128


def run() -> list[Row]:
    """A row per width of the codes and number of rows, then the sizes."""
    torch.set_num_threads(1)
    width = int(option("WIDTH", "4096"))
    matrix = (torch.randn(3 * width, width, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    theirs = _torchao(matrix, ROWS) if importlib.util.find_spec("torchao") else []
    rows: list[Row] = []
    for bits in (8, 4):
        quantization = Quantization(bits, GROUP_SIZE)
        timings = compare_speed(matrix, quantization, ROWS)
        rows += [_row(bits, timing) for timing in timings]
        rows += [_beside(bits, timing, other_s) for timing, other_s in zip(timings, theirs, strict=False)]
        ours = sum(part.nbytes for part in _parts(quantize(matrix, bits, GROUP_SIZE))) / 1e6
        rows.append(less_is_better(f"{bits} bits: size", ours, "MB", RIVAL, matrix.nbytes / 1e6, command_of(NAME)))
    return rows


def _row(bits: int, timing: Timing) -> Row:
    name = f"{bits} bits: {timing.num_rows} row(s)"
    return less_is_better(name, timing.after_s * 1e3, "ms", RIVAL, timing.before_s * 1e3, command_of(NAME))


def _beside(bits: int, timing: Timing, other_s: float) -> Row:
    name = f"{bits} bits: {timing.num_rows} row(s)"
    return less_is_better(name, timing.after_s * 1e3, "ms", "torchao int8", other_s * 1e3, command_of(NAME))


def _parts(codes: Codes) -> list[Tensor]:
    return [part for part in codes if part is not None]


@torch.inference_mode()
def _torchao(matrix: Tensor, rows: Sequence[int]) -> list[float]:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, dtype=matrix.dtype)
    layer.weight = nn.Parameter(matrix, requires_grad=False)
    model = nn.Sequential(layer)
    quantize_(model, Int8WeightOnlyConfig())
    inputs = [torch.randn(num_rows, matrix.shape[1], dtype=matrix.dtype) for num_rows in rows]
    return [seconds(lambda x=x: model(x)) for x in inputs]  # type: ignore[misc]
