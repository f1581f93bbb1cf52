"""run/gpu_memory.py: what is on each GPU, how many sessions fit, and what to change where they don't."""

from __future__ import annotations

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from deploy.cli import app as cli
from deploy.cli.common import EXIT_USAGE, EXIT_VIOLATED
from deploy.run import gpu_memory
from deploy.run.gpu_memory import (
    CUDA_CONTEXT_BYTES,
    GIB,
    GPUS,
    GpuMemoryError,
    GpuPlan,
    check_gpu_memory,
    gpu_bytes_of,
    gpu_plan,
    lines_of,
)
from graph.spec import PipelineSpec, default_spec_path
from model_shards.config import RELEASED, Quantization
from tests.support.specs import load_spec, model_stages

H200 = GPUS["h200"]
INT4 = dataclasses.replace(RELEASED, llm=dataclasses.replace(RELEASED.llm, quantization=Quantization(4, 128)))


def sets(share: float = 0.2, **more: str) -> list[str]:
    return [*(f"stages.{stage}.gpus={share}" for stage in model_stages()), *(f"{k}={v}" for k, v in more.items())]


def spec(*overrides: str, share: float = 0.2) -> PipelineSpec:
    return load_spec(default_spec_path(), [*sets(share), *overrides])


def plan(*overrides: str, share: float = 0.2, gpu_bytes: int = H200, num_cameras: int = 1) -> GpuPlan:
    found = gpu_plan(spec(*overrides, share=share), RELEASED, gpu_bytes, num_cameras)
    assert found is not None
    return found


def test_the_released_model_fits_on_an_h200_and_on_no_16_gb() -> None:
    assert plan("stages.llm.kv_memory=8GiB").problems == []
    (problem,) = plan("stages.llm.kv_memory=8GiB", gpu_bytes=16 * GIB).problems
    assert problem.startswith("GPU 0 would hold ") and "llm.0" in problem and "pipeline shards quantize" in problem


def test_of_a_pool_of_64_gib_87_sessions_of_the_official_window_are_served() -> None:
    """scale.md's bound by KV memory on an H200 is 87; here with the unit that comes on top of 8000 tokens."""
    official = plan("stages.llm.kv_memory=110GB", "stages.llm.context={mode: basic, high: 8000, low: 6000}")
    assert official.session_kv == 36 * 256 * 147_456
    assert official.kv_sessions == 110 * 10**9 // official.session_kv == 80


def test_each_process_has_a_context_and_all_of_one_gpu_add_up() -> None:
    together, apart = plan(), plan(share=1)
    assert [len(parts) for parts in together.gpus] == [5]
    assert [len(parts) for parts in apart.gpus] == [1] * 5
    assert all(part.context == CUDA_CONTEXT_BYTES for part in together.gpus[0])
    assert sum(part.total(1) for part in together.gpus[0]) == sum(part.total(1) for (part,) in apart.gpus)


def test_sessions_take_what_they_keep_and_no_more_fit_than_there_is_room_for() -> None:
    found = plan("stages.llm.kv_memory=60GiB", num_cameras=78)
    assert found.most_sessions is not None and found.most_sessions < 78
    (problem,) = found.problems
    assert "set stages.llm.kv_memory to at most" in problem
    assert plan("stages.llm.kv_memory=60GiB", num_cameras=found.most_sessions).problems == []


def test_what_is_resident_is_taken_however_few_sessions_there_are() -> None:
    many, few = ("stages.vocoder.resident=16", "stages.audio_encoder.resident=16"), ("stages.vocoder.resident=0",)
    (of_many,), (of_few,) = plan(*many).gpus, plan(*few).gpus
    vocoder, without = (next(part for part in parts if part.process == "vocoder.0") for parts in (of_many, of_few))
    assert vocoder.total(1) == vocoder.total(16) == without.total(16) > without.total(1)
    assert plan(*many).most_sessions == plan(*few).most_sessions


def test_what_is_advised_fits() -> None:
    (problem,) = plan("stages.llm.kv_memory=100GiB", num_cameras=40).problems
    advised = problem.rpartition(" ")[2]
    assert plan(f"stages.llm.kv_memory={advised}", num_cameras=40).problems == []


def test_a_pool_without_room_for_all_sessions_is_told_with_what_it_takes() -> None:
    (problem,) = plan("stages.llm.kv_memory=4GiB", num_cameras=20).problems
    assert "has room for 5 sessions, not 20" in problem
    advised = problem.partition("kv_memory to ")[2].partition(",")[0]
    assert plan(f"stages.llm.kv_memory={advised}", num_cameras=20).problems == []


def test_keys_and_values_in_fp8_leave_room_for_twice_the_sessions() -> None:
    plain, halved = (plan("stages.llm.kv_memory=8GiB", *more) for more in ((), ("stages.llm.kv_dtype=fp8",)))
    assert halved.session_kv * 2 == plain.session_kv


def test_the_talker_has_a_pool_or_what_each_session_keeps() -> None:
    (pooled, each) = (plan(f"stages.tts.attention={name}").gpus[0][3] for name in ("varlen", "sdpa"))
    assert (pooled.shared, pooled.each) == (4 * GIB, 0)
    assert each.shared == 0 < each.each


def test_replicas_share_the_sessions() -> None:
    two = plan(*(f"stages.{stage}.replicas=2" for stage in model_stages()), num_cameras=10)
    assert two.num_sessions == 5 and len(two.gpus) == 2


def test_weights_of_4_bits_leave_room_for_more_sessions() -> None:
    full, small = (gpu_plan(spec("stages.llm.kv_memory=8GiB"), config, 48 * GIB, 1) for config in (RELEASED, INT4))
    assert full is not None and small is not None
    assert (full.gpus[0][2].weights, small.gpus[0][2].weights) == pytest.approx((16.4e9, 5.6e9), rel=0.02)


def test_without_a_gpu_nothing_is_reckoned() -> None:
    assert gpu_plan(load_spec(default_spec_path()), RELEASED, H200, 3) is None


def test_up_refuses_what_does_not_fit_on_the_gpus_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_memory, "gpu_bytes_here", lambda: 16 * GIB)
    with pytest.raises(GpuMemoryError, match="GPU 0 would hold"):
        check_gpu_memory(spec(), RELEASED, 1)
    monkeypatch.setattr(gpu_memory, "gpu_bytes_here", lambda: H200)
    check_gpu_memory(spec("stages.llm.kv_memory=8GiB"), RELEASED, 1)
    monkeypatch.setattr(gpu_memory, "gpu_bytes_here", lambda: None)
    check_gpu_memory(spec(), RELEASED, 1)  # who starts a stage there says it


@pytest.mark.parametrize(("told", "num_bytes"), [("h200", 141_000 * 10**6), ("H100", 80 * GIB), ("24GiB", 24 * GIB)])
def test_gpus_are_known_by_name_or_by_memory(told: str, num_bytes: int) -> None:
    assert gpu_bytes_of(told) == num_bytes


def test_another_gpu_is_told_with_those_that_are_known() -> None:
    with pytest.raises(GpuMemoryError, match=r"no such GPU.*'h2000'.*h200, h100"):
        gpu_bytes_of("h2000")


def test_a_person_is_told_which_process_takes_what() -> None:
    told = "\n".join(lines_of(plan("stages.llm.kv_memory=8GiB", num_cameras=2)))
    assert "llm.0" in told and "16.4 GB" in told and "8.6 GB" in told
    assert "so 10 sessions fit" in told


# ---- pipeline plan ---------------------------------------------------------------------------------------------------

RELEASE = "model=openbmb/MiniCPM-o-4_5@0123456789abcdef0123456789abcdef01234567"


def run(*arguments: str, overrides: list[str]) -> tuple[int, str]:
    settings = [part for override in overrides for part in ("--set", override)]
    result = CliRunner().invoke(cli.app, ["plan", "-f", str(default_spec_path()), *arguments, *settings])
    return result.exit_code, result.output


def test_plan_tells_the_memory_of_a_gpu_that_is_elsewhere_without_a_profile() -> None:
    overrides = [*sets(), RELEASE, "stages.llm.kv_memory=8GiB"]
    code, told = run("--gpu", "h200", "--cameras", "8", "--json", overrides=overrides)
    memory = json.loads(told[told.index("{") :])["memory"]
    assert code == 0 and memory["fits"] and memory["sessions"] == 8
    assert memory["gpus"][0]["llm.0"]["kv_pool"] == 8 * GIB
    code, told = run("--gpu", "16GiB", "--cameras", "8", overrides=overrides)
    assert code == EXIT_VIOLATED and "GPU 0 would hold" in told


def test_plan_without_anything_to_plan_with_says_what_it_needs() -> None:
    code, told = run(overrides=[])
    assert code == EXIT_USAGE and "--profile" in told and "--gpu" in told
