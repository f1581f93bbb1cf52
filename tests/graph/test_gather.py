"""Batches over sessions: who goes, in which order, and how long a unit waits for peers."""

from hypothesis import given
from hypothesis import strategies as st

from graph.chunk import NS_PER_MS, NS_PER_S, SessionId
from graph.gather import SLACK_SHARE, Gathering, Waiting

WAIT_NS = 5 * NS_PER_MS
SOON, NEVER = [NS_PER_S], list[int]()


def unit(name: str = "door", since_ns: int = NS_PER_S, deadline_ns: int | None = 2 * NS_PER_S, **times: int) -> Waiting:
    return Waiting(SessionId(name), since_ns, times.get("end_ns", NS_PER_S), deadline_ns)


def test_who_has_all_the_time_waits_as_long_as_it_may():
    gathering = Gathering(8, WAIT_NS)
    assert gathering.batch([unit()], SOON, NS_PER_S + WAIT_NS - 1) == []
    assert gathering.batch([unit()], SOON, NS_PER_S + WAIT_NS) == ["door"]


def test_who_has_little_time_left_waits_for_a_small_part_of_it():
    late = unit(since_ns=NS_PER_S, deadline_ns=NS_PER_S + 100 * NS_PER_MS)
    waits_ns = 100 * NS_PER_MS // SLACK_SHARE
    assert Gathering(8, WAIT_NS).batch([late], SOON, NS_PER_S + waits_ns - 1) == []
    assert Gathering(8, WAIT_NS).batch([late], SOON, NS_PER_S + waits_ns) == ["door"]


def test_who_is_late_waits_for_nobody():
    late = unit(since_ns=3 * NS_PER_S)
    assert Gathering(8, WAIT_NS).batch([late], SOON, 3 * NS_PER_S) == ["door"]


def test_in_virtual_time_nobody_is_late():
    behind = unit(since_ns=9 * NS_PER_S, deadline_ns=None)
    assert Gathering(8, WAIT_NS).batch([behind], SOON, 9 * NS_PER_S) == []


def test_nobody_waits_for_who_comes_later_or_not_at_all():
    gathering = Gathering(8, WAIT_NS)
    assert gathering.batch([unit()], [NS_PER_S + WAIT_NS + 1], NS_PER_S) == ["door"]
    assert gathering.batch([unit()], NEVER, NS_PER_S) == ["door"]


def test_a_full_batch_is_not_waited_for():
    assert Gathering(2, WAIT_NS).batch([unit("a"), unit("b")], SOON, NS_PER_S) == ["a", "b"]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=12), st.integers(1, 8))
def test_a_batch_is_bounded_and_takes_the_earliest_deadlines(ends: list[int], max_units: int):
    ready = [unit(str(index), end_ns=end_ns) for index, end_ns in enumerate(ends)]
    taken = Gathering(max_units, 0).batch(ready, SOON, NS_PER_S)
    assert [ends[int(session)] for session in taken] == sorted(ends)[:max_units]


@given(st.integers(0, 10**10), st.integers(0, 10**10), st.integers(0, 10**8))
def test_nobody_waits_longer_than_told_or_beyond_its_share(since_ns: int, deadline_ns: int, wait_ns: int):
    until_ns = Gathering(8, wait_ns).until_ns(unit(since_ns=since_ns, deadline_ns=deadline_ns))
    assert 0 <= until_ns - since_ns <= min(wait_ns, max(deadline_ns - since_ns, 0))
