"""A replica has died: how its sessions go on at another one, or at the one that takes its place.

A session goes on with the window that it is in. What the dead replica held is lost and counted, what it knew is
forgotten: an LLM begins with its system prompt. Where speech came through it, what was said and not heard is taken
back, as if the listener had interrupted: so all who speak begin anew together.

Whoever runs these steps (control/restarts.py) answers the calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from deploy.actor.session_plan import Listener, SessionPlan
from deploy.control.calls import Reply, Steps, answered
from deploy.control.routing import session_plan, stages_of
from graph.chunk import Scalar
from graph.edges import EdgeSpec
from graph.kinds import Kind
from graph.spec import PipelineSpec
from graph.tail import Ack
from stages.stage import Session


@dataclass(frozen=True, slots=True)
class Going:
    """A session that goes on, as the same incarnation, and per stage the replica where it is from now on."""

    session: Session
    replicas: dict[str, int]
    incarnation: int


class Replicas(Protocol):
    """Per stage, the replica at which a session is. Calls to one of them are done in the order in which they are made;
    where it is not there, or the session is over, whoever has its name by now, the reply has failed."""

    def resume(self, stage: str, going: Going, plan: SessionPlan) -> Reply[None]:
        """Open a session and let its clock run. Fails with StageError where there is no room."""

    def listener(self, stage: str, going: Going) -> Reply[Listener | None]: ...
    def reroute(self, stage: str, going: Going, edge: str, target: int) -> Reply[bool]: ...
    def end_input(self, stage: str, going: Going, edge: str) -> None: ...
    def tell(self, stage: str, going: Going, kind: str, attrs: dict[str, Scalar], *, cuts: bool) -> Reply[None]: ...


def reopen(replicas: Replicas, spec: PipelineSpec, stage: str, going: Sequence[Going]) -> Steps[list[Reply[None]]]:
    """Open sessions again at a stage; returns what became of each."""
    heard = [_listener(replicas, spec, each) for each in going]
    yield heard
    opened: list[Reply[None]] = []
    for each, reply in zip(going, heard, strict=True):
        listener = (None if reply.error else reply.result()) or Listener(Ack(0), 0)
        plan = replace(session_plan(spec, stage, each.session, each.replicas, each.incarnation), goes_on=listener)
        opened.append(replicas.resume(stage, each, plan))
    yield opened
    return opened


def redirect(replicas: Replicas, spec: PipelineSpec, stage: str, going: Going) -> dict[str, Reply[bool]]:
    """Let what is sent to a stage go where the session is now; it may still have to wait for the link.

    Returns by edge whether the session is still open at the other end; if not, nothing will come on it.
    """
    passed = stages_of(going.session, spec)
    return {
        edge.id: replicas.reroute(edge.source.stage, going, edge.id, going.replicas[stage])
        for edge in inputs_of(spec, stage)
        if edge.source.stage in passed
    }


def announce(
    replicas: Replicas, spec: PipelineSpec, stage: str, going: Going, actor: str, redirected: dict[str, Reply[bool]]
) -> Steps[None]:
    """Once it is reached: end what has ended, and tell that `actor` had died. Who speaks begins anew with it."""
    yield list(redirected.values())
    for edge in inputs_of(spec, stage):
        reply = redirected.get(edge.id)
        # Where nobody has answered, whoever takes that one's place will send.
        if reply is not None and not edge.kind.is_control and reply.error is None and not reply.result():
            replicas.end_input(stage, going, edge.id)
    tell(replicas, spec, going, "recovered", {"actor": actor}, cuts=_speaks(spec, stage))


def tell(
    replicas: Replicas,
    spec: PipelineSpec,
    going: Going,
    kind: str,
    attrs: dict[str, Scalar],
    *,
    cuts: bool = False,
) -> Reply[None]:
    """Let a stage that can tell an event of a session. cuts: what was said and not heard is lost, if it speaks."""
    passed = stages_of(going.session, spec)
    tellers = [s for s in spec.wiring.downstream_first if s in passed and any(k.is_event for k in _made(spec, s))]
    teller = next((stage for stage in tellers if stage == _listening(spec)), next(iter(tellers), None))
    if teller is None:  # no stage here tells anything
        return answered("", None)
    cuts = cuts and teller == _listening(spec)
    return replicas.tell(teller, going, kind, attrs, cuts=cuts)


def inputs_of(spec: PipelineSpec, stage: str) -> list[EdgeSpec]:
    """The edges that come to a stage."""
    return [edge for edge in spec.edges if edge.target.stage == stage]


def _listener(replicas: Replicas, spec: PipelineSpec, going: Going) -> Reply[Listener | None]:
    if (stage := _listening(spec)) is None or stage not in stages_of(going.session, spec):
        return answered("", None)
    return replicas.listener(stage, going)


def _listening(spec: PipelineSpec) -> str | None:
    """The stage that knows how far the listener has heard, and tells the others."""
    return next((stage for stage in spec.stages if any(kind.is_control for kind in _made(spec, stage))), None)


def _speaks(spec: PipelineSpec, stage: str) -> bool:
    """Whether what this stage makes is said."""
    return any(kind.is_fenced for kind in _made(spec, stage))


def _made(spec: PipelineSpec, stage: str) -> list[Kind[Any]]:
    return [port.kind for port in spec.types[stage].outputs.values()]
