"""What is wrong with a description although each of its sections is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from graph.edges import Edges, no_senses, wiring_of
from graph.sections import BUILT_IN, EMBEDDED, HUB_ID, NO_SOUND, VERSION, CameraSpec, FileSpec, StageOptions
from graph.stage_type import StageType, can_be_off, needed_among
from graph.units import format_duration
from graph.wording import listed, shown, suggest
from graph.yaml_file import Finding, KeyPath, dotted

MAX_CAMERAS: Final = 256
"""Sources, of all cameras together."""
MAX_VIEWS: Final = 16  # of a camera: the model's unit has room for so many pictures


def findings(file: FileSpec, types: Mapping[str, StageType], edges: Edges, wrong: Iterable[KeyPath]) -> list[Finding]:
    """What is to be told besides `wrong`, the places where a section has found a problem of its own.

    types: of the stages, by name.

    What may only follow from one of those, since a wrong value counts as not written, is left out.
    """
    wrong = list(wrong)
    return [finding for finding in _all_findings(file, types, edges) if not _clouded(finding, wrong)]


def _clouded(finding: Finding, wrong: Iterable[KeyPath]) -> bool:
    """True where a neighbour is wrong, so that what was found may only follow from its absence."""
    around = [path if len(path) == 1 else path[:-1] for path in (finding.path, *finding.also)]
    return any(place[: len(section)] == section for place in wrong for section in around)


def _all_findings(file: FileSpec, types: Mapping[str, StageType], edges: Edges) -> Iterator[Finding]:
    yield from _version_findings(file)
    yield from _model_findings(file.model)
    yield from _tail_findings(file)
    if not file.cameras:
        yield Finding(("cameras",), 'not one camera; write `cameras: {test: {source: "test://pattern"}}`')
    num_sources = sum(len(camera.sources) for camera in file.cameras.values())
    if num_sources > MAX_CAMERAS:
        what = "cameras" if num_sources == len(file.cameras) else "views of all cameras"
        yield Finding(("cameras",), f"{num_sources} {what}; one pipeline takes {MAX_CAMERAS}")
    for name, camera in file.cameras.items():
        yield from _camera_findings(name, camera)
    stages = file.stages.by_name()
    for name, stage in stages.items():
        yield from _stage_findings(name, stage, types)
    yield from edges.findings
    if not edges.lost:  # else it may only follow from that
        yield from _together_findings(stages, types, edges)


def _camera_findings(name: str, camera: CameraSpec) -> Iterator[Finding]:
    path, where = ("cameras", name), f"cameras.{name}"
    num_views = len(camera.views)
    if "views" in camera.model_fields_set:
        if camera.source is not None:
            message = f"camera {name} has a source, too; write it as one of the views, or leave the views out"
            yield Finding((*path, "views"), f"{where}.views: {message}")
        elif not num_views:
            yield Finding((*path, "views"), f'{where}.views: not one view; write `views: {{front: "rtsp://…"}}`')
    elif camera.source is None:
        yield Finding((*path, "source"), f"{where}.source: is missing")
    if num_views > MAX_VIEWS:
        yield Finding((*path, "views"), f"{where}.views: {num_views} views; a camera has {MAX_VIEWS} at most")
    if camera.microphone not in (EMBEDDED, NO_SOUND, *camera.views):
        if num_views:
            has = f"it has: {', '.join(camera.views)}{suggest(camera.microphone, camera.views, alone=False)}"
            message = f"camera {name} has no view {shown(camera.microphone)}; {has}"
        else:
            message = f"must be '{EMBEDDED}' or '{NO_SOUND}', not {shown(camera.microphone)}"
        yield Finding((*path, "microphone"), f"{where}.microphone: {message}")


def source_findings(file: FileSpec, source_problem: Callable[[str], str]) -> Iterator[Finding]:
    """Cameras whose source can be read nowhere. source_problem: why it can't, its secrets masked, or ""."""
    for name, camera in file.cameras.items():
        for view, source in camera.sources.items():
            if problem := source_problem(source.reveal()):
                path = ("cameras", name, *(("views", view) if view else ("source",)))
                yield Finding(path, f"{dotted(path)}: {problem}")


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


def _stage_findings(name: str, stage: StageOptions, types: Mapping[str, StageType]) -> Iterator[Finding]:
    path: KeyPath = ("stages", name)
    if stage.replicas == 0 and not types[name].can_be_off:
        message = f"can't be 0; can be switched off: {listed(can_be_off(types))}"
        yield Finding((*path, "replicas"), f"stages.{name}.replicas: {message}")
    if stage.max_replicas < stage.replicas:
        message = f"max {stage.max_replicas} is less than min {stage.replicas}"
        yield Finding((*path, "replicas"), f"stages.{name}.replicas: {message}")
    if stage.process and types[name].has_model:
        light = listed(other for other, each in types.items() if not each.has_model)
        message = f"only stages without a model share a process: {light}"
        yield Finding((*path, "process"), f"stages.{name}.process: {message}")
    elif types[name].scope == "pipeline" and stage.max_replicas > 1:
        message = "must be 1: one replica has the state of all sessions"
        yield Finding((*path, "replicas"), f"stages.{name}.replicas: {message}")


def _together_findings(
    stages: Mapping[str, StageOptions], types: Mapping[str, StageType], edges: Edges
) -> Iterator[Finding]:
    """What follows from the stages that run, and how they are wired."""
    off = {name for name, stage in stages.items() if stage.replicas == 0}
    if off - can_be_off(types) or any(finding.path[0] == "stages" for finding in edges.findings):
        return
    wiring = wiring_of(types, edges.all)
    off = wiring.idle(off, needed_among(types))
    if off.issuperset(wiring.sources):
        yield Finding(("stages",), no_senses(wiring))
    ends = wiring.ends(name for name, each in types.items() if each.ends_windows and name not in off)
    if len(ends) > 1:
        yield Finding(("stages",), f"a window ends once, but here it would at {listed(ends)}; switch off all but one")
    yield from _shared_findings(stages, types, off)
    yield from _process_findings({name: stage for name, stage in stages.items() if name not in off})


def _process_findings(stages: Mapping[str, StageOptions]) -> Iterator[Finding]:
    """Stages that share a process have as many replicas."""
    first: dict[str, str] = {}
    for name, stage in stages.items():
        if stage.process is None:
            continue
        other = first.setdefault(stage.process, name)
        if stage.replicas != stages[other].replicas:
            message = f"{stage.replicas}, but stages.{other}.replicas is {stages[other].replicas}"
            why = f"stages of one process ({stage.process!r}) have as many; write the same, or another process"
            yield Finding(("stages", name, "replicas"), f"stages.{name}.replicas: {message}: {why}")


def _shared_findings(
    stages: Mapping[str, StageOptions], types: Mapping[str, StageType], off: set[str]
) -> Iterator[Finding]:
    """Stages that read one source share a process."""
    reading: dict[str, list[str]] = {}
    for name, each in types.items():
        if each.shares and name not in off:
            reading.setdefault(each.shares, []).append(name)
    for what, names in reading.items():
        places = {stages[name].process for name in names}
        if len(names) > 1 and (len(places) > 1 or None in places):
            keys = ", ".join(f"stages.{name}.process" for name in names)
            processes = " and ".join(shown(stages[name].process) for name in names)
            message = f"they read one {what} and share a named process, not {processes}"
            yield Finding(("stages", names[-1], "process"), f"{keys}: {message}")
