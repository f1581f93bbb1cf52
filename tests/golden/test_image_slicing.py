"""Every recorded size, at every recorded limit, is cut into the official cells and keeps its official place."""

from __future__ import annotations

from typing import Any

import numpy as np

from model_shards.config import SliceConfig
from model_shards.image import SlicePlan, placeholder, plan_slices, slice_image
from tests.support.golden import cases, read_json

FILE = "image_slicing.json"


def ids() -> list[str]:
    rows = read_json(FILE)["rows"]
    return [f"{index}: {'x'.join(map(str, row['size']))} in {row['max_slice_nums']}" for index, row in enumerate(rows)]


def row_of(case: str) -> tuple[dict[str, Any], SliceConfig]:
    recorded = read_json(FILE)
    row = recorded["rows"][int(case.split(":")[0])]
    return row, SliceConfig(row["max_slice_nums"], recorded["patch_size"], recorded["scale_resolution"])


@cases(FILE, ids())
def test_a_size_is_cut_and_keeps_its_place_as_officially(case: str) -> None:
    row, config = row_of(case)
    width, height = row["size"]

    plan = plan_slices(width, height, config)
    pieces = slice_image(np.zeros((height, width, 3), dtype=np.uint8), config)

    parts = [None if part is None else list(part) for part in (plan.source, plan.grid, plan.refined, plan.cell)]
    assert parts == [row["source_size"], row["grid"], row["refine_size"], row["slice_size"]]
    assert planned_patches(plan, config.patch_size) == row["tgt_sizes"]
    assert [[piece.rows, piece.cols] for piece in pieces] == row.get("tgt_sizes_preprocess", row["tgt_sizes"])
    assert short_placeholders(plan) == [row["placeholder_rle"], row["placeholder_noid_rle"]]


def planned_patches(plan: SlicePlan, patch: int) -> list[list[int]]:
    """Rows and columns of patches: the whole picture first, then its cells."""
    cells = [] if plan.cell is None else [plan.cell] * plan.num_cells
    return [[height // patch, width // patch] for width, height in (plan.source, *cells)]


def short_placeholders(plan: SlicePlan) -> list[str]:
    num, image_id = read_json(FILE)["image_feature_size"], read_json(FILE)["image_idx_in_placeholder"]
    texts = [placeholder(plan, num, image_id=image_id), placeholder(plan, num)]
    return [text.replace("<unk>" * num, f"{{unk*{num}}}") for text in texts]
