"""A virtual actor: the real loop (actor/loop.py) and the real commands (actor/commands.py) of an actor's process, which
takes its turns in virtual time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final, Protocol

from deploy.actor.commands import Commands, Ends
from deploy.actor.loop import ActorLoop
from deploy.actor.plan import REFUSALS, ActorPlan, Address, Answer, Call
from deploy.actor.runner import StageRunner
from deploy.actor.suspects import NO_WORK, Work
from deploy.simulator.links import SendEnd, VirtualBus, Wires
from deploy.simulator.world import HostClock
from graph.chunk import NS_PER_MS
from graph.edge import Arrival, Receiver, Sender, SilentObserver
from graph.window import Unit

GRANT_DELAY_NS: Final = NS_PER_MS  # as in graph/bus.py
RETRY_NS: Final = 5 * NS_PER_MS  # as in graph/bus.py
IDLE_NS: Final = 500 * NS_PER_MS  # as deploy/actor/actor.py
CHANGE_NO_WORK: Final = frozenset({"address", "report", "listener"})

Build = Callable[["VirtualActor"], list[StageRunner]]


class Watch(Protocol):
    """Sees what becomes of actors."""

    def called(self, actor: VirtualActor, call: Call) -> None:
        """A call was done."""

    def died(self, actor: VirtualActor) -> None: ...


class VirtualActor:
    """A process with its stages, one thread: it takes a turn when something comes or is due, one after the other, and
    does between two of them what it is called for."""

    def __init__(
        self, plan: ActorPlan, host: HostClock, wires: Wires, build: Build, watch: Watch, load_ns: int
    ) -> None:
        """build: makes the stages, which takes load_ns."""
        self.plan, self.host, self.peer = plan, host, plan.peer
        self.bus = VirtualBus(self, host, wires)
        self.ends = Ends(plan, self.bus, "", lambda edge: SilentObserver())
        self.num_waiting = 0  # messages that have come and were not taken
        self.is_dead = False
        self.loop = ActorLoop([])
        self.receives: Callable[[int], None] = lambda num_chunks: None  # what it takes to receive them
        self._commands = Commands(Address(plan.peer, "", 0, 0), self.ends, lambda: build(self))
        self._world, self._watch, self._load_ns = wires.world, watch, load_ns
        self._granted: set[SendEnd] = set()  # whose grants were not taken
        self._blocked: list[Sender] = []
        self._owing: list[Receiver] = []
        self._free_ns = 0
        self._next_turn_ns: int | None = None
        self._noted = NO_WORK
        self._works_until_ns = 0  # at those
        self._last_work = NO_WORK  # when it died

    @property
    def runners(self) -> dict[str, StageRunner]:
        """By stage; none before they are loaded."""
        return self._commands.runners

    def die(self) -> None:
        """Do nothing any more."""
        if not self.is_dead:
            self._last_work = self.work
            self.is_dead = True
            self._watch.died(self)

    @property
    def work(self) -> Work:
        """What it works on, or did when it died."""
        if self.is_dead:
            return self._last_work
        return self._noted if self._world.now_ns < self._works_until_ns else NO_WORK

    def bury_all(self) -> None:
        """Those that have died, and of whom nobody has said so yet."""
        for link, sender in self.bus.senders:
            if link.target.party.is_dead:
                self.bus.bury(sender)

    def stall(self, until_ns: int) -> None:
        """Do nothing until then; whose data it is at work on, it is at work on all that time."""
        self._free_ns = max(self._free_ns, until_ns)
        if self._world.now_ns < self._works_until_ns:
            self._works_until_ns = self._free_ns

    @contextmanager
    def note(self, stage: str, units: Sequence[Unit]) -> Iterator[None]:
        """It works on these windows (deploy/actor/suspects.py: WorkNote)."""
        self._noted = Work(stage, tuple((unit.session, unit.index) for unit in units))
        yield

    # ---- what it is called for ---------------------------------------------------------------------------------------

    def perform(self, calls: Sequence[Call], answered: Callable[[list[Answer]], None]) -> None:
        """Do these as soon as no turn is under way. answered: given the answers, unless it dies before."""
        if self.is_dead:
            return
        if self._free_ns > self._world.now_ns:
            self._world.at(self._free_ns, lambda: self.perform(calls, answered))
            return
        answers = self._commands.perform(calls)
        for call, answer in zip(calls, answers, strict=True):
            if answer.error is not None and not isinstance(answer.error, REFUSALS):
                raise answer.error
            if answer.error is None:
                self._watch.called(self, call)
        if any(call.method == "load" for call in calls):
            self.loop = self._commands.loop
            self._free_ns = self._world.now_ns + self._load_ns
        self._world.at(self._free_ns, lambda: answered(answers))
        if not all(call.method in CHANGE_NO_WORK for call in calls):
            self.wake()

    # ---- its turns ---------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        self._schedule(self._world.now_ns)

    def take_grants(self, link: SendEnd) -> None:
        """As Bus.wait() does while its loop sleeps: only a session that has room again wakes the loop."""
        if self.is_dead:
            return
        self._granted.add(link)
        if self._free_ns <= self._world.now_ns and self._flush_senders():
            self.wake()

    def _flush_senders(self) -> bool:
        """Whether a session that waited has room again."""
        if not self._granted and not self._blocked:
            return False
        eased = False
        for link, sender in self.bus.senders:
            if link in self._granted or sender.is_blocked:
                sender.flush()
                eased = sender.has_eased() or eased
        self._granted.clear()
        self._blocked = [sender for sender in self._blocked if sender.is_blocked]
        return eased

    def _arrivals(self) -> list[Arrival]:
        """What has come in. Grants are taken and given on the way, as by Bus.wait()."""
        self._flush_senders()
        for receiver in self._owing:
            receiver.flush()
        if not self.num_waiting:
            return []
        return [arrival for link, receiver in self.bus.receivers if link.num_waiting for arrival in receiver.receive()]

    def _schedule(self, at_ns: int) -> None:
        at_ns = max(at_ns, self._free_ns)
        if self._next_turn_ns is None or at_ns < self._next_turn_ns:
            self._next_turn_ns = at_ns
            self._world.at(at_ns, partial(self._turn_at, at_ns))

    def _turn_at(self, at_ns: int) -> None:
        if at_ns != self._next_turn_ns or self.is_dead:
            return  # an earlier one has come in between
        self._next_turn_ns = None
        if self._free_ns > at_ns:  # stalled meanwhile
            self._schedule(self._free_ns)
            return
        arrivals = self._arrivals()
        self.receives(len(arrivals))
        self.loop.turn(arrivals)
        self._blocked = [sender for _, sender in self.bus.senders if sender.is_blocked]
        self._owing = [receiver for _, receiver in self.bus.receivers if receiver.owes_grants]
        due_ns = 0 if self.num_waiting else self._due_in_ns()
        self._free_ns = self._works_until_ns = self._world.now_ns
        self._world.now_ns = at_ns
        self._schedule(self._free_ns + due_ns)

    def _due_in_ns(self) -> int:
        due_ns = self.loop.due_in_ns()
        due_ns = IDLE_NS if due_ns is None else min(due_ns, IDLE_NS)
        if self._owing:
            return min(due_ns, GRANT_DELAY_NS)
        return min(due_ns, RETRY_NS) if self._blocked else due_ns
