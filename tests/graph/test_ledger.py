from __future__ import annotations

from collections import Counter

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from graph.chunk import Chunk, SessionId
from graph.epoch import EpochFence
from graph.ledger import REASONS, Account, Ledger, Reason, merge
from tests.support.streams import kind_of

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure

picks = st.integers(0, 99)
reasons = st.sampled_from(REASONS)
counts = st.integers(0, 1000)
accounts = st.builds(Account, counts, counts, st.dictionaries(reasons, counts))


class Edge(RuleBasedStateMachine):
    """Both ends of an edge with two replicas: chunks come and go in any order, across barge-ins."""

    @initialize()
    def open(self) -> None:
        self.sender = Ledger()
        self.replicas = [Ledger(), Ledger()]
        self.fence = EpochFence()
        self.waiting: list[Chunk] = []
        self.arrived: list[Chunk] = []
        self.dropped: Counter[Reason] = Counter()
        self.num_sent = self.num_delivered = 0

    @rule()
    def accept(self) -> None:
        self.waiting.append(Chunk(SessionId("porch"), "speech", 0, seq=self.num_sent, epoch=self.fence.epoch))
        self.num_sent += 1
        self.sender.accept()

    @precondition(lambda self: self.waiting)
    @rule()
    def transmit(self) -> None:
        self.arrived.append(self.waiting.pop(0))

    @precondition(lambda self: self.waiting)
    @rule(reason=reasons)
    def the_sender_drops_the_oldest(self, reason: Reason) -> None:
        self.waiting.pop(0)
        self.sender.drop(reason)
        self.dropped[reason] += 1

    @precondition(lambda self: self.arrived)
    @rule(pick=picks)
    def a_replica_delivers_or_drops_what_is_stale(self, pick: int) -> None:
        ledger = self.replicas[pick % 2]
        stale = self.fence.is_stale(self.arrived.pop(pick % len(self.arrived)), kind_of("text"))
        settle = {False: ledger.deliver, True: lambda: ledger.drop("stale")}[stale]
        settle()
        self.dropped["stale"] += stale
        self.num_delivered += not stale

    @rule()
    def barge_in(self) -> None:
        self.fence.raise_to(self.fence.epoch + 1)

    @invariant()
    def every_chunk_accepted_is_delivered_or_dropped_by_name_or_in_flight(self) -> None:
        account = merge([self.sender.account(), *(replica.account() for replica in self.replicas)])
        assert account.accepted == self.num_sent
        assert account.delivered == self.num_delivered
        assert +Counter(account.dropped) == +self.dropped
        assert account.in_flight == len(self.waiting) + len(self.arrived)


TestEdge = Edge.TestCase
TestEdge.settings = settings(unhurried, max_examples=100, stateful_step_count=40)


@unhurried
@given(st.lists(accounts))
def test_a_merge_adds_up_every_column(parts: list[Account]) -> None:
    whole = merge(parts)
    assert whole.accepted == sum(part.accepted for part in parts)
    assert whole.delivered == sum(part.delivered for part in parts)
    assert whole.dropped == {reason: sum(part.dropped.get(reason, 0) for part in parts) for reason in REASONS}
    assert whole.in_flight == sum(part.in_flight for part in parts)


@unhurried
@given(st.lists(accounts), st.randoms(use_true_random=False))
def test_a_merge_does_not_care_for_the_order(parts: list[Account], random: object) -> None:
    shuffled = list(parts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert merge(shuffled) == merge(parts)


def test_an_account_taken_earlier_does_not_change() -> None:
    ledger = Ledger()
    before = ledger.account()
    ledger.accept()
    ledger.drop("late")
    assert (before.accepted, before.in_flight, before.dropped["late"]) == (0, 0, 0)


def test_the_json_names_every_reason_even_the_ones_that_never_came() -> None:
    ledger = Ledger()
    for step in (ledger.accept, ledger.accept, ledger.deliver):
        step()
    assert ledger.account().as_dict() == {
        "accepted": 2,
        "delivered": 1,
        "dropped": dict.fromkeys(("late", "shed", "closed", "stale", "overflow", "crash", "failed", "invalid"), 0),
        "in_flight": 1,
    }
