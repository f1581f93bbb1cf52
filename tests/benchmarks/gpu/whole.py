"""Part 3: the whole pipeline on one device: every stage a process, on the real bus, under the coordinator's procedures.

For each number of sessions and share of them that speaks: how long windows take from their end to the listener, how
long a turn's first sound takes, and how often speech runs out. `fifo` is the same with one session's window at a time.
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
from tests.benchmarks.gpu.stages import TALKER_MIB, USES, Turns, room_for
from tests.support.written import written_spec

MODEL_STAGES: Final = ("vision_encoder", "audio_encoder", "llm", "tts", "vocoder")
Cells = Sequence[tuple[int, float]]
"""Numbers of sessions, and the share of them that speaks."""
CELLS: Final[Mapping[str, Cells]] = {
    "full": (
        *((16, 0.25), (32, 0.25), (64, 0.25), (48, 0.25)),
        *((64, 0.5), (64, 0.05), (32, 0.5), (32, 0.05), (48, 0.5), (48, 0.05), (16, 0.5), (16, 0.05)),
    ),
    "tiny": ((2, 0.5), (1, 0.25)),
}
FIFO_CELLS: Final[Mapping[str, Cells]] = {"full": ((16, 0.25), (32, 0.25)), "tiny": ((2, 0.5),)}
FIFO_AFTER: Final = {"full": 4, "tiny": 1}  # cells of ours
MEASURED_S: Final = {"full": 12, "tiny": 4}
NUM_WARM_UP: Final = {"full": 3, "tiny": 1}  # windows of each session
DRAIN_S: Final = 3.0  # after the sources' end: what is being said is heard
CELL_S: Final = {size: NUM_WARM_UP[size] + MEASURED_S[size] + DRAIN_S + 6.0 for size in CELLS}
"""What one takes, with opening, closing and reading."""
KV_BYTES: Final = 5500 * 147_456  # of a session: 4000 tokens, and a unit, of keys and values in bfloat16
SESSION_BYTES: Final = KV_BYTES + (TALKER_MIB << 20)
BESIDE_BYTES: Final = 27e9  # weights of all stages, what computing takes, and five processes on a device


def measure(request: Request) -> Iterator[Entry]:
    """The rival runs beside ours, which is idle then, as far as there is room for it; else in its place."""
    cells, after = CELLS[request.size], FIFO_AFTER[request.size]
    with _folder() as folder, Pipeline.running("batched", request, folder, cells) as ours:
        yield "pipeline_started_s", round(ours.started_s, 1)
        yield from ours.cells(cells[:after])
        beside = [cell for cell in FIFO_CELLS[request.size] if _has_room(request, cell[0])]
        if beside:
            yield from _fifo(request, beside, ours.started_s)
            yield from ours.cells(cells[after:])
    if not beside:
        yield from _fifo(request, FIFO_CELLS[request.size], ours.started_s)


def _fifo(request: Request, cells: Cells, starts_s: float) -> Iterator[Entry]:
    """The rival, if there is time. starts_s: what a start takes, about."""
    if request.left_s < starts_s + CELL_S[request.size]:
        yield "problem", {"at": "fifo", "problem": "no time was left to start it"}
        return
    try:
        with _folder() as folder, Pipeline.running("fifo", request, folder, cells) as fifo:
            yield from fifo.cells(cells)
    except CoordinatorError as error:
        yield "problem", {"at": "fifo", "problem": str(error)}


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
    told: list[str]
    started_s: float = 0.0

    @classmethod
    @contextmanager
    def running(cls, name: str, request: Request, folder: Path, cells: Cells) -> Iterator[Pipeline]:
        """With room for the sessions of these cells."""
        told: list[str] = []
        processes, begun_s = Processes(), time.monotonic()
        spec = spec_of(request, max(cells)[0], fifo=name == "fifo")
        coordinator = Coordinator(spec, Path(request.size), folder, processes, told.append)
        try:
            coordinator.start()
            yield cls(name, request, folder, coordinator, told, time.monotonic() - begun_s)
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
        self.told.clear()
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
        found = figures(out, warm_up)
        return found | {"gpu_gib": round(most_gib, 1) or None, "deaths": deaths, "told": self.told[:5]}

    def _close_all(self) -> None:
        for session in self.coordinator.sessions:
            self.coordinator.close_session(session)
        for _ in range(3):
            self.coordinator.poll()


def spec_of(request: Request, num_sessions: int, *, fifo: bool) -> PipelineSpec:
    batch = {"batch": 1, "wait": "0s"} if fifo else {"batch": 64 if request.size == "full" else 4, "wait": "5ms"}
    where = {"device": request.device, "gpus": 1 / len(MODEL_STAGES) if request.device == "cuda" else 0.0}
    stages: dict[str, dict[str, Any]] = {name: {**where, **batch} for name in MODEL_STAGES}
    stages["llm"] |= {"kv_memory": _kv_memory(request, num_sessions), "force_listen": 0}
    for name in MODEL_STAGES if not request.is_tiny else ():
        stages[name] |= room_for(name, num_sessions)
    stages |= {name: {"process": "media"} for name in ("camera", "microphone")}
    return written_spec(USES, {"stages": stages, "shedding": {"ladder": []}})


def _kv_memory(request: Request, num_sessions: int) -> str:
    """For so many sessions, or for as many as this device has room for."""
    if request.is_tiny:
        return "256MiB"
    most = max(_free_bytes(request) - BESIDE_BYTES - num_sessions * (TALKER_MIB << 20), 1e9)
    return f"{int(min(num_sessions * KV_BYTES, most)) >> 20}MiB"


def _has_room(request: Request, num_sessions: int) -> bool:
    """For one pipeline more."""
    return _free_bytes(request) > BESIDE_BYTES + num_sessions * SESSION_BYTES


def _free_bytes(request: Request) -> float:
    """Of the device; of a CPU nobody asks."""
    if request.device != "cuda":
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
    found = [1000 * windows[key]["latency_s"] for key in keys if key in windows]
    return percentiles(found, digits=1) if found else None


def _of_stages(windows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How long the batch took that a window was in, by stage."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in windows:
        for stage, seconds in row["compute"].items():
            found[stage].append(1000 * seconds)
    return {stage: percentiles(ms, digits=1) for stage, ms in found.items() if stage in MODEL_STAGES}


def _rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file, which somebody may be writing to."""
    whole, _, _ = (path.read_text(encoding="utf-8") if path.is_file() else "").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]
