"""A replica has died: how its sessions are resumed at another one, or at the one that takes its place.

A session is resumed with the window that it is in. What the dead replica held is lost and counted, what it knew is
forgotten: an LLM begins with its system prompt. Where speech came through it, what was said and not heard is taken
back, as if the listener had interrupted: so all who speak begin anew together. What the replica knew of the listener,
those know to whom it was reported.

A replica is a process: where several stages share one, they die together and are resumed together.

Whoever runs these steps (control/restarts.py) answers the calls.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
from stages.session import Session


@dataclass(frozen=True, slots=True)
class Resumption:
    """A session that is resumed, as the same incarnation, and per stage the replica where it is from now on.

    num_windows, num_late: that have come to their end, and late, as was last reported; since then it may be more.
    removed_views: of which those behind a source may not have heard.
    """

    session: Session
    replicas: dict[str, int]
    incarnation: int
    num_windows: int = 0
    removed_views: tuple[str, ...] = ()
    num_late: int = 0


class Replicas(Protocol):
    """Per stage, the replica at which a session is. Calls to one of them are done in the order in which they are made;
    where it is not there, or the session is over, whoever has its name by now, the reply has failed."""

    def resume(self, resumed: Resumption, plans: Mapping[str, SessionPlan]) -> Reply[None]:
        """Open a session at stages of one process and let its clock run there, at all of them or at none. plans: by
        stage, downstream first. Fails with StageError where there is no room."""

    def listener(self, stage: str, resumed: Resumption) -> Reply[Listener | None]: ...
    def reroute(self, stage: str, resumed: Resumption, edge: str, target: int) -> Reply[int | None]: ...
    def end_input(self, stage: str, resumed: Resumption, edge: str, num_windows: int) -> None: ...
    def tell(
        self, stage: str, resumed: Resumption, kind: str, attrs: dict[str, Scalar], *, cuts: bool
    ) -> Reply[None]: ...


def reopen(
    replicas: Replicas, spec: PipelineSpec, stages: Sequence[str], resumed: Sequence[Resumption]
) -> Steps[list[Reply[None]]]:
    """Open sessions again at the stages of a process, downstream first; returns what became of each."""
    heard = yield from _listeners(replicas, spec, stages, resumed)
    opened: list[Reply[None]] = []
    for each, listener in zip(resumed, heard, strict=True):
        passed = stages_of(each.session, spec)
        here = (stage for stage in stages if stage in passed)
        plans = {name: session_plan(spec, name, each.session, each.replicas, each.incarnation) for name in here}
        plans = {
            name: replace(plan, resume_from=listener, removed_views=each.removed_views, num_late=each.num_late)
            for name, plan in plans.items()
        }
        opened.append(replicas.resume(each, plans))
    yield opened
    return opened


def redirect(
    replicas: Replicas, spec: PipelineSpec, stages: Collection[str], resumed: Resumption
) -> dict[str, Reply[int | None]]:
    """Let what others send to these stages go where the session is now; it may still have to wait for the link.

    Returns by edge None, or how many windows the session had that has ended at the other end: nothing will come on it.
    """
    passed = stages_of(resumed.session, spec)
    return {
        edge.id: replicas.reroute(edge.source.stage, resumed, edge.id, resumed.replicas[edge.target.stage])
        for edge in inputs_of(spec, stages)
        if {edge.source.stage, edge.target.stage} <= passed
    }


def announce(
    replicas: Replicas,
    spec: PipelineSpec,
    stages: Collection[str],
    resumed: Resumption,
    actor: str,
    redirected: dict[str, Reply[int | None]],
) -> Steps[None]:
    """Once it is reached: end what has ended, and tell that `actor` had died. Who speaks begins anew with it."""
    yield list(redirected.values())
    for edge in inputs_of(spec, stages):
        reply = redirected.get(edge.id)
        # Where nobody has answered, whoever takes that one's place will send.
        num_windows = None if reply is None or reply.error is not None else reply.result()
        if num_windows is not None and not edge.kind.is_control:
            replicas.end_input(edge.target.stage, resumed, edge.id, num_windows)
    cuts = any(_speaks(spec, stage) for stage in stages) or _listening(spec) in stages
    tell(replicas, spec, resumed, "recovered", {"actor": actor}, cuts=cuts)


def tell(
    replicas: Replicas,
    spec: PipelineSpec,
    resumed: Resumption,
    kind: str,
    attrs: dict[str, Scalar],
    *,
    cuts: bool = False,
) -> Reply[None]:
    """Let a stage that can tell an event of a session. cuts: what was said and not heard is lost, if it speaks."""
    passed = stages_of(resumed.session, spec)
    tellers = [s for s in spec.wiring.downstream_first if s in passed and any(k.is_event for k in _made(spec, s))]
    teller = next((stage for stage in tellers if stage == _listening(spec)), next(iter(tellers), None))
    if teller is None:  # no stage here tells anything
        return answered("", None)
    cuts = cuts and teller == _listening(spec)
    return replicas.tell(teller, resumed, kind, attrs, cuts=cuts)


def inputs_of(spec: PipelineSpec, stages: Collection[str]) -> list[EdgeSpec]:
    """The edges that come to these stages from others."""
    return [edge for edge in spec.edges if edge.target.stage in stages and edge.source.stage not in stages]


def _listeners(
    replicas: Replicas, spec: PipelineSpec, dead: Collection[str], resumed: Sequence[Resumption]
) -> Steps[list[Listener]]:
    """What is known of each session's listener: where he listens, else where it was reported to."""
    there = [[stage] if (stage := _listening(spec)) and stage not in dead else [] for _ in resumed]
    known = yield from _ask(replicas, spec, there, resumed)
    hearing = [] if all(known) else [stage for stage in _hearing(spec) if stage not in dead]
    others = yield from _ask(replicas, spec, [[] if each else hearing for each in known], resumed)
    return [_latest([*a, *b], each.num_windows) for a, b, each in zip(known, others, resumed, strict=True)]


def _ask(
    replicas: Replicas, spec: PipelineSpec, stages: Sequence[Collection[str]], resumed: Sequence[Resumption]
) -> Steps[list[list[Listener]]]:
    """What these stages, of each session, know of its listener."""
    replies = [
        [replicas.listener(stage, each) for stage in those if stage in stages_of(each.session, spec)]
        for those, each in zip(stages, resumed, strict=True)
    ]
    yield [reply for each in replies for reply in each]
    return [[known for reply in each if not reply.error and (known := reply.result())] for each in replies]


def _latest(known: Sequence[Listener], num_windows: int) -> Listener:
    """Of what several know; where all who knew something have died, there is what was reported."""
    latest = max(known, key=lambda each: (each.ack.epoch, each.ack.at_ns), default=Listener(Ack(0), 0))
    return replace(latest, ack=replace(latest.ack, num_windows=max(latest.ack.num_windows, num_windows)))


def _listening(spec: PipelineSpec) -> str | None:
    """The stage that knows how far the listener has heard, and tells the others."""
    return next((stage for stage in spec.stages if any(kind.is_control for kind in _made(spec, stage))), None)


def _hearing(spec: PipelineSpec) -> list[str]:
    """The stages that are told by that one."""
    return [edge.target.stage for edge in spec.edges if edge.kind.is_control and edge.source.stage == _listening(spec)]


def _speaks(spec: PipelineSpec, stage: str) -> bool:
    """Whether what this stage makes is said."""
    return any(kind.is_fenced for kind in _made(spec, stage))


def _made(spec: PipelineSpec, stage: str) -> list[Kind[Any]]:
    return [port.kind for port in spec.types[stage].outputs.values()]
