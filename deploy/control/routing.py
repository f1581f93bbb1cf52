"""Which way a session takes through the pipeline: its stages, and at each of them the replica. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deploy.actor.session_plan import SessionPlan
from graph.ports import needed_among
from graph.sections import WindowSpec
from graph.spec import PipelineSpec
from graph.streams import stream_of
from graph.window import Late
from stages.stage import Session


def stages_of(session: Session, spec: PipelineSpec) -> set[str]:
    """Where a session lives: everywhere, but for the ears of one that has no microphone."""
    off = set() if session.microphone else {"microphone"}
    return spec.stages.keys() - spec.wiring.idle(off, needed_among(spec.stages))


def least_loaded(num_sessions: Sequence[int]) -> int:
    """The replica that a new session goes to, by how many each has."""
    return num_sessions.index(min(num_sessions))


def phase_ns(number: int, window: WindowSpec) -> int:
    """How long after the first session's windows those of the session end that was opened as the `number`-th."""
    return number % window.phases * window.length_ns // window.phases


def session_plan(
    spec: PipelineSpec, stage: str, session: Session, replicas: Mapping[str, int], incarnation: int
) -> SessionPlan:
    """How a stage takes part in a session. replicas: by stage, where the session goes."""
    passed = stages_of(session, spec)
    edges = [edge for edge in spec.edges if {edge.source.stage, edge.target.stage} <= passed]
    inputs = [edge for edge in edges if edge.target.stage == stage and not edge.kind.is_control]
    outputs = [edge for edge in edges if edge.source.stage == stage]
    streams: dict[str, Late] = {stream_of(e.kind, session.camera): e.late for e in inputs if e.kind.is_windowed}
    makes = (stream_of(edge.kind, session.camera) for edge in outputs if not edge.kind.is_control)
    return SessionPlan(
        session=session,
        streams=streams,
        num_inputs=len(inputs),
        peers={edge.id: replicas[edge.target.stage] for edge in outputs},
        incarnation=incarnation,
        ends_windows=stage == spec.wiring.last(passed),
        makes=tuple(dict.fromkeys(makes)),
    )
