"""What must hold of a simulated pipeline, whatever happens.

Units come as 0, 1, 2 …, each once (deploy/simulator/costly.py); nothing is sent without credit; no more speech waits
unheard than lead + window; the ledger of every edge is exact and queues stay bounded; every window comes to its end,
and every session; and all is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from deploy.actor.accounts import Accounts
from deploy.actor.plan import Call
from deploy.actor.runner import MAX_READY
from deploy.actor.session_plan import SessionPlan
from deploy.simulator.actors import VirtualActor
from deploy.simulator.links import SendEnd
from deploy.simulator.world import World
from graph.chunk import NS_PER_S, Chunk, SessionId
from graph.credit import Limit
from graph.edge import CONTROL_PER_CHUNK, Arrival, EdgeRule
from graph.ledger import Account

MAX_VIOLATIONS: Final = 20
FEW: Final = 8

_Way: TypeAlias = tuple[str, tuple[str, str], SessionId, int]
"""Of chunks: their edge, who sends and who receives, their session and its incarnation."""


@dataclass(frozen=True, slots=True)
class Violation:
    """What did not hold. time_s: of the world."""

    seed: int
    time_s: float
    rule: str
    what: str


class Invariants:
    """Sees what is sent and settled, and looks at all actors now and then.

    trace: what has happened, a line per event, where it is kept.
    """

    def __init__(
        self, world: World, seed: int, edges: Sequence[str], num_sessions: int, longest: int, *, traced: bool
    ) -> None:
        """longest: for how many windows an actor may hang; what comes without credit waits for it."""
        self._world, self._seed, self._edges, self._num_sessions = world, seed, edges, num_sessions
        self._few = FEW + CONTROL_PER_CHUNK * longest
        self._traced = traced
        self._under_way: dict[_Way, list[Chunk]] = {}
        self._accounts = Accounts()
        self.trace: list[str] = []
        self.violations: list[Violation] = []

    def violated(self, rule: str, what: str) -> None:
        if len(self.violations) < MAX_VIOLATIONS:
            self.violations.append(Violation(self._seed, self._world.now_ns / NS_PER_S, rule, what))

    def note(self, what: str) -> None:
        """For the trace."""
        if self._traced:
            self.trace.append(f"{self._world.now_ns / NS_PER_S:9.4f} s  {what}")

    # ---- chunk by chunk ----------------------------------------------------------------------------------------------

    def sent(self, link: SendEnd, chunk: Chunk) -> None:
        if self._traced:
            self.note(f"{link.rule.id}: {chunk.session} sends {_chunk_text(chunk)}")
        if not chunk.is_control:
            under_way = self._under_way.setdefault(_way(link, chunk), [])
            under_way.append(chunk)
            self._check_credit(link.rule, under_way)

    def settled(self, link: SendEnd, arrival: Arrival) -> None:
        chunk = arrival.chunk
        if self._traced:
            self.note(f"{arrival.edge}: {chunk.session} has done with {_chunk_text(chunk)}")
        way = _way(link, chunk)
        under_way = self._under_way.get(way, [])
        left = [other for other in under_way if other is not chunk]
        if len(left) == len(under_way):
            self.violated("ledger", f"{arrival.edge}: {chunk.stream} {chunk.seq} is settled twice")
        self._under_way[way] = left

    def buried(self, link: SendEnd) -> None:
        """Who sent there knows that what was under way is lost."""
        sender, receiver = link.ends
        if link.target.party.is_dead:  # else it is not up yet, and has got nothing
            self._accounts.died(receiver, [sender])
        for way in [way for way in self._under_way if way[:2] == (link.rule.id, link.ends)]:
            del self._under_way[way]

    def died(self, actor: VirtualActor) -> None:
        """Its last word is known here, other than to the coordinator."""
        self.note(f"{actor.peer} dies")
        self._accounts.reported(actor.peer, actor.ends.accounts())
        self._accounts.died(actor.peer, ())

    def called(self, actor: VirtualActor, call: Call) -> None:
        if self._traced:
            self.note(f"{actor.peer} has done {call.method} {', '.join(map(_session_in, call.arguments))}")

    def _check_credit(self, rule: EdgeRule, under_way: Sequence[Chunk]) -> None:
        """What was sent and has not been settled, as neither end counts it."""
        spent_ns, limit_ns = sum([chunk.duration_ns for chunk in under_way]), rule.limit.duration_ns
        is_too_long = limit_ns is not None and spent_ns > limit_ns and len(under_way) > 1
        if len(under_way) > rule.limit.chunks or is_too_long:
            amount = f"{len(under_way)} chunks, {spent_ns / NS_PER_S:.3f} s"
            self.violated("credit", f"{rule.id}, {under_way[0].session}: {amount} are under way")

    # ---- now and then ------------------------------------------------------------------------------------------------

    def accounts(self, actors: Iterable[VirtualActor]) -> dict[str, Account]:
        """Of every edge, the ends of dead actors included. actors: that live."""
        for actor in actors:
            self._accounts.reported(actor.peer, actor.ends.accounts())
        return self._accounts.of(self._edges)

    def check(self, actors: Sequence[VirtualActor]) -> None:
        for actor in actors:
            for _, sender in actor.bus.senders:
                self._bound(f"{sender.rule.id}: chunks that wait for credit", sender.num_waiting, sender.rule.limit)
            for link, receiver in actor.bus.receivers:
                self._bound(f"{receiver.rule.id}: messages that were not taken", link.num_waiting, receiver.rule.limit)
            for name, runner in actor.runners.items():
                self._bound(f"{name}: units that wait", runner.replica.num_ready, Limit(MAX_READY))
        for edge, account in self.accounts(actors).items():
            if account.in_flight < 0:
                self.violated("ledger", f"{edge}: more has come out than went in: {account}")

    def check_exact(self, accounts: Mapping[str, Account]) -> None:
        """At the end nothing is under way."""
        for edge, account in accounts.items():
            if account.in_flight:
                self.violated("ledger", f"{edge}: {account.in_flight} chunks are neither delivered nor dropped")

    def _bound(self, what: str, number: int, limit: Limit) -> None:
        """Per session: what credit allows, and the control and the windows without anything beside it."""
        most = self._num_sessions * (limit.chunks * (1 + CONTROL_PER_CHUNK) + self._few)
        if number > most:
            self.violated("bounded queues", f"{what}: {number}, {most} is the most")


def _way(link: SendEnd, chunk: Chunk) -> _Way:
    return link.rule.id, link.ends, chunk.session, chunk.incarnation


def _session_in(argument: object) -> str:
    """An argument of a call, in a word."""
    return argument.session.id if isinstance(argument, SessionPlan) else str(argument)


def _chunk_text(chunk: Chunk) -> str:
    what = chunk.type.name.lower() if chunk.is_control else f"chunk {chunk.seq}"
    return f"{what} of {chunk.stream} at {chunk.start_ns / NS_PER_S:g} s, epoch {chunk.epoch}"
