"""deploy/actor/accounts.py: the ledger is exact, whoever dies when, and however old the last word is."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from deploy.actor.accounts import Accounts, EdgeEnds
from graph.ledger import REASONS, Ledger

EDGE = "llm.text->tts.text"
picks = st.integers(0, 99)


@dataclass
class Source:
    """waiting, sent: chunks; sent by the sink that they went to."""

    ledger: Ledger = field(default_factory=Ledger)
    waiting: int = 0
    sent: dict[str, int] = field(default_factory=dict)

    def ends(self) -> EdgeEnds:
        return EdgeEnds(sent=self.ledger.account())


@dataclass
class Sink:
    ledger: Ledger = field(default_factory=Ledger)
    held: int = 0
    arrived: dict[str, int] = field(default_factory=dict)

    def ends(self) -> EdgeEnds:
        return EdgeEnds(received=self.ledger.account(), arrived=dict(self.arrived))


class Pipeline(RuleBasedStateMachine):
    """Two sources and two sinks of one edge. Chunks go from any to any; who dies takes along what it held and what was
    under way from it, and another comes. They tell of themselves now and then."""

    @initialize()
    def begin(self) -> None:
        self.accounts = Accounts()
        self.sources = {name: Source() for name in ("llm.0", "llm.1")}
        self.sinks = {name: Sink() for name in ("tts.0", "tts.1")}
        self.num_born = 0
        self.tell()

    @rule(pick=picks)
    def make(self, pick: int) -> None:
        source = self.sources[sorted(self.sources)[pick % 2]]
        source.ledger.accept()
        source.waiting += 1

    @rule(pick=picks)
    def send(self, pick: int) -> None:
        source = self.sources[sorted(self.sources)[pick % 2]]
        sink = sorted(self.sinks)[pick // 2 % 2]
        if source.waiting:
            source.waiting -= 1
            source.sent[sink] = source.sent.get(sink, 0) + 1

    @rule(pick=picks)
    def arrive(self, pick: int) -> None:
        name, sink = sorted(self.sources)[pick % 2], sorted(self.sinks)[pick // 2 % 2]
        if self.sources[name].sent.get(sink, 0) > self.sinks[sink].arrived.get(name, 0):
            self.sinks[sink].arrived[name] = self.sinks[sink].arrived.get(name, 0) + 1
            self.sinks[sink].held += 1

    @rule(pick=picks, reason=st.sampled_from((None, *REASONS)))
    def settle(self, pick: int, reason: str | None) -> None:
        sink = self.sinks[sorted(self.sinks)[pick % 2]]
        if sink.held:
            sink.held -= 1
            sink.ledger.drop(reason) if reason else sink.ledger.deliver()  # type: ignore[arg-type]

    @rule()
    def tell(self) -> None:
        for name, actor in (*self.sources.items(), *self.sinks.items()):
            self.accounts.reported(name, {EDGE: actor.ends()})

    @precondition(lambda self: self.num_born < 6)
    @rule(pick=picks)
    def a_source_dies(self, pick: int) -> None:
        name = sorted(self.sources)[pick % 2]
        del self.sources[name]
        self.accounts.died(name, ())
        self.sources[self._born("llm")] = Source()

    @precondition(lambda self: self.num_born < 6)
    @rule(pick=picks)
    def a_sink_dies(self, pick: int) -> None:
        """As `Sender.bury()`: what is known not to have been used is lost, and the rest was used."""
        name = sorted(self.sinks)[pick % 2]
        sink = self.sinks.pop(name)
        for source_name, source in self.sources.items():
            sent = source.sent.pop(name, 0)
            lost = min(sent - sink.arrived.get(source_name, 0) + min(sink.held, pick % 3), sent)
            source.ledger.drop("crash", lost)
            source.ledger.deliver(sent - lost)
        self.accounts.died(name, list(self.sources))
        self.sinks[self._born("tts")] = Sink()

    def _born(self, stage: str) -> str:
        self.num_born += 1
        return f"{stage}.0-{self.num_born}"

    @invariant()
    def what_lives_accounts_for_all(self) -> None:
        """When all have told, what is in flight is what the living hold, and what is under way between them."""
        accounts = deepcopy(self.accounts)
        for name, actor in (*self.sources.items(), *self.sinks.items()):
            accounts.reported(name, {EDGE: actor.ends()})
        waiting = sum(source.waiting for source in self.sources.values())
        held = sum(sink.held for sink in self.sinks.values())
        under_way = sum(
            number - self.sinks[sink].arrived.get(name, 0)
            for name, source in self.sources.items()
            for sink, number in source.sent.items()
        )
        account = accounts.of([EDGE])[EDGE]
        assert account.in_flight == waiting + held + under_way
        assert all(number >= 0 for number in account.dropped.values())


TestPipeline = Pipeline.TestCase
TestPipeline.settings = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=60)


def test_who_has_died_before_it_told_anything_is_known_by_what_has_come_from_it() -> None:
    accounts = Accounts()
    sink = Ledger()
    sink.deliver(2)
    accounts.died("llm.0", ())
    accounts.reported("tts.0", {EDGE: EdgeEnds(received=sink.account(), arrived={"llm.0": 3})})
    account = accounts.of([EDGE])[EDGE]
    assert (account.accepted, account.delivered, account.in_flight) == (3, 2, 1)


def test_what_a_dead_one_was_known_to_have_sent_and_nobody_got_is_lost() -> None:
    accounts = Accounts()
    source = Ledger()
    source.accept(5)
    accounts.reported("llm.0", {EDGE: EdgeEnds(sent=source.account())})
    accounts.reported("tts.0", {EDGE: EdgeEnds(arrived={"llm.0": 3})})
    accounts.died("llm.0", ())
    account = accounts.of([EDGE])[EDGE]
    assert (account.accepted, account.dropped["crash"], account.in_flight) == (5, 2, 3)


def test_what_a_dead_one_had_dropped_keeps_its_name() -> None:
    accounts = Accounts()
    source, sink = Ledger(), Ledger()
    source.accept(4), source.deliver(3), source.drop("crash")  # as its sender has it, which buried it
    sink.deliver(), sink.drop("stale", 2)
    accounts.reported("tts.0", {EDGE: EdgeEnds(received=sink.account(), arrived={"llm.0": 4})})
    accounts.died("tts.0", ["llm.0"])
    accounts.reported("llm.0", {EDGE: EdgeEnds(sent=source.account())})
    account = accounts.of([EDGE])[EDGE]
    assert (account.delivered, account.dropped["stale"], account.dropped["crash"], account.in_flight) == (1, 2, 1, 0)
