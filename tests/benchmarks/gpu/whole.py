"""Part 3: the whole pipeline on one device: every stage a process, on the real bus, under the coordinator's procedures.

For each number of sessions and share of them that speaks: how long windows take from their end to the listener, how
long a turn's first sound takes, and how often speech runs out. `fifo` is the same with one session's window at a time.

Rule: one pipeline at a time, with all pools as large as its sessions need. What a device has no room for is measured
with as many sessions as it has room for. No cell is left out while there is time for it.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from deploy.control.calls import CoordinatorError
from deploy.control.coordinator import Coordinator
from deploy.control.processes import Processes
from graph.chunk import NS_PER_S, SessionId
from graph.spec import PipelineSpec
from stages.session import Media, Session
from stages.stage import StageError
from tests.benchmarks.gpu.parts import Entry, Request
from tests.benchmarks.gpu.quantiles import percentiles
from tests.benchmarks.gpu.stages import MOST_RESIDENT, TALKER_MIB, USES, Turns, room_for
from tests.support.written import written_spec

MODEL_STAGES: Final = ("vision_encoder", "audio_encoder", "llm", "tts", "vocoder")
Cells = Sequence[tuple[int, float]]
"""Numbers of sessions, and the share of them that speaks."""
CELLS: Final[Mapping[str, Cells]] = {
    "full": ((16, 0.25), (32, 0.25), (64, 0.25), (48, 0.25), (64, 0.5), (64, 0.05)),
    "tiny": ((2, 0.5),),
}
FIFO_CELLS: Final[Mapping[str, Cells]] = {"full": ((16, 0.25), (32, 0.25)), "tiny": ((2, 0.5),)}
MORE_CELLS: Final[Mapping[str, Cells]] = {
    "full": ((32, 0.5), (32, 0.05), (48, 0.5), (48, 0.05), (16, 0.5), (16, 0.05)),
    "tiny": ((1, 0.25),),
}
"""Of ours again."""
MEASURED_S: Final = {"full": 12, "tiny": 4}
NUM_WARM_UP: Final = {"full": 3, "tiny": 1}  # windows of each session
DRAIN_S: Final = 3.0  # after the sources' end: what is being said is heard
CELL_S: Final = {size: NUM_WARM_UP[size] + MEASURED_S[size] + DRAIN_S + 6.0 for size in CELLS}
"""What one takes, with opening, closing and reading."""
KV_BYTES: Final = 5500 * 147_456  # of a session: 4000 tokens, and a unit, of keys and values in bfloat16
RESIDENT_BYTES: Final = 150e6 + 235e6  # of a session in the audio encoder and in the vocoder, taken when they load
SESSION_BYTES: Final = KV_BYTES + (TALKER_MIB << 20) + RESIDENT_BYTES
BESIDE_BYTES: Final = 33e9  # 19.4 of weights, 2.5 of contexts; the rest is for computing and graphs, an estimate
USABLE: Final = 0.97  # what is left when the allocator's blocks don't fit each other


def measure(request: Request) -> Iterator[Entry]:
    """With as many sessions as there is room for, and with half of them where that was too much after all."""
    free, requested = _free_bytes(request), max(CELLS[request.size])[0]
    most = min(most_sessions(free), requested)
    while most:
        if most < requested:
            yield "problem", {"at": "memory", "problem": f"{free / 1e9:.0f} GB: {most} sessions are the most"}
        try:
            yield from _measured(request, most)
            return
        except (CoordinatorError, StageError) as error:
            if "out of memory" not in str(error):
                raise
            yield "problem", {"at": f"{most} sessions", "problem": str(error)}
            most //= 2
    yield "problem", {"at": "memory", "problem": f"{free / 1e9:.0f} GB are too few for the model and a session"}


def _measured(request: Request, most: int) -> Iterator[Entry]:
    """Ours, the rival in its place, and ours again; ours goes on where no time is left to start another one."""
    cells, fifo, more = (fitting(each[request.size], most) for each in (CELLS, FIFO_CELLS, MORE_CELLS))
    more = [cell for cell in more if cell not in cells]
    with _folder() as folder, Pipeline.running("batched", request, folder, cells) as ours:
        yield "pipeline_started_s", round(ours.started_s, 1)
        yield from ours.cells(cells)
        starts_s = ours.started_s
        if not _can_start(request, starts_s):
            yield "problem", {"at": "fifo", "problem": "no time was left to start it"}
            yield from ours.cells(more)
            return
    try:
        with _folder() as folder, Pipeline.running("fifo", request, folder, fifo) as rival:
            yield from rival.cells(fifo)
    except CoordinatorError as error:
        yield "problem", {"at": "fifo", "problem": str(error)}
    if more and _can_start(request, starts_s):
        with _folder() as folder, Pipeline.running("batched", request, folder, more) as ours:
            yield from ours.cells(more)
    elif more:
        yield "problem", {"at": "batched, other shares", "problem": "no time was left to start it again"}


def _can_start(request: Request, starts_s: float) -> bool:
    """Whether a start, which takes so long, and a cell fit into the time."""
    return request.left_s >= starts_s + CELL_S[request.size]


def most_sessions(free_bytes: float) -> int:
    """That a device with so much memory has room for, full size."""
    return max(int((USABLE * free_bytes - BESIDE_BYTES) / SESSION_BYTES), 0)


def fitting(cells: Cells, most: int) -> list[tuple[int, float]]:
    """The cells with `most` sessions where they have more; each once."""
    return list(dict.fromkeys((min(num_sessions, most), share) for num_sessions, share in cells))


@contextmanager
def _folder() -> Iterator[Path]:
    """For sockets and logs; short, for a socket's path has 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="omni", dir="/tmp", ignore_cleanup_errors=True) as made:
        yield Path(made)


@dataclass(slots=True)
class Pipeline:
    """A pipeline that runs. name: batched, or fifo."""

    name: str
    request: Request
    folder: Path
    coordinator: Coordinator
    lines: list[str]
    started_s: float = 0.0

    @classmethod
    @contextmanager
    def running(cls, name: str, request: Request, folder: Path, cells: Cells) -> Iterator[Pipeline]:
        """With room for the sessions of these cells."""
        lines: list[str] = []
        processes, begun_s = Processes(), time.monotonic()
        spec = spec_of(request, max(cells)[0], fifo=name == "fifo")
        coordinator = Coordinator(spec, Path(request.size), folder, processes, lines.append)
        try:
            coordinator.start()
            yield cls(name, request, folder, coordinator, lines, time.monotonic() - begun_s)
        finally:
            coordinator.stop()
            processes.close()

    def cells(self, cells: Cells) -> Iterator[Entry]:
        """While there is time."""
        for num_sessions, share in cells:
            if self.request.left_s < CELL_S[self.request.size]:
                yield "problem", {"at": f"{self.name}: {num_sessions} at {share:.0%}", "problem": "no time was left"}
                continue
            yield "at", f"{self.name}: {num_sessions} at {share:.0%}"
            cell = {"pipeline": self.name, "sessions": num_sessions, "speaking": share}
            try:
                yield "cells[]", cell | self._cell(num_sessions, share)
            except StageError as error:
                yield "cells[]", cell | {"refused": str(error)}
                self._close_all()

    def _cell(self, num_sessions: int, share: float) -> dict[str, Any]:
        warm_up, measured_s = NUM_WARM_UP[self.request.size], MEASURED_S[self.request.size]
        num_windows = warm_up + measured_s
        out = self.folder / f"{num_sessions}-{share}"
        self.lines.clear()
        turns = [Turns(number, num_sessions, share) for number in range(num_sessions)]
        self.coordinator.open_sessions([_session(each, num_windows, out) for each in turns])
        deadline_s = time.monotonic() + num_windows + DRAIN_S
        most_gib = 0.0
        while self.coordinator.sessions and time.monotonic() < deadline_s:
            self.coordinator.poll()
            most_gib = max(most_gib, _used_gib(self.request.device))
            time.sleep(0.1)
        self._close_all()
        deaths = dict(self.coordinator.num_deaths)
        cell = figures(out, warm_up)
        return cell | {"gpu_gib": round(most_gib, 1) or None, "deaths": deaths, "told": self.lines[:5]}

    def _close_all(self) -> None:
        for session in self.coordinator.sessions:
            self.coordinator.close_session(session)
        for _ in range(3):
            self.coordinator.poll()


def spec_of(request: Request, num_sessions: int, *, fifo: bool) -> PipelineSpec:
    most = 4 if request.is_tiny else min(num_sessions, MOST_RESIDENT)
    kv_memory = "256MiB" if request.is_tiny else f"{num_sessions * KV_BYTES >> 20}MiB"
    batch = {"batch": 1, "wait": "0s"} if fifo else {"batch": most, "wait": "5ms"}
    where = {"device": request.device, "gpus": 1 / len(MODEL_STAGES) if request.device == "cuda" else 0.0}
    stages: dict[str, dict[str, Any]] = {name: {**where, **batch} for name in MODEL_STAGES}
    stages["llm"] |= {"kv_memory": kv_memory, "force_listen": 0}
    for name in MODEL_STAGES if not request.is_tiny else ():
        stages[name] |= room_for(name, num_sessions)
    stages |= {name: {"process": "media"} for name in ("camera", "microphone")}
    return written_spec(USES, {"stages": stages, "shedding": {"ladder": []}})


def _free_bytes(request: Request) -> float:
    """Of the device; a CPU, and tiny weights, have room for all."""
    if request.device != "cuda" or request.is_tiny:
        return 1e12
    import torch

    return float(torch.cuda.mem_get_info()[0])


def _used_gib(device: str) -> float:
    """Of the device, by all processes."""
    if device != "cuda":
        return 0.0
    import torch

    free, total = torch.cuda.mem_get_info()
    return float(total - free) / 2**30


def _session(turns: Turns, num_windows: int, out: Path) -> Session:
    name = f"s{turns.number}"
    return Session(SessionId(name), name, Media.of(turns.source), duration_ns=num_windows * NS_PER_S, out=out)


# ---- what was left of it ---------------------------------------------------------------------------------------------


def figures(out: Path, warm_up: int) -> dict[str, Any]:
    """Of the windows after the warm-up, as the pipeline itself has written them."""
    windows = [row for row in _rows(out / "windows.jsonl") if row["index"] >= warm_up]
    events = _rows(out / "events.jsonl")
    if not windows:
        return {"windows": 0}
    by_window = {(row["session"], row["index"]): row for row in windows}
    said = [row for row in events if row["type"] == "said" and row["text"]]  # not the mere end of a turn
    spoken = {(row["session"], row["window"]) for row in said}
    firsts = [key for key in spoken if (key[0], key[1] - 1) not in spoken]
    underruns = [row for row in events if row["type"] == "underrun" and row["window"] >= warm_up]
    return {
        "windows": len(windows),
        "on_time": round(sum(bool(row["on_time"]) for row in windows) / len(windows), 4),
        "latency_ms": percentiles([1000 * row["latency_s"] for row in windows], digits=1),
        "spoken_latency_ms": _of(by_window, spoken),
        "first_audio_ms": _of(by_window, firsts),
        "spoken_share": round(sum(key in spoken for key in by_window) / len(windows), 3),
        "turns": sum(key in by_window for key in firsts),
        "underruns": len(underruns),
        "underrun_s": round(sum(row["seconds"] for row in underruns), 3),
        "failed": sum(bool(row["failed"]) for row in windows),
        "missing": sum(bool(row["missing"]) for row in windows),
        "stage_ms": _of_stages(windows),
    }


def _of(windows: Mapping[tuple[str, int], dict[str, Any]], keys: Any) -> dict[str, float] | None:
    latencies_ms = [1000 * windows[key]["latency_s"] for key in keys if key in windows]
    return percentiles(latencies_ms, digits=1) if latencies_ms else None


def _of_stages(windows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How long the batch took that a window was in, by stage."""
    durations_ms: dict[str, list[float]] = defaultdict(list)
    for row in windows:
        for stage, seconds in row["compute"].items():
            durations_ms[stage].append(1000 * seconds)
    return {stage: percentiles(ms, digits=1) for stage, ms in durations_ms.items() if stage in MODEL_STAGES}


def _rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file, which somebody may be writing to."""
    whole, _, _ = (path.read_text(encoding="utf-8") if path.is_file() else "").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]
