"""How pictures are cut: the sizes of the plain rule, to the pixel."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_shards.config import SliceConfig
from model_shards.errors import ModelError
from model_shards.image import SlicePlan, placeholder, plan_slices, slice_image
from tests.support import plain


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


@given(width=st.integers(1, 5000), height=st.integers(1, 5000), max_slice_nums=st.integers(1, 9))
def test_a_picture_is_cut_as_the_plain_rule_cuts_it(width: int, height: int, max_slice_nums: int) -> None:
    expected = plain.slicing(width, height, max_slice_nums)

    plan = plan_slices(width, height, config(max_slice_nums))

    parts = [None if part is None else list(part) for part in (plan.source, plan.grid, plan.refined, plan.cell)]
    assert parts == [expected[key] for key in ("source_size", "grid", "refine_size", "slice_size")]
    assert patch_sizes(plan) == expected["tgt_sizes"]
    assert placeholder(plan, 2, image_id=7) == plain.placeholder(expected["grid"], "<unk><unk>", 7)


@pytest.mark.parametrize(
    ("width", "height", "max_slice_nums"), [(60, 40, 1), (33, 170, 1), (700, 500, 4), (900, 450, 9)]
)
def test_pixels_are_those_of_the_plain_rule_bit_for_bit(width: int, height: int, max_slice_nums: int) -> None:
    image = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)

    pieces = slice_image(image, config(max_slice_nums))

    expected = plain.patches(image, plain.slicing(width, height, max_slice_nums))
    assert len(pieces) == len(expected)
    for piece, patch in zip(pieces, expected, strict=True):
        assert piece.pixels.dtype == torch.float32
        assert np.array_equal(piece.pixels.numpy(), plain.pixel_values(patch))
