"""Vision encoder: pictures of many cameras in one forward, 64 embeddings per picture or cell."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from pydantic import Field

from graph.chunk import NS_PER_MS, Chunk
from graph.costs import StageCost
from graph.sections import StageOptions
from graph.stage_type import In, Out
from graph.window import Unit
from stages.inference import inference
from stages.kinds import FRAMES, IMAGE
from stages.stage import Site, Stage

if TYPE_CHECKING:
    import torch

    from model_shards.vision import VisionEncoder as VisionModel


WIDE: Final = 24, 43
"""Rows and columns of patches of a picture of 16 by 9, as most cameras give it. Other sizes get their programs when one
comes for the first time."""


class VisionOptions(StageOptions):
    """max_slices: cells a large picture is cut into beside itself (1: none)."""

    max_slices: int = Field(default=1, ge=1, le=9)


class VisionEncoder(Stage):
    """Pictures to embeddings, one chunk per picture: embeds [cells, queries, dim], the whole picture first.

    Keeps nothing between windows. max_slices: cells a large picture is cut into beside itself (1: none).
    """

    frames = In(FRAMES)
    image = Out(IMAGE)
    Options = VisionOptions
    component = "vision"
    cost = StageCost(8 * NS_PER_MS, 4 * NS_PER_MS, spread=0.2)

    @classmethod
    def load(cls, options: VisionOptions, site: Site) -> VisionEncoder:
        from model_shards.checkpoint import load_shard
        from stages.tensors import runtime

        where = runtime(site.device, options.dtype)
        model = load_shard(site.checkpoint, "vision", dtype=where.dtype, device=where.device)
        if where.device.startswith("cuda"):
            model.use_programs()
            inference(model.warm_up)(*WIDE)
        return cls(model, options.max_slices)

    def __init__(self, model: VisionModel, max_slices: int) -> None:
        self._model = model
        self._slices = dataclasses.replace(model.config.slices, max_slice_nums=max_slices)

    def is_idle(self, unit: Unit) -> bool:
        return not unit.chunks

    @inference
    def process(self, units: list[Unit]) -> list[Chunk]:
        import torch

        from model_shards.image import slice_image

        pictures = [chunk for unit in units for chunk in unit.of(self.frames)]
        cut = [slice_image(chunk.arrays["image"], self._slices) for chunk in pictures]
        embeds = self._model.encode([cell for cells in cut for cell in cells])
        per_picture = torch.split(embeds, [len(cells) for cells in cut])
        return [self._encoded(chunk, cells) for chunk, cells in zip(pictures, per_picture, strict=True)]

    def _encoded(self, picture: Chunk, embeds: torch.Tensor) -> Chunk:
        from stages.tensors import to_arrays

        arrays, attrs = to_arrays("embeds", embeds)
        return self.image.like(picture, arrays=arrays, attrs=attrs)
