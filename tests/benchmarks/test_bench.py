"""The benchmarks run and tell what they measured; how fast anything was is never asserted."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.evaluate.bench import FOLDER, BenchError, find_benchmarks, less_is_better, more_is_better, run_bench

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"OMNI_BENCH_REPETITIONS": "4", "OMNI_BENCH_SESSIONS": "1", "OMNI_BENCH_SECONDS": "1"}
QUICK |= {
    "OMNI_BENCH_WARM_UP": "2",
    "OMNI_BENCH_SIZES": "1,2",
    "OMNI_BENCH_WINDOWS": "14",
    "OMNI_BENCH_SEEDS": "1",
    "OMNI_BENCH_BATCHED": "2",
    "OMNI_BENCH_CALIBRATED": "1",
    "OMNI_BENCH_SIMULATED": "2",
    "OMNI_BENCH_SCHEDULED": "4",
    "OMNI_BENCH_WIDTH": "256",
    "OMNI_BENCH_CAMERAS": "2:1",
    "OMNI_BENCH_SETTLE": "1",
    "OMNI_BENCH_BESIDE": "2",
    "OMNI_BENCH_TURNS": "1",
    "OMNI_BENCH_SIZE": "tiny",
    "OMNI_BENCH_PARTS": "machine,stages",  # test_gpu.py runs the others
    "OMP_NUM_THREADS": "1",
}
ROW_KEYS = {"name", "value", "unit", "rival", "rival_value", "ratio", "command"}


def run_quickly(name: str) -> dict[str, object]:
    """What `pipeline bench NAME --json` prints; in a process of its own, for Ray keeps its first environment."""
    result = subprocess.run(
        [sys.executable, "-m", "deploy", "bench", name, "--json"],
        cwd=ROOT,
        env={**os.environ, **QUICK},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    report: dict[str, object] = json.loads(result.stdout)
    return report


@pytest.mark.ray
@pytest.mark.parametrize(
    ("name", "num_rows"),
    [
        ("bus", 36),
        ("cameras", 9),
        ("decoders", 3),
        ("engine", 8),
        ("gpu", 6),
        ("onset", 61),
        ("overload", 6),
        ("plan", 8),
        ("quantized", 10),
        ("sessions", 9),
        ("simulate", 4),
        ("stages", 5),
    ],
)
def test_a_benchmark_tells_ours_and_the_rivals_number_and_on_what_they_were_measured(name: str, num_rows: int) -> None:
    report = run_quickly(name)
    rows = report["rows"]
    assert isinstance(rows, list) and len(rows) == num_rows
    assert report["benchmark"] == name
    for row in rows:
        assert row.keys() == ROW_KEYS
        compared = ("value", "rival_value", "ratio") if row["rival_value"] else ("value",)  # a rival may serve nobody
        assert all(math.isfinite(row[key]) for key in compared)
        assert row["command"].endswith(f"pipeline bench {name}")
    assert len({(row["name"], row["rival"]) for row in rows}) == num_rows
    machine, versions = report["machine"], report["versions"]
    assert isinstance(machine, dict) and isinstance(versions, dict)
    assert machine.keys() == {"cpu", "cores", "memory_gib", "gpu", "busy_before"}
    assert versions.keys() >= {"python", "torch", "ray", "pyzmq", "commit"}


NAMES = [
    "bus",
    "cameras",
    "decoders",
    "engine",
    "gpu",
    "onset",
    "overload",
    "plan",
    "quantized",
    "sessions",
    "simulate",
    "stages",
]


def test_without_a_name_the_benchmarks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    run_bench(None, as_json=True)
    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed] == NAMES
    assert all(entry["about"].endswith(".") for entry in listed)


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(BenchError, match=f"no benchmark 'buss'; there are: {', '.join(NAMES)}"):
        run_bench("buss", as_json=False)


def test_without_the_repository_the_error_says_where_the_benchmarks_lie(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="in the repository's tests/benchmarks/"):
        find_benchmarks(tmp_path / "tests" / "benchmarks")


def test_every_benchmark_has_its_name_and_says_what_it_measures() -> None:
    for name, module in find_benchmarks(FOLDER).items():
        assert (module.NAME, bool(module.__doc__), callable(module.run)) == (name, True, True)


def test_a_ratio_above_one_means_that_we_win() -> None:
    assert less_is_better("time", 2.0, "s", "rival", 10.0, "").ratio == 5.0
    assert more_is_better("on time", 100.0, "%", "rival", 50.0, "").ratio == 2.0


def test_a_cost_is_found_in_batches_of_any_size_age_and_text() -> None:
    stages = find_benchmarks(FOLDER)["stages"]
    batches = [
        stages.Batch(
            size, 0, 3_000_000 + size * 2_000_000 + age * size * 10_000 + tokens * 500_000, (age,) * size, tokens
        )
        for size in (1, 4, 8)
        for age in (0, 7, 15, 30)
        for tokens in (0, 3, 5)
    ]
    cost = stages._cost(batches)
    assert cost.fixed_ns == pytest.approx(3_000_000, rel=0.01)
    assert cost.each_ns == pytest.approx(2_000_000, rel=0.01)
    assert (cost.age_ns, cost.token_ns, cost.most_age) == (pytest.approx(10_000), pytest.approx(500_000), 30)
    assert cost.ratios[0] == pytest.approx(cost.ratios[-1], abs=0.01) == pytest.approx(1.0, abs=0.01)


def test_what_costs_less_with_age_is_taken_for_nothing() -> None:
    stages = find_benchmarks(FOLDER)["stages"]
    cost = stages._cost([stages.Batch(2, 0, 5_000_000 - 10_000 * age, (age, age)) for age in range(20)])
    assert cost.age_ns == cost.token_ns == 0 < cost.each_ns
