"""Pictures into LLM embeddings: a SigLIP tower which takes any aspect, and a resampler with a fixed number of queries.

Rule: pictures of many sessions share a batch. Inside it they are padded to the longest; padding is masked in every
attention, so a picture's embeddings don't depend on its neighbours.

Source: MiniCPM-o 4.5, `modeling_navit_siglip.py`, `modeling_minicpmo_unified.py` (Resampler, get_vision_embedding);
reference/minicpmo-4.5.md §1.3, §2.2, §2.3; golden-notes.md 16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_shards.config import VisionConfig
from model_shards.image import ImagePatches
from model_shards.programs import LADDER, ladder_to
from model_shards.shapes import ByShape

NUM_SIZES: Final = 4
"""Sizes of pictures for which there are programs: cameras have few, and each program keeps memory for all layers."""


@dataclass(frozen=True, slots=True)
class PatchBatch:
    """Pictures side by side: B pictures, padded to the L patches of the longest.

    pixels: (B, L, channels · patch²), 0 where padded.
    rows, cols: (B, L) int64, the place of each patch in its picture, in patches; 0 where padded.
    positions: (B, L) int64, its row of the learned position table; 0 where padded.
    mask: (B, 1, 1, L) bool, true for patches, false for padding; None when nothing is padded.
    longest: the most rows or columns of a picture.
    """

    pixels: Tensor
    rows: Tensor
    cols: Tensor
    positions: Tensor
    mask: Tensor | None
    longest: int


class VisionEncoder(nn.Module):
    """`vpm.*` and `resampler.*` of a checkpoint. Keeps no state between calls."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vpm = VisionTower(config)
        self.resampler = Resampler(config)
        self._has_programs = False
        self._run: Callable[..., tuple[Tensor, ...]] = self._encode

    def use_programs(self, ladder: Sequence[int] = LADDER) -> None:
        """Pictures of the first NUM_SIZES sizes that come are encoded by programs of fixed shapes from now on, as a GPU
        wants them; each is made when its size comes first. Batches are then of one size each.
        """
        sizes: set[tuple[int, int]] = set()

        def is_usual(longest: int, pixels: Tensor, *_: Tensor) -> bool:
            size = pixels.shape[1], longest
            if len(sizes) < NUM_SIZES:
                sizes.add(size)
            return size in sizes

        self._has_programs = True
        self._run = ByShape(self._encode, is_usual, ladder_to(self.config.vision_batch_size, ladder))

    def warm_up(self, rows: int, cols: int) -> None:
        """Make the programs for pictures of this size, the largest batch first, before a picture needs them."""
        size = self.config.patch_size
        blank = ImagePatches(torch.zeros(self.config.num_channels, size, size * rows * cols), rows, cols)
        for num in reversed(ladder_to(self.config.vision_batch_size)):
            self.encode([blank] * num)

    def encode(self, patches: Sequence[ImagePatches]) -> Tensor:
        """Encode pictures (of any sessions) into LLM embeddings.

        returns: (len(patches), query_num, embed_dim), in the order given, with the weights' dtype and device.
        """
        weight = self.resampler.query
        out = torch.empty(len(patches), *weight.shape, dtype=weight.dtype, device=weight.device)
        for chosen in self._batches([picture.rows * picture.cols for picture in patches]):
            out[chosen] = self.encode_batch(self.gather([patches[index] for index in chosen]))
        return out

    def encode_batch(self, batch: PatchBatch) -> Tensor:
        """Encode one padded batch; returns (B, query_num, embed_dim), which the next call may overwrite."""
        if batch.mask is None:
            (embeddings,) = self._run(batch.longest, batch.pixels, batch.rows, batch.cols, batch.positions)
        else:
            embeddings = self.resampler(self.vpm(batch), batch)
        return embeddings

    def _encode(
        self, longest: int, pixels: Tensor, rows: Tensor, cols: Tensor, positions: Tensor
    ) -> tuple[Tensor, ...]:
        batch = PatchBatch(pixels, rows, cols, positions, None, longest)
        return (self.resampler(self.vpm(batch), batch),)

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Neighbours in length share a batch: least padding. None at all where there are programs."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        groups = [list(g) for _, g in groupby(order, key=lengths.__getitem__)] if self._has_programs else [order]
        for group in groups:
            for start in range(0, len(group), self.config.vision_batch_size):
                yield group[start : start + self.config.vision_batch_size]

    def gather(self, patches: Sequence[ImagePatches]) -> PatchBatch:
        """Pad at least one picture to the longest, on the weights' device and in their dtype."""
        weight = self.resampler.query
        batch = gather_patches(patches, self.config)
        return PatchBatch(
            pixels=batch.pixels.to(weight.device, weight.dtype),
            rows=batch.rows.to(weight.device),
            cols=batch.cols.to(weight.device),
            positions=batch.positions.to(weight.device),
            mask=None if batch.mask is None else batch.mask.to(weight.device),
            longest=batch.longest,
        )


def gather_patches(patches: Sequence[ImagePatches], config: VisionConfig) -> PatchBatch:
    """Pad at least one picture to the longest, where the pictures are."""
    side = config.image_size // config.patch_size
    lengths = torch.tensor([picture.rows * picture.cols for picture in patches])
    longest = int(lengths.max())
    num_values = config.num_channels * config.patch_size**2
    pixels = patches[0].pixels.new_zeros(len(patches), longest, num_values)
    rows, cols, positions = torch.zeros(3, len(patches), longest, dtype=torch.int64)
    for index, picture in enumerate(patches):
        length = picture.rows * picture.cols
        pixels[index, :length] = _patch_vectors(picture.pixels)
        rows[index, :length] = torch.arange(picture.rows).repeat_interleave(picture.cols)
        cols[index, :length] = torch.arange(picture.cols).repeat(picture.rows)
        row_buckets, col_buckets = position_buckets(picture.rows, side), position_buckets(picture.cols, side)
        positions[index, :length] = (row_buckets[:, None] * side + col_buckets).flatten()
    mask = (torch.arange(longest) < lengths[:, None])[:, None, None]
    longest_side = max(max(picture.rows, picture.cols) for picture in patches)
    return PatchBatch(pixels, rows, cols, positions, None if bool(mask.all()) else mask, longest_side)


def position_buckets(num_patches: int, side: int) -> Tensor:
    """Spread `num_patches` along one axis over the `side` learned positions; returns (num_patches,) int64.

    Nothing is interpolated: a patch takes the learned position which its fraction of the axis falls on. The fractions
    are rounded to float32 as in training, since some lie on a boundary.
    """
    step = torch.tensor(1.0) / num_patches
    fractions = torch.arange(0, 1 - 1e-6, step.item())
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    return torch.bucketize(fractions, boundaries, right=True)


def grid_embedding(rows: Tensor, cols: Tensor, width: int, longest: int) -> Tensor:
    """Sines and cosines of each patch's place: half of the channels from its column, half from its row.

    rows, cols: any shape (…), int64, below `longest`.
    returns: (…, width) float32 = [sin col | cos col | sin row | cos row].
    """
    frequencies = torch.arange(width // 4, dtype=torch.float32, device=rows.device) / (width // 4)
    places = torch.arange(longest, dtype=torch.float32, device=rows.device)
    angles = places[:, None] * (1.0 / 10000**frequencies)
    table = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return torch.cat([table[cols], table[rows]], dim=-1)


def _patch_vectors(pixels: Tensor) -> Tensor:
    """(channels, patch, patch · L) to (L, channels · patch²), in the order of the patch embedding's weights."""
    channels, patch, _ = pixels.shape
    return pixels.view(channels, patch, -1, patch).permute(2, 0, 1, 3).flatten(1)


class VisionTower(nn.Module):
    """`vpm.*`: SigLIP encoder without its last layer and without a pooling head."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = PatchEmbedding(config)
        self.encoder = VisionLayers(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, batch: PatchBatch) -> Tensor:
        """returns: (B, L, hidden_size); rows of padding mean nothing."""
        hidden: Tensor = self.post_layernorm(self.encoder(self.embeddings(batch), batch.mask))
        return hidden


class PatchEmbedding(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        side = config.image_size // config.patch_size
        self.position_embedding = nn.Embedding(side * side, config.hidden_size)

    def forward(self, batch: PatchBatch) -> Tensor:
        # A convolution whose stride is its kernel is one matrix product per patch.
        patches = F.linear(batch.pixels, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)
        positions: Tensor = self.position_embedding(batch.positions)
        return patches + positions


class VisionLayers(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return hidden


class VisionLayer(nn.Module):
    """One pre-norm block: attention over all patches of a picture, then the MLP."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMlp(config)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden), mask)
        mlp: Tensor = self.mlp(self.layer_norm2(hidden))
        return hidden + mlp


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (_split_heads(p(hidden), self.num_heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        heads = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out: Tensor = self.out_proj(_join_heads(heads))
        return out


class VisionMlp(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(hidden), approximate="tanh"))
        return out


class Resampler(nn.Module):
    """`resampler.*`: learned queries read a picture's patches; places are added to the keys only."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, eps = config.embed_dim, config.layer_norm_eps
        self.query = nn.Parameter(torch.zeros(config.query_num, width))
        self.kv_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.attn = CrossAttention(width, num_heads=width // config.resampler_head_dim)
        self.ln_q = nn.LayerNorm(width, eps=eps)
        self.ln_kv = nn.LayerNorm(width, eps=eps)
        self.ln_post = nn.LayerNorm(width, eps=eps)
        self.proj = nn.Parameter(torch.zeros(width, width))

    def forward(self, hidden: Tensor, batch: PatchBatch) -> Tensor:
        """hidden: (B, L, hidden_size) of the tower. returns: (B, query_num, embed_dim)."""
        value = self.ln_kv(self.kv_proj(hidden))
        key = value + grid_embedding(batch.rows, batch.cols, value.shape[-1], batch.longest).to(value.dtype)
        out: Tensor = self.ln_post(self.attn(self.ln_q(self.query), key, value, batch.mask))
        return out @ self.proj


class CrossAttention(nn.Module):
    """Multi-head attention with one shared set of queries; weights are named as in torch.nn.MultiheadAttention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """query: (Q, width). key, value: (B, L, width). mask: (B, 1, 1, L) bool. returns: (B, Q, width)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        query = F.linear(query, weights[0], biases[0]).expand(len(key), -1, -1)
        query = _split_heads(query, self.num_heads)
        key = _split_heads(F.linear(key, weights[1], biases[1]), self.num_heads)
        value = _split_heads(F.linear(value, weights[2], biases[2]), self.num_heads)
        heads = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out: Tensor = self.out_proj(_join_heads(heads))
        return out


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, L, heads · d) to (B, heads, L, d)."""
    return x.view(*x.shape[:-1], num_heads, -1).transpose(1, 2)


def _join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)
