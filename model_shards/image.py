"""Pictures cut into patches, as the vision encoder wants them.

Rule: sizes round half to even (Python's `round`) and scaled widths are truncated, in this order, so that every picture
gets exactly the cells which the model was trained on. Sizes are (width, height) as in PIL, grids are (cols, rows);
patches are counted as rows × cols.

Source: MiniCPM-o 4.5, `processing_minicpmo.py` (MiniCPMVImageProcessor); reference/minicpmo-4.5.md §2.1, §2.2, §2.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_shards.config import SliceConfig
from model_shards.errors import ModelError

Pixels = NDArray[np.uint8]
Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ImagePatches:
    """One picture, or one cell of a sliced picture.

    pixels: (3, patch, patch · rows · cols) float32 in [-1, 1]: patch after patch, row by row, side by side.
    """

    pixels: Tensor
    rows: int
    cols: int


@dataclass(frozen=True, slots=True)
class SlicePlan:
    """How a picture of one size is cut: the whole picture resized to `source`, and then, when the picture is large,
    the picture resized to `refined` and cut into grid = (cols, rows) cells."""

    source: Size
    grid: tuple[int, int] | None = None
    refined: Size | None = None

    @property
    def num_cells(self) -> int:
        return self.grid[0] * self.grid[1] if self.grid else 0

    @property
    def cell(self) -> Size | None:
        """Size of one cell in pixels."""
        if self.grid is None or self.refined is None:
            return None
        return self.refined[0] // self.grid[0], self.refined[1] // self.grid[1]


def plan_slices(width: int, height: int, config: SliceConfig) -> SlicePlan:
    """Decide how a picture of width × height pixels is cut into at most `config.max_slice_nums` cells."""
    grid = _choose_grid(width, height, config)
    if grid is None:
        return SlicePlan(source=_fit(width, height, config, may_enlarge=True))
    cols, rows = grid
    cell_width, cell_height = _fit(
        _divisible(width, cols) / cols, _divisible(height, rows) / rows, config, may_enlarge=True
    )
    return SlicePlan(
        source=_fit(width, height, config, may_enlarge=False),
        grid=grid,
        refined=(cell_width * cols, cell_height * rows),
    )


def slice_image(image: Pixels, config: SliceConfig) -> list[ImagePatches]:
    """Cut a picture into what the vision encoder takes: the whole picture first, then its cells row by row.

    image: (height, width, 3) uint8, RGB.
    Raises ModelError when the array is something else.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ModelError(f"a picture is (height, width, 3) uint8, got {image.shape} {image.dtype}")
    plan = plan_slices(image.shape[1], image.shape[0], config)
    pieces = [_resize(image, plan.source)]
    if plan.refined is not None and plan.cell is not None:
        pieces += _cut(_resize(image, plan.refined), plan.cell)
    return [_to_patches(piece, config.patch_size) for piece in pieces]


def placeholder(plan: SlicePlan, query_num: int, *, image_id: int | None = None, row_end: str = "\n") -> str:
    """The text which keeps a picture's place in a prompt: `query_num` times `<unk>` for the whole and for each cell.

    Chat numbers its pictures and ends rows of cells with a newline; a duplex unit has image_id=None and row_end="".
    """
    unknown = "<unk>" * query_num
    number = "" if image_id is None else f"<image_id>{image_id}</image_id>"
    cols, rows = plan.grid or (0, 0)
    row = f"<slice>{unknown}</slice>" * cols
    return f"{number}<image>{unknown}</image>" + row_end.join([row] * rows)


def _choose_grid(width: int, height: int, config: SliceConfig) -> tuple[int, int] | None:
    """Find the (cols, rows) nearest to the picture's own aspect; None when one cell is enough."""
    num_cells = min(math.ceil(width * height / config.scale_resolution**2), config.max_slice_nums)
    if num_cells <= 1:
        return None
    candidates = [
        (cols, count // cols)
        for count in (num_cells - 1, num_cells, num_cells + 1)
        if 1 < count <= config.max_slice_nums
        for cols in range(1, count + 1)
        if count % cols == 0
    ]
    aspect = math.log(width / height)
    return min(candidates, key=lambda grid: abs(aspect - math.log(grid[0] / grid[1])))


def _fit(width: float, height: float, config: SliceConfig, *, may_enlarge: bool) -> Size:
    """Scale to the area of scale_resolution², keep the aspect, and round to whole patches."""
    if may_enlarge or width * height > config.scale_resolution**2:
        aspect = width / height
        height = int(config.scale_resolution / math.sqrt(aspect))
        width = int(height * aspect)  # from the truncated height, as the model was trained
    return _divisible(width, config.patch_size), _divisible(height, config.patch_size)


def _divisible(length: float, divisor: int) -> int:
    return max(round(length / divisor) * divisor, divisor)


def _resize(image: Pixels, size: Size) -> Pixels:
    if image.shape[1::-1] == size:
        return image
    from PIL import Image

    return np.array(Image.fromarray(image).resize(size, resample=Image.Resampling.BICUBIC))


def _cut(image: Pixels, cell: Size) -> list[Pixels]:
    width, height = cell
    return [
        image[top : top + height, left : left + width]
        for top in range(0, image.shape[0], height)
        for left in range(0, image.shape[1], width)
    ]


def _to_patches(image: Pixels, patch: int) -> ImagePatches:
    rows, cols = image.shape[0] // patch, image.shape[1] // patch
    values = torch.from_numpy(np.array(image)).view(rows, patch, cols, patch, 3)  # a copy: pictures are read-only
    values = values.permute(4, 1, 0, 2, 3).reshape(3, patch, rows * cols * patch)  # moved as bytes: a quarter to move
    # Divided, shifted and divided again in float32: the same roundings as in training.
    return ImagePatches(values.float().div_(255).sub_(0.5).div_(0.5), rows, cols)
