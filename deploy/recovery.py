"""A replica has died: how its sessions go on at another one, or at the one that takes its place.

A session goes on with the window that it is in. What the dead replica held is lost and counted, what it knew is
forgotten: an LLM begins with its system prompt. Where speech came through it, what was said and not heard is taken
back, as if the listener had interrupted: so all who speak begin anew together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from deploy.routing import session_plan, stages_of
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


def reopen(replicas: Replicas, spec: PipelineSpec, stage: str, going: Going) -> None:
    """Open a session again at a stage. Raises StageError when that has no room for it."""
    listener = Listener(Ack(0), 0)
    if "speaker" in stages_of(going.session, spec):
        listener = replicas.listener("speaker", going.replicas["speaker"], going.session.id) or listener
    plan = replace(session_plan(spec, stage, going.session, going.replicas), goes_on=listener)
    replicas.open(stage, going.replicas[stage], plan)
    replicas.begin(stage, going.replicas[stage], going.session.id)


def redirect(replicas: Replicas, spec: PipelineSpec, stage: str, going: Going) -> list[str]:
    """Let what is sent to a stage go where the session is now; it may still have to wait for the link.

    Returns the edges on which nothing will come, since the session has ended at their other end.
    """
    passed = stages_of(going.session, spec)
    ended: list[str] = []
    for edge in inputs_of(spec, stage):
        source = edge.source.stage
        if source in passed:
            where = (source, going.replicas[source])
            is_open = replicas.reroute(*where, going.session.id, edge.id, going.replicas[stage])
            ended += [edge.id] if not is_open and edge.kind != "playback" else []
    return ended


def announce(
    replicas: Replicas, spec: PipelineSpec, stage: str, going: Going, actor: str, ended: Sequence[str]
) -> None:
    """Once it is reached: end what has ended, and tell that `actor` had died. Who speaks begins anew with it."""
    for edge in ended:
        replicas.end_input(stage, going.replicas[stage], going.session.id, edge)
    teller = next(each for each in TELLING if each in stages_of(going.session, spec))
    cuts = teller == "speaker" and stage in SPEAKING
    attrs: dict[str, Scalar] = {"actor": actor}
    replicas.tell(teller, going.replicas[teller], going.session.id, "recovered", attrs, cuts=cuts)


def inputs_of(spec: PipelineSpec, stage: str) -> list[EdgeSpec]:
    """The edges that come to a stage."""
    return [edge for edge in spec.edges if edge.target.stage == stage]
