"""How pictures are cut: the official sizes, to the pixel."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_shards.config import SliceConfig
from model_shards.errors import ModelError
from model_shards.image import ImagePatches, SlicePlan, placeholder, plan_slices, slice_image

PLACES = [Path(__file__).parents[up] / "shared" / "golden" for up in (2, 3)]
GOLDEN = Path(os.environ.get("OMNI_GOLDEN") or next((place for place in PLACES if place.is_dir()), PLACES[0]))
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden data; OMNI_GOLDEN names its folder")


def config(max_slice_nums: int) -> SliceConfig:
    return SliceConfig(max_slice_nums=max_slice_nums)


def patch_sizes(plan: SlicePlan) -> list[list[int]]:
    """Rows and columns of patches: the whole picture first, then its cells."""
    cells = [] if plan.cell is None else [plan.cell] * plan.num_cells
    return [[height // 14, width // 14] for width, height in (plan.source, *cells)]


@pytest.mark.parametrize(
    ("size", "max_slice_nums", "expected"),
    [
        ((448, 448), 1, SlicePlan(source=(448, 448))),
        ((640, 480), 1, SlicePlan(source=(518, 392))),
        ((1920, 1080), 1, SlicePlan(source=(602, 336))),
        ((1280, 720), 2, SlicePlan(source=(602, 336), grid=(2, 1), refined=(840, 476))),
        ((1280, 720), 9, SlicePlan(source=(602, 336), grid=(3, 2), refined=(1470, 812))),
        ((1920, 1080), 9, SlicePlan(source=(602, 336), grid=(4, 2), refined=(1680, 952))),
    ],
)
def test_common_cameras_are_cut_as_officially(size: tuple[int, int], max_slice_nums: int, expected: SlicePlan) -> None:
    assert plan_slices(*size, config(max_slice_nums)) == expected


@given(width=st.integers(1, 5000), height=st.integers(1, 5000), max_slice_nums=st.integers(1, 9))
def test_every_plan_is_whole_patches_and_not_too_many_cells(width: int, height: int, max_slice_nums: int) -> None:
    plan = plan_slices(width, height, config(max_slice_nums))

    sizes = [plan.source] + ([plan.cell] if plan.cell else [])
    assert all(side % 14 == 0 and side > 0 for size in sizes for side in size)
    assert plan.num_cells <= max_slice_nums
    if plan.grid is not None and plan.cell is not None:
        assert plan.refined == (plan.cell[0] * plan.grid[0], plan.cell[1] * plan.grid[1])


def test_a_sliced_picture_gives_the_whole_and_then_its_cells() -> None:
    image = np.zeros((720, 1280, 3), dtype=np.uint8)

    pieces = slice_image(image, config(2))

    assert [(piece.rows, piece.cols) for piece in pieces] == [(24, 43), (34, 30), (34, 30)]
    assert all(tuple(piece.pixels.shape) == (3, 14, 14 * piece.rows * piece.cols) for piece in pieces)


def test_cells_come_row_by_row() -> None:
    image = np.zeros((896, 896, 3), dtype=np.uint8)
    image[:448, 448:] = 80
    image[448:, :448] = 160
    image[448:, 448:] = 240

    means = [float(piece.pixels.mean()) for piece in slice_image(image, config(4))[1:]]

    assert means == sorted(means)
    assert len(means) == 4


def test_patches_lie_side_by_side_row_by_row() -> None:
    image = np.zeros((448, 448, 3), dtype=np.uint8)
    image[14:28, 28:42, 1] = 255  # green, patch of row 1 and column 2

    (piece,) = slice_image(image, config(1))

    patches = piece.pixels.view(3, 14, 32 * 32, 14)
    assert bool((patches[1, :, 1 * 32 + 2] == 1).all())
    assert int((piece.pixels == 1).sum()) == 14 * 14
    assert float(piece.pixels.min()) == -1


def test_chat_numbers_its_pictures_and_breaks_rows() -> None:
    plan = SlicePlan(source=(448, 448), grid=(2, 2), refined=(896, 896))
    row = "<slice><unk></slice><slice><unk></slice>"

    assert placeholder(plan, 1, image_id=3) == f"<image_id>3</image_id><image><unk></image>{row}\n{row}"
    assert placeholder(plan, 1, row_end="") == f"<image><unk></image>{row}{row}"


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((10, 10), dtype=np.uint8),
        np.zeros((10, 10, 4), dtype=np.uint8),
        np.zeros((0, 10, 3), dtype=np.uint8),
        np.zeros((10, 10, 3), dtype=np.float32),
    ],
)
def test_something_else_than_a_picture_is_refused(image: Any) -> None:
    with pytest.raises(ModelError, match="uint8"):
        slice_image(image, config(1))


@golden
def test_plans_and_placeholders_are_the_official_ones() -> None:
    recorded = json.loads((GOLDEN / "image_slicing.json").read_text())

    for row in recorded["rows"]:
        plan = plan_slices(*row["size"], config(row["max_slice_nums"]))
        told = [None if part is None else list(part) for part in (plan.source, plan.grid, plan.refined, plan.cell)]
        assert told == [row["source_size"], row["grid"], row["refine_size"], row["slice_size"]]
        assert patch_sizes(plan) == row["tgt_sizes"]
        texts = [placeholder(plan, 64, image_id=3), placeholder(plan, 64)]
        short = [text.replace("<unk>" * 64, "{unk*64}") for text in texts]
        assert short == [row["placeholder_rle"], row["placeholder_noid_rle"]]


@golden
def test_pixels_are_the_official_ones_bit_for_bit() -> None:
    inputs = np.load(GOLDEN / "image_pixels.npz")
    recorded = json.loads((GOLDEN / "image_pixels.json").read_text())

    for index, row in enumerate(recorded):
        limits = dataclasses.replace(SliceConfig(), max_slice_nums=row["max_slice_nums"])
        pieces = slice_image(inputs[f"img{index}_input"], limits)
        assert [_digest(piece) for piece in pieces] == [patch["sha256_f32"] for patch in row["patches"]]


def _digest(piece: ImagePatches) -> str:
    assert piece.pixels.dtype == torch.float32
    return hashlib.sha256(piece.pixels.numpy().tobytes()).hexdigest()
