"""tests/benchmarks/gpu: it runs with next to no packages, keeps what it has found, and passes no time that it is given.

How fast anything was is never asserted.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from deploy.control.capacity import Demand, reckon
from graph.costs import read_profile
from model_shards.duplex import DuplexEngine, UnitInput
from model_shards.kv_cache import KvCache, KvShape
from model_shards.programs import Captured
from tests.benchmarks.gpu import parts, roofline, show, timing, weights, whole
from tests.benchmarks.gpu.stages import TURN, Turns
from tests.support.made_part import MADE
from tests.support.specs import load_spec

ROOT = Path(__file__).resolve().parents[2]
BARE = ROOT / "tests" / "support" / "bare"
ABSENT = "ray, av, pydantic, prometheus_client, psutil, ruamel, tokenizers, PIL, typer"
MODEL_STAGES = {"vision_encoder", "audio_encoder", "llm", "tts", "vocoder"}


def bare(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """Python where only a borrowed machine's packages can be imported."""
    environment = {**os.environ, "PYTHONPATH": f"{BARE}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800, **more
    )


def test_the_bare_interpreter_has_no_other_package() -> None:
    for package in ABSENT.split(", "):
        result = bare("-c", f"import {package}")
        assert f"No module named '{package}'" in result.stderr


DUMP = """
import json
from stages.catalog import BUILT_IN, stage_class
from graph.sections import TailSpec, WindowSpec
classes = {name: stage_class(use).Options for name, use in BUILT_IN.items()}
said = {"batch": 7, "wait": "3ms", "replicas": 2, "memory": "1GiB", "inputs": {}, "resources": {"a": 1.0}}
stages = {name: each.model_validate(said) for name, each in classes.items()}
read = stages | {"window": WindowSpec(), "tail": TailSpec()}
told = {name: each.model_dump(by_alias=True, exclude={"inputs"}) for name, each in read.items()}
print(json.dumps([told, [[each.wait_ns, each.replicas, each.memory] for each in stages.values()]]))
"""


def test_options_are_read_and_written_by_the_stand_in_as_by_the_package_itself() -> None:
    real = subprocess.run([sys.executable, "-c", DUMP], cwd=ROOT, capture_output=True, text=True, check=True)
    ours = bare("-c", "import tests.benchmarks.gpu\n" + DUMP)
    assert ours.returncode == 0, ours.stderr
    assert json.loads(ours.stdout) == json.loads(real.stdout)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it in small, with the packages of a borrowed machine."""
    record = tmp_path_factory.mktemp("gpu") / "gpu.json"
    size = ("--size", "tiny", "--device", "cpu", "--minutes", "13")  # a minute, or more on a machine that is busy
    result = bare("-m", "tests.benchmarks.gpu", *size, "--json", str(record))
    assert result.returncode == 0, result.stderr
    return record


@pytest.fixture(scope="module")
def record(measured: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(measured.read_text(encoding="utf-8"))
    return content


def test_with_a_borrowed_machines_packages_every_part_is_measured(record: dict[str, Any]) -> None:
    assert record["problems"] == []
    assert list(record["seconds"]) == ["machine", "stages", "pipeline", "sequential"]


def test_it_says_what_it_ran_on_and_which_features_are_missing(record: dict[str, Any]) -> None:
    assert record["machine"]["cores"] == os.cpu_count()
    assert record["versions"]["torch"] == torch.__version__
    assert set(record["features"]) == {"varlen_attn", "flash_attn", "cuda_graphs", "fp8", "int4", "mps"}
    assert not record["features"]["cuda_graphs"]["there"] and record["features"]["cuda_graphs"]["says"]


def test_each_stage_is_measured_by_batch_and_the_llm_by_context(record: dict[str, Any]) -> None:
    rows = record["stages_measured"]
    assert {row["stage"] for row in rows} == MODEL_STAGES
    for stage in MODEL_STAGES:
        assert {row["batch"] for row in rows if row["stage"] == stage} == {1, 3}
    assert {row["context"] for row in rows if row["what"] == "decode step"} == {64, 256}
    for row in rows:
        assert 0 < row["ms"]["p50"] <= row["ms"]["p99"] and row["per_s"] > 0 and row["tflop"] >= 0
        assert row["gbytes"] >= 0 and row["how"] == "eager"
        assert row["roofline_ms"] is None  # of a CPU nobody knows it


def test_the_record_is_a_profile_that_plan_reckons_with(measured: Path) -> None:
    profile = read_profile(measured)
    assert set(profile.stages) == MODEL_STAGES
    plan = reckon(load_spec(ROOT / "pipeline.yaml"), profile, Demand(((1, 1),)))
    assert set(plan.stages) == MODEL_STAGES


def test_the_pipeline_speaks_as_much_as_it_is_to_and_fifo_stands_beside_it(record: dict[str, Any]) -> None:
    cells = {(cell["pipeline"], cell["sessions"], cell["speaking"]): cell for cell in record["cells"]}
    assert set(cells) == {("batched", 2, 0.5), ("fifo", 2, 0.5), ("batched", 1, 0.25)}
    for cell in cells.values():
        assert cell["windows"] == 4 * cell["sessions"] and not cell["failed"] and not cell["deaths"]
        assert all(math.isfinite(cell["latency_ms"][q]) for q in ("p50", "p95", "p99"))
    both = cells["batched", 2, 0.5]
    assert 0 < both["spoken_share"] < 1 and both["turns"] == 1 and both["first_audio_ms"]["p50"] > 0
    assert set(both["stage_ms"]) == MODEL_STAGES


def test_the_sequential_loop_speaks_and_listens(record: dict[str, Any]) -> None:
    found = record["sequential"]
    assert found["speaking_ms"]["p50"] > found["listening_ms"]["p50"]  # by 25 codes and a second of sound
    assert found["seconds_spoken"] > TURN and set(found["sessions_served"]) == {"0.05", "0.25", "0.5"}


def test_a_record_is_shown_as_tables(measured: Path) -> None:
    result = bare("-m", "tests.benchmarks.gpu", "--show", str(measured))
    assert result.returncode == 0, result.stderr
    for told in ("tiny weights on cpu", "decode step", "batched", "fifo", "sequential, one piece after the other"):
        assert told in result.stdout


@pytest.mark.gpu
def test_on_a_gpu_every_part_is_measured_in_small(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--size", "tiny", "--device", "cuda", "--minutes", "8"]
    subprocess.run([*command, "--json", str(tmp_path / "gpu.json")], cwd=ROOT, check=True, timeout=600)
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert found["problems"] == []
    assert {row["stage"] for row in found["stages_measured"]} == MODEL_STAGES
    assert all(row["peak_gib"] is not None for row in found["stages_measured"])


# ---- parts -----------------------------------------------------------------------------------------------------------


def run_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str, minutes: float) -> dict[str, Any]:
    monkeypatch.setattr(parts, "PARTS", (MADE,))
    monkeypatch.setattr(parts, "command_for", lambda told: [sys.executable, "-m", MADE.module, told])
    record = parts.Record(tmp_path / "out.json", {})
    parts.run_parts(record, size, "cpu", minutes, ["made"])
    content: dict[str, Any] = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    return content


def test_a_part_that_hangs_is_ended_in_time_with_all_that_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_part(tmp_path, monkeypatch, "hangs", 0.15)
    assert found["first"] == 1 and "third" not in found
    assert found["problems"] == [{"part": "made", "at": "second", "problem": "its time was over"}]
    assert not psutil.pid_exists(found["child"]) or psutil.Process(found["child"]).status() == psutil.STATUS_ZOMBIE


def test_a_part_whose_process_dies_goes_on_without_what_it_died_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_part(tmp_path, monkeypatch, "dies", 5.0)
    assert found["problems"] == [{"part": "made", "at": "second", "problem": "its process ended with 9"}]
    assert found["third"] == 3


def test_parts_for_which_no_time_is_left_say_so(tmp_path: Path) -> None:
    record = parts.Record(tmp_path / "out.json", {})
    parts.run_parts(record, "tiny", "cpu", 0.001, ["machine"])
    assert record.content["problems"] == [{"part": "machine", "problem": "no time was left for it"}]


def test_the_profile_of_a_part_that_was_begun_again_keeps_what_it_had(tmp_path: Path) -> None:
    record = parts.Record(tmp_path / "out.json", {})
    for stage in ("llm", "tts"):
        record.add("profile", {"version": 1, "stages": {stage: {}}})
    assert record.content["profile"] == {"version": 1, "stages": {"llm": {}, "tts": {}}}


def test_programs_are_counted_and_can_be_left_out() -> None:
    called = []

    def double(x: torch.Tensor) -> tuple[torch.Tensor]:
        called.append(len(x))
        return (2 * x,)

    program = Captured(double, lambda size: (torch.zeros(size),), ladder=(4,))
    with timing.Counted() as counted:
        (padded,) = program(torch.ones(3))
    with timing.without_programs("cpu"):
        (plain,) = program(torch.ones(3))
    assert counted.num_calls == 1 and padded.tolist() == plain.tolist() == [2.0, 2.0, 2.0]
    assert called == [4, 4, 3]  # as it was made, as a program of four rows, as it is written


@pytest.mark.parametrize(
    ("num_bytes", "operations", "dtype", "best_ms"),
    [(4.8e9, 0, torch.bfloat16, 1.0), (0, 989e9, torch.bfloat16, 1.0), (0, 67e9, torch.float32, 1.0)],
)
def test_the_roofline_is_the_larger_of_bytes_and_operations(
    num_bytes: float, operations: float, dtype: torch.dtype, best_ms: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "known_device", lambda: roofline.DEVICES["H200"])
    assert roofline.roofline_ms(num_bytes, operations, dtype) == pytest.approx(best_ms)


def test_a_record_that_has_just_begun_is_shown(tmp_path: Path) -> None:
    told = {"size": "full", "device": "cuda", "minutes": 8.0, "begun": "now"}
    assert next(iter(show.lines(parts.Record(tmp_path / "out.json", told).content))).startswith("full weights on cuda")


def test_the_special_tokens_have_the_released_ids() -> None:
    special = weights.letters(weights.MODELS["full"]).special
    assert (special.im_start, special.unit, special.listen, special.speak) == (151644, 151683, 151705, 151706)
    assert (special.turn_eos, special.chunk_eos, special.tts_pad) == (151717, 151718, 151722)


# ---- what is imposed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5])
def test_the_share_that_is_asked_for_speaks_in_every_window(share: float) -> None:
    turns = [Turns.of_source(Turns(number, 64, share).source) for number in range(64)]
    for window in range(40):
        speaking = sum(each.speaks(window) for each in turns)
        assert abs(speaking - 64 * share) <= 1


@pytest.mark.parametrize("decoding", ["greedy", "sampling"])
def test_the_model_itself_does_what_it_hears(decoding: str) -> None:
    """Six letters where it is to speak; where it is not, its turn ends and it listens."""
    from model_shards.checkpoint import build_hollow
    from model_shards.decoding import SamplingConfig
    from model_shards.duplex import DuplexConfig

    config = weights.MODELS["tiny"]
    model: Any = build_hollow("llm", config)
    weights.draw(model, "llm", config, torch.float32, "cpu")
    cache = KvCache(KvShape.of(config.llm), num_pages=64)
    rule = SamplingConfig(mode=decoding)  # type: ignore[arg-type]
    tokenizer = weights.letters(config)
    engine = DuplexEngine(model, cache, tokenizer, DuplexConfig(sampling=rule, force_listen_count=0))
    session = engine.new_session(0)
    said = []
    with torch.inference_mode():
        for speaks in (False, True, True, False, False):
            heard = torch.randn(10, config.llm.hidden_size)
            heard[:, weights.DECISION] = weights.OBEYED if speaks else -weights.OBEYED
            (output,) = engine.step([(session, UnitInput((), heard))])
            said.append((output.text, output.turn_start, output.end_of_turn, output.is_listen))
    spoken = weights.WORDS
    assert said == [
        ("", False, False, True),
        (spoken, True, False, False),
        (spoken, False, False, False),
        ("", False, True, False),
        ("", False, False, True),
    ]


def test_figures_count_windows_after_the_warm_up_and_turns_at_their_first_window(tmp_path: Path) -> None:
    rows = [
        {"session": "a", "index": n, "latency_s": n / 10, "on_time": n < 3, "failed": [], "missing": [], "compute": {}}
        for n in range(4)
    ]
    said = [{"session": "a", "type": "said", "window": n, "text": "hi"} for n in (2, 3)]
    underrun = {"session": "a", "type": "underrun", "window": 3, "seconds": 0.25}
    for name, lines in (("windows", rows), ("events", [*said, underrun])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found = whole.figures(tmp_path, warm_up=1)
    assert (found["windows"], found["on_time"], found["turns"], found["underruns"]) == (3, 0.6667, 1, 1)
    assert found["first_audio_ms"]["p50"] == 200.0 and found["spoken_share"] == 0.667 and found["underrun_s"] == 0.25
