"""run/memory.py on machines and containers that are a few files: what there is, and what a pipeline takes of it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from deploy.run.memory import ACTOR_BYTES, DECODER_BYTES, Available, available_memory, needed_memory
from graph.spec import PipelineSpec
from tests.support.specs import parse_spec

GIB = 1 << 30
NO_LIMIT_V1 = 9223372036854771712
CAMERAS = "{a: {source: 'test://pattern'}, b: {source: 'test://pattern'}}"


def spec(*overrides: str) -> PipelineSpec:
    return parse_spec(f"version: 1\nmodel: tiny\ncameras: {CAMERAS}\n", "pipeline.yaml", overrides)


class Machine:
    """A root folder with 32 GiB free, and the cgroups which a test gives it."""

    def __init__(self, root: Path, cgroup: str) -> None:
        self.root = root
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/meminfo").write_text(f"MemTotal: 67108864 kB\nMemAvailable: {32 * GIB // 1024} kB\n")
        (root / "proc/self/cgroup").write_text(cgroup)

    def cgroup(self, folder: str, **files: object) -> None:
        path = self.root / "sys/fs/cgroup" / folder
        path.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (path / f"memory.{name}").write_text(f"{content}\n")

    @property
    def available(self) -> Available:
        return available_memory(self.root)


def test_a_machine_without_cgroups_has_what_is_free(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "")
    (tmp_path / "proc/self/cgroup").unlink()
    assert machine.available == Available(32 * GIB)


@pytest.mark.parametrize("line", ["MemAvailable:", "MemAvailable: lots kB", "MemAvailable", ""])
def test_what_the_system_does_not_say_is_looked_up_elsewhere(tmp_path: Path, line: str) -> None:
    machine = Machine(tmp_path, "")
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 67108864 kB\n{line}\n")
    assert 0 < machine.available.num_bytes <= psutil.virtual_memory().total


@pytest.mark.parametrize("folder", ["", "docker/ab"])  # with a namespace of its own, and without
def test_in_a_container_of_version_2_its_limit_counts_less_what_is_taken(tmp_path: Path, folder: str) -> None:
    machine = Machine(tmp_path, f"0::/{folder}\n")
    machine.cgroup(folder, max=4 * GIB, current=3 * GIB, stat=f"anon 1\ninactive_file {1 * GIB}")
    assert machine.available == Available(2 * GIB, 4 * GIB)


def test_a_path_that_is_not_mounted_leaves_the_top(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/../../kubepods/pod1\n")
    machine.cgroup("", max=4 * GIB, current=0)
    assert machine.available == Available(4 * GIB, 4 * GIB)


def test_the_tightest_of_the_groups_around_us_counts(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/user.slice/app.scope\n")
    machine.cgroup("user.slice/app.scope", max="max", current=1 * GIB)
    machine.cgroup("user.slice", max=6 * GIB, current=2 * GIB)
    machine.cgroup("", current=9 * GIB)
    assert machine.available == Available(4 * GIB, 6 * GIB)


def test_a_limit_that_slows_down_counts_as_one_that_kills(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/\n")
    machine.cgroup("", max=8 * GIB, high=2 * GIB, current=0)
    assert machine.available == Available(2 * GIB, 2 * GIB)


@pytest.mark.parametrize("folder", ["memory", "memory/docker/ab"])
def test_in_a_container_of_version_1_its_limit_counts(tmp_path: Path, folder: str) -> None:
    machine = Machine(tmp_path, "5:cpu,cpuacct:/\n4:memory:/docker/ab\n0::/\n")
    machine.cgroup("memory", limit_in_bytes=NO_LIMIT_V1, usage_in_bytes=9 * GIB)
    machine.cgroup(folder, limit_in_bytes=4 * GIB, usage_in_bytes=GIB, stat=f"total_inactive_file {GIB // 2}")
    assert machine.available == Available(4 * GIB - GIB // 2, 4 * GIB)


def test_a_limit_above_what_the_machine_has_does_not_count(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/\n")
    machine.cgroup("", max=64 * GIB, current=0)
    assert machine.available == Available(32 * GIB)


def test_a_container_that_is_full_has_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/\n")
    machine.cgroup("", max=GIB, current=2 * GIB)
    assert machine.available == Available(0, GIB)


def test_the_pool_of_each_llm_on_a_cpu_counts_in_full() -> None:
    llms = needed_memory(spec("stages.llm.kv_memory=3GiB", "stages.llm.replicas=2"), {"llm": 0})
    assert llms.kv_caches == 6 * GIB
    on_gpu = needed_memory(spec("stages.llm.kv_memory=3GiB", "stages.llm.gpus=1"), {"llm": 0})
    assert on_gpu.kv_caches == 0


def test_each_replica_and_each_camera_counts_and_no_stage_that_is_off() -> None:
    weights = {"llm": 10 * GIB, "tts": 5 * GIB}
    one, two = needed_memory(spec(), weights), needed_memory(spec("stages.llm.replicas=2"), weights)
    assert (one.weights, two.weights) == (15 * GIB, 25 * GIB)
    assert two.processes - one.processes == ACTOR_BYTES
    assert one.decoders == 2 * DECODER_BYTES
    assert needed_memory(spec("stages.tts.replicas=0"), weights).weights == 10 * GIB


def test_where_a_smaller_pool_helps_nothing_none_is_advised() -> None:
    needed = needed_memory(spec("stages.llm.kv_memory=3GiB"), {"llm": 10 * GIB})
    assert needed.kv_memory_that_fits(Available(10 * GIB)) is None
    assert needed.kv_memory_that_fits(Available(needed.num_bytes - GIB)) == "2GiB"
