"""The vision encoder: released sizes, official numbers, and the same for a picture alone and in company."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from model_shards.checkpoint import load_shard
from model_shards.config import VisionConfig
from model_shards.image import ImagePatches
from model_shards.vision import VisionEncoder, gather_patches, grid_embedding, position_buckets

PLACES = [Path(__file__).parents[up] / "shared" / "golden" for up in (2, 3)]
GOLDEN = Path(os.environ.get("OMNI_GOLDEN") or next((place for place in PLACES if place.is_dir()), PLACES[0]))
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden data; OMNI_GOLDEN names its folder")

TINY = VisionConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    query_num=8,
    embed_dim=128,
    vision_batch_size=3,
)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def encoder() -> VisionEncoder:
    torch.manual_seed(1)
    module = VisionEncoder(TINY).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module


def picture(rows: int, cols: int, seed: int = 0) -> ImagePatches:
    source = torch.Generator().manual_seed(seed)
    return ImagePatches(torch.randn(3, 14, 14 * rows * cols, generator=source), rows, cols)


def test_released_sizes_have_the_released_number_of_parameters() -> None:
    with torch.device("meta"):
        module = VisionEncoder(VisionConfig())

    assert sum(parameter.numel() for parameter in module.vpm.parameters()) == 402_552_736
    assert sum(parameter.numel() for parameter in module.resampler.parameters()) == 88_907_776


def test_a_picture_is_the_same_alone_and_in_company(encoder: VisionEncoder) -> None:
    pictures = [picture(4, 6, 1), picture(1, 5, 2), picture(7, 3, 3), picture(2, 2, 4), picture(5, 5, 5)]

    together = encoder.encode(pictures)

    alone = torch.cat([encoder.encode([one]) for one in pictures])
    assert together.shape == (5, 8, 128)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_no_picture_gives_no_embedding(encoder: VisionEncoder) -> None:
    assert encoder.encode([]).shape == (0, 8, 128)


def test_only_pictures_of_different_length_need_a_mask() -> None:
    assert gather_patches([picture(2, 3), picture(3, 2)], TINY).mask is None
    mask = gather_patches([picture(2, 3), picture(2, 2)], TINY).mask
    assert mask is not None
    assert mask[:, 0, 0].tolist() == [[True] * 6, [True] * 4 + [False] * 2]


def test_the_patch_embedding_is_a_convolution(encoder: VisionEncoder) -> None:
    image = torch.randn(1, 3, 28, 42)
    embeddings = encoder.vpm.embeddings
    patches = F.unfold(image, 14, stride=14).view(3, 14, 14, 6).permute(0, 1, 3, 2).reshape(3, 14, 84)

    batch = encoder.gather([ImagePatches(patches, 2, 3)])

    convolved = embeddings.patch_embedding(image).flatten(2).mT + embeddings.position_embedding(batch.positions)
    torch.testing.assert_close(embeddings(batch), convolved, rtol=1e-4, atol=1e-4)


def test_positions_are_spread_over_the_learned_ones() -> None:
    assert position_buckets(1, 70).tolist() == [0]
    assert position_buckets(3, 70).tolist() == [0, 23, 46]
    assert position_buckets(70, 70).tolist() == list(range(70))
    assert len(position_buckets(75, 70)) == 75


def test_columns_fill_the_first_half_of_a_place() -> None:
    rows, cols = torch.tensor([0, 2]), torch.tensor([1, 0])

    places = grid_embedding(rows, cols, 8)

    one, two = torch.tensor([1.0, 0.01]), torch.tensor([2.0, 0.02])
    torch.testing.assert_close(places[0], torch.cat([one.sin(), one.cos(), torch.tensor([0.0, 0, 1, 1])]))
    torch.testing.assert_close(places[1], torch.cat([torch.tensor([0.0, 0, 1, 1]), two.sin(), two.cos()]))


@golden
def test_buckets_are_the_official_ones() -> None:
    recorded = json.loads((GOLDEN / "vision_buckets.json").read_text())["table"]
    assert {count: position_buckets(int(count), 70).tolist() for count in recorded} == recorded


@golden
@pytest.mark.parametrize("case", ["a", "b", "c", "many"])
def test_tower_and_resampler_give_the_official_numbers(case: str) -> None:
    recorded = load_file(GOLDEN / "vision.safetensors")
    told = json.loads((GOLDEN / "vision.json").read_text())[case]
    encoder = load_shard(GOLDEN, "vision")
    sizes = told["tgt_sizes"]
    pictures = [ImagePatches(recorded[f"{case}.pixel_values.{i}"], *size) for i, size in enumerate(sizes)]

    for call in range(told["n_vpm_calls"]):
        batch = encoder.gather(pictures[16 * call : 16 * call + 16])
        longest = batch.positions.shape[1]
        assert torch.equal(batch.positions.int(), recorded[f"{case}.position_ids.{call}"][:, :longest])
        official = recorded[f"{case}.vpm_out.{call}"][:, :longest]
        assert_close_where_seen(encoder.vpm(batch), official, batch.mask)
    embeds = encoder.encode(pictures)
    torch.testing.assert_close(
        embeds[told["resampler_out_rows"]], recorded[f"{case}.resampler_out"], rtol=1e-4, atol=1e-4
    )


def assert_close_where_seen(ours: Tensor, official: Tensor, mask: Tensor | None) -> None:
    seen = torch.ones(ours.shape[:2], dtype=torch.bool) if mask is None else mask[:, 0, 0]
    torch.testing.assert_close(ours[seen], official[seen], rtol=1e-4, atol=1e-4)
