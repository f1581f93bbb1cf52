"""Which way a session takes through the pipeline: its stages, and at each of them the replica. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from deploy.placement import LOCAL_STAGES
from deploy.session_plan import SessionPlan
from graph.sections import WindowSpec
from graph.spec import EdgeSpec, PipelineSpec
from graph.streams import camera_stream
from graph.window import Late
from stages.stage import Session

SOURCES = ("microphone", "camera")


def stages_of(session: Session, spec: PipelineSpec) -> set[str]:
    """Where a session lives: everywhere, but for the ears of one that has no microphone."""
    deaf = set() if session.microphone else {"microphone", "audio_encoder"}
    return spec.stages.keys() - deaf


def least_loaded(num_sessions: Sequence[int]) -> int:
    """The replica that a new session goes to, by how many each has."""
    return num_sessions.index(min(num_sessions))


def phase_ns(number: int, window: WindowSpec) -> int:
    """How long after the first session's windows those of the session end that was opened as the `number`-th."""
    return number % window.phases * window.length_ns // window.phases


def opening_order(spec: PipelineSpec) -> list[str]:
    """All stages: who only computes, then who listens, then who begins to send."""
    local = [name for name in ("events", "speaker", *SOURCES) if name in spec.stages]
    return [name for name in spec.stages if name not in LOCAL_STAGES] + local


def closing_order(spec: PipelineSpec) -> list[str]:
    """All stages, each before those that it sends to: so nobody who is closed is sent anything more.

    What comes back from downstream (feedback) does not count, nor does it take credit.
    """
    sources: dict[str, set[str]] = {name: set() for name in spec.stages}
    for edge in spec.edges:
        if not edge.target.is_feedback:
            sources[edge.target.stage].add(edge.source.stage)
    order: list[str] = []
    while len(order) < len(sources):
        order.append(next(name for name in sources if name not in order and sources[name] <= set(order)))
    return order


def last_stage(spec: PipelineSpec, passed: Collection[str]) -> str:
    """Where windows end: at the end of the longest way that they take through these stages.

    A stage beside it, which nothing follows, ends none: each window is told once.
    """
    lengths: dict[str, int] = {}
    for stage in (stage for stage in closing_order(spec) if stage in passed):
        windows = [e for e in spec.edges if e.target.stage == stage and e.kind not in ("playback", "events")]
        lengths[stage] = 1 + max((lengths.get(edge.source.stage, 0) for edge in windows), default=0)
    return max(lengths, key=lambda stage: lengths[stage])


def session_plan(
    spec: PipelineSpec, stage: str, session: Session, replicas: Mapping[str, int], incarnation: int
) -> SessionPlan:
    """How a stage takes part in a session. replicas: by stage, where the session goes."""
    passed = stages_of(session, spec)
    edges = [edge for edge in spec.edges if {edge.source.stage, edge.target.stage} <= passed]
    inputs = [edge for edge in edges if edge.target.stage == stage and edge.kind != "playback"]
    outputs = [edge for edge in edges if edge.source.stage == stage]
    streams: dict[str, Late] = {_stream(edge, session): edge.late for edge in inputs if edge.kind != "events"}
    return SessionPlan(
        session=session,
        streams=streams,
        num_inputs=len(inputs),
        peers={edge.id: replicas[edge.target.stage] for edge in outputs},
        incarnation=incarnation,
        ends_windows=stage == last_stage(spec, passed),
        makes=tuple(dict.fromkeys(_stream(edge, session) for edge in outputs if edge.kind != "playback")),
    )


def _stream(edge: EdgeSpec, session: Session) -> str:
    """The stream that comes in on an edge."""
    return {"frames": camera_stream(session.camera), "sound": "mic"}.get(edge.kind, edge.kind)
