"""run/gpu_memory.py: what is on each GPU, how many sessions fit, and what to change where they don't."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from deploy.cli import app as cli
from deploy.cli.common import EXIT_USAGE, EXIT_VIOLATED
from deploy.run import gpu_memory
from deploy.run.gpu_memory import (
    GIB,
    GPUS,
    GpuMemoryError,
    GpuPlan,
    check_gpu_memory,
    gpu_bytes_of,
    gpu_plan,
    lines_of,
)
from deploy.run.gpu_parts import CUDA_CONTEXT_BYTES, Pool
from graph.costs import Profile, StageCost
from graph.spec import PipelineSpec, default_spec_path
from model_shards.attention import PAGE_SIZES
from model_shards.config import RELEASED, ModelConfig, Quantization
from model_shards.kv_cache import KvCache
from model_shards.programs import ladder_to
from model_shards.tts_paged import PagedTalker, shape_of
from tests.model_shards.test_tts import TINY as TINY_TALKER
from tests.model_shards.test_tts_paged import talker_of
from tests.support.kernels import reference_kernel
from tests.support.specs import load_spec, model_stages

H200 = GPUS["h200"]
INT4 = dataclasses.replace(RELEASED, llm=dataclasses.replace(RELEASED.llm, quantization=Quantization(4, 128)))


def sets(share: float = 0.2, **more: str) -> list[str]:
    return [*(f"stages.{stage}.gpus={share}" for stage in model_stages()), *(f"{k}={v}" for k, v in more.items())]


def spec(*overrides: str, share: float = 0.2) -> PipelineSpec:
    return load_spec(default_spec_path(), [*sets(share), *overrides])


def plan(
    *overrides: str,
    share: float = 0.2,
    gpu_bytes: int = H200,
    num_cameras: int | None = 1,
    config: ModelConfig = RELEASED,
) -> GpuPlan:
    result = gpu_plan(spec(*overrides, share=share), config, gpu_bytes, num_cameras)
    assert result is not None
    return result


def advised(problem: str) -> list[str]:
    """As overrides."""
    return ["=".join(setting) for setting in re.findall(r"(stages\.[a-z_.]+) to (?:at most )?(\w+)", problem)]


def test_the_released_model_fits_on_an_h200_and_on_no_16_gb() -> None:
    assert plan("stages.llm.kv_memory=8GiB").problems == []
    (problem,) = plan("stages.llm.kv_memory=8GiB", gpu_bytes=16 * GIB).problems
    assert problem.startswith("GPU 0 would hold ") and "llm.0" in problem and "pipeline shards quantize" in problem


def test_of_a_pool_of_64_gib_87_sessions_of_the_official_window_are_served() -> None:
    """scale.md's bound by KV memory on an H200 is 87; here with the unit that comes on top of 8000 tokens."""
    official = plan("stages.llm.kv_memory=110GB", "stages.llm.context={mode: basic, high: 8000, low: 6000}")
    pool = official.pools["llm"]
    assert pool.session_bytes == 36 * 256 * 147_456
    assert pool.num_sessions == 110 * 10**9 // pool.session_bytes == 80


def test_each_process_has_a_context_and_all_of_one_gpu_add_up() -> None:
    together, apart = plan(), plan(share=1)
    assert [len(parts) for parts in together.gpus] == [5]
    assert [len(parts) for parts in apart.gpus] == [1] * 5
    assert all(part.context == CUDA_CONTEXT_BYTES for part in together.gpus[0])
    assert sum(part.total(1) for part in together.gpus[0]) == sum(part.total(1) for (part,) in apart.gpus)


def test_sessions_take_what_they_keep_and_no_more_fit_than_there_is_room_for() -> None:
    large = ("stages.llm.kv_memory=68GiB", "stages.tts.kv_memory=22GiB")
    planned = plan(*large, num_cameras=88)
    assert planned.most_sessions == 35 and {pool.num_sessions for pool in planned.pools.values()} == {88, 92}
    (problem,) = planned.problems
    assert "GPU 0 would hold" in problem
    assert plan(*large, num_cameras=35).problems == []
    assert plan(*large, num_cameras=36).problems != []


def test_the_talkers_pool_of_4_gib_bounds_the_sessions_to_16() -> None:
    """273 pages, 17 for the longest turn, one for nobody: whoever comes then is refused when it opens."""
    planned = plan("stages.llm.kv_memory=60GiB", num_cameras=40)
    assert (planned.most_sessions, planned.pools["tts"].num_sessions) == (16, 16)
    (problem,) = planned.problems
    assert "KV cache of tts has room for 16 sessions, not 40" in problem
    better = plan("stages.llm.kv_memory=60GiB", *advised(problem), num_cameras=40)
    assert better.problems == [] and better.most_sessions == 40


@pytest.mark.parametrize("kib", [700, 1023, 1500])
def test_the_talkers_pool_has_room_for_as_many_as_the_talker_says(kib: int) -> None:
    """The talker makes its pool as the stage does; max_position_embeddings of 510 and a launch are 3 pages."""
    config = dataclasses.replace(TINY_TALKER, max_position_embeddings=510)
    talker, shape = talker_of(config), shape_of(config)
    cache = KvCache.of_bytes(shape, kib * 1024, PAGE_SIZES["varlen"], torch.float32)
    made = PagedTalker(talker, cache, "varlen", ladder_to(1), reference_kernel)
    pool = Pool("tts", kib * 1024, PAGE_SIZES["varlen"] * shape.bytes_per_token(torch.float32), session_pages=3)
    assert made.max_sessions == pool.num_sessions
    own = plan("stages.tts.dtype=float32", config=dataclasses.replace(RELEASED, tts=config)).pools["tts"]
    assert (own.page_bytes, own.session_pages) == (pool.page_bytes, 3)


def test_without_a_number_of_cameras_as_many_are_reckoned_as_fit() -> None:
    assert plan("stages.llm.kv_memory=60GiB", num_cameras=None).num_sessions == 16
    assert plan("stages.llm.kv_memory=16GiB", gpu_bytes=16 * GIB, num_cameras=None).num_sessions == 1
    two = plan(
        "stages.llm.kv_memory=4GiB", *(f"stages.{stage}.replicas=2" for stage in model_stages()), num_cameras=None
    )
    assert two.num_sessions == two.most_sessions == 5


def test_no_session_fits_where_what_is_loaded_does_not() -> None:
    assert plan("stages.llm.kv_memory=100GiB", share=1, gpu_bytes=80 * GIB).most_sessions == 0


def test_what_is_resident_is_taken_however_few_sessions_there_are() -> None:
    many, few = ("stages.vocoder.resident=16", "stages.audio_encoder.resident=16"), ("stages.vocoder.resident=0",)
    (of_many,), (of_few,) = plan(*many).gpus, plan(*few).gpus
    vocoder, without = (next(part for part in parts if part.process == "vocoder.0") for parts in (of_many, of_few))
    assert vocoder.total(1) == vocoder.total(16) == vocoder.total(17) - vocoder.each
    assert without.total(16) - without.total(1) == 15 * without.each == 15 * vocoder.each
    assert plan(*many).most_sessions == plan(*few).most_sessions


def test_what_is_advised_fits() -> None:
    large = ("stages.llm.kv_memory=100GiB", "stages.tts.kv_memory=12GiB")
    (problem,) = plan(*large, num_cameras=40).problems
    assert [setting.partition("=")[0] for setting in advised(problem)] == ["stages.llm.kv_memory"]
    assert plan(*large, *advised(problem), num_cameras=40).problems == []


def test_what_is_advised_for_several_pools_fits() -> None:
    """The one that is too large leaves room for the one that is too small."""
    problems = plan("stages.llm.kv_memory=100GiB", num_cameras=40).problems
    both = [setting for problem in problems for setting in advised(problem)]
    assert len(problems) == 2 and plan(*both, num_cameras=40).problems == []


def test_what_is_large_is_named_and_no_more_than_is_needed() -> None:
    sizes = ("stages.llm.kv_memory=1GiB", "stages.vocoder.resident=16")
    (problem,) = plan(*sizes, gpu_bytes=24 * GIB, config=INT4).problems
    assert [setting.partition("=")[0] for setting in advised(problem)] == ["stages.tts.kv_memory"]
    (problem,) = plan(*sizes, gpu_bytes=18 * GIB, config=INT4).problems
    assert advised(problem) == [
        "stages.tts.kv_memory=270MiB",
        "stages.vocoder.resident=1",
        "stages.audio_encoder.resident=1",
    ]
    assert "4 bits" not in problem, "it has them"
    assert plan(*sizes, *advised(problem), gpu_bytes=18 * GIB, config=INT4).problems == []


LEAST = (
    "stages.llm.kv_memory=792MiB",
    "stages.tts.kv_memory=270MiB",
    "stages.vocoder.resident=1",
    "stages.audio_encoder.resident=1",
    *(f"stages.{stage}.batch=1" for stage in model_stages()),
)


def test_in_4_bits_the_whole_model_of_five_processes_takes_15_gb_and_that_is_the_least() -> None:
    """As model_shards/README.md has it. With what need not be on the GPU elsewhere, 12 GB are enough."""
    least = plan(*LEAST, gpu_bytes=16 * GIB, config=INT4)
    assert least.problems == [] and least.most_sessions == 1
    assert sum(part.total(1) for part in least.gpus[0]) == pytest.approx(14.2e9, abs=0.05e9)
    (problem,) = plan(*LEAST, gpu_bytes=12 * 10**9, config=INT4).problems
    assert advised(problem) == [] and "larger GPUs" in problem and "4 bits" not in problem
    on_cpu = ("stages.vocoder.gpus=0", "stages.audio_encoder.gpus=0")
    some = plan(*LEAST, *on_cpu, gpu_bytes=12 * 10**9, config=INT4)
    assert some.problems == []
    assert sum(part.total(1) for part in some.gpus[0]) == pytest.approx(10.6e9, abs=0.05e9)


def test_the_vocoders_steps_and_the_slices_of_pictures_count_as_they_are_set() -> None:
    one, five = (plan(f"stages.vocoder.steps={steps}").gpus[0][4] for steps in (1, 5))
    assert five.each > 4 * one.each
    whole, cut = (
        plan(f"stages.vision_encoder.max_slices={slices}", "stages.vision_encoder.batch=1").gpus[0][0]
        for slices in (1, 9)
    )
    assert cut.workspace > whole.workspace


def test_a_pool_without_room_for_all_sessions_is_told_with_what_it_takes() -> None:
    (problem,) = plan("stages.llm.kv_memory=4GiB", num_cameras=16).problems
    assert "has room for 5 sessions, not 16" in problem and "stages.llm.context.high" in problem
    assert plan(*advised(problem), num_cameras=16).problems == []


def test_keys_and_values_in_fp8_leave_room_for_twice_the_sessions() -> None:
    plain, halved = (plan("stages.llm.kv_memory=8GiB", *more) for more in ((), ("stages.llm.kv_dtype=fp8",)))
    assert halved.pools["llm"].session_bytes * 2 == pytest.approx(plain.pools["llm"].session_bytes, rel=0.05)


@pytest.mark.parametrize(("attention", "pages"), [("varlen", 17), ("flash", 17), ("sdpa", 129)])
def test_the_talker_has_its_pool_whatever_its_attention_is(attention: str, pages: int) -> None:
    planned = plan(f"stages.tts.attention={attention}")
    assert (planned.gpus[0][3].kv_pool, planned.gpus[0][3].each) == (4 * GIB, 0)
    assert planned.pools["tts"].session_pages == pages


@pytest.mark.parametrize("setting", ["llm.attention=sdpa", "llm.kv_dtype=fp8", "tts.attention=sdpa"])
def test_what_sdpa_copies_in_a_decode_step_is_workspace(setting: str) -> None:
    number = 2 if setting.startswith("llm") else 3
    ragged, copying = (plan(*more).gpus[0][number] for more in ((), (f"stages.{setting}",)))
    assert copying.workspace > ragged.workspace + 100e6


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
    with pytest.raises(GpuMemoryError, match=r"GPU 0 would hold .*, and an otherwise empty GPU has 16\.7 GB for it"):
        check_gpu_memory(spec(), RELEASED, 1)
    monkeypatch.setattr(gpu_memory, "gpu_bytes_here", lambda: H200)
    check_gpu_memory(spec("stages.llm.kv_memory=8GiB"), RELEASED, 1)
    monkeypatch.setattr(gpu_memory, "gpu_bytes_here", lambda: None)
    check_gpu_memory(spec(), RELEASED, 1)  # who starts a stage there says it


@pytest.mark.parametrize(("text", "num_bytes"), [("h200", 141_000 * 10**6), ("H100", 80 * GIB), ("24GiB", 24 * GIB)])
def test_gpus_are_known_by_name_or_by_memory(text: str, num_bytes: int) -> None:
    assert gpu_bytes_of(text) == num_bytes


def test_another_gpu_is_told_with_those_that_are_known() -> None:
    with pytest.raises(GpuMemoryError, match=r"no such GPU.*'h2000'.*h200, h100"):
        gpu_bytes_of("h2000")


def test_a_person_is_told_which_process_takes_what() -> None:
    text = "\n".join(lines_of(plan("stages.llm.kv_memory=8GiB", num_cameras=2)))
    assert "llm.0" in text and "16.4 GB" in text and "8.6 GB" in text
    assert "so 10 sessions fit" in text


# ---- pipeline plan ---------------------------------------------------------------------------------------------------

RELEASE = "model=openbmb/MiniCPM-o-4_5@0123456789abcdef0123456789abcdef01234567"


def run(*arguments: str, overrides: list[str]) -> tuple[int, str]:
    settings = [part for override in overrides for part in ("--set", override)]
    result = CliRunner().invoke(cli.app, ["plan", "-f", str(default_spec_path()), *arguments, *settings])
    return result.exit_code, result.output


def test_plan_tells_the_memory_of_a_gpu_that_is_elsewhere_without_a_profile() -> None:
    overrides = [*sets(), RELEASE, "stages.llm.kv_memory=8GiB"]
    code, output = run("--gpu", "h200", "--cameras", "8", "--json", overrides=overrides)
    memory = json.loads(output[output.index("{") :])["memory"]
    assert code == 0 and memory["fits"] and memory["sessions"] == 8
    assert memory["gpus"][0]["llm.0"]["kv_pool"] == 8 * GIB
    code, output = run("--gpu", "16GiB", "--cameras", "8", overrides=overrides)
    assert code == EXIT_VIOLATED and "GPU 0 would hold" in output


def test_plan_without_anything_to_plan_with_says_what_it_needs() -> None:
    code, output = run(overrides=[])
    assert code == EXIT_USAGE and "--profile" in output and "--gpu" in output


@pytest.mark.parametrize("cameras", ["-3", "0"])
def test_plan_takes_no_fewer_than_one_camera(cameras: str) -> None:
    code, output = run("--gpu", "h200", "--cameras", cameras, overrides=[*sets(), RELEASE])
    assert code == EXIT_USAGE and "--cameras" in output


def test_plan_without_a_number_of_cameras_tells_how_many_fit() -> None:
    code, output = run("--gpu", "h200", overrides=[*sets(), RELEASE, "stages.llm.kv_memory=60GiB"])
    assert code == 0 and "with 16 sessions of a replica" in output and "so 16 sessions fit" in output


def profile_of(path: Path, gpu: str | None) -> str:
    costs = dict.fromkeys(model_stages(), StageCost(10**7, 10**6))
    path.write_text(Profile("released", {"gpu": gpu}, 32, costs).as_json(), encoding="utf-8")
    return str(path)


def test_plan_with_a_gpus_profile_and_stages_without_one_says_what_to_set(tmp_path: Path) -> None:
    arguments = ("--profile", profile_of(tmp_path / "gpu.json", "H200"), "--cameras", "2")
    code, output = run(*arguments, overrides=[])
    assert code == 0 and "no stage here has one" in output and "cores are busy" in output
    suggested = re.findall(r"--set (\S+)", output)
    assert sorted(suggested) == sorted(sets())
    code, output = run(*arguments, "--gpu", "h200", overrides=[*suggested, RELEASE, "stages.llm.kv_memory=8GiB"])
    assert code == 0 and "1 GPUs, 2.0 sessions each" in output and "no stage here" not in output


def test_plan_with_the_profile_of_a_machine_without_a_gpu_says_nothing_of_gpus(tmp_path: Path) -> None:
    code, output = run("--profile", profile_of(tmp_path / "cpu.json", None), "--cameras", "2", overrides=[])
    assert code == 0 and "GPU" not in output
