"""Vision encoder: pictures of many cameras in one forward, 64 embeddings per picture or cell."""

from __future__ import annotations

import dataclasses

import torch

from graph.chunk import Chunk
from graph.streams import IMAGE, kind_of
from graph.window import Unit
from model_shards.image import slice_image
from model_shards.vision import VisionEncoder as VisionModel
from stages.stage import Stage
from stages.tensors import to_arrays


class VisionEncoder(Stage):
    """`camera/<name>` → `image`, one chunk per picture: embeds [cells, queries, dim], the whole picture first.

    Keeps nothing between windows. max_slices: cells a large picture is cut into beside itself (1: none).
    """

    outputs = (IMAGE,)

    def __init__(self, model: VisionModel, max_slices: int) -> None:
        self._model = model
        self._slices = dataclasses.replace(model.config.slices, max_slice_nums=max_slices)

    def is_idle(self, unit: Unit) -> bool:
        return not unit.chunks

    @torch.inference_mode()
    def process(self, units: list[Unit]) -> list[Chunk]:
        pictures = [
            (unit, chunk)
            for unit in units
            for stream in unit.chunks
            if kind_of(stream).is_picture
            for chunk in unit.of(stream)
        ]
        cut = [slice_image(chunk.arrays["image"], self._slices) for _, chunk in pictures]
        embeds = self._model.encode([cell for cells in cut for cell in cells])
        per_picture = torch.split(embeds, [len(cells) for cells in cut])
        return [_encoded(chunk, cells) for (_, chunk), cells in zip(pictures, per_picture, strict=True)]


def _encoded(picture: Chunk, embeds: torch.Tensor) -> Chunk:
    arrays, attrs = to_arrays("embeds", embeds)
    return Chunk(picture.session, IMAGE, picture.start_ns, picture.duration_ns, arrays=arrays, attrs=attrs)
