"""Which way a session takes through the pipeline: its stages, and at each of them the replica. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from deploy.actor.session_plan import Output, SessionPlan, view_stream
from graph.edges import EdgeSpec
from graph.spec import PipelineSpec
from graph.window import Input
from stages.session import Session

# Simulated (`pipeline bench onset`): nano on two cores has most room with 3 phases, and 0.6 to 0.8 of the p99 with 2;
# of the full model on a H200, where a larger batch costs next to nothing, as few do best as don't split a batch.
CPU_PHASES: Final = 3
LEAST_PHASES: Final = 2
QUARTERS: Final = (0, 2, 1, 3)  # of a window: where each phase is, far from those before it


def stages_of(session: Session, spec: PipelineSpec) -> set[str]:
    """Where a session lives: everywhere, but for what has nothing to do without a microphone where it has none."""
    off = set() if session.microphone else {name for name in spec.wiring.sources if _hears(spec, name)}
    return spec.stages.keys() - spec.wiring.idle(off, spec.needed)


def num_phases(num_sessions: int, spec: PipelineSpec) -> int:
    """How many phases that many sessions of one replica have. One more makes the bursts smaller, and costs each stage
    a batch more per window."""
    if (even := _even_phases(spec)) is not None:
        return even
    size = min(stage.batch for name, stage in spec.stages.items() if spec.types[name].has_model)
    return min(max(-(-num_sessions // size), LEAST_PHASES), len(QUARTERS))


def phase_ns(number: int, spec: PipelineSpec) -> int:
    """How long after those of the first phase the windows of phase `number` end."""
    if (even := _even_phases(spec)) is not None:
        return number * spec.window.length_ns // even
    return QUARTERS[number] * spec.window.length_ns // len(QUARTERS)


def _even_phases(spec: PipelineSpec) -> int | None:
    """How many there are, however many sessions; None: that goes by their number."""
    is_on_gpu = any(stage.gpus for name, stage in spec.stages.items() if spec.types[name].has_model)
    return spec.window.phases or (None if is_on_gpu else CPU_PHASES)


def session_plan(
    spec: PipelineSpec, stage: str, session: Session, replicas: Mapping[str, int], incarnation: int
) -> SessionPlan:
    """How a stage takes part in a session. replicas: by stage, where the session goes."""
    passed = stages_of(session, spec)
    edges = [edge for edge in spec.edges if {edge.source.stage, edge.target.stage} <= passed]
    incoming = [edge for edge in edges if edge.target.stage == stage and not edge.kind.is_control]
    windowed = [edge for edge in incoming if edge.kind.is_windowed]
    prefixes = _prefixes(windowed, session)
    ends = ends_of(session, spec)
    return SessionPlan(
        session=session,
        inputs={
            prefixes.get(edge.id, "") + stream: _input(edge, spec)
            for edge in windowed
            for stream in _streams_of(edge, spec, session)
        },
        prefixes=prefixes,
        ports={edge.id: edge.target.name for edge in incoming},
        num_inputs=len(incoming),
        outputs=_outputs(spec, stage, session, [edge for edge in edges if edge.source.stage == stage]),
        peers={edge.id: replicas[edge.target.stage] for edge in edges if edge.source.stage == stage},
        to_sources=frozenset(edge.id for edge in edges if edge.target.stage in spec.wiring.sources),
        incarnation=incarnation,
        ends_windows=stage in ends,
        upstream=_upstream(spec, edges, session) if stage in ends else (),
        is_aside=is_aside(spec, stage, session),
    )


def is_aside(spec: PipelineSpec, stage: str, session: Session) -> bool:
    """Does no window of the session end at the stage or behind it, as on a side branch?"""
    return not ends_of(session, spec) & {stage, *spec.wiring.behind(stage)}


def ends_of(session: Session, spec: PipelineSpec) -> set[str]:
    """The stages where its windows end."""
    return spec.wiring.ends(spec.ends_windows & stages_of(session, spec))


def stream_of(edge: EdgeSpec, session: Session) -> str:
    """The name under which what leaves on an edge travels."""
    return (edge.kind.stream or edge.kind.name).format(view=session.camera)


def _prefixes(edges: Sequence[EdgeSpec], session: Session) -> dict[str, str]:
    """Where streams of one name come on several edges: by edge, what tells them apart."""
    names = [stream_of(edge, session) for edge in edges]
    return {e.id: f"{e.target.name}/" for e in edges if names.count(stream_of(e, session)) > 1}


def _streams_of(edge: EdgeSpec, spec: PipelineSpec, session: Session) -> list[str]:
    """The streams that an edge brings: one, or one per view."""
    stream = stream_of(edge, session)
    return [view_stream(stream, view.name) for view in session.media.views] if _is_many(edge, spec) else [stream]


def _is_many(edge: EdgeSpec, spec: PipelineSpec) -> bool:
    return spec.types[edge.source.stage].outputs[edge.source.name].many


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
        is_many=_is_many(edge, spec),
    )


def _outputs(spec: PipelineSpec, stage: str, session: Session, edges: Sequence[EdgeSpec]) -> dict[str, Output]:
    return {
        name: Output(
            stream=(port.kind.stream or port.kind.name).format(view=session.camera),
            kind=port.kind,
            edges=tuple(edge.id for edge in edges if edge.source.name == name),
            is_many=port.many,
        )
        for name, port in spec.types[stage].outputs.items()
    }


def _upstream(spec: PipelineSpec, edges: Iterable[EdgeSpec], session: Session) -> tuple[str, ...]:
    """The streams in which a window may lack something, other than those of the sources."""
    made = (edge for edge in edges if edge.kind.is_windowed and edge.source.stage not in spec.wiring.sources)
    return tuple(dict.fromkeys(stream_of(edge, session) for edge in made if not edge.target.is_side))
