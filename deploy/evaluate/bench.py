"""`pipeline bench`: a benchmark beside its rival, in one run on one machine, so that the ratio means something.

A benchmark is a module or a package in tests/benchmarks/ with NAME, a docstring and `run() -> list[Row]`; one that has
`run_to(file) -> list[Row]`, too, keeps more in a file than its rows, while it measures. It lives in the repository and
not in the wheel: who measures wants the code that was measured.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

from graph.errors import GraphError

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "benchmarks"
PACKAGES = ("torch", "ray", "pyzmq", "msgpack", "numpy", "av")
COLUMNS = ("name", "value", "unit", "ratio", "rival_value", "rival")


class BenchError(GraphError):
    """A benchmark has failed, or there are none."""


class BenchUsageError(BenchError):
    """There is no such benchmark, or it can't be told that; says what there is."""


@dataclass(frozen=True, slots=True)
class Row:
    """One number of ours beside the rival's, measured in the same run.

    ratio:   how many times better ours is: above 1 we win, whether less is better or more.
    command: what measures it again.
    """

    name: str
    value: float
    unit: str
    rival: str
    rival_value: float | None
    ratio: float | None
    command: str


def less_is_better(name: str, value: float, unit: str, rival: str, rival_value: float, command: str) -> Row:
    """A row of something that costs."""
    return Row(name, value, unit, rival, rival_value, rival_value / value if value else None, command)


def more_is_better(name: str, value: float, unit: str, rival: str, rival_value: float, command: str) -> Row:
    """A row of something that is wanted."""
    return Row(name, value, unit, rival, rival_value, value / rival_value if rival_value else None, command)


def option(name: str, default: str) -> str:
    """A benchmark's option, from the environment: OMNI_BENCH_<name>."""
    return os.environ.get(f"OMNI_BENCH_{name}", default)


def command_of(benchmark: str) -> str:
    """The command which runs a benchmark as it runs now, its options included."""
    options = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("OMNI_BENCH_")]
    return " ".join([*options, "pipeline bench", benchmark])


def run_bench(name: str | None, as_json: bool, record: Path | None = None) -> None:
    """Run a benchmark and print its rows; without a name, list the benchmarks.

    record: a file for the JSON, which then isn't printed; of a benchmark that keeps more, for all that it keeps.
    Raises BenchUsageError when there is none of that name, or the file can't be written, and BenchError when the
    repository isn't there.
    """
    benchmarks = find_benchmarks(FOLDER)
    if name is None:
        _print_list(benchmarks, as_json)
        return
    if name not in benchmarks:
        raise BenchUsageError(f"no benchmark {name!r}; there are: {', '.join(sorted(benchmarks))}")
    if record is not None:
        check_record(record)
    surroundings: dict[str, Mapping[str, object]] = {"machine": describe_machine(), "versions": describe_versions()}
    keeps_more = record is not None and hasattr(benchmarks[name], "run_to")
    rows: list[Row] = benchmarks[name].run_to(record) if keeps_more else benchmarks[name].run()
    if not rows:
        raise BenchError(f"benchmark {name!r} gave no rows")
    report = json.dumps({"benchmark": name, **surroundings, "rows": [asdict(row) for row in rows]}, indent=2)
    if record is not None and not keeps_more:
        record.write_text(report + "\n", encoding="utf-8")
    if as_json and record is None:
        print(report)
        return
    for what, facts in surroundings.items():
        print(f"{what}: " + ", ".join(f"{fact} {value}" for fact, value in facts.items() if value is not None))
    print_rows(rows)


def check_record(record: Path) -> None:
    """Raises BenchUsageError where what was measured can't be written to this file."""
    folder = record.absolute().parent
    if not folder.is_dir():
        raise BenchUsageError(f"{record}: there is no folder {folder}")
    if record.exists() and not record.is_file():
        raise BenchUsageError(f"{record}: no file, but a folder or a device")
    if not os.access(record if record.exists() else folder, os.W_OK) or not os.access(folder, os.W_OK):
        raise BenchUsageError(f"{record}: may not be written")


def find_benchmarks(folder: Path) -> dict[str, ModuleType]:
    """The benchmarks in a folder, by their names. Raises BenchError when the folder isn't there."""
    if not folder.is_dir():
        raise BenchError(
            f"the benchmarks lie in the repository's tests/benchmarks/, not in the installed package ({folder} isn't "
            "there); run `make bench` or .venv/bin/pipeline bench in a checkout"
        )
    files = [path for path in sorted(folder.glob("*.py")) if not path.name.startswith(("test_", "_", "conftest"))]
    modules = [_load(path) for path in (*files, *sorted(folder.glob("*/__init__.py")))]
    return {module.NAME: module for module in sorted(modules, key=lambda module: str(module.NAME))}


def describe_machine() -> Mapping[str, object]:
    """What the numbers were measured on, and how busy it was before."""
    import psutil  # not on a borrowed machine, on which one benchmark runs by itself

    return {
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": _gpu_model(),
        "busy_before": round(psutil.cpu_percent(interval=1.0) / 100, 2),
    }


def describe_versions() -> Mapping[str, str | None]:
    """What was measured with."""
    packages = {name: _version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **packages, "commit": _commit(ROOT)}


def print_rows(rows: Sequence[Row]) -> None:
    """The rows as an aligned table, and what measures them again."""
    cells = [list(COLUMNS)] + [[_cell(getattr(row, column)) for column in COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print()
    for line in cells:
        aligned = [
            cell.rjust(width) if column in ("value", "ratio", "rival_value") else cell.ljust(width)
            for column, cell, width in zip(COLUMNS, line, widths, strict=True)
        ]
        print("  ".join(aligned).rstrip())
    print("\nratio: how many times better than the rival, in the same run. Again with: " + rows[0].command)


def _print_list(benchmarks: dict[str, ModuleType], as_json: bool) -> None:
    descriptions = {name: (module.__doc__ or "").strip().splitlines()[0] for name, module in benchmarks.items()}
    if as_json:
        print(json.dumps([{"name": name, "about": about} for name, about in descriptions.items()], indent=2))
        return
    for name, about in descriptions.items():
        print(f"{name:<12} {about}")


def _load(path: Path) -> ModuleType:
    """A module, or what a package says of itself, from a folder that is no package."""
    name = path.parent.name if path.name == "__init__.py" else path.stem
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,.3g}" if isinstance(value, float) and abs(value) < 100 else _whole(value)


def _whole(value: object) -> str:
    return f"{value:,.0f}" if isinstance(value, float) else str(value)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpu_model() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    return _output(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(root: Path) -> str | None:
    """The checkout's commit, with a + when files differ from it."""
    commit = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    if commit is None:
        return None
    changed = _output(["git", "-C", str(root), "--no-optional-locks", "status", "--porcelain", "--untracked-files=no"])
    return f"{commit}+" if changed else commit


def _output(command: list[str]) -> str | None:
    """What a program prints; None where it isn't installed or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
