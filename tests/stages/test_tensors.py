"""stages/tensors.py: what a stage gives is what the next one gets."""

import numpy as np
import pytest
import torch

from graph.chunk import Chunk, SessionId
from stages.tensors import Runtime, runtime, to_arrays, to_tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_survives_the_way_bit_by_bit(dtype: torch.dtype):
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    arrays, attrs = to_arrays("embeds", tensor)
    chunk = Chunk(SessionId("door"), "image", 0, arrays=arrays, attrs=attrs)
    assert torch.equal(to_tensor(chunk, "embeds", Runtime("cpu", dtype)), tensor)


def test_bfloat16_travels_as_uint16_and_says_so():
    arrays, attrs = to_arrays("embeds", torch.ones(2, dtype=torch.bfloat16))
    assert (arrays["embeds"].dtype, attrs) == (np.uint16, {"dtype": "bfloat16"})


def test_other_dtypes_travel_as_float32():
    arrays, attrs = to_arrays("embeds", torch.ones(2, dtype=torch.float64))
    assert (arrays["embeds"].dtype, attrs) == (np.float32, {})


def test_a_tensor_that_is_a_view_is_copied_as_it_looks():
    tensor = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T
    arrays, attrs = to_arrays("embeds", tensor)
    chunk = Chunk(SessionId("door"), "image", 0, arrays=arrays, attrs=attrs)
    assert torch.equal(to_tensor(chunk, "embeds", Runtime("cpu", torch.bfloat16)), tensor)


def test_read_only_memory_is_copied_and_stays_as_it_is():
    array = np.ones(3, np.float32)
    array.setflags(write=False)
    tensor = to_tensor(Chunk(SessionId("door"), "image", 0, arrays={"embeds": array}), "embeds", Runtime())
    tensor += 1
    assert array.tolist() == [1.0, 1.0, 1.0]


def test_the_receiver_decides_in_what_it_computes():
    arrays, attrs = to_arrays("embeds", torch.ones(2))
    chunk = Chunk(SessionId("door"), "image", 0, arrays=arrays, attrs=attrs)
    assert to_tensor(chunk, "embeds", Runtime("cpu", torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cpu", "auto", Runtime("cpu", torch.float32)),
        ("cpu", "bfloat16", Runtime("cpu", torch.bfloat16)),
        ("cuda", "auto", Runtime("cuda", torch.bfloat16)),
        ("cuda", "float32", Runtime("cuda", torch.float32)),
    ],
)
def test_auto_is_bfloat16_on_a_gpu_and_float32_on_a_cpu(device: str, dtype: str, expected: Runtime):
    assert runtime(device, dtype) == expected
