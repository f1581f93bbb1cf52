"""`pipeline stages` and `pipeline graph`: which stages there are, and how they are wired."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.cli.common import File, Json, Set, clear_errors, described_in, load, stdout_to_stderr, table, usage
from deploy.process.terminal import tell
from graph.chunk import NS_PER_S

if TYPE_CHECKING:
    from graph.edges import EdgeSpec
    from graph.spec import PipelineSpec
    from graph.stage_type import StageType


def stages(file: File = None, overrides: Set = None, as_json: Json = False) -> None:
    """List the stages, what each is, its ports and options: the description's, and those that other packages bring.

    --json: {stage: {class, about, runs (in this pipeline; null where the description has mistakes), inputs: {port:
    {kind, feedback, side, many, optional, window_s}}, outputs: {port: kind}, many (outputs with a stream per view of a
    camera), options, scope, component, is_local, can_be_off}}.
    """
    with clear_errors(), usage():
        described = _described(file, overrides or [])
    if as_json:
        print(json.dumps(described, indent=2))
        return
    for name, stage in described.items():
        print("\n".join(_block(name, stage)), end="\n\n")


def _block(name: str, stage: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a stage; its options with their defaults, as they may be written."""
    yield f"{name}  {stage['class']}{'  (does not run here)' if stage['runs'] is False else ''}"
    if stage["about"]:
        yield f"    {stage['about']}"
    rows = {
        "inputs": ", ".join(_input(port, each) for port, each in stage["inputs"].items()),
        "outputs": ", ".join(_output(port, kind, stage["many"]) for port, kind in stage["outputs"].items()),
        "options": ", ".join(
            f"{option}: {json.dumps(value, ensure_ascii=False)}" for option, value in stage["options"].items()
        ),
    }
    yield from (f"    {f'{key}:':<9}{text}" for key, text in rows.items() if text)


def _input(port: str, each: Mapping[str, Any]) -> str:
    """Its name, its kind where that has another one, and how it differs from others."""
    notes = [each["kind"]] if each["kind"] != port else []
    notes += ["feedback"] if each["feedback"] else [name for name in ("side", "many", "optional") if each[name]]
    notes += [f"{each['window_s']:g} s"] if each["window_s"] else []
    return f"{port} ({', '.join(notes)})" if notes else port


def _output(port: str, kind: str, many: Collection[str]) -> str:
    notes = [kind] if kind != port else []
    notes += ["per view"] if port in many else []
    return f"{port} ({', '.join(notes)})" if notes else port


def graph(
    file: File = None,
    overrides: Set = None,
    as_mermaid: Annotated[bool, typer.Option("--mermaid", help="Print a Mermaid flowchart.")] = False,
    as_json: Json = False,
) -> None:
    """Print how the described pipeline is wired: every edge with its credit and what it does when it is full.

    --json: {stages, edges: [{from, to, kind, feedback, side, credit: {chunks, time_s}, when_full, late}]}, upstream
    first.
    """
    with clear_errors(), usage():
        spec = load(file, overrides or [])
    if as_json:
        print(json.dumps({"stages": spec.wiring.upstream_first, "edges": _rows(spec)}, indent=2))
    elif as_mermaid:
        print("\n".join(mermaid(spec)))
    else:
        table(
            [row | {"to": _target(row), "credit": _credit_text(row["credit"])} for row in _rows(spec)],
            ("from", "to", "kind", "credit", "when_full", "late"),
        )


def mermaid(spec: PipelineSpec) -> Iterator[str]:
    """Lines of a flowchart: whole arrows carry windows, dotted ones news."""
    yield "flowchart LR"
    for edge in _upstream_first(spec):
        arrow = "-->" if edge.kind.is_windowed else "-.->"
        yield f"    {edge.source.stage} {arrow}|{edge.kind}| {edge.target.stage}"


def _rows(spec: PipelineSpec) -> list[dict[str, Any]]:
    return [
        {
            "from": str(edge.source),
            "to": str(edge.target),
            "kind": str(edge.kind),
            "feedback": edge.target.is_feedback,
            "side": edge.target.is_side,
            "credit": {"chunks": edge.credit.chunks, "time_s": _seconds(edge.credit.duration_ns)},
            "when_full": edge.when_full,
            "late": edge.late,
        }
        for edge in _upstream_first(spec)
    ]


def _target(row: Mapping[str, Any]) -> str:
    return f"{row['to']} (side)" if row["side"] else str(row["to"])


def _upstream_first(spec: PipelineSpec) -> list[EdgeSpec]:
    """In the order of the stages that they come from."""
    place = {stage: index for index, stage in enumerate(spec.wiring.upstream_first)}
    return sorted(spec.edges, key=lambda edge: place[edge.source.stage])


def _seconds(time_ns: int | None) -> float | None:
    return None if time_ns is None else time_ns / NS_PER_S


def _credit_text(credit: dict[str, Any]) -> str:
    return f"{credit['chunks']} chunks" + (f", {credit['time_s']:g} s" if credit["time_s"] else "")


def _described(file: Path | None, overrides: list[str]) -> dict[str, dict[str, Any]]:
    """The description's stages, then those installed that it does not name; a broken one of these is reported."""
    from graph.errors import SpecError
    from graph.sections import StageOptions
    from graph.spec import load_spec, load_types
    from graph.stage_type import StageTypeError
    from stages.catalog import StageCatalog

    path = described_in(file)
    catalog = StageCatalog(path.parent)
    running: Collection[str] | None = None
    with stdout_to_stderr():
        types = dict(load_types(path, catalog, overrides))
        try:
            running = load_spec(path, catalog, overrides).stages
        except SpecError as error:
            tell(f"which of them run can't be said: {error.problems[0]}")
        for name, use in catalog.installed.items():
            try:
                types.setdefault(name, catalog.find(use))
            except StageTypeError as error:
                tell(f"pipeline: stage {name} of an installed package: {error}")
    shared = StageOptions().model_dump(by_alias=True)
    return {name: _type(each, shared, None if running is None else name in running) for name, each in types.items()}


def _type(each: StageType, shared: Collection[str], runs: bool | None) -> dict[str, Any]:
    options = each.options().model_dump(by_alias=True)
    return {
        "class": each.use,
        "about": each.about,
        "runs": runs,
        "inputs": {
            name: {
                "kind": str(port.kind),
                "feedback": port.is_feedback,
                "side": port.side,
                "many": port.many,
                "optional": port.optional,
                "window_s": _seconds(port.window_ns),
            }
            for name, port in each.inputs.items()
        },
        "outputs": {name: str(port.kind) for name, port in each.outputs.items()},
        "many": [name for name, port in each.outputs.items() if port.many],
        "options": {option: value for option, value in options.items() if option not in shared},
        "scope": each.scope,
        "component": each.component,
        "is_local": each.is_local,
        "can_be_off": each.can_be_off,
    }
