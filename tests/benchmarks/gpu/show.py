"""What was measured, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def show(record: dict[str, Any]) -> None:
    """Print a record, as far as it has come."""
    for line in lines(record):
        print(line)


def lines(record: dict[str, Any]) -> Iterable[str]:
    yield f"{record['size']} weights on {record['device']}, {record['minutes']:g} minutes, begun {record['begun']}"
    for what in ("machine", "versions"):
        facts = record.get(what, {}).items()
        yield f"{what}: " + ", ".join(f"{name} {value}" for name, value in facts if value is not None)
    for name, feature in record.get("features", {}).items():
        yield f"  {name}: {'' if feature['there'] else 'missing: '}{feature['says']}"
    if "llm_runs_with" in record:
        yield f"llm: {record['llm_runs_with']}"
    yield from _stages(record.get("stages_measured", []))
    yield from _cells(record.get("cells", []))
    yield from _sequential(record.get("sequential"))
    for problem in record.get("problems", []):
        at = f", {problem['at']}" if problem.get("at") else ""
        yield f"not measured: {problem['part']}{at}: {problem['problem']}"
    yield "seconds: " + ", ".join(f"{part} {took:g}" for part, took in record.get("seconds", {}).items())


def _stages(rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    if not rows:
        return
    yield ""
    head = ("stage", "what", "context", "how", "batch", "p50 ms", "p99 ms", "roofline ms", "x roofline", "per s", "GiB")
    table = [
        [
            *(row[name] for name in ("stage", "what", "context", "how", "batch")),
            *(row["ms"][q] for q in ("p50", "p99")),
            *(row[name] for name in ("roofline_ms", "times_roofline", "per_s", "peak_gib")),
        ]
        for row in rows
    ]
    yield from _table(head, table)


def _cells(cells: Sequence[dict[str, Any]]) -> Iterable[str]:
    if not cells:
        return
    yield ""
    times = ("window p50/p95/p99 ms", "first audio p50/p95/p99 ms")
    head = ("pipeline", "sessions", "speaking", "on time", *times, "turns", "underruns", "GiB", "windows")
    table = []
    for cell in cells:
        name = [cell["pipeline"], cell["sessions"], f"{100 * cell['speaking']:.0f} %"]
        if "latency_ms" not in cell:
            table.append([*name, cell.get("refused", "no window came"), *[""] * 6])
            continue
        took = [_three(cell["latency_ms"]), _three(cell["first_audio_ms"])]
        counts = [cell["turns"], cell["underruns"], cell["gpu_gib"], cell["windows"]]
        table.append([*name, f"{100 * cell['on_time']:.1f} %", *took, *counts])
    yield from _table(head, table)


def _sequential(figures: dict[str, Any] | None) -> Iterable[str]:
    if figures is None:
        return
    yield ""
    served = ", ".join(f"{most} at {100 * float(share):.0f} %" for share, most in figures["sessions_served"].items())
    windows = (
        f"{figures['listening_ms']['p50']} ms a window that listens, {figures['speaking_ms']['p50']} ms one that speaks"
    )
    yield f"sequential, one piece after the other, eager: {windows}; sessions in real time: {served}"


def _three(values: dict[str, float] | None) -> str:
    return "-" if values is None else "/".join(f"{values[q]:.0f}" for q in ("p50", "p95", "p99"))


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterable[str]:
    cells = [list(head), *[["-" if value is None else str(value) for value in row] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
