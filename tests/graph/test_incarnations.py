"""Sessions of one name, one after the other, on one edge: what of an earlier one is under way is none of a later's."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from graph.chunk import Chunk, SessionId, watermark
from graph.credit import Grant, Limit
from graph.edge import Arrival, EdgeRule, Receiver, Sender, SilentObserver
from graph.ledger import Account, merge

DOOR = SessionId("door")
RULE = EdgeRule("llm.text->tts.text", Limit(4, 8))
PEER = b"llm.0"


@dataclass
class Wire:
    """Both links of an edge: what is sent waits until it is taken."""

    chunks: deque[Chunk] = field(default_factory=deque)
    grants_: deque[tuple[SessionId, int, Grant]] = field(default_factory=deque)
    broken: list[Chunk] = field(default_factory=list)
    num_taken: int = 1_000_000

    def send(self, chunk: Chunk) -> bool:
        self.chunks.append(chunk)
        return True

    def receive(self) -> list[tuple[bytes, Chunk]]:
        return [(PEER, self.chunks.popleft()) for _ in range(min(self.num_taken, len(self.chunks)))]

    def refused(self) -> list[tuple[bytes, Chunk]]:
        broken, self.broken = self.broken, []
        return [(PEER, chunk) for chunk in broken]

    def grant(self, peer: bytes, session: SessionId, incarnation: int, grant: Grant) -> bool:
        self.grants_.append((session, incarnation, grant))
        return True

    def grants(self) -> list[tuple[SessionId, int, Grant]]:
        taken, self.grants_ = list(self.grants_), deque()
        return taken


@dataclass
class Edge:
    """An edge with both ends."""

    wire: Wire = field(default_factory=Wire)

    def __post_init__(self) -> None:
        self.sender = Sender(RULE, self.wire, SilentObserver(), lambda: 0)
        self.receiver = Receiver(RULE, self.wire, SilentObserver(), lambda: 0)

    def open(self, incarnation: int) -> None:
        self.receiver.open_session(DOOR, incarnation)
        self.sender.open_session(DOOR, incarnation)

    def take(self) -> list[Arrival]:
        return [arrival for arrival in self.receiver.receive() if not arrival.chunk.is_control]

    @property
    def account(self) -> Account:
        return merge([self.sender.account(), self.receiver.account()])


def piece(seq: int = 0) -> Chunk:
    return Chunk(DOOR, "text", seq, 1, seq)


def test_what_comes_late_of_a_closed_session_gives_the_next_one_of_its_name_no_credit() -> None:
    edge = Edge()
    edge.open(1)
    for seq in range(4):
        edge.sender.send(piece(seq))
    edge.sender.close_session(DOOR), edge.receiver.close_session(DOOR)
    edge.open(2)
    assert edge.take() == []
    edge.sender.flush()
    for seq in range(9):
        edge.sender.send(piece(seq))
    assert len(edge.wire.chunks) == RULE.limit.chunks
    assert (edge.sender.num_in_flight, edge.account.dropped["closed"], edge.account.in_flight) == (4, 4, 9)


def test_a_grant_for_a_closed_session_that_a_busy_sender_takes_later_is_none_for_the_next() -> None:
    edge = Edge()
    edge.open(1)
    for seq in range(4):
        edge.sender.send(piece(seq))
    for arrival in edge.take():
        edge.receiver.deliver(arrival, 0.0)
    edge.sender.close_session(DOOR), edge.receiver.close_session(DOOR)
    edge.open(2)
    edge.sender.flush()
    for seq in range(9):
        edge.sender.send(piece(seq))
    assert (len(edge.wire.chunks), edge.sender.num_in_flight) == (4, 4)


def test_what_a_replica_holds_of_a_session_that_was_closed_is_lost_when_it_dies() -> None:
    edge = Edge()
    edge.open(1)
    for seq in range(4):
        edge.sender.send(piece(seq))
    edge.receiver.deliver(edge.take()[0], 0.0)
    edge.receiver.flush()
    edge.sender.close_session(DOOR)
    edge.sender.bury()
    account = edge.sender.account()
    assert (account.delivered, account.dropped["crash"], account.in_flight) == (1, 3, 0)


def test_what_comes_when_the_session_is_closed_there_is_done_with_and_not_lost_later() -> None:
    edge = Edge()
    edge.open(1)
    for seq in range(4):
        edge.sender.send(piece(seq))
    edge.receiver.deliver(edge.take()[0], 0.0)
    edge.sender.send(piece(4))
    edge.sender.close_session(DOOR), edge.receiver.close_session(DOOR)
    assert edge.take() == []
    edge.sender.bury()
    assert edge.account.dropped["closed"] == 1
    assert edge.sender.account().dropped["crash"] == 3, "these it had taken, and not settled"


def test_what_comes_after_the_end_there_is_done_with_though_the_end_here_comes_later() -> None:
    edge = Edge()
    edge.open(1)
    edge.receiver.close_session(DOOR)
    edge.sender.send(piece(0))
    assert edge.take() == []
    edge.sender.flush()
    edge.sender.close_session(DOOR)
    edge.sender.bury()
    assert dict(edge.sender.account().dropped)["crash"] == 0
    assert edge.account.dropped["closed"] == 1


def test_a_replica_that_dies_after_a_name_came_again_loses_what_it_held_and_never_less_than_nothing() -> None:
    edge = Edge()
    edge.open(1)
    for seq in range(4):
        edge.sender.send(piece(seq))
    for arrival in edge.take():
        edge.receiver.deliver(arrival, 0.0)
    edge.sender.close_session(DOOR), edge.receiver.close_session(DOOR)
    edge.open(2)
    edge.sender.bury()
    assert edge.sender.account().dropped["crash"] == 0
    assert (edge.sender.account().delivered, edge.sender.account().in_flight) == (4, 0)


def test_control_of_an_earlier_session_is_not_taken_for_the_laters() -> None:
    edge = Edge()
    edge.open(1)
    edge.sender.send(watermark(DOOR, "text", 7))
    edge.receiver.close_session(DOOR)
    edge.receiver.open_session(DOOR, 2)
    assert edge.receiver.receive() == []


def test_data_that_could_not_be_read_gives_its_credit_back_and_is_named() -> None:
    edge = Edge()
    edge.open(1)
    for seq in range(4):
        edge.sender.send(piece(seq))
    edge.wire.broken += edge.wire.chunks
    edge.wire.chunks.clear()
    assert edge.take() == []
    edge.receiver.flush(), edge.sender.flush()
    assert (edge.sender.num_in_flight, edge.account.dropped["invalid"], edge.account.in_flight) == (0, 4, 0)


def test_what_closes_leaves_nothing_at_either_end() -> None:
    edge = Edge()
    for incarnation in range(1, 100):
        edge.open(incarnation)
        for seq in range(3):
            edge.sender.send(piece(seq))
        (first, *_) = edge.take()
        edge.receiver.deliver(first, 0.0)
        edge.receiver.close_session(DOOR), edge.sender.close_session(DOOR)
    for table in (edge.sender._lanes, edge.receiver._incarnations, edge.receiver._credits, edge.receiver._unsent):
        assert not table
    assert edge.receiver.arrived == {PEER: 3 * 99}


class Names(RuleBasedStateMachine):
    """Ends close and open in any order, by force, while chunks and grants are under way."""

    def __init__(self) -> None:
        super().__init__()
        self.edge = Edge()
        self.held: list[Arrival] = []
        self.incarnation = 0
        self.is_sending = False

    @precondition(lambda self: not self.is_sending)
    @rule()
    def a_session_of_the_name_opens(self) -> None:
        self.incarnation += 1
        self.is_sending = True
        self.edge.open(self.incarnation)

    @precondition(lambda self: self.is_sending)
    @rule()
    def something_is_sent(self) -> None:
        self.edge.sender.send(piece())

    @rule(num_taken=st.integers(1, 3))
    def some_of_it_comes(self, num_taken: int) -> None:
        self.edge.wire.num_taken = num_taken
        self.held += self.edge.take()

    @precondition(lambda self: self.held)
    @rule(late=st.booleans())
    def one_is_settled(self, late: bool) -> None:
        arrival = self.held.pop(0)
        if late:
            self.edge.receiver.drop(arrival, "late")
        else:
            self.edge.receiver.deliver(arrival, 0.0)

    @rule()
    def grants_leave(self) -> None:
        self.edge.receiver.flush()

    @rule()
    def grants_are_taken(self) -> None:
        self.edge.sender.flush()

    @precondition(lambda self: self.is_sending)
    @rule(receiver_first=st.booleans())
    def it_is_closed_by_force(self, receiver_first: bool) -> None:
        closings = [self.close_sender, self.close_receiver]
        for close in reversed(closings) if receiver_first else closings:
            close()

    def close_sender(self) -> None:
        self.edge.sender.close_session(DOOR)
        self.is_sending = False

    def close_receiver(self) -> None:
        for arrival in self.held:
            self.edge.receiver.drop(arrival, "closed")
        self.held.clear()
        self.edge.receiver.close_session(DOOR)

    @invariant()
    def no_more_is_under_way_than_the_limit(self) -> None:
        under_way = [chunk for chunk in self.edge.wire.chunks if chunk.incarnation == self.incarnation]
        assert len(under_way) + len(self.held) <= RULE.limit.chunks
        assert 0 <= self.edge.sender.num_in_flight <= RULE.limit.chunks

    @invariant()
    def the_ledger_is_exact(self) -> None:
        waiting = self.edge.sender.num_waiting
        assert self.edge.account.in_flight == waiting + len(self.edge.wire.chunks) + len(self.held)

    def teardown(self) -> None:
        self.edge.wire.num_taken = 1_000_000
        self.close_sender(), self.close_receiver()
        self.edge.take()
        assert self.edge.account.in_flight == 0
        assert not self.edge.receiver._credits


TestNames = Names.TestCase
TestNames.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
