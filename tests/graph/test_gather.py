"""Batches over sessions: who goes, in which order, and how long a unit waits for peers."""

from hypothesis import given
from hypothesis import strategies as st

from graph.chunk import NS_PER_MS, NS_PER_S, SessionId
from graph.gather import MARGIN_NS, NUM_HELD, NUM_WAYS, PAUSE_NS, SLACK_SHARE, Gathering, Holding, Peer, Waiting

WAIT_NS = 5 * NS_PER_MS
HOLD_NS = 300 * NS_PER_MS
WAY_NS = 100 * NS_PER_MS
SOON, NEVER = [Peer(NS_PER_S)], list[Peer]()
TIMES_NS = st.integers(0, 4 * NS_PER_S)


def unit(name: str = "door", since_ns: int = NS_PER_S, deadline_ns: int | None = 2 * NS_PER_S, **times: int) -> Waiting:
    return Waiting(SessionId(name), since_ns, times.get("end_ns", NS_PER_S), deadline_ns)


def piece(name: str = "door", dry_ns: int | None = NS_PER_S + 400 * NS_PER_MS, *, may_hold: bool = True) -> Waiting:
    """Of speech, ready 50 ms after its window's end."""
    since_ns = NS_PER_S + 50 * NS_PER_MS
    return Waiting(SessionId(name), since_ns, NS_PER_S, 2 * NS_PER_S, dry_ns, may_hold)


def speaker(in_ms: int) -> list[Peer]:
    """One whose next window ends so long after a piece's."""
    return [Peer(NS_PER_S + in_ms * NS_PER_MS, speaks=True)]


def gathering(hold_ns: int = HOLD_NS, way_ns: int = WAY_NS) -> Gathering:
    """One that knows the way to its listeners."""
    gathering = Gathering(8, WAIT_NS, hold_ns)
    for _ in range(NUM_WAYS):
        gathering.holding.arrived(way_ns, 0, was_late=None)
    return gathering


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
    assert gathering.batch([unit()], [Peer(NS_PER_S + WAIT_NS + 1)], NS_PER_S) == ["door"]
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


# ---- The listener's deadline ----------------------------------------------------------------------------------------


def test_of_a_window_those_go_first_whose_listeners_run_dry_first_and_last_those_who_begin():
    pieces = [piece("new", None, may_hold=False), piece("later", 3 * NS_PER_S), piece("soon", 2 * NS_PER_S)]
    assert Gathering(2, 0).batch(pieces, NEVER, 2 * NS_PER_S) == ["soon", "later"]


def test_a_piece_inside_a_turn_is_held_until_its_listener_would_run_dry():
    leaves_ns = NS_PER_S + 400 * NS_PER_MS - WAY_NS - MARGIN_NS
    assert gathering().batch([piece()], speaker(100), leaves_ns - 1) == []
    assert gathering().batch([piece()], speaker(100), leaves_ns) == ["door"]


def test_a_piece_is_held_for_who_speaks_and_will_be_here_in_time_and_for_nobody_else():
    now_ns = NS_PER_S + 60 * NS_PER_MS  # longer than others would wait
    assert gathering().batch([piece()], speaker(200), now_ns) == []
    assert gathering().batch([piece()], speaker(201), now_ns) == ["door"]  # 50 ms before it comes here
    assert gathering().batch([piece()], [Peer(NS_PER_S + 100 * NS_PER_MS)], now_ns) == ["door"]


def test_a_piece_that_begins_or_ends_a_turn_is_not_held_and_takes_the_others_along():
    now_ns = NS_PER_S + 60 * NS_PER_MS
    first = piece("first", None, may_hold=False)
    assert gathering().batch([piece(), first], speaker(100), now_ns) == ["door", "first"]


def test_nothing_is_held_for_longer_than_told():
    now_ns = NS_PER_S + 50 * NS_PER_MS + 20 * NS_PER_MS
    assert gathering(hold_ns=20 * NS_PER_MS).batch([piece()], speaker(20), now_ns - 1) == []
    assert gathering(hold_ns=20 * NS_PER_MS).batch([piece()], speaker(20), now_ns) == ["door"]


def test_a_window_with_held_speech_ends_so_early_that_no_ladder_takes_it_for_a_strain():
    leaves_ns = NS_PER_S + NS_PER_S // 2 - WAY_NS - MARGIN_NS
    assert gathering(hold_ns=NS_PER_S).until_ns(piece(dry_ns=9 * NS_PER_S)) == leaves_ns


def test_nothing_is_held_until_it_is_known_how_long_the_way_is():
    unknown = Gathering(8, WAIT_NS, HOLD_NS)
    assert unknown.batch([piece()], speaker(100), NS_PER_S + 60 * NS_PER_MS) == ["door"]


def test_where_more_than_a_tenth_of_the_held_pieces_come_late_none_is_held_for_ten_seconds():
    holding = gathering().holding
    for index in range(NUM_HELD):
        holding.arrived(WAY_NS, 0, was_late=index % 10 == 0)
    assert holding.until_ns(piece()) > piece().since_ns
    holding.arrived(WAY_NS, 0, was_late=None)  # what was not held says nothing of it
    assert holding.until_ns(piece()) > piece().since_ns
    for _ in range(2):
        holding.arrived(WAY_NS, NS_PER_S, was_late=True)
    assert holding.until_ns(piece()) == piece().since_ns
    after = Waiting(SessionId("a"), NS_PER_S + PAUSE_NS, PAUSE_NS, 3 * PAUSE_NS, 2 * PAUSE_NS, may_hold=True)
    assert holding.until_ns(after) > after.since_ns


@given(TIMES_NS, TIMES_NS, st.none() | TIMES_NS, st.booleans(), st.integers(0, NS_PER_S), st.integers(0, NS_PER_S))
def test_no_piece_is_held_beyond_its_deadlines(
    since_ns: int, end_ns: int, dry_ns: int | None, may_hold: bool, way_ns: int, most_ns: int
):
    holding = Holding(most_ns)
    for _ in range(NUM_WAYS):
        holding.arrived(way_ns, 0, was_late=None)
    held = Waiting(SessionId("a"), since_ns, end_ns, end_ns + NS_PER_S, dry_ns, may_hold)
    until_ns = holding.until_ns(held)
    assert since_ns <= until_ns <= since_ns + most_ns
    if until_ns > since_ns:
        assert may_hold and dry_ns is not None
        assert until_ns + way_ns + MARGIN_NS <= min(dry_ns, held.end_ns + NS_PER_S)


@given(st.data())
def test_whoever_is_ready_goes_in_the_end_though_others_come_all_the_time(data: st.DataObject):
    """Pieces of several sessions, each of which has its next one as soon as the last one has gone."""
    loop, now_ns, gone = gathering(), NS_PER_S, dict.fromkeys("abcde", 0)
    waiting: dict[str, Waiting] = {}
    for _ in range(40):
        for name in gone:
            if name not in waiting and data.draw(st.booleans()):
                end_ns = now_ns - data.draw(st.integers(0, 200)) * NS_PER_MS
                dry_ns = data.draw(st.none() | st.integers(0, 600))
                dry_ns = None if dry_ns is None else end_ns + dry_ns * NS_PER_MS
                held = data.draw(st.booleans())
                waiting[name] = Waiting(SessionId(name), now_ns, end_ns, end_ns + NS_PER_S, dry_ns, held)
        for session in loop.batch(list(waiting.values()), [Peer(now_ns, speaks=True)], now_ns):
            del waiting[session]
            gone[session] += 1
        now_ns += 10 * NS_PER_MS
        assert all(now_ns - each.since_ns <= HOLD_NS + 10 * NS_PER_MS for each in waiting.values())
