"""One GPU measured within minutes: each stage beside its roofline, then the whole pipeline beside its rivals.

Full-size random weights, made on the device; no file, no network, no Ray, and no package but torch, numpy, msgpack,
safetensors and pyzmq. What matters most comes first, and each number is kept when it is there, so that a run which is
cut off leaves what it had.

    python -m tests.benchmarks.gpu --minutes 8 --json OUT       # on the machine with the GPU
    python -m tests.benchmarks.gpu --show OUT                   # as tables, anywhere
    pipeline plan --profile OUT --set stages.llm.gpus=0.2 …     # what one serves; a share of it for each stage

`pipeline bench gpu` takes the same: --minutes (8), --size full or tiny (tiny without a GPU), --device cuda or cpu, and
--json OUT for everything that was measured; for --parts, some of machine,stages,pipeline,sequential, OMNI_BENCH_PARTS.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploy.evaluate.bench import Row

NAME = "gpu"
ROOT = Path(__file__).resolve().parents[3]
STANDINS = Path(__file__).resolve().parent / "standins"
OPTIONS = ("minutes", "size", "device", "parts")
FIFO = "fifo (batch: 1, wait: 0s)"
SEQUENTIAL = "sequential: one process, one piece after the other, eager"
ROOFLINE = "roofline of the device"
SERVED = 0.99  # of the windows are on time

if str(STANDINS) not in sys.path:
    sys.path.append(str(STANDINS))  # behind all others: only what is absent is found there


def environment() -> dict[str, str]:
    """For a process of ours, wherever it is started."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def run() -> list[Row]:
    """See `run_to`; the record is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        return run_to(Path(folder) / "gpu.json")


def run_to(record: Path) -> list[Row]:
    """Measure, with everything in a file; the rows are the stages beside their roofline, then the pipeline beside its
    rivals. Raises BenchUsageError where an option is wrong, before anything is measured."""
    from deploy.evaluate.bench import BenchError, option
    from tests.benchmarks.gpu.options import check_options

    given = {name: option(name.upper(), "") for name in OPTIONS}
    check_options(**given)
    arguments = [word for name, value in given.items() if value for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "tests.benchmarks.gpu", *arguments, "--json", str(record.absolute())]
    if _ended(subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=sys.stderr.fileno())):
        raise BenchError(f"{' '.join(command)} has failed")
    content = json.loads(record.read_text(encoding="utf-8"))
    return [*_stages(content), *_cells(content), *_served(content)]


def _ended(process: subprocess.Popen[bytes]) -> int:
    """Its exit code. What interrupts us interrupts it, and it may say what it has measured."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)  # which it has from a terminal already, and takes once
        process.wait()
        raise
    finally:
        process.kill()  # where it was interrupted twice


def _stages(record: dict[str, Any]) -> Iterator[Row]:
    """Of each stage the largest batch, as it ships."""
    from deploy.evaluate.bench import command_of, less_is_better

    largest: dict[tuple[str, str], dict[str, Any]] = {}
    for row in record["stages_measured"]:
        before = largest.get((row["stage"], row["what"]))
        if before is None or (row["batch"] > before["batch"] and row["context"] == before["context"]):
            largest[row["stage"], row["what"]] = row
    for (stage, what), row in largest.items():
        name = f"{stage}: {what}, a batch of {row['batch']}"
        best_ms = row["roofline_ms"]
        if best_ms:
            yield less_is_better(name, row["ms"]["p50"], "ms", ROOFLINE, best_ms, command_of(NAME))
        else:
            yield _alone(name, row["ms"]["p50"])


def _cells(record: dict[str, Any]) -> Iterator[Row]:
    """Of each number of sessions and share that speaks, the latency of windows."""
    from deploy.evaluate.bench import command_of, less_is_better

    cells = [cell for cell in record["cells"] if "latency_ms" in cell]
    fifo = {(cell["sessions"], cell["speaking"]): cell for cell in cells if cell["pipeline"] == "fifo"}
    for cell in (cell for cell in cells if cell["pipeline"] == "batched"):
        rival = fifo.get((cell["sessions"], cell["speaking"]))
        for what in ("p50", "p99"):
            name = f"{cell['sessions']} sessions, {100 * cell['speaking']:g} % speaking: window latency {what}"
            value = cell["latency_ms"][what]
            if rival is None:
                yield _alone(name, value)
            else:
                yield less_is_better(name, value, "ms", FIFO, rival["latency_ms"][what], command_of(NAME))


def _served(record: dict[str, Any]) -> Iterator[Row]:
    """Of each share that was tried, the most sessions whose windows were on time."""
    from deploy.evaluate.bench import command_of, more_is_better

    ours = [cell for cell in record["cells"] if cell["pipeline"] == "batched" and "on_time" in cell]
    for share, most in record.get("sequential", {}).get("sessions_served", {}).items():
        tried = [cell for cell in ours if cell["speaking"] == float(share)]
        if tried:
            served = max((float(cell["sessions"]) for cell in tried if cell["on_time"] >= SERVED), default=0.0)
            name = f"sessions served, of those that were tried with {100 * float(share):g} % speaking"
            yield more_is_better(name, served, "sessions", SEQUENTIAL, float(most), command_of(NAME))


def _alone(name: str, ms: float) -> Row:
    """A number without a rival."""
    from deploy.evaluate.bench import Row, command_of

    return Row(name, ms, "ms", "", None, None, command_of(NAME))
