"""What kernels of a GPU do, as their documents say it, in plain loops and double precision.

Ragged attention: the docstring of torch.nn.attention.varlen.varlen_attn (torch 2.13), and of flash_attn_varlen_func
(flash-attn 2.8): query [tokens, heads, head_dim]; with a block table, keys and values are pools [pages, page size, kv
heads, head_dim]; cumulative lengths and the table are int32; a causal mask is aligned at the end of each sequence;
heads of the query share those of the keys in groups, in their order.
"""

import torch
from torch import Tensor

from model_shards.attention import RaggedBatch


def reference_kernel(query: Tensor, keys: Tensor, values: Tensor, batch: RaggedBatch) -> Tensor:
    _check(query, keys, values, batch)
    page_size, group = keys.shape[1], query.shape[1] // keys.shape[2]
    out = torch.zeros_like(query, dtype=torch.float64)
    for index, used in enumerate(batch.used.tolist()):
        first, last = int(batch.cu_new[index]), int(batch.cu_new[index + 1])
        places = [divmod(position, page_size) for position in range(used)]
        at = [(int(batch.pages[index, page]), offset) for page, offset in places]
        own_keys = torch.stack([keys[place] for place in at]).double()  # [used, kv heads, head_dim]
        own_values = torch.stack([values[place] for place in at]).double()
        for row in range(first, last):
            seen = used - (last - row - 1)  # the last new token sees all, each before it one less
            for head in range(query.shape[1]):
                scores = own_keys[:seen, head // group] @ query[row, head].double() * query.shape[2] ** -0.5
                out[row, head] = scores.softmax(0) @ own_values[:seen, head // group]
    return out.to(query.dtype)


def _check(query: Tensor, keys: Tensor, values: Tensor, batch: RaggedBatch) -> None:
    """What the kernels take for granted: they read beyond their bounds where it does not hold."""
    num = len(batch.used)
    for tensor in (batch.cu_new, batch.cu_used, batch.used, batch.pages):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous() and tensor.device == query.device
    assert batch.cu_new.shape == batch.cu_used.shape == (num + 1,)
    assert batch.pages.shape[0] == num and batch.pages.shape[1] * keys.shape[1] >= batch.max_used
    new, used = batch.cu_new.diff(), batch.cu_used.diff()
    assert batch.cu_new[0] == batch.cu_used[0] == 0 and batch.cu_new[-1] == len(query)
    assert bool((new >= 1).all()) and bool((new <= batch.used).all()), "causal at the end: none without a key"
    assert torch.equal(used, batch.used)
    assert batch.max_new == int(new.max()) and batch.max_used >= int(batch.used.max())
    assert 0 <= int(batch.pages.min()) <= int(batch.pages.max()) < len(keys)
    assert keys.shape == values.shape and query.shape[1] % keys.shape[2] == 0
    assert keys.stride(-1) == values.stride(-1) == query.stride(-1) == 1


def shapes_only(query: Tensor, keys: Tensor, values: Tensor, batch: RaggedBatch) -> Tensor:
    """In the place of a kernel on the device `meta`, where tensors have no values.

    A program that looks at one, or brings one from the host, fails there.
    """
    for tensor in (batch.cu_new, batch.cu_used, batch.used, batch.pages):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous() and tensor.device == query.device == keys.device
    assert batch.pages.shape[1] * keys.shape[1] == batch.max_used and batch.max_new == 1
    return torch.empty_like(query)


def int4_packed(pairs: Tensor, tiles: int) -> Tensor:
    """`torch._convert_weight_to_int4pack` on CUDA, whose own order nobody reads: here it stays as it is.

    pairs: [rows, columns / 2] uint8, of two codes the first in the upper half. tiles: 2, 4 or 8, of 16 columns each.
    Source: torchao, which hands it codes so (quantization/utils.py, groupwise_affine_quantize_tensor_from_qparams).
    """
    assert pairs.dtype == torch.uint8 and len(pairs) % 8 == 0 and pairs.shape[1] * 2 % (16 * tiles) == 0
    return pairs


def int4_product(x: Tensor, packed: Tensor, group_size: int, scales_and_zeros: Tensor) -> Tensor:
    """`torch._weight_int4pack_mm`: a weight is (code - 8) * scale + zero. scales_and_zeros: [groups, rows, 2]."""
    codes = torch.stack([packed >> 4, packed & 15], dim=2).flatten(1).double() - 8
    scale, zero = scales_and_zeros.double().repeat_interleave(group_size, dim=0).unbind(2)
    return (x.double() @ (codes.T * scale + zero)).to(x.dtype)
