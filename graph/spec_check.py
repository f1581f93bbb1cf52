"""What is wrong with a description although each of its sections is right."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from graph.kinds import Kind
from graph.ports import (
    CAN_BE_OFF,
    NO_SENSES,
    STAGES,
    InPort,
    OutPort,
    full_graph,
    lacks_senses,
    off_with,
)
from graph.sections import (
    BUILT_IN,
    HUB_ID,
    VERSION,
    ContextSpec,
    FileSpec,
    LlmSpec,
    StageSpec,
    StagesSpec,
    WrittenEdge,
)
from graph.units import format_duration
from graph.wording import listed, shown
from graph.yaml_file import KeyPath, dotted

MAX_CAMERAS: Final = 256


class Finding(NamedTuple):
    """A problem and the place to change; `also` are other places which it follows from."""

    path: KeyPath
    message: str
    also: tuple[KeyPath, ...] = ()


def findings(file: FileSpec, wrong: Iterable[KeyPath]) -> list[Finding]:
    """What is to be told besides `wrong`, the places where a section has found a problem of its own.

    What may only follow from one of those, since a wrong value counts as not written, is left out.
    """
    wrong = list(wrong)
    return [finding for finding in _all_findings(file) if not _clouded(finding, wrong)]


def _clouded(finding: Finding, wrong: Iterable[KeyPath]) -> bool:
    """True where a neighbour is wrong, so that what was found may only follow from its absence."""
    around = [path if len(path) == 1 else path[:-1] for path in (finding.path, *finding.also)]
    return any(place[: len(section)] == section for place in wrong for section in around)


def _all_findings(file: FileSpec) -> Iterator[Finding]:
    yield from _version_findings(file)
    yield from _model_findings(file.model)
    yield from _tail_findings(file)
    if not file.cameras:
        yield Finding(("cameras",), 'not one camera; write `cameras: {test: {source: "test://pattern"}}`')
    if len(file.cameras) > MAX_CAMERAS:
        yield Finding(("cameras",), f"{len(file.cameras)} cameras; one pipeline takes {MAX_CAMERAS}")
    for name, stage in file.stages.by_name().items():
        yield from _stage_findings(name, stage)
    yield from _together_findings(file.stages)
    yield from _edge_findings(file)


def _version_findings(file: FileSpec) -> Iterator[Finding]:
    if file.version is None:
        yield Finding(("version",), f"version is missing; write `version: {VERSION}`")
    elif file.version != VERSION:
        yield Finding(("version",), f"version: this build reads version {VERSION}, not {file.version}")


def _model_findings(model: str) -> Iterator[Finding]:
    if model not in BUILT_IN and not _is_folder(model) and not HUB_ID.fullmatch(model):
        known = f"{', '.join(BUILT_IN)}, a folder with a MiniCPM-o 4.5 checkpoint, or a hub id like owner/name"
        reason = f"no such folder; write {known}"
        yield Finding(("model",), f"model {shown(model)}: {reason}")


def _is_folder(path: str) -> bool:
    try:
        return Path(path).expanduser().is_dir()
    except (OSError, RuntimeError):  # a name too long; ~nobody
        return False


def _tail_findings(file: FileSpec) -> Iterator[Finding]:
    lead, delay, length = map(format_duration, (file.tail.lead_ns, file.tail.delay_ns, file.window.length_ns))
    if file.tail.lead_ns < file.tail.delay_ns:
        message = f"{lead} is less than tail.delay ({delay}); speech would stop before it is heard"
        yield Finding(("tail", "lead"), f"tail.lead: {message}")
    if file.tail.delay_ns >= file.window.length_ns:
        message = f"{delay} is not less than window.length ({length})"
        places: list[KeyPath] = [("tail", "delay"), ("window", "length")]
        if "delay_ns" not in file.tail.model_fields_set:
            places.reverse()  # to where something is written
        yield Finding(
            places[0], f"tail.delay: {message}; speech would begin after the next window is decided", (places[1],)
        )


def _stage_findings(name: str, stage: StageSpec) -> Iterator[Finding]:
    path: KeyPath = ("stages", name)
    if stage.replicas == 0 and name not in CAN_BE_OFF:
        message = f"can't be 0; can be switched off: {listed(CAN_BE_OFF)}"
        yield Finding((*path, "replicas"), f"stages.{name}.replicas: {message}")
    if stage.max_replicas < stage.replicas:
        message = f"max {stage.max_replicas} is less than min {stage.replicas}"
        yield Finding((*path, "replicas"), f"stages.{name}.replicas: {message}")
    if stage.process and STAGES[name].has_model:
        light = listed(other for other, ports in STAGES.items() if not ports.has_model)
        message = f"only stages without a model share a process: {light}"
        yield Finding((*path, "process"), f"stages.{name}.process: {message}")
    elif stage.process and stage.max_replicas > 1:
        message = f"must be 1 in a shared process ({stage.process!r}); for more write `process: null`"
        yield Finding((*path, "replicas"), f"stages.{name}.replicas: {message}")
    if isinstance(stage, LlmSpec):
        yield from _context_findings((*path, "context"), stage.context)


def _context_findings(path: KeyPath, context: ContextSpec) -> Iterator[Finding]:
    if context.high is None and context.low is None:
        return
    if context.high is None or context.low is None:
        other = "high" if context.high is None else "low"
        yield Finding(path, f"{dotted(path)}: high and low go together; write {other}, too, or neither")
    elif context.low >= context.high:
        message = f"{context.low} is not less than high ({context.high})"
        yield Finding((*path, "low"), f"{dotted(path)}.low: {message}")


def _together_findings(stages: StagesSpec) -> Iterator[Finding]:
    off = off_with([name for name, stage in stages.by_name().items() if stage.replicas == 0])
    if lacks_senses(off):
        yield Finding(("stages",), NO_SENSES)
    camera, microphone = stages.camera.process, stages.microphone.process
    if not {"camera", "microphone"} & off and (camera != microphone or camera is None):
        names = "stages.camera.process, stages.microphone.process"
        message = f"they read one decoder and share a named process, not {shown(camera)} and {shown(microphone)}"
        yield Finding(("stages", "microphone", "process"), f"{names}: {message}")


def _edge_findings(file: FileSpec) -> Iterator[Finding]:
    edges = file.edges or []
    first: dict[tuple[OutPort, InPort], int] = {}
    for index, edge in enumerate(edges):
        source, target = edge.source, edge.target
        if source.kind != target.kind:
            message = f"carries {source.kind}, but {target} takes {target.kind}"
            yield Finding(("edges", index, "to"), f"edge {source}->{target}: {source} {message}")
        if first.setdefault((source, target), index) != index:
            yield Finding(("edges", index), f"edge {source}->{target} is written twice")
        if edge.credit.chunks is not None and edge.credit.chunks < (least := least_chunks(source.kind, file)):
            message = f"{edge.credit.chunks} is too little; with the fps of the cameras a window needs {least}"
            yield Finding(("edges", index, "credit", "chunks"), f"edge {source}->{target}: credit.chunks {message}")
    if circle := _circle(edges):
        index = next(index for index, edge in enumerate(edges) if (edge.source.stage, edge.target.stage) == circle[-2:])
        yield Finding(("edges", index), f"edges go round in a circle: {' -> '.join(circle)}")
    if file.edges is not None:
        yield from _unfed_findings(file, edges)


def least_chunks(kind: Kind, file: FileSpec) -> int:
    """The least credit for pictures: what a window holds until it closes, and the same again of the next."""
    if not kind.is_picture:
        return 1
    fps = max((camera.fps for camera in file.cameras.values()), default=1.0)
    return 2 * math.ceil(fps * file.window.length_ns / 1e9) + 2


def _circle(edges: Iterable[WrittenEdge]) -> tuple[str, ...]:
    """Some stages which feed each other, the first one again at the end; empty if there is no circle."""
    targets: dict[str, list[str]] = {}
    for edge in edges:
        if not edge.target.is_feedback:
            targets.setdefault(edge.source.stage, []).append(edge.target.stage)
    done: set[str] = set()

    def visit(way: tuple[str, ...]) -> tuple[str, ...]:
        for stage in targets.get(way[-1], ()):
            if stage in way:
                return (*way[way.index(stage) :], stage)
            if stage not in done and (circle := visit((*way, stage))):
                return circle
        done.add(way[-1])
        return ()

    return next((circle for stage in targets if (circle := visit((stage,)))), ())


def _unfed_findings(file: FileSpec, edges: Iterable[WrittenEdge]) -> Iterator[Finding]:
    """Inputs of running stages which nothing feeds, although a running stage could."""
    off = off_with([name for name, stage in file.stages.by_name().items() if stage.replicas == 0])
    fed = {edge.target for edge in edges}
    for source, target in full_graph():
        if target not in fed and not off & {source.stage, target.stage}:
            fed.add(target)
            yield Finding(("edges",), f"input {target} has no source; add {{from: {source}, to: {target}}}")
