"""tests/benchmarks/gpu: it runs with next to no packages, keeps what it has found, and passes no time that it is given.

How fast anything was is never asserted.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import psutil
import pytest
import torch
from typer.testing import CliRunner, Result

import model_shards.attention
import tests.benchmarks.gpu
from deploy.cli.app import app
from deploy.control.calls import CoordinatorError
from deploy.control.capacity import Demand, reckon
from deploy.evaluate import bench
from graph.costs import read_profile
from model_shards import memory
from model_shards.attention import AttentionName
from model_shards.config import RELEASED
from model_shards.duplex import DuplexEngine, UnitInput
from model_shards.errors import ModelError
from model_shards.image import plan_slices, slice_image
from model_shards.kv_cache import KvCache, KvShape
from model_shards.programs import Captured
from stages.audio_encoder import AudioOptions
from stages.llm import LlmOptions
from stages.tts import TtsOptions
from stages.vision_encoder import WIDE
from stages.vocoder import VocoderOptions
from tests.benchmarks.gpu import OPTIONS, environment, machine, parts, roofline, show, timing, weights, whole
from tests.benchmarks.gpu.__main__ import main
from tests.benchmarks.gpu.stages import PICTURE, TURN, Turns
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
dumped = {name: each.model_dump(by_alias=True, exclude={"inputs"}) for name, each in read.items()}
print(json.dumps([dumped, [[each.wait_ns, each.replicas, each.memory] for each in stages.values()]]))
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
    kernels = {f"{name} attention" for name in get_args(AttentionName)}
    assert set(record["features"]) == {*kernels, "cuda_graphs", "fp8", "int4", "mps"}
    assert not record["features"]["cuda_graphs"]["there"] and record["features"]["cuda_graphs"]["says"]


def test_a_kernel_of_attention_is_there_where_the_stages_may_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(device: str, dtype: torch.dtype, requested: str | None = None) -> str:
        if requested == "flash":
            raise ModelError("attention: flash needs the package flash-attn")
        return requested or "varlen"

    monkeypatch.setattr(model_shards.attention, "choose_attention", choose)
    features = {name: machine._tried(machine.FEATURES[f"{name} attention"]) for name in get_args(AttentionName)}
    assert features == {
        "flash": {"there": False, "says": "ModelError: attention: flash needs the package flash-attn"},
        "varlen": {"there": True, "says": "chosen"},
        "sdpa": {"there": True, "says": "runs; varlen is chosen"},
    }


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
    figures = record["sequential"]
    assert figures["speaking_ms"]["p50"] > figures["listening_ms"]["p50"]  # by 25 codes and a second of sound
    assert figures["seconds_spoken"] > TURN and set(figures["sessions_served"]) == {"0.05", "0.25", "0.5"}


def test_a_record_is_shown_as_tables(measured: Path) -> None:
    result = bare("-m", "tests.benchmarks.gpu", "--show", str(measured))
    assert result.returncode == 0, result.stderr
    for text in ("tiny weights on cpu", "decode step", "batched", "fifo", "sequential, one piece after the other"):
        assert text in result.stdout


@pytest.mark.gpu
def test_on_a_gpu_every_part_is_measured_in_small(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--size", "tiny", "--device", "cuda", "--minutes", "8"]
    subprocess.run([*command, "--json", str(tmp_path / "gpu.json")], cwd=ROOT, check=True, timeout=600)
    record = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert record["problems"] == []
    assert {row["stage"] for row in record["stages_measured"]} == MODEL_STAGES
    assert all(row["peak_gib"] is not None for row in record["stages_measured"])


# ---- how it is started -----------------------------------------------------------------------------------------------

WRONG = [
    (["--parts", "stagez"], "parts: 'stagez' is none of machine, stages, pipeline, sequential"),
    (["--parts", ","], "parts: none is named"),
    (["--minutes", "0"], "minutes: 0"),
    (["--minutes", "nan"], "minutes: nan"),
    (["--minutes", "inf"], "minutes: inf"),
    (["--minutes", "soon"], "minutes: soon"),
    (["--size", "huge"], "size: 'huge' is none of full, tiny"),
    (["--device", "tpu"], "device: 'tpu' is none of cuda, cpu"),
    (["--json", "/nonexistent/x.json"], "/nonexistent/x.json: there is no folder /nonexistent"),
    (["--json", "/dev/null"], "/dev/null: no file, but a folder or a device"),
    (["--show", "/nonexistent/x.json"], "/nonexistent/x.json: No such file or directory"),
    (["--show", __file__], "no JSON"),
]


@pytest.mark.parametrize(("arguments", "problem"), WRONG)
def test_what_can_not_be_is_refused_before_anything_is_measured(
    arguments: list[str], problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and problem in capsys.readouterr().err


def test_json_of_something_else_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text('{"benchmark": "bus"}', encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["gpu", "--show", str(tmp_path / "other.json")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "nothing that this benchmark has measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "variables", "problem"),
    [
        (["--size", "huge"], {}, "pipeline: size: 'huge' is none of full, tiny"),
        (["--minutes", "nan"], {}, "pipeline: minutes: nan"),
        (["--json", "/nonexistent/x.json"], {}, "pipeline: /nonexistent/x.json: there is no folder"),
        ([], {"PARTS": "stagez"}, "pipeline: parts: 'stagez' is none of"),
    ],
)
def test_pipeline_bench_refuses_the_same_as_usage(
    arguments: list[str], variables: dict[str, str], problem: str, bench_gpu: BenchGpu
) -> None:
    result = bench_gpu(arguments, variables)
    assert result.exit_code == 2 and problem in result.output


def test_pipeline_bench_writes_to_the_file_behind_json(
    tmp_path: Path, bench_gpu: BenchGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def run_to(record: Path) -> list[bench.Row]:
        written.append(record)
        return [bench.Row("a number", 1.0, "ms", "", None, None, "")]

    monkeypatch.setattr(bench, "find_benchmarks", lambda folder: {"gpu": SimpleNamespace(run_to=run_to)})
    result = bench_gpu(["--minutes", "8", "--json", str(tmp_path / "out.json")], {})
    assert result.exit_code == 0 and written == [tmp_path / "out.json"] and "a number" in result.output


BenchGpu = Callable[[list[str], dict[str, str]], Result]


@pytest.fixture
def bench_gpu(monkeypatch: pytest.MonkeyPatch) -> BenchGpu:
    """`pipeline bench gpu`, with these variables."""

    def run(arguments: list[str], variables: dict[str, str]) -> Result:
        for name in OPTIONS:  # what the command sets goes with the test
            monkeypatch.setenv(f"OMNI_BENCH_{name.upper()}", variables.get(name.upper(), ""))
        return CliRunner().invoke(app, ["bench", "gpu", *arguments])

    monkeypatch.setattr(bench, "find_benchmarks", lambda folder: {"gpu": tests.benchmarks.gpu})
    monkeypatch.setattr(bench, "describe_machine", dict)
    return run


WITH_MADE = """
import sys
from tests.benchmarks.gpu import parts
from tests.support.made_part import MADE
parts.PARTS = (MADE,)
parts.command_for = lambda written: [sys.executable, "-m", MADE.module, written]
from tests.benchmarks.gpu.__main__ import main
main()
"""


@contextmanager
def hanging(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """The benchmark in a part that hangs, and a process that this part has started."""
    record = tmp_path / "gpu.json"
    command = [sys.executable, "-c", WITH_MADE, "--device", "cpu", "--json", str(record)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, **pipes) as process:  # type: ignore[call-overload]
        while process.poll() is None and '"child"' not in (record.read_text() if record.is_file() else ""):
            time.sleep(0.05)
        try:
            yield process, psutil.Process(json.loads(record.read_text())["child"])
        finally:
            process.kill()


def is_over(process: psutil.Process) -> bool:
    """Killed, though whoever inherits it here may not have noticed."""
    for _ in range(600):
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_an_interrupt_shows_what_was_measured_and_ends_all_that_runs(tmp_path: Path) -> None:
    with hanging(tmp_path) as (process, child):
        process.send_signal(signal.SIGINT)
        shown, log = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in log and "interrupted" in log
        assert shown.startswith("tiny weights on cpu") and is_over(child)


def test_a_part_whose_parent_is_killed_ends_with_all_that_it_has_started(tmp_path: Path) -> None:
    with hanging(tmp_path) as (process, child):
        process.kill()
        process.wait()
        assert is_over(child)


# ---- parts -----------------------------------------------------------------------------------------------------------


def run_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str, minutes: float) -> dict[str, Any]:
    monkeypatch.setattr(parts, "PARTS", (MADE,))
    monkeypatch.setattr(parts, "command_for", lambda written: [sys.executable, "-m", MADE.module, written])
    record = parts.Record(tmp_path / "out.json", {})
    parts.run_parts(record, size, "cpu", minutes, ["made"])
    content: dict[str, Any] = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    return content


def test_a_part_that_hangs_is_ended_in_time_with_all_that_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run_part(tmp_path, monkeypatch, "hangs", 0.15)
    assert record["first"] == 1 and "third" not in record
    assert record["problems"] == [{"part": "made", "at": "second", "problem": "its time was over"}]
    assert not psutil.pid_exists(record["child"]) or psutil.Process(record["child"]).status() == psutil.STATUS_ZOMBIE


def test_a_part_whose_process_dies_goes_on_without_what_it_died_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run_part(tmp_path, monkeypatch, "dies", 5.0)
    assert record["problems"] == [{"part": "made", "at": "second", "problem": "its process ended with 9"}]
    assert record["third"] == 3


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


def test_the_talkers_bytes_are_those_of_its_weights_and_folding_hides_none() -> None:
    """755 MB of layers and 20 MB of head, as the released checkpoint has them; in float32."""
    assert roofline.num_bytes("tts", RELEASED, torch.float32) == pytest.approx(775.4e6, rel=1e-3)
    assert roofline.num_bytes("tts", RELEASED, torch.bfloat16) == pytest.approx(387.7e6, rel=1e-3)


def test_what_the_vocoder_reads_is_without_what_is_computed_once() -> None:
    """Of 706 MB, 153 make what a time makes of the layers, and 13 are the table of codes."""
    assert roofline.num_bytes("vocoder", RELEASED, torch.float32) == pytest.approx(539.7e6, rel=1e-3)
    assert roofline.num_bytes("vocoder", RELEASED, torch.float32, "flow.decoder") == pytest.approx(304.8e6, rel=1e-3)


def test_a_record_that_has_just_begun_is_shown(tmp_path: Path) -> None:
    header = {"size": "full", "device": "cuda", "minutes": 8.0, "begun": "now"}
    assert next(iter(show.lines(parts.Record(tmp_path / "out.json", header).content))).startswith(
        "full weights on cuda"
    )


def test_the_special_tokens_have_the_released_ids() -> None:
    special = weights.letters(weights.MODELS["full"]).special
    assert (special.im_start, special.unit, special.listen, special.speak) == (151644, 151683, 151705, 151706)
    assert (special.turn_eos, special.chunk_eos, special.tts_pad) == (151717, 151718, 151722)


# ---- how many sessions, and in which order ---------------------------------------------------------------------------

FULL = parts.Request("pipeline", "full", "cuda", math.inf)


@pytest.mark.parametrize(("free_gb", "most"), [(149, 64), (84, 32), (24, 0)])
def test_a_device_is_given_as_many_sessions_as_it_has_room_for(free_gb: int, most: int) -> None:
    assert min(whole.most_sessions(free_gb * 1e9), 64) == pytest.approx(most, abs=1)


def test_what_the_stages_take_for_each_session_is_what_is_reckoned() -> None:
    spec = whole.spec_of(FULL, 32, fifo=False)
    audio, vocoder, llm, tts = (spec.stages[name] for name in ("audio_encoder", "vocoder", "llm", "tts"))
    assert isinstance(audio, AudioOptions) and isinstance(vocoder, VocoderOptions)
    assert isinstance(llm, LlmOptions) and isinstance(tts, TtsOptions)
    assert (audio.resident, vocoder.resident) == (32, 32)
    pools = llm.kv_memory_bytes + tts.kv_memory_bytes
    resident = 32 * memory.session_bytes("audio", RELEASED, torch.bfloat16, 150)
    frames = 150 + 52  # of the drawn voice, and of a window with what it looks ahead; the turn's last 100 are fewer
    resident += 32 * memory.session_bytes("vocoder", RELEASED, torch.float32, 150) * frames // (150 + 200)
    assert 0.85 < (pools + resident) / (32 * whole.SESSION_BYTES) < 1


def test_cells_with_more_sessions_than_fit_have_as_many_as_fit_and_come_once() -> None:
    assert whole.fitting(((16, 0.25), (64, 0.25), (48, 0.25), (64, 0.5)), 40) == [(16, 0.25), (40, 0.25), (40, 0.5)]


@dataclass
class Started:
    """A pipeline whose cells are its name and theirs."""

    name: str
    started_s: float = 30.0

    def cells(self, cells: whole.Cells) -> Iterator[parts.Entry]:
        for num_sessions, share in cells:
            yield "cells[]", (self.name, num_sessions, share)


def ordered(request: parts.Request, monkeypatch: pytest.MonkeyPatch, fit: int = 64, free: float = 1e12) -> list[Any]:
    """The cells of a run, and what kept it from one. fit: sessions that really fit."""

    @contextmanager
    def running(name: str, request: parts.Request, folder: Path, cells: whole.Cells) -> Iterator[Started]:
        if max(cells)[0] > fit:
            raise CoordinatorError("llm.0: CUDA out of memory. Tried to allocate 2.00 GiB")
        yield Started(name)

    monkeypatch.setattr(whole.Pipeline, "running", running)
    monkeypatch.setattr(whole, "_free_bytes", lambda request: free)
    return [value for key, value in whole.measure(request) if key in ("cells[]", "problem")]


def test_no_cell_is_left_out_while_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = ordered(FULL, monkeypatch)
    assert [cell[:2] for cell in cells[6:8]] == [("fifo", 16), ("fifo", 32)]
    assert [cell[1:] for cell in cells[:6]] == list(whole.CELLS["full"])
    assert [cell[1:] for cell in cells[8:]] == list(whole.MORE_CELLS["full"]) and len(cells) == 14


def test_ours_goes_on_where_no_time_is_left_to_start_the_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = ordered(replace(FULL, until_s=time.monotonic() + 30), monkeypatch)
    assert cells.pop(6) == {"at": "fifo", "problem": "no time was left to start it"}
    assert len(cells) == 12 and {cell[0] for cell in cells} == {"batched"}


def test_what_is_out_of_memory_at_load_is_tried_with_half_the_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, *cells = ordered(FULL, monkeypatch, fit=40)
    assert problem["at"] == "64 sessions" and "out of memory" in problem["problem"]
    assert cells[0] == {"at": "memory", "problem": "1000 GB: 32 sessions are the most"}
    assert max(cell[1] for cell in cells[1:]) == 32


def test_a_device_that_is_too_small_for_the_model_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = ordered(FULL, monkeypatch, free=24e9)
    assert problem == {"at": "memory", "problem": "24 GB are too few for the model and a session"}


# ---- what is imposed -------------------------------------------------------------------------------------------------


def test_pictures_have_the_size_that_the_encoder_is_warmed_up_for_and_are_not_scaled() -> None:
    vision = weights.MODELS["full"].vision
    assert vision is not None
    one = replace(vision.slices, max_slice_nums=1)
    (picture,) = slice_image(np.zeros((*PICTURE, 3), np.uint8), one)
    assert (picture.rows, picture.cols) == WIDE and plan_slices(PICTURE[1], PICTURE[0], one).source == PICTURE[::-1]


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
    figures = whole.figures(tmp_path, warm_up=1)
    assert (figures["windows"], figures["on_time"], figures["turns"], figures["underruns"]) == (3, 0.6667, 1, 1)
    assert (
        figures["first_audio_ms"]["p50"] == 200.0 and figures["spoken_share"] == 0.667 and figures["underrun_s"] == 0.25
    )
