"""The vision encoder: released sizes, stock SigLIP and attention, and the same for a picture alone and in company."""

import copy
from collections.abc import Iterator
from typing import cast

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel

from model_shards.config import VisionConfig
from model_shards.image import ImagePatches
from model_shards.shapes import ByShape
from model_shards.vision import VisionEncoder, gather_patches, grid_embedding, position_buckets
from tests.support import plain
from tests.support.capturing import checked

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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_programs_give_the_embeddings_of_a_padded_batch(
    encoder: VisionEncoder, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [(4, 6), (6, 4), (2, 2), (4, 6), (3, 8), (5, 5), (4, 6), (1, 5), (1, 7)]
    pictures = [picture(rows, cols, seed) for seed, (rows, cols) in enumerate(sizes)]
    expected = encoder.encode(pictures)
    fast = copy.deepcopy(encoder).to(device)
    monkeypatch.setattr(VisionEncoder, "_encode", checked(VisionEncoder._encode))
    fast.use_programs(ladder=(1, 2))
    fast.warm_up(4, 6)
    for chosen in (list(range(9)), [0], [3, 6, 2], [7, 8]):
        embeds = fast.encode([pictures[index] for index in chosen])
        torch.testing.assert_close(embeds.cpu(), expected[chosen], rtol=1e-4, atol=1e-4)
    programs = cast(ByShape, fast._run)._programs
    sides = {(shapes[0][0], longest) for longest, shapes in programs}
    assert sides == {(24, 6), (4, 2), (5, 5), (7, 7)}  # 24 in a row of 8, and 25, came when there were four


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

    places = grid_embedding(rows, cols, 8, longest=3)

    one, two = torch.tensor([1.0, 0.01]), torch.tensor([2.0, 0.02])
    torch.testing.assert_close(places[0], torch.cat([one.sin(), one.cos(), torch.tensor([0.0, 0, 1, 1])]))
    torch.testing.assert_close(places[1], torch.cat([torch.tensor([0.0, 0, 1, 1]), two.sin(), two.cos()]))


@pytest.mark.parametrize("side", [70, 32, 7])
def test_positions_are_spread_as_by_the_plain_rule(side: int) -> None:
    for num_patches in range(1, side + 6):
        spread = position_buckets(num_patches, side).tolist()
        assert all(bucket in may for bucket, may in zip(spread, plain.buckets(num_patches, side), strict=True))


def test_places_are_those_of_the_plain_rule() -> None:
    rows, cols = torch.meshgrid(torch.arange(9), torch.arange(75), indexing="ij")
    expected = [[plain.grid_place(row, col, 32) for col in range(75)] for row in range(9)]
    torch.testing.assert_close(grid_embedding(rows, cols, 32, longest=75), torch.tensor(expected), rtol=0, atol=2e-5)


def test_a_picture_of_full_size_goes_through_the_tower_as_through_stock_siglip(encoder: VisionEncoder) -> None:
    side = TINY.image_size // TINY.patch_size
    stock = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=TINY.hidden_size,
            intermediate_size=TINY.intermediate_size,
            num_hidden_layers=TINY.num_hidden_layers,
            num_attention_heads=TINY.num_attention_heads,
            image_size=TINY.image_size,
            patch_size=TINY.patch_size,
            vision_use_head=False,
        )
    ).eval()
    stock.load_state_dict(encoder.vpm.state_dict())
    image = torch.randn(1, 3, TINY.image_size, TINY.image_size, generator=torch.Generator().manual_seed(9))
    squares = image[0].unflatten(1, (side, 14)).unflatten(3, (side, 14)).permute(0, 2, 1, 3, 4)

    hidden = encoder.vpm(encoder.gather([ImagePatches(squares.reshape(3, 14, -1), side, side)]))

    torch.testing.assert_close(hidden, stock(image).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_the_resampler_is_stock_attention_of_queries_over_placed_keys(encoder: VisionEncoder) -> None:
    resampler, width = encoder.resampler, TINY.embed_dim
    batch = encoder.gather([picture(3, 4, 1), picture(5, 2, 2)])
    hidden = torch.randn(2, 12, TINY.hidden_size, generator=torch.Generator().manual_seed(9))
    stock = nn.MultiheadAttention(width, width // TINY.resampler_head_dim, batch_first=True)
    stock.load_state_dict(resampler.attn.state_dict())

    embeds = resampler(hidden, batch)

    value = resampler.ln_kv(resampler.kv_proj(hidden))
    places = [
        [plain.grid_place(int(r), int(c), width) for r, c in zip(*at, strict=True)]
        for at in zip(batch.rows, batch.cols, strict=True)
    ]
    assert batch.mask is not None
    query = resampler.ln_q(resampler.query).expand(2, -1, -1)
    read, _ = stock(query, value + torch.tensor(places), value, key_padding_mask=~batch.mask[:, 0, 0])
    torch.testing.assert_close(embeds, resampler.ln_post(read) @ resampler.proj, rtol=1e-4, atol=1e-4)
