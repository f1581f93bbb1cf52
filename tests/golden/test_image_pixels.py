"""Pictures become the official pixel values, bit for bit."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Any

import numpy as np
import pytest
import torch

from model_shards.config import load_config
from model_shards.image import ImagePatches, slice_image
from tests.support import golden
from tests.support.golden import cases, read_json, read_tensors

JSON, NPZ = "image_pixels.json", "image_pixels.npz"


def images() -> list[dict[str, Any]]:
    return read_json(JSON)


def patch_ids() -> list[str]:
    return [f"img{k}_patch{j}" for k, image in enumerate(images()) for j in range(len(image["patches"]))]


@functools.cache
def sliced(index: int) -> list[ImagePatches]:
    config = load_config(golden.FOLDER).vision
    assert config is not None
    limits = dataclasses.replace(config.slices, max_slice_nums=images()[index]["max_slice_nums"])
    return slice_image(read_tensors(NPZ)[f"img{index}_input"].numpy(), limits)


def patch_of(case: str) -> tuple[ImagePatches, dict[str, Any]]:
    index, number = (int(part) for part in case.removeprefix("img").split("_patch"))
    return sliced(index)[number], images()[index]["patches"][number]


@cases(JSON, (f"img{index}" for index in range(len(images()))))
def test_a_picture_gives_the_official_patches(case: str) -> None:
    index = int(case.removeprefix("img"))
    recorded = images()[index]
    height, width, _ = read_tensors(NPZ)[f"{case}_input"].shape

    assert [width, height] == recorded["size"]
    assert [[piece.rows, piece.cols] for piece in sliced(index)] == recorded["tgt_sizes"]
    assert len(sliced(index)) == len(recorded["patches"])


@cases(JSON, patch_ids())
def test_a_patch_has_the_official_values_bit_for_bit(case: str) -> None:
    piece, recorded = patch_of(case)

    assert list(piece.pixels.shape) == recorded["shape"]
    assert str(piece.pixels.dtype) == f"torch.{recorded['dtype']}"
    assert hashlib.sha256(piece.pixels.numpy().tobytes()).hexdigest() == recorded["sha256_f32"]
    assert float(piece.pixels.double().sum()) == pytest.approx(recorded["sum"], rel=1e-9)


@cases(NPZ, [case for case in patch_ids() if f"{case}_u8" in read_tensors(NPZ)])
def test_a_patch_is_made_of_the_official_bytes(case: str) -> None:
    piece, recorded = patch_of(case)
    u8 = read_tensors(NPZ)[f"{case}_u8"].numpy()

    values = (u8.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)

    assert recorded["u8_exact"]
    assert np.array_equal(piece.pixels.numpy(), values)


@cases(NPZ, [case for case in patch_ids() if f"{case}_f32_head" in read_tensors(NPZ)])
def test_a_patch_begins_with_the_official_columns(case: str) -> None:
    head = read_tensors(NPZ)[f"{case}_f32_head"]
    assert torch.equal(patch_of(case)[0].pixels[..., : head.shape[-1]], head)
