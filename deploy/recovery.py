"""A replica has died: how its sessions go on at another one, or at the one that takes its place.

A session goes on with the window that it is in. What the dead replica held is lost and counted, what it knew is
forgotten: an LLM begins with its system prompt. Where speech came through it, what was said and not heard is taken
back, as if the listener had interrupted: so all who speak begin anew together.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from deploy.routing import opening_order, session_plan, stages_of
from deploy.runner import Listener, SessionPlan
from graph.chunk import Scalar, SessionId
from graph.spec import EdgeSpec, PipelineSpec
from graph.tail import Ack
from stages.stage import Session

SPEAKING: Final = frozenset({"llm", "tts", "vocoder"})
TELLING: Final = ("speaker", "llm", "camera")  # who can tell events


class Replicas(Protocol):
    """The stages' replicas, each named by its stage and number."""

    def open(self, stage: str, replica: int, plan: SessionPlan) -> None: ...
    def begin(self, stage: str, replica: int, session: SessionId) -> None: ...
    def listener(self, stage: str, replica: int, session: SessionId) -> Listener | None: ...
    def reroute(self, stage: str, replica: int, session: SessionId, edge: str, target: int) -> bool: ...
    def end_input(self, stage: str, replica: int, session: SessionId, edge: str) -> None: ...
    def tell(
        self, stage: str, replica: int, session: SessionId, kind: str, attrs: dict[str, Scalar], *, cuts: bool
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Going:
    """A session that goes on, and per stage the replica where it is from now on."""

    session: Session
    replicas: dict[str, int]


def reopen(replicas: Replicas, spec: PipelineSpec, stages: Collection[str], going: Going) -> None:
    """Open a session at these stages again, which died together. Raises StageError when one has no room for it."""
    session = going.session
    listener = Listener(Ack(0), 0)
    if "speaker" in stages_of(session, spec):
        listener = replicas.listener("speaker", going.replicas["speaker"], session.id) or listener
    for stage in _passed(spec, stages, session):
        plan = replace(session_plan(spec, stage, session, going.replicas), goes_on=listener)
        replicas.open(stage, going.replicas[stage], plan)
    for stage in _passed(spec, stages, session):
        replicas.begin(stage, going.replicas[stage], session.id)


def reconnect(replicas: Replicas, spec: PipelineSpec, stages: Collection[str], going: Going, actor: str) -> None:
    """Let what is sent to these stages go there again. actor: the name of the one that has died, to be told."""
    session, passed = going.session, stages_of(going.session, spec)
    for edge in inputs_of(spec, stages):
        source, target = edge.source.stage, edge.target.stage
        if {source, target} <= passed:
            replica = going.replicas[target]
            is_open = replicas.reroute(source, going.replicas[source], session.id, edge.id, replica)
            if not is_open and edge.kind != "playback":
                replicas.end_input(target, replica, session.id, edge.id)
    teller = next(stage for stage in TELLING if stage in passed)
    cuts = teller == "speaker" and bool(SPEAKING & set(stages))
    attrs: dict[str, Scalar] = {"actor": actor}
    replicas.tell(teller, going.replicas[teller], session.id, "recovered", attrs, cuts=cuts)


def inputs_of(spec: PipelineSpec, stages: Collection[str]) -> Sequence[EdgeSpec]:
    """The edges that come to these stages from others."""
    return [edge for edge in spec.edges if edge.target.stage in stages and edge.source.stage not in stages]


def _passed(spec: PipelineSpec, stages: Collection[str], session: Session) -> list[str]:
    return [stage for stage in opening_order(spec) if stage in stages and stage in stages_of(session, spec)]
