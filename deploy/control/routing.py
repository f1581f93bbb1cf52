"""Which way a session takes through the pipeline: its stages, and at each of them the replica. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from deploy.actor.session_plan import Output, SessionPlan
from graph.edges import EdgeSpec
from graph.sections import WindowSpec
from graph.spec import PipelineSpec
from graph.window import Input
from stages.stage import Session


def stages_of(session: Session, spec: PipelineSpec) -> set[str]:
    """Where a session lives: everywhere, but for what has nothing to do without a microphone where it has none."""
    off = set() if session.microphone else {name for name in spec.wiring.sources if _hears(spec, name)}
    return spec.stages.keys() - spec.wiring.idle(off, spec.needed)


def phase_ns(number: int, window: WindowSpec) -> int:
    """How long after the first session's windows those of the session end that was opened as the `number`-th."""
    return number % window.phases * window.length_ns // window.phases


def session_plan(
    spec: PipelineSpec, stage: str, session: Session, replicas: Mapping[str, int], incarnation: int
) -> SessionPlan:
    """How a stage takes part in a session. replicas: by stage, where the session goes."""
    passed = stages_of(session, spec)
    edges = [edge for edge in spec.edges if {edge.source.stage, edge.target.stage} <= passed]
    incoming = [edge for edge in edges if edge.target.stage == stage and not edge.kind.is_control]
    streams = _streams([edge for edge in incoming if edge.kind.is_windowed], session)
    ends = spec.wiring.ends(spec.ends_windows & passed)
    return SessionPlan(
        session=session,
        inputs={streams[edge.id]: _input(edge, spec) for edge in incoming if edge.id in streams},
        renamed=_renamed(incoming, streams, session),
        ports={edge.id: edge.target.name for edge in incoming},
        num_inputs=len(incoming),
        outputs=_outputs(spec, stage, session, [edge for edge in edges if edge.source.stage == stage]),
        peers={edge.id: replicas[edge.target.stage] for edge in edges if edge.source.stage == stage},
        to_sources=frozenset(edge.id for edge in edges if edge.target.stage in spec.wiring.sources),
        incarnation=incarnation,
        ends_windows=stage in ends,
        upstream=_upstream(spec, edges, session) if stage in ends else (),
        is_aside=not ends & {stage, *spec.wiring.behind(stage)},
    )


def stream_of(edge: EdgeSpec, session: Session) -> str:
    """The name under which what leaves on an edge travels."""
    return (edge.kind.stream or edge.kind.name).format(view=session.camera)


def _streams(edges: Sequence[EdgeSpec], session: Session) -> dict[str, str]:
    """Per edge the stream, by names that no two inputs of a stage share."""
    names = {edge.id: stream_of(edge, session) for edge in edges}
    several = {name for name in names.values() if list(names.values()).count(name) > 1}
    return {e.id: f"{e.target.name}/{names[e.id]}" if names[e.id] in several else names[e.id] for e in edges}


def _renamed(edges: Sequence[EdgeSpec], streams: Mapping[str, str], session: Session) -> dict[tuple[str, str], str]:
    own = ((edge.id, stream_of(edge, session)) for edge in edges if edge.id in streams)
    return {(edge, stream): streams[edge] for edge, stream in own if streams[edge] != stream}


def _hears(spec: PipelineSpec, stage: str) -> bool:
    return any(port.kind.is_sound for port in spec.types[stage].outputs.values())


def _input(edge: EdgeSpec, spec: PipelineSpec) -> Input:
    return Input(
        port=edge.target.name,
        kind=edge.kind,
        edge=edge.id,
        source=edge.source.stage,
        late=edge.late,
        window_ns=edge.window_ns,
        lateness_ns=edge.lateness_ns,
        is_side=edge.target.is_side,
        is_original=edge.source.stage in spec.wiring.sources,
    )


def _outputs(spec: PipelineSpec, stage: str, session: Session, edges: Sequence[EdgeSpec]) -> dict[str, Output]:
    return {
        name: Output(
            stream=(port.kind.stream or port.kind.name).format(view=session.camera),
            kind=port.kind,
            edges=tuple(edge.id for edge in edges if edge.source.name == name),
        )
        for name, port in spec.types[stage].outputs.items()
    }


def _upstream(spec: PipelineSpec, edges: Iterable[EdgeSpec], session: Session) -> tuple[str, ...]:
    """The streams in which a window may lack something, other than those of the sources."""
    made = (edge for edge in edges if edge.kind.is_windowed and edge.source.stage not in spec.wiring.sources)
    return tuple(dict.fromkeys(stream_of(edge, session) for edge in made if not edge.target.is_side))
