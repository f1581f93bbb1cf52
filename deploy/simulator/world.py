"""A pipeline in virtual time: the real loops (actor/runner.py) and edges (graph/edge.py), with a clock, links and
devices that are moved by events.

Rule: nothing here decides anything about order, credit or playback; that is what is being tried. Time is
`World.now_ns`; an actor that works moves it ahead for itself, and it goes back when its turn is over.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

from deploy.actor.loop import ActorLoop
from deploy.actor.runner import StageRunner
from graph.chunk import NS_PER_MS, Chunk, ChunkType, SessionId
from graph.credit import Grant
from graph.edge import Arrival, Receiver, Sender

RECEIVE_BATCH: Final = 64  # as in graph/bus.py
GRANT_DELAY_NS: Final = NS_PER_MS  # as in graph/bus.py
RETRY_NS: Final = 5 * NS_PER_MS  # as in graph/bus.py
IDLE_NS: Final = (
    500 * NS_PER_MS
)  # ten times what deploy/actor/actor.py sleeps: it has to look for what Ray's threads ask
PPM: Final = 1_000_000


class World:
    """What happens, in the order of time."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.is_over = False
        self._num_events = 0
        self._events: list[tuple[int, int, Callable[[], None]]] = []

    def at(self, time_ns: int, action: Callable[[], None]) -> None:
        """Let something happen. What is past happens now."""
        self._num_events += 1
        heapq.heappush(self._events, (max(time_ns, self.now_ns), self._num_events, action))

    def run(self, until_ns: int) -> None:
        """Let time pass until nothing is left to happen, or it is over."""
        while self._events and self._events[0][0] <= until_ns and not self.is_over:
            self.now_ns, _, action = heapq.heappop(self._events)
            action()


class HostClock:
    """A host's monotonic clock: it drifts, and begins where it likes."""

    def __init__(self, world: World, *, drift_ppm: int = 0, begun_ns: int = 0) -> None:
        """begun_ns: what it says at the world's 0."""
        self._world = world
        self._drift_ppm = drift_ppm
        self._begun_ns = begun_ns

    def monotonic_ns(self) -> int:
        now_ns = self._world.now_ns
        return now_ns + now_ns * self._drift_ppm // PPM + self._begun_ns

    def ahead_ns(self) -> int:
        """How far it is ahead of the world's, now."""
        return self.monotonic_ns() - self._world.now_ns


class Device:
    """What computes: so many things at once, the others wait in the order in which they came."""

    def __init__(self, world: World, num_at_once: int) -> None:
        self._world = world
        self._free_ns = [0] * num_at_once
        self.busy_ns = 0

    def work(self, cost_ns: int) -> None:
        """Work as the actor whose turn it is: for it, time moves on."""
        begin_ns = max(self._world.now_ns, self._free_ns[0])
        heapq.heapreplace(self._free_ns, begin_ns + cost_ns)
        self.busy_ns += cost_ns
        self._world.now_ns = begin_ns + cost_ns


@dataclass(frozen=True, slots=True)
class Network:
    """How long a message takes: at least latency, and up to jitter more. lost, doubled: parts of the messages.
    refused: how often the link is full, and takes none for now."""

    latency_ns: int = 100_000
    jitter_ns: int = 200_000
    lost: float = 0.0
    doubled: float = 0.0
    refused: float = 0.0

    def arrivals_ns(self, rng: Random) -> list[int]:
        """After how long a message arrives; more than once, or never, if so."""
        if self.lost and rng.random() < self.lost:
            return []
        copies = 2 if self.doubled and rng.random() < self.doubled else 1
        return [self.latency_ns + int(rng.random() * self.jitter_ns) for _ in range(copies)]


class ReceiveEnd:
    """The link of a Receiver."""

    def __init__(self, world: World, actor: Actor, replica: int, grants: Network, rng: Random) -> None:
        self.actor, self.replica = actor, replica
        self._world, self._grants, self._rng = world, grants, rng
        self._came: deque[tuple[bytes, Chunk]] = deque()
        self._epochs: dict[tuple[SessionId, int], int] = {}  # the newest that has come, by incarnation
        self.peers: dict[bytes, SendEnd] = {}

    @property
    def num_waiting(self) -> int:
        """Messages that have come and were not taken."""
        return len(self._came)

    def come(self, peer: bytes, chunk: Chunk) -> None:
        if self.actor.is_dead:
            return
        self._came.append((peer, chunk))
        self.actor.num_waiting += 1
        key = (chunk.session, chunk.incarnation)
        tells_of_barge_in = chunk.epoch > self._epochs.get(key, 0)
        if tells_of_barge_in:
            self._epochs[key] = chunk.epoch
        # In real time nothing is done about the listener's news until the next window comes (`StageRunner.take()`), so
        # here they wait for it without a turn of their own.
        if tells_of_barge_in or chunk.type is not ChunkType.PLAYBACK:
            self.actor.wake()

    def receive(self) -> list[tuple[bytes, Chunk]]:
        taken = [self._came.popleft() for _ in range(min(len(self._came), RECEIVE_BATCH))]
        self.actor.num_waiting -= len(taken)
        return taken

    def refused(self) -> list[tuple[bytes, Chunk]]:
        return []

    def grant(self, peer: bytes, session: SessionId, incarnation: int, grant: Grant) -> bool:
        end = self.peers[peer]
        for after_ns in self._grants.arrivals_ns(self._rng):
            self._world.at(self._world.now_ns + after_ns, lambda: end.come(session, incarnation, grant))
        return True


class SendEnd:
    """The link of a Sender: messages keep their order, unless the network is one that loses some."""

    def __init__(
        self,
        world: World,
        actor: Actor,
        target: ReceiveEnd,
        network: Network,
        rng: Random,
        sent: Callable[[bytes, Chunk], None],
    ) -> None:
        """sent: told of each chunk that leaves, and by whom."""
        self.target = target
        self._world, self._actor, self._network, self._rng = world, actor, network, rng
        self._sent = sent
        self._peer = actor.name.encode()
        self._last_ns = 0
        self._grants: list[tuple[SessionId, int, Grant]] = []
        target.peers[self._peer] = self

    def send(self, chunk: Chunk) -> bool:
        if self._network.refused and self._rng.random() < self._network.refused:
            return False
        self._sent(self._peer, chunk)
        for after_ns in self._network.arrivals_ns(self._rng):
            at_ns = self._world.now_ns + after_ns
            if not self._network.lost:
                at_ns = self._last_ns = max(at_ns, self._last_ns)
            self._world.at(at_ns, lambda: self._arrive(chunk))
        return True

    def _arrive(self, chunk: Chunk) -> None:
        """What was under way when its sender died is lost with it."""
        if not self._actor.is_dead:
            self.target.come(self._peer, chunk)

    def come(self, session: SessionId, incarnation: int, grant: Grant) -> None:
        self._grants.append((session, incarnation, grant))
        self._actor.take_grants(self)

    def grants(self) -> list[tuple[SessionId, int, Grant]]:
        came, self._grants = self._grants, []
        return came


class Actor:
    """A process with its stages, one thread: it takes a turn when something comes or is due, one after the other."""

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self.runners: dict[str, StageRunner] = {}
        self.loop = ActorLoop([])
        self.senders: list[tuple[SendEnd, Sender]] = []
        self.receivers: list[tuple[ReceiveEnd, Receiver]] = []
        self.num_waiting = 0  # messages that have come and were not taken
        self._granted: set[SendEnd] = set()  # whose grants were not taken
        self._blocked: list[Sender] = []
        self._owing: list[Receiver] = []
        self.is_dead = False
        self._world = world
        self._free_ns = 0
        self._next_turn_ns: int | None = None

    def die(self) -> None:
        """Do nothing any more."""
        self.is_dead = True

    def start(self) -> None:
        """Once it is wired."""
        self.loop = ActorLoop(list(self.runners.values()))
        self._schedule(self._world.now_ns)

    def stall(self, until_ns: int) -> None:
        """Do nothing until then."""
        self._free_ns = max(self._free_ns, until_ns)

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
        for link, sender in self.senders:
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
        return [arrival for link, receiver in self.receivers if link.num_waiting for arrival in receiver.receive()]

    def _schedule(self, at_ns: int) -> None:
        at_ns = max(at_ns, self._free_ns)
        if self._next_turn_ns is None or at_ns < self._next_turn_ns:
            self._next_turn_ns = at_ns
            self._world.at(at_ns, lambda: self._turn_at(at_ns))

    def _turn_at(self, at_ns: int) -> None:
        if at_ns != self._next_turn_ns or self.is_dead:
            return  # an earlier one has come in between
        self._next_turn_ns = None
        if self._free_ns > at_ns:  # stalled meanwhile
            self._schedule(self._free_ns)
            return
        self.loop.turn(self._arrivals())
        self._blocked = [sender for _, sender in self.senders if sender.is_blocked]
        self._owing = [receiver for _, receiver in self.receivers if receiver.owes_grants]
        due_ns = 0 if self.num_waiting else self._due_in_ns()
        self._free_ns, self._world.now_ns = self._world.now_ns, at_ns
        self._schedule(self._free_ns + due_ns)

    def _due_in_ns(self) -> int:
        due_ns = self.loop.due_in_ns()
        due_ns = IDLE_NS if due_ns is None else min(due_ns, IDLE_NS)
        if self._owing:
            return min(due_ns, GRANT_DELAY_NS)
        return min(due_ns, RETRY_NS) if self._blocked else due_ns
