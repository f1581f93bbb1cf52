from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from graph.credit import Grant, Limit, ReceiveCredit, SendCredit

picks = st.integers(0, 99)


class UnreliableEdge(RuleBasedStateMachine):
    """Both ends of an edge; data arrives, grants are lost, doubled and reordered."""

    @initialize(chunks=st.integers(1, 4), duration_ns=st.none() | st.integers(1, 10))
    def open(self, chunks: int, duration_ns: int | None) -> None:
        self.limit = Limit(chunks, duration_ns)
        self.sender = SendCredit(self.limit)
        self.receiver = ReceiveCredit(self.limit)
        self.in_flight: list[int] = []  # durations of what was sent and not released
        self.grants: list[Grant] = []  # under way

    @rule(duration_ns=st.integers(0, 15))
    def send(self, duration_ns: int) -> None:
        self.in_flight += [duration_ns] * self.sender.take(duration_ns)

    @precondition(lambda self: self.in_flight)
    @rule()
    def release(self) -> None:
        self.receiver.release(self.in_flight.pop(0))
        self.grants.append(self.receiver.grant())

    @precondition(lambda self: self.grants)
    @rule(pick=picks)
    def a_grant_arrives_in_any_order(self, pick: int) -> None:
        self.sender.grant(self.grants.pop(pick % len(self.grants)))

    @precondition(lambda self: self.grants)
    @rule(pick=picks)
    def a_grant_arrives_and_will_come_again(self, pick: int) -> None:
        self.sender.grant(self.grants[pick % len(self.grants)])

    @precondition(lambda self: self.grants)
    @rule(pick=picks)
    def a_grant_is_lost(self, pick: int) -> None:
        self.grants.pop(pick % len(self.grants))

    @rule()
    def the_next_grant_heals_all(self) -> None:
        self.sender.grant(self.receiver.grant())
        assert self.sender.in_flight == len(self.in_flight)

    @rule(duration_ns=st.integers(0, 15))
    def a_drained_edge_takes_any_chunk_once_a_grant_gets_through(self, duration_ns: int) -> None:
        for held_ns in self.in_flight:
            self.receiver.release(held_ns)
        self.sender.grant(self.receiver.grant())
        assert self.sender.fits(duration_ns)
        assert self.sender.take(duration_ns)
        self.in_flight = [duration_ns]

    @invariant()
    def chunks_never_exceed_the_limit(self) -> None:
        assert len(self.in_flight) <= self.limit.chunks

    @invariant()
    def media_time_never_exceeds_the_limit_but_for_a_chunk_that_travels_alone(self) -> None:
        limit_ns = self.limit.duration_ns or sum(self.in_flight)
        assert sum(self.in_flight) <= limit_ns or len(self.in_flight) == 1

    @invariant()
    def the_sender_never_thinks_that_less_is_under_way_than_is(self) -> None:
        assert self.sender.in_flight >= len(self.in_flight)


TestUnreliableEdge = UnreliableEdge.TestCase
TestUnreliableEdge.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_a_full_edge_waits_until_something_was_used_up() -> None:
    sender, receiver = SendCredit(Limit(2)), ReceiveCredit(Limit(2))
    assert [sender.take(0), sender.take(0), sender.take(0)] == [True, True, False]
    receiver.release(0)
    sender.grant(receiver.grant())
    assert [sender.take(0), sender.take(0)] == [True, False]


def test_media_time_fills_an_edge_before_the_chunks_do() -> None:
    sender = SendCredit(Limit(10, duration_ns=3))
    assert [sender.take(2), sender.take(2), sender.take(1)] == [True, False, True]


def test_without_a_limit_in_media_time_only_chunks_count() -> None:
    sender = SendCredit(Limit(2, duration_ns=None))
    assert [sender.take(10**12), sender.take(10**12), sender.take(0)] == [True, True, False]


def test_a_chunk_longer_than_the_limit_travels_alone() -> None:
    sender, receiver = SendCredit(Limit(10, duration_ns=3)), ReceiveCredit(Limit(10, duration_ns=3))
    assert [sender.take(1), sender.take(8)] == [True, False]
    receiver.release(1)
    sender.grant(receiver.grant())
    assert [sender.take(8), sender.take(1)] == [True, False]
    receiver.release(8)
    sender.grant(receiver.grant())
    assert sender.take(3)


def test_asking_whether_a_chunk_fits_spends_nothing() -> None:
    sender = SendCredit(Limit(1))
    assert [sender.fits(1), sender.fits(1), sender.take(1), sender.fits(1)] == [True, True, True, False]


def test_an_old_grant_takes_nothing_back() -> None:
    sender, receiver = SendCredit(Limit(1)), ReceiveCredit(Limit(1))
    old = receiver.grant()
    sender.take(0)
    receiver.release(0)
    sender.grant(receiver.grant())
    sender.grant(old)
    assert sender.take(0)
