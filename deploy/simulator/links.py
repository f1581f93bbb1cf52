"""The bus of a virtual actor: links that carry chunks and grants, and only take time for it.

Rule: as graph/bus.py. What an actor sends reaches the replica that was bound there when it was connected, and nobody
else; what was under way when its sender died is lost with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Final, Protocol

from deploy.simulator.world import HostClock, Network, World
from graph.chunk import Chunk, ChunkType, SessionId
from graph.credit import Grant
from graph.edge import Arrival, EdgeObserver, EdgeRule, Receiver, Sender, SilentObserver
from graph.ledger import Reason

RECEIVE_BATCH: Final = 64  # as in graph/bus.py


class Party(Protocol):
    """Whose ends they are: an actor (deploy/simulator/actors.py)."""

    peer: str
    is_dead: bool
    num_waiting: int

    def wake(self) -> None: ...
    def take_grants(self, link: SendEnd) -> None: ...


class Witness(Protocol):
    """Sees what passes (deploy/simulator/invariants.py)."""

    def sent(self, link: SendEnd, chunk: Chunk) -> None: ...
    def settled(self, link: SendEnd, arrival: Arrival) -> None: ...
    def buried(self, link: SendEnd) -> None: ...


class ReceiveEnd:
    """The link of a Receiver."""

    def __init__(self, world: World, party: Party, grants: Network, rng: Random) -> None:
        self.party = party
        self._world, self._grants, self._rng = world, grants, rng
        self._came: deque[tuple[bytes, Chunk]] = deque()
        self._epochs: dict[tuple[SessionId, int], int] = {}  # the newest that has come, by incarnation
        self.peers: dict[bytes, SendEnd] = {}

    @property
    def num_waiting(self) -> int:
        """Messages that have come and were not taken."""
        return len(self._came)

    def come(self, peer: bytes, chunk: Chunk) -> None:
        if self.party.is_dead:
            return
        self._came.append((peer, chunk))
        self.party.num_waiting += 1
        key = (chunk.session, chunk.incarnation)
        tells_of_barge_in = chunk.epoch > self._epochs.get(key, 0)
        if tells_of_barge_in:
            self._epochs[key] = chunk.epoch
        # In real time nothing is done about the listener's news until the next window comes (`Inbox.take()`), so
        # here they wait for it without a turn of their own.
        if tells_of_barge_in or chunk.type is not ChunkType.PLAYBACK:
            self.party.wake()

    def receive(self) -> list[tuple[bytes, Chunk]]:
        taken = [self._came.popleft() for _ in range(min(len(self._came), RECEIVE_BATCH))]
        self.party.num_waiting -= len(taken)
        return taken

    def refused(self) -> list[tuple[bytes, Chunk]]:
        return []

    def grant(self, peer: bytes, session: SessionId, incarnation: int, grant: Grant) -> bool:
        end = self.peers[peer]
        for after_ns in self._grants.arrivals_ns(self._rng):
            self._world.after(after_ns, partial(end.come, session, incarnation, grant))
        return True


class SendEnd:
    """The link of a Sender: messages keep their order, unless the network is one that loses some."""

    def __init__(
        self,
        world: World,
        party: Party,
        target: ReceiveEnd,
        rule: EdgeRule,
        network: Network,
        rng: Random,
        witness: Witness,
    ) -> None:
        self.target, self.rule = target, rule
        self.ends = party.peer, target.party.peer  # who sends, and who receives
        self._world, self._party, self._network, self._rng = world, party, network, rng
        self._witness = witness
        self._peer = party.peer.encode()
        self._last_ns = 0
        self._grants: list[tuple[SessionId, int, Grant]] = []
        target.peers[self._peer] = self

    def send(self, chunk: Chunk) -> bool:
        if self._network.refused and self._rng.random() < self._network.refused:
            return False
        self._witness.sent(self, chunk)
        for after_ns in self._network.arrivals_ns(self._rng):
            at_ns = self._world.now_ns + after_ns
            if not self._network.lost:
                at_ns = self._last_ns = max(at_ns, self._last_ns)
            self._world.at(at_ns, partial(self._arrive, chunk))
        return True

    def _arrive(self, chunk: Chunk) -> None:
        if not self._party.is_dead:
            self.target.come(self._peer, chunk)

    def come(self, session: SessionId, incarnation: int, grant: Grant) -> None:
        self._grants.append((session, incarnation, grant))
        self._party.take_grants(self)

    def grants(self) -> list[tuple[SessionId, int, Grant]]:
        came, self._grants = self._grants, []
        return came


class Wires:
    """The network that all actors are on. endpoints: who is bound where."""

    def __init__(
        self,
        world: World,
        witness: Witness,
        new_rng: Callable[[str], Random],
        network_of: Callable[[str], Network],
        grants: Network,
    ) -> None:
        """new_rng: by a name, of which each is drawn from in its own order. network_of: by edge."""
        self.world, self.witness, self.new_rng = world, witness, new_rng
        self.network_of, self.grants = network_of, grants
        self.endpoints: dict[str, ReceiveEnd] = {}


class VirtualBus:
    """One actor's ends (deploy/actor/commands.py: EdgeBus)."""

    def __init__(self, party: Party, clock: HostClock, wires: Wires) -> None:
        self._party, self._clock, self._wires = party, clock, wires
        self.senders: list[tuple[SendEnd, Sender]] = []
        self.receivers: list[tuple[ReceiveEnd, Receiver]] = []

    def bind(self, rule: EdgeRule, address: str | None, observer: EdgeObserver) -> tuple[Receiver, str]:
        wires, endpoint = self._wires, f"virtual://{self._party.peer}/{rule.id}"
        link = ReceiveEnd(wires.world, self._party, wires.grants, wires.new_rng(endpoint))
        self.receivers.append((link, WatchedReceiver(rule, link, wires.witness)))
        wires.endpoints[endpoint] = link
        return self.receivers[-1][1], endpoint

    def connect(self, rule: EdgeRule, endpoint: str, observer: EdgeObserver) -> Sender:
        link = self._link(rule, endpoint)
        self.senders.append((link, Sender(rule, link, observer, self._clock.monotonic_ns)))
        return self.senders[-1][1]

    def bury(self, sender: Sender) -> None:
        sender.bury()
        self._wires.witness.buried(self.senders[self._index_of(sender)][0])

    def reconnect(self, sender: Sender, endpoint: str, observer: EdgeObserver) -> None:
        link = self._link(sender.rule, endpoint)
        self.senders[self._index_of(sender)] = (link, sender)
        sender.meet(link)

    def _link(self, rule: EdgeRule, endpoint: str) -> SendEnd:
        wires = self._wires
        rng = wires.new_rng(f"{self._party.peer} to {endpoint}")
        target, network = wires.endpoints[endpoint], wires.network_of(rule.id)
        return SendEnd(wires.world, self._party, target, rule, network, rng, wires.witness)

    def _index_of(self, sender: Sender) -> int:
        return next(index for index, (_, each) in enumerate(self.senders) if each is sender)


class WatchedReceiver(Receiver):
    """Tells of each chunk that is settled."""

    def __init__(self, rule: EdgeRule, link: ReceiveEnd, witness: Witness) -> None:
        super().__init__(rule, link, SilentObserver())
        self._ends, self._witness = link, witness

    def deliver(self, arrival: Arrival, age_s: float) -> None:
        self._witness.settled(self._ends.peers[arrival.peer], arrival)
        super().deliver(arrival, age_s)

    def drop(self, arrival: Arrival, reason: Reason) -> None:
        self._witness.settled(self._ends.peers[arrival.peer], arrival)
        super().drop(arrival, reason)
