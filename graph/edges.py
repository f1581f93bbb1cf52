"""From what is written of inputs and edges to the edges that there are. Pure.

Rules:
- An input comes from where `stages.<stage>.inputs` says; where nothing is said, from the one output of its kind.
- `edges` changes what an edge does, and makes none.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from graph.chunk import NS_PER_S
from graph.credit import Limit
from graph.kinds import Kind, Late, WhenFull
from graph.ports import InPort, OutPort
from graph.sections import FileSpec, InputSpec, WrittenEdge
from graph.stage_type import In, StageType
from graph.wiring import Link, Wiring
from graph.wording import listed, suggest
from graph.yaml_file import Finding, KeyPath

_NOTHING: Final = InputSpec()


@dataclass(frozen=True, slots=True)
class EdgeSpec:
    """One edge.

    credit: what may be in flight per session. late: what happens to a chunk whose window has left.
    window_ns, lateness_ns: of the input, where they are not the pipeline's.
    """

    source: OutPort
    target: InPort
    credit: Limit
    when_full: WhenFull
    late: Late
    window_ns: int | None = None
    lateness_ns: int | None = None

    @property
    def id(self) -> str:
        return f"{self.source}->{self.target}"

    @property
    def kind(self) -> Kind[Any]:
        return self.source.kind


class Edges:
    """The edges of a description, `all`; `findings`: what is wrong with them."""

    def __init__(self, file: FileSpec, types: Mapping[str, StageType], lost: Collection[str] = ()) -> None:
        """types: of all stages, by name. lost: names of others, of which nobody knows what they take and make."""
        self._file = file
        self.lost = lost
        self._types = types
        self._written = file.stages.by_name()
        self._outputs = {
            f"{stage}.{name}": OutPort(stage, name, port.kind)
            for stage, stage_type in types.items()
            for name, port in stage_type.outputs.items()
        }
        self._places: dict[str, KeyPath] = {}  # by edge, where its input is written
        self.findings: list[Finding] = []
        policies = dict(self._policies())
        self.all = tuple(self._edge(*ends, policies.get(_id(*ends[:2]))) for ends in self._ends())
        self._check_policies(policies)
        self._check_circles()
        if not lost:
            self._check_fed()

    # ---- inputs ------------------------------------------------------------------------------------------------------

    def _ends(self) -> Iterator[tuple[OutPort, InPort, InputSpec]]:
        """Each output with the input that it feeds, and what is written of that; in the order of the outputs."""
        ends: list[tuple[OutPort, InPort, InputSpec]] = []
        for stage, stage_type in self._types.items():
            for name in self._written[stage].inputs.keys() - stage_type.inputs.keys():
                self._note((stage, "inputs", name), _no_port(stage, "input", name, stage_type.inputs))
            for name, port in stage_type.inputs.items():
                written = self._written[stage].inputs.get(name, _NOTHING)
                side = port.side if written.side is None else written.side
                target = InPort(stage, name, port.kind, port.is_feedback, side)
                sources = self._sources(stage, port, written) if name in self._written[stage].inputs else None
                ends += [(source, target, written) for source in self._fitting(target, port, sources)]
        order = {port: index for index, port in enumerate(self._outputs)}
        return iter(sorted(ends, key=lambda end: order[str(end[0])]))

    def _sources(self, stage: str, port: In, written: InputSpec) -> list[OutPort] | None:
        """As they are written; None: nothing is."""
        path = (stage, "inputs", port.name)
        if not written.source:
            if "source" not in written.model_fields_set:
                return None
            if not (port.optional or port.many):
                self._note(path, f"comes from nowhere, but {stage} needs it; write stage.port", name=True)
            return []
        sources = [source for name in written.source if (source := self._output(name, path)) is not None]
        for source in sources:
            if source.kind != port.kind:
                self._note(path, f"takes {port.kind}, but {source} carries {_other(source.kind, port.kind)}", name=True)
            elif source.stage == stage:
                self._note(path, f"comes from {source}, of the same stage", name=True)
            elif self._is_off(source.stage) and not (port.optional or port.many or self._is_off(stage)):
                remedy = f"name another source, or switch {stage} off, too"
                self._note(path, f"comes from {source}, which is off (replicas: 0); {remedy}", name=True)
        if len(sources) > 1 and not port.many:
            self._note(path, f"takes one source, not {listed(map(str, sources))}", name=True)
            return sources[:1]
        return [source for source in sources if source.kind == port.kind and source.stage != stage]

    def _is_off(self, stage: str) -> bool:
        return not self._written[stage].replicas

    def _fitting(self, target: InPort, port: In, sources: list[OutPort] | None) -> list[OutPort]:
        """Where an input comes from: as written, or the one that fits."""
        for source in sources or ():
            self._places[_id(source, target)] = ("stages", target.stage, "inputs", target.name)
        if sources is not None:
            return sources
        fitting = [o for o in self._outputs.values() if o.kind == port.kind and o.stage != target.stage]
        if port.many:
            return fitting
        running = [output for output in fitting if not self._is_off(output.stage)]
        candidates = running if len(fitting) > 1 else fitting
        is_off = self._is_off(target.stage)
        if len(candidates) > 1:
            if is_off:
                return []
            either = " or ".join(sorted(map(str, candidates)))
            self._note((target.stage,), f"input {target.name} may come from {either}; write which: {_how(target)}")
            return []
        if not candidates and not port.optional and not is_off and not self.lost:
            message = f"input {target.name} has no source: no other stage makes {port.kind}"
            self._note((target.stage,), message)
        return candidates

    def _output(self, written: str, path: KeyPath) -> OutPort | None:
        if written not in self._outputs and not self._is_lost(written):
            self._note(path, self._unknown(written, "output"), name=True)
        return self._outputs.get(written)

    def _is_lost(self, written: str) -> bool:
        return written.partition(".")[0] in self.lost

    def _unknown(self, written: str, what: str) -> str:
        """What is wrong with `stage.port`."""
        stage, _, name = written.partition(".")
        if stage not in self._types:
            return f"there is no stage {stage!r}{suggest(stage, self._types)}"
        ports = self._types[stage].outputs if what == "output" else self._types[stage].inputs
        return _no_port(stage, what, name, ports)

    def _note(self, path: KeyPath, message: str, *, name: bool = False) -> None:
        """name: say which value it is about."""
        dotted = ".".join(map(str, ("stages", *path)))
        self.findings.append(Finding(("stages", *path), f"{dotted}: {message}" if name or len(path) == 1 else message))

    # ---- what edges do -----------------------------------------------------------------------------------------------

    def _edge(self, source: OutPort, target: InPort, written: InputSpec, policy: WrittenEdge | None) -> EdgeSpec:
        kind, port = source.kind, self._types[target.stage].inputs[target.name]
        credit = policy.credit if policy else None
        chunks = (credit and credit.chunks) or max(kind.credit.chunks, least_chunks(kind, self._file))
        limit = Limit(chunks, (credit and credit.time_ns) or kind.credit.duration_ns)
        usual: WhenFull = "drop_oldest" if target.is_side else kind.when_full
        return EdgeSpec(
            source,
            target,
            limit,
            (policy and policy.when_full) or usual,
            (policy and policy.late) or written.late or port.late or kind.late,
            written.window_ns or port.window_ns,
            port.lateness_ns if written.lateness_ns is None else written.lateness_ns,
        )

    def _policies(self) -> Iterator[tuple[str, WrittenEdge]]:
        inputs = {f"{s}.{name}" for s, stage_type in self._types.items() for name in stage_type.inputs}
        seen: set[str] = set()
        for index, edge in enumerate(self._file.edges):
            path, id_ = ("edges", index), f"{edge.source}->{edge.target}"
            if edge.source not in self._outputs and not self._is_lost(edge.source):
                self.findings.append(Finding((*path, "from"), self._unknown_end(index, "from", edge.source, "output")))
            if edge.target not in inputs and not self._is_lost(edge.target):
                self.findings.append(Finding((*path, "to"), self._unknown_end(index, "to", edge.target, "input")))
            if id_ in seen:
                self.findings.append(Finding(path, f"edge {id_} is written twice"))
            seen.add(id_)
            if edge.source in self._outputs and edge.target in inputs:
                yield id_, edge

    def _unknown_end(self, index: int, end: str, written: str, what: str) -> str:
        return f"edges[{index}].{end}: {self._unknown(written, what)}"

    def _check_policies(self, policies: Mapping[str, WrittenEdge]) -> None:
        there = {edge.id: edge for edge in self.all}
        for index, written in enumerate(self._file.edges):
            id_ = f"{written.source}->{written.target}"
            if policies.get(id_) is not written:
                continue
            if id_ not in there:
                self.findings.append(self._not_wired(index, written))
                continue
            least = least_chunks(there[id_].kind, self._file)
            if written.credit.chunks is not None and written.credit.chunks < least:
                message = f"{written.credit.chunks} is too little; with the fps of the cameras a window needs {least}"
                path: KeyPath = ("edges", index, "credit", "chunks")
                self.findings.append(Finding(path, f"edge {id_}: credit.chunks {message}"))

    def _not_wired(self, index: int, written: WrittenEdge) -> Finding:
        stage, _, name = written.target.partition(".")
        source, kind = self._outputs[written.source], self._types[stage].inputs[name].kind
        target = InPort(stage, name, kind)
        if source.kind != kind:
            message = f"{source} carries {_other(source.kind, kind)}, but {target} takes {kind}"
            return Finding(("edges", index, "to"), f"edge {source}->{target}: {message}")
        message = f"edge {source}->{target} is not there: `edges` changes what an edge does, and makes none"
        return Finding(("edges", index), f"{message}; write {_how(target, source)}")

    def _check_circles(self) -> None:
        if circle := _circle(self.all):
            last = next(e for e in self.all if (e.source.stage, e.target.stage) == circle[-2:])
            path = self._places.get(last.id, ("stages",))
            self.findings.append(Finding(path, f"stages feed each other in a circle: {' -> '.join(circle)}"))

    def _check_fed(self) -> None:
        """A stage all of whose inputs are optional needs one of them."""
        fed = {edge.target.stage for edge in self.all if not edge.target.is_feedback}
        for stage in self._types.keys() - fed:
            inputs = [port for port in self._types[stage].inputs.values() if not port.is_feedback]
            if inputs and all(port.optional for port in inputs) and self._written[stage].replicas:
                names = listed(port.name for port in inputs)
                self._note((stage,), f"nothing comes to it; one of its inputs needs a source: {names}")


def wiring_of(types: Mapping[str, StageType], edges: Iterable[EdgeSpec]) -> Wiring:
    """What follows from these edges. types: of the stages, by name."""
    return Wiring(
        types,
        (
            Link(
                edge.source.stage,
                edge.target.stage,
                is_windowed=edge.kind.is_windowed,
                is_feedback=edge.target.is_feedback,
                is_side=edge.target.is_side,
            )
            for edge in edges
        ),
        [name for name, each in types.items() if each.makes_windows_only],
    )


def no_senses(wiring: Wiring) -> str:
    """What to say where all sources are off."""
    return f"nothing to see and nothing to hear: {listed(wiring.sources)} are off, since nothing takes what they make"


def least_chunks(kind: Kind[Any], file: FileSpec) -> int:
    """The least credit for pictures: what a window holds until it closes, and the same again of the next."""
    if not kind.is_picture:
        return 1
    window_ns = file.window.length_ns
    pictures = (each.num_pictures(window_ns) for each in file.cameras.values())
    return 2 * max(pictures, default=math.ceil(window_ns / NS_PER_S)) + 2


def _circle(edges: Iterable[EdgeSpec]) -> tuple[str, ...]:
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


def _id(source: OutPort, target: InPort) -> str:
    return f"{source}->{target}"


def _other(kind: Kind[Any], expected: Kind[Any]) -> str:
    """Its name, and that it is not the kind of that name that is expected."""
    return str(kind) if kind.name != expected.name else f"another kind called {kind}"


def _no_port(stage: str, what: str, name: str, ports: Mapping[str, object]) -> str:
    has = f"it has: {', '.join(sorted(ports))}" if ports else "it has none"
    return f"stage {stage!r} has no {what} {name!r}; {has}{suggest(name, ports, alone=False)}"


def _how(target: InPort, source: OutPort | str = "…") -> str:
    return f"stages.{target.stage}.inputs: {{{target.name}: {source}}}"
