"""deploy/build.py: where a stage computes."""

from __future__ import annotations

import pytest
import torch

from deploy.build import device_of
from graph.sections import StageSpec
from stages.tensors import Runtime, runtime


@pytest.mark.parametrize(("gpus", "device"), [(0.0, "cpu"), (0.25, "cuda"), (1.0, "cuda"), (2.0, "cuda")])
def test_a_stage_with_a_gpu_computes_there(gpus: float, device: str) -> None:
    assert device_of(StageSpec(gpus=gpus)) == device


def test_a_device_that_is_written_is_taken() -> None:
    assert device_of(StageSpec(gpus=1.0, device="cpu")) == "cpu"
    assert device_of(StageSpec(device="cuda")) == "cuda"


def test_auto_dtype_follows_the_device() -> None:
    assert runtime("cuda", "auto") == Runtime("cuda", torch.bfloat16)
    assert runtime("cpu", "auto") == Runtime("cpu", torch.float32)
    assert runtime("cuda", "float32") == Runtime("cuda", torch.float32)
