"""Positions, tower and resampler give the official numbers, for a picture alone and in any company."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from model_shards.checkpoint import load_shard
from model_shards.image import ImagePatches, slice_image
from model_shards.vision import VisionEncoder, grid_embedding, position_buckets
from tests.support import golden
from tests.support.golden import cases, close, read_json, read_tensors

JSON, TENSORS, BUCKETS = "vision.json", "vision.safetensors", "vision_buckets.json"


@dataclass(frozen=True)
class Picture:
    """One picture of a case, and what the official code made of it. `embeds` isn't recorded for every picture."""

    patches: ImagePatches
    positions: Tensor
    hidden: Tensor
    embeds: Tensor | None


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@functools.cache
def encoder() -> VisionEncoder:
    return load_shard(golden.FOLDER, "vision")


def case_names() -> list[str]:
    return list(read_json(JSON))


def picture_ids() -> list[str]:
    return [f"{name}.{index}" for name in case_names() for index in range(len(read_json(JSON)[name]["tgt_sizes"]))]


def processed_ids() -> list[str]:
    """Pictures that went through the image processor first."""
    names = list(read_tensors(TENSORS))
    return [match[1] for name in names if (match := re.fullmatch(r"(img\d+)\.resampler_out", name))]


def place_ids() -> list[str]:
    names = list(read_tensors(TENSORS))
    return [name for name in names if name.startswith("resampler_pos_embed_")]


@functools.cache
def pictures(name: str) -> list[Picture]:
    recorded, tensors, size = read_json(JSON)[name], read_tensors(TENSORS), encoder().config.vision_batch_size
    rows = {row: place for place, row in enumerate(recorded["resampler_out_rows"])}
    entries = []
    for index, (height, width) in enumerate(recorded["tgt_sizes"]):
        call, place = divmod(index, size)
        entries.append(
            Picture(
                ImagePatches(tensors[f"{name}.pixel_values.{index}"], height, width),
                tensors[f"{name}.position_ids.{call}"][place],
                tensors[f"{name}.vpm_out.{call}"][place, : height * width],
                tensors[f"{name}.resampler_out"][rows[index]] if index in rows else None,
            )
        )
    return entries


def picture(case: str) -> Picture:
    name, index = case.rsplit(".", 1)
    return pictures(name)[int(index)]


@cases(JSON, picture_ids())
def test_a_picture_alone_has_the_official_positions_and_numbers(case: str) -> None:
    official = picture(case)
    length = official.patches.rows * official.patches.cols

    batch = encoder().gather([official.patches])

    assert batch.positions[0].tolist() == official.positions[:length].tolist()
    assert not official.positions[length:].any()
    close(encoder().vpm(batch)[0], official.hidden)
    if official.embeds is not None:
        close(encoder().encode_batch(batch)[0], official.embeds)


@cases(JSON, case_names())
def test_pictures_in_one_batch_have_the_official_numbers(case: str) -> None:
    official, recorded, size = pictures(case), read_json(JSON)[case], encoder().config.vision_batch_size

    embeds = encoder().encode([one.patches for one in official])

    assert recorded["n_vpm_calls"] == math.ceil(len(official) / size)
    assert read_tensors(TENSORS)[f"{case}.tgt_sizes"].tolist() == recorded["tgt_sizes"]
    for start in range(0, len(official), size):
        batch = encoder().gather([one.patches for one in official[start : start + size]])
        for one, hidden in zip(official[start : start + size], encoder().vpm(batch), strict=True):
            close(hidden[: len(one.hidden)], one.hidden)
    close(embeds[recorded["resampler_out_rows"]], read_tensors(TENSORS)[f"{case}.resampler_out"])


@cases(JSON, [f"all pictures, shuffled by {seed}, {size} at a time" for seed in range(4) for size in (1, 2, 3, 5, 16)])
def test_a_pictures_numbers_do_not_depend_on_its_company(case: str) -> None:
    seed, size = (int(number) for number in re.findall(r"\d+", case))
    mixed = [one for name in case_names() for one in pictures(name)]
    random.Random(seed).shuffle(mixed)
    encoder_of_size = VisionEncoder(dataclasses.replace(encoder().config, vision_batch_size=size))
    encoder_of_size.load_state_dict(encoder().state_dict(), assign=True)

    together = encoder_of_size.encode([one.patches for one in mixed])

    for one, embeds in zip(mixed, together, strict=True):
        close(embeds, encoder().encode([one.patches])[0] if one.embeds is None else one.embeds)


@cases(TENSORS, processed_ids())
def test_a_camera_picture_goes_through_processor_and_model(case: str) -> None:
    index, tensors = int(case.removeprefix("img")), read_tensors(TENSORS)
    image = read_tensors("image_pixels.npz")[f"{case}_input"].numpy()
    limit = read_json("image_pixels.json")[index]["max_slice_nums"]

    patches = slice_image(image, dataclasses.replace(encoder().config.slices, max_slice_nums=limit))

    batch = encoder().gather(patches)
    assert [[one.rows, one.cols] for one in patches] == tensors[f"{case}.tgt_sizes"].tolist()
    close(encoder().vpm(batch), tensors[f"{case}.vpm_out"])
    close(encoder().encode(patches), tensors[f"{case}.resampler_out"])


@cases(TENSORS, place_ids())
def test_the_resampler_adds_the_official_places(case: str) -> None:
    places = read_tensors(TENSORS)[case]
    rows, cols, width = places.shape
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    close(grid_embedding(row, col, width, max(rows, cols)), places, rtol=0, atol=1e-6)


@cases(BUCKETS, read_json(BUCKETS)["table"])
def test_patches_are_spread_over_the_official_buckets(case: str) -> None:
    recorded = read_json(BUCKETS)
    assert position_buckets(int(case), recorded["num_patches_per_side"]).tolist() == recorded["table"][case]


@cases(BUCKETS, ["num_patches_per_side"])
def test_there_are_as_many_buckets_as_learned_positions(case: str) -> None:
    recorded, config = read_json(BUCKETS), encoder().config
    assert recorded[case] == config.image_size // config.patch_size == recorded["boundaries_len"] + 1
