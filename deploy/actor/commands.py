"""What the coordinator may ask of an actor. Everything here runs in the loop's thread, between two turns.

How its ends reach others is the bus's (`EdgeBus`): sockets in an actor's process, time alone in the simulator.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from deploy.actor.accounts import NOTHING, EdgeEnds
from deploy.actor.loop import ActorLoop
from deploy.actor.plan import REFUSALS, ActorPlan, Address, Answer, Call, Report
from deploy.actor.runner import StageRunner
from deploy.actor.session_plan import SessionPlan
from graph.chunk import Scalar, SessionId
from graph.edge import EdgeObserver, EdgeRule, Receiver, Sender
from graph.ledger import merge
from stages.session import Mailbox


class EdgeBus(Protocol):
    """What opens and closes the ends of an actor's edges (graph/bus.py: Bus)."""

    def bind(self, rule: EdgeRule, address: str | None, observer: EdgeObserver) -> tuple[Receiver, str]: ...
    def connect(self, rule: EdgeRule, endpoint: str, observer: EdgeObserver) -> Sender: ...
    def bury(self, sender: Sender) -> None: ...
    def reconnect(self, sender: Sender, endpoint: str, observer: EdgeObserver) -> None: ...


class Ends:
    """An actor's ends of its edges."""

    def __init__(self, plan: ActorPlan, bus: EdgeBus, host: str, observe: Callable[[str], EdgeObserver]) -> None:
        """host: where it is reached over TCP. observe: makes what is told of an edge."""
        self._plan, self._bus, self._host, self._observe = plan, bus, host, observe
        self.receivers: dict[str, Receiver] = {}
        self.senders: dict[str, list[Sender]] = {}
        self._observers: dict[str, EdgeObserver] = {}

    def bind(self, over_tcp: Mapping[str, bool]) -> dict[str, str]:
        """Open the receiving ends; returns the endpoints. over_tcp: by edge."""
        endpoints: dict[str, str] = {}
        for edge, tcp in over_tcp.items():
            host = self._host if tcp else None
            self.receivers[edge], endpoints[edge] = self._bus.bind(self._rule(edge), host, self._observer(edge))
        return endpoints

    def connect(self, endpoints: Mapping[str, list[str]]) -> None:
        """Open the sending ends: per edge the endpoints of all replicas of the other stage."""
        for edge, replicas in endpoints.items():
            rule, observer = self._rule(edge), self._observer(edge)
            self.senders[edge] = [self._bus.connect(rule, endpoint, observer) for endpoint in replicas]

    def bury(self, ends: Sequence[tuple[str, int]]) -> None:
        """Replicas that this actor sends to have died: on which edge, and which one."""
        for edge, replica in ends:
            self._bus.bury(self.senders[edge][replica])

    def reconnect(self, ends: Sequence[tuple[str, int, str]]) -> None:
        """Others have taken their place: on which edge, which one, and its endpoint."""
        for edge, replica, endpoint in ends:
            self._bus.reconnect(self.senders[edge][replica], endpoint, self._observer(edge))

    def accounts(self) -> dict[str, EdgeEnds]:
        """This actor's ends, by edge."""
        edges = dict.fromkeys((*self.receivers, *self.senders))
        return {edge: self._ends_of(self.senders.get(edge, ()), self.receivers.get(edge)) for edge in edges}

    @staticmethod
    def _ends_of(senders: Sequence[Sender], receiver: Receiver | None) -> EdgeEnds:
        accounts = [sender.account() for sender in senders]
        sent = merge(accounts) if len(accounts) > 1 else next(iter(accounts), NOTHING)
        if receiver is None:
            return EdgeEnds(sent)
        return EdgeEnds(sent, receiver.account(), {peer.decode(): number for peer, number in receiver.arrived.items()})

    def _rule(self, edge: str) -> EdgeRule:
        spec = next(e for e in self._plan.edges if e.id == edge)
        return EdgeRule(edge, spec.credit, spec.when_full)

    def _observer(self, edge: str) -> EdgeObserver:
        if edge not in self._observers:
            self._observers[edge] = self._observe(edge)
        return self._observers[edge]


class Commands:
    """By their names, as the coordinator posts them (deploy/actor/plan.py: Call)."""

    def __init__(self, address: Address, ends: Ends, build: Callable[[], list[StageRunner]]) -> None:
        """address: of this actor. build: makes the stages, with their weights."""
        self._ends, self._build = ends, build
        self.runners: dict[str, StageRunner] = {}
        self.loop = ActorLoop([])
        self._by_name: Mapping[str, Callable[..., object]] = {
            "address": lambda: address,  # answered once the process is up, which is long before its models are
            "bind": ends.bind,
            "connect": ends.connect,
            "bury": ends.bury,
            "reconnect": ends.reconnect,
            "load": self._load,
            "report": self._report,
            "open_sessions": self._open_sessions,
            "begin_sessions": self._begin_sessions,
            "resume_session": self._resume_session,
            "add_view": lambda stage, *arguments: self.runners[stage].add_view(*arguments),
            "remove_view": lambda stage, *arguments: self.runners[stage].remove_view(*arguments),
            "end_session": lambda stage, session: self.runners[stage].end_session(session),
            "close_session": lambda stage, session: self.runners[stage].close_session(session),
            "listener": lambda stage, session: self.runners[stage].listener(session),
            "reroute": lambda stage, *arguments: self.runners[stage].reroute(*arguments),
            "end_input": lambda stage, *arguments: self.runners[stage].end_input(*arguments),
            "tell": self._tell,
        }

    def perform(self, calls: Sequence[Call]) -> list[Answer]:
        """Do these, in order, each whatever became of those before it."""
        return [self._answer(call) for call in calls]

    def close_sessions(self) -> None:
        """All of them, as if each had been closed."""
        for runner in self.runners.values():
            for session in runner.snapshot().sessions:
                runner.close_session(session)

    def close_stages(self) -> None:
        """After a failure: files and decoders are closed; the sockets' other ends will find out by themselves."""
        for runner in self.runners.values():
            for session in runner.snapshot().sessions:
                runner.stage.close_session(session)

    def _answer(self, call: Call) -> Answer:
        try:
            return Answer(self._by_name[call.method](*call.arguments))
        except BaseException as error:  # whatever a stage's load() or another hook raises
            if not isinstance(error, REFUSALS):
                logging.exception("%s has failed", call.method)
            return Answer(error=_portable(error))

    def _load(self) -> str:
        """Returns what its stages compute with, for the user."""
        runners = self._build()
        self.loop = ActorLoop(runners)
        self.runners = {runner.name: runner for runner in runners}
        return "; ".join(runner.stage.runs_with for runner in runners if runner.stage.runs_with)

    def _report(self) -> Report:
        return Report({name: runner.snapshot() for name, runner in self.runners.items()}, self._ends.accounts())

    def _open_sessions(self, stage: str, plans: Sequence[SessionPlan]) -> None:
        """Raises StageError when there is no room for one; those before it are open then."""
        for plan in plans:
            self.runners[stage].open_session(_own(plan))

    def _begin_sessions(self, stage: str, origins_ns: Mapping[SessionId, int]) -> None:
        """Let their clocks run, each from event time 0 at its origin, of this node's monotonic clock."""
        for session, origin_ns in origins_ns.items():
            self.runners[stage].begin_session(session, origin_ns)

    def _resume_session(self, plans: Mapping[str, SessionPlan], origin_ns: int) -> None:
        """Both, for a session that is resumed at these stages. Raises StageError where one has no room; then it is open
        at none."""
        opened: list[StageRunner] = []
        try:
            for stage, plan in plans.items():
                self.runners[stage].open_session(_own(plan))
                opened.append(self.runners[stage])
        except BaseException:
            for runner, plan in zip(opened, plans.values(), strict=False):
                runner.close_session(plan.session.id)
            raise
        for runner, plan in zip(opened, plans.values(), strict=True):
            runner.begin_session(plan.session.id, origin_ns)

    def _tell(self, stage: str, session: SessionId, kind: str, attrs: Mapping[str, Scalar], cuts: bool) -> None:
        self.runners[stage].tell(session, kind, attrs, cuts=cuts)


def _own(plan: SessionPlan) -> SessionPlan:
    """A stage knows of a session what it was told itself, and nothing of what others in its process were: what comes
    in one batch of calls is one object for all of them."""
    return replace(plan, session=replace(plan.session, mailbox=Mailbox()))


def _portable(error: BaseException) -> Exception:
    """The error as another process can take it: what can't be sent, or would end who takes it, is told by its text."""
    if isinstance(error, Exception):
        with contextlib.suppress(Exception):
            pickle.loads(pickle.dumps(error))  # some can be written and not read
            return error
    return RuntimeError(f"{type(error).__name__}: {error}")
