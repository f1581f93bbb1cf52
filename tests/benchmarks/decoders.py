"""What a camera's decoder costs: processor time until its source is open, and memory of its own while it decodes.

Decoders are forked from a process that has imported everything; the rival is a fresh Python per decoder, with the same
limits and the same code. Both open a file of 640x360 H.264 at 15 fps with a keyframe each second, and are read at
1 fps until their pipe is full. Processor time is of the decoder's process, as the kernel's scheduler counts it, until
its first item is there. Memory is what is private of one beside others of its kind (Private_Clean and Private_Dirty).

Options: OMNI_BENCH_REPETITIONS, the decoders of each kind (default: 12).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.evaluate.bench import ROOT, BenchError, Row, command_of, less_is_better, option
from deploy.evaluate.films import FilmSpec, make_film
from graph.chunk import NS_PER_MS
from stages.media.fork import PIPE_BYTES, ForkServer
from stages.media.reader import Ended, Failed, Frame, MediaReader, MediaRequest, Progress

NAME = "decoders"
RIVAL = "a fresh Python per decoder"
NUM_FRAMES = 8  # that are read before memory is looked at
SETTLE_S = 0.5  # until the pipe is full
PATIENCE_S = 30.0
PROGRAM = """
import os
from stages.media.process import run_decoder
os._exit(run_decoder(0, 1, os.pidfd_open(os.getppid())))
"""


def run() -> list[Row]:
    """Rows for start and memory; medians."""
    count = int(option("REPETITIONS", "12"))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="omni-bench-")))
        film = make_film(folder / "film.mp4", FilmSpec())
        forking, fresh = stack.enter_context(closing(ForkServer())), FreshPython()
        forking.fork(PATIENCE_S).stdin.close()  # starts it
        ours, rival = (measure(film, kind, count) for kind in (forking, fresh))
    return [
        _row("start, processor time", "ms", [[cost.start_ns / NS_PER_MS for cost in costs] for costs in (ours, rival)]),
        _row(
            "start, until the first item",
            "ms",
            [[cost.wait_ns / NS_PER_MS for cost in costs] for costs in (ours, rival)],
        ),
        _row("private memory", "MB", [[cost.private_bytes / 1e6 for cost in costs] for costs in (ours, rival)]),
    ]


def _row(name: str, unit: str, values: list[list[float]]) -> Row:
    ours, rival = map(statistics.median, values)
    return less_is_better(name, ours, unit, RIVAL, rival, command_of(NAME))


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one decoder: processor time and waiting until its first item, and its own memory while it decodes."""

    start_ns: int
    wait_ns: int
    private_bytes: int


def measure(film: Path, kind: ForkServer, count: int) -> list[Cost]:
    """That many decoders, which are started one after the other and run beside each other."""
    with ExitStack() as stack:
        readers, starts = [], []
        for _ in range(count):
            readers.append(stack.enter_context(closing(_reader(film, kind))))
            starts.append(_start(readers[-1]))
        for reader in readers:
            for _ in range(NUM_FRAMES):
                _read(reader, Frame)
        time.sleep(SETTLE_S)
        memory = [_private_bytes(reader.pid) for reader in readers]
    return [Cost(*start, private) for start, private in zip(starts, memory, strict=True)]


def _reader(film: Path, kind: ForkServer) -> MediaReader:
    return MediaReader(MediaRequest(str(film), 1.0, 1 << 20, True, False, 50 * NS_PER_MS, None), fork_server=kind)


def _start(reader: MediaReader) -> tuple[int, int]:
    """Processor time and waiting until the first item, ns."""
    begin_ns = time.monotonic_ns()
    reader.start()
    _read(reader, Progress)
    wait_ns = time.monotonic_ns() - begin_ns
    return _cpu_ns(reader.pid), wait_ns


def _read(reader: MediaReader, of_type: type[Progress] | type[Frame]) -> None:
    while not isinstance(item := reader.read(PATIENCE_S), of_type):
        if item is None or isinstance(item, (Ended, Failed)):
            raise BenchError(f"a decoder gave {item}")


def _cpu_ns(pid: int | None) -> int:
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))


def _private_bytes(pid: int | None) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes: Mapping[str, str] = dict(line.split(":") for line in lines)
    return 1024 * sum(int(sizes[name].split()[0]) for name in ("Private_Clean", "Private_Dirty"))


class FreshPython(ForkServer):
    """Starts an interpreter for each decoder, which imports what it needs."""

    def fork(self, timeout_s: float) -> Any:
        return subprocess.Popen(
            [sys.executable, "-P", "-s", "-c", PROGRAM],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pipesize=PIPE_BYTES,
            start_new_session=True,
            cwd="/",
            env={"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
