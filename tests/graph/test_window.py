from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from graph.chunk import NS_PER_MS, NS_PER_S, Chunk, SessionId, Span, Trace
from graph.kinds import Late
from graph.window import FOREVER_NS, Joined, Unit, WindowJoin
from stages.llm import Llm
from tests.support.streams import inputs

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure

SESSION = SessionId("porch")
DOOR, MIC = "camera/door", "mic"
T = NS_PER_S
LATENESS = 150 * NS_PER_MS


def join(*streams: str, lateness_ns: int | None = LATENESS, late: Late = "drop", window_ns: int = T) -> WindowJoin:
    return WindowJoin(SESSION, inputs(*streams, late=late), window_ns=window_ns, lateness_ns=lateness_ns)


def piece(stream: str, start_ns: int, duration_ns: int = 0, seq: int = 0) -> Chunk:
    return Chunk(SESSION, stream, start_ns, duration_ns, seq)


# ---- the order of arrival ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Word:
    """One message of one stream: a chunk, a watermark or the end."""

    verb: str
    stream: str
    at_ns: int
    seq: int = 0


def say(subject: WindowJoin, word: Word) -> Joined:
    if word.verb == "chunk":
        return subject.add(piece(word.stream, word.at_ns, seq=word.seq))
    if word.verb == "end":
        return subject.end(word.stream, word.at_ns)
    trace = Trace(digest=f"{word.stream}@{word.at_ns}")
    return subject.advance(word.stream, word.at_ns, trace)


@st.composite
def script(draw: st.DrawFn, stream: str, window_ns: int) -> list[Word]:
    """What one stream legally says: nothing before its watermark, in seq order, the end last."""
    words: list[Word] = []
    watermark_ns = latest_ns = 0
    for seq in range(draw(st.integers(0, 8))):
        is_chunk = draw(st.booleans())
        at_ns = watermark_ns + draw(st.integers(0, 2 * window_ns))
        words.append(Word("chunk" if is_chunk else "watermark", stream, at_ns, seq))
        latest_ns = max(latest_ns, at_ns)
        watermark_ns = watermark_ns if is_chunk else at_ns
    return [*words, Word("end", stream, latest_ns + draw(st.integers(0, 2 * window_ns)))]


@st.composite
def scripts(draw: st.DrawFn) -> list[list[Word]]:
    num_streams = draw(st.integers(1, 4))
    return [draw(script(f"camera/{i}", window_ns=4)) for i in range(num_streams)]


def interleave(order: Sequence[int], scripts: Sequence[Sequence[Word]]) -> list[Word]:
    """One order of arrival that keeps each stream's own; `order` picks whose turn it is."""
    queues = [list(words) for words in scripts]
    merged: list[Word] = []
    for pick in order:
        talking = [queue for queue in queues if queue]
        merged.append(talking[pick % len(talking)].pop(0))
    return merged


def play(scripts: Sequence[Sequence[Word]], words: Sequence[Word]) -> tuple[WindowJoin, list[Unit], list[Chunk]]:
    subject = join(*(script[0].stream for script in scripts), lateness_ns=None, window_ns=4)
    answers = [say(subject, word) for word in words]
    return subject, [u for a in answers for u in a.units], [c for a in answers for c in a.late]


def content(unit: Unit) -> tuple[object, ...]:
    """A unit without `closed_by`, the one field which tells who came last."""
    return (unit.index, unit.start_ns, unit.end_ns, dict(unit.chunks), unit.missing, dict(unit.traces))


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[list[list[Word]], list[Word]]:
    """Streams, and one order in which their words arrive."""
    streams = draw(scripts())
    num_words = sum(map(len, streams))
    order = draw(st.lists(st.integers(0, 11), min_size=num_words, max_size=num_words))
    return streams, interleave(order, streams)


A_PICTURE_WHERE_THE_STREAM_ENDS = [[Word("chunk", "camera/0", 4), Word("end", "camera/0", 4)]]


@unhurried
@given(arrivals())
def test_any_order_of_arrival_between_streams_gives_the_same_units(
    case: tuple[list[list[Word]], list[Word]],
) -> None:
    streams, words = case
    one_after_the_other = [word for script in streams for word in script]
    _, expected, _ = play(streams, one_after_the_other)
    _, units, _ = play(streams, words)
    assert list(map(content, units)) == list(map(content, expected))


@unhurried
@given(arrivals())
@example((A_PICTURE_WHERE_THE_STREAM_ENDS, A_PICTURE_WHERE_THE_STREAM_ENDS[0]))
def test_every_chunk_is_in_exactly_one_unit_and_it_is_the_unit_of_its_window(
    case: tuple[list[list[Word]], list[Word]],
) -> None:
    subject, units, late = play(*case)
    sent = sorted((w.stream, w.at_ns, w.seq) for script in case[0] for w in script if w.verb == "chunk")
    joined = sorted((c.stream, c.start_ns, c.seq) for unit in units for cs in unit.chunks.values() for c in cs)
    assert joined == sent
    assert all(unit.start_ns <= c.start_ns < unit.end_ns for unit in units for cs in unit.chunks.values() for c in cs)
    assert (late, subject.num_pending) == ([], 0)


@unhurried
@given(arrivals())
def test_units_leave_with_k_counting_from_zero_until_all_have_ended(
    case: tuple[list[list[Word]], list[Word]],
) -> None:
    subject, units, _ = play(*case)
    last_ns = max(word.at_ns for script in case[0] for word in script)
    assert [unit.index for unit in units] == list(range(len(units)))
    assert [unit.start_ns for unit in units] == [k * 4 for k in range(len(units))]
    assert len(units) * 4 >= last_ns
    assert subject.finished


@unhurried
@given(arrivals())
def test_missing_names_the_streams_that_gave_nothing(case: tuple[list[list[Word]], list[Word]]) -> None:
    _, units, _ = play(*case)
    streams = {script[0].stream for script in case[0]}
    assert all(unit.missing == streams - set(unit.chunks) for unit in units)


@unhurried
@given(arrivals())
def test_inside_a_stream_chunks_are_ordered_by_time_then_seq(case: tuple[list[list[Word]], list[Word]]) -> None:
    _, units, _ = play(*case)
    runs = [[(c.start_ns, c.seq) for c in chunks] for unit in units for chunks in unit.chunks.values()]
    assert runs == [sorted(run) for run in runs]


@unhurried
@given(arrivals(), st.lists(st.integers(0, 60), max_size=10))
def test_units_leave_exactly_once_whatever_expires(
    case: tuple[list[list[Word]], list[Word]], expiries: list[int]
) -> None:
    streams, words = case
    subject = join(*(script[0].stream for script in streams), lateness_ns=2, late="carry", window_ns=4)
    steps = [*zip(words, [*sorted(expiries), *[0] * len(words)], strict=False)]
    answers = [answer for word, now_ns in steps for answer in (subject.expire(now_ns), say(subject, word))]
    answers.append(subject.expire(60))
    units = [unit for answer in answers for unit in answer.units]
    sent = sorted((w.stream, w.seq) for w in words if w.verb == "chunk")
    joined = sorted((c.stream, c.seq) for unit in units for cs in unit.chunks.values() for c in cs)
    assert [unit.index for unit in units] == list(range(len(units)))
    assert joined == sent
    assert subject.finished


# ---- one promise at a time -----------------------------------------------------------------------------------------


def test_a_chunk_alone_completes_nothing() -> None:
    subject = join(DOOR, MIC)
    assert subject.add(piece(DOOR, 5 * T)).units == ()
    assert subject.num_pending == 1


def test_a_window_leaves_when_the_last_watermark_has_passed_its_end() -> None:
    subject = join(DOOR, MIC)
    assert subject.advance(DOOR, T).units == ()
    assert subject.advance(MIC, T - 1).units == ()
    (unit,) = subject.advance(MIC, T).units
    assert (unit.index, unit.start_ns, unit.end_ns, unit.closed_by) == (0, 0, T, MIC)


def test_a_window_never_waits_for_a_still_camera_whose_watermark_advances() -> None:
    subject = join(DOOR, MIC)
    for k in range(3):
        subject.add(piece(MIC, k * T, T, seq=k))
        subject.advance(DOOR, (k + 1) * T)
        (unit,) = subject.advance(MIC, (k + 1) * T).units
        assert (unit.index, unit.missing, len(unit.chunks.get(MIC, ())), unit.chunks.get(DOOR, ())) == (
            k,
            {DOOR},
            1,
            (),
        )


def test_a_chunk_on_the_border_belongs_to_the_window_that_begins() -> None:
    subject = join(DOOR)
    subject.add(piece(DOOR, T - 1, seq=0))
    subject.add(piece(DOOR, T, seq=1))
    first, second = subject.advance(DOOR, 2 * T).units
    assert [c.seq for c in first.chunks.get(DOOR, ())] == [0]
    assert [c.seq for c in second.chunks.get(DOOR, ())] == [1]


def test_a_chunk_across_the_border_belongs_where_it_starts() -> None:
    subject = join(MIC)
    subject.add(piece(MIC, T // 2, T))
    first, second = subject.advance(MIC, 2 * T).units
    assert (len(first.chunks.get(MIC, ())), len(second.chunks.get(MIC, ()))) == (1, 0)


def test_one_watermark_far_ahead_closes_every_window_on_its_way() -> None:
    subject = join(DOOR)
    assert [unit.index for unit in subject.advance(DOOR, 4 * T + 1).units] == [0, 1, 2, 3]


def test_a_watermark_never_moves_back() -> None:
    subject = join(DOOR, MIC)
    subject.advance(DOOR, 2 * T)
    subject.advance(DOOR, T // 2)
    assert [unit.index for unit in subject.advance(MIC, 2 * T).units] == [0, 1]


def test_a_doubled_watermark_closes_nothing_twice() -> None:
    subject = join(DOOR)
    subject.advance(DOOR, T)
    assert subject.advance(DOOR, T).units == ()


def test_a_stream_that_nobody_announced_is_a_mistake() -> None:
    with pytest.raises(KeyError):
        join(DOOR).add(piece("camera/garage", 0))


def test_expire_gives_up_on_a_dead_camera_and_names_it() -> None:
    subject = join(DOOR, MIC)
    subject.add(piece(MIC, 0, T))
    subject.advance(MIC, T)
    assert subject.expire(T + LATENESS - 1).units == ()
    (unit,) = subject.expire(T + LATENESS).units
    assert (unit.missing, unit.closed_by, unit.awaited, len(unit.chunks.get(MIC, ()))) == ({DOOR}, "", {DOOR}, 1)


def test_what_was_awaited_is_named_though_a_part_of_it_had_come() -> None:
    subject = join(DOOR, MIC)
    subject.add(piece(DOOR, 0))
    subject.advance(MIC, T)
    (unit,) = subject.expire(T + LATENESS).units
    assert (unit.missing, unit.awaited) == ({MIC}, {DOOR})


def test_expire_after_a_long_sleep_gives_up_each_window_once() -> None:
    subject = join(DOOR, MIC)
    units = [*subject.expire(4 * T + LATENESS).units, *subject.expire(4 * T + LATENESS).units]
    assert [unit.index for unit in units] == [0, 1, 2, 3]


def test_a_camera_that_comes_back_takes_part_again() -> None:
    subject = join(DOOR, MIC)
    subject.advance(MIC, 3 * T)
    subject.expire(2 * T + LATENESS)
    subject.add(piece(DOOR, 2 * T))
    (unit,) = subject.advance(DOOR, 3 * T).units
    assert (unit.index, unit.missing, unit.closed_by) == (2, {MIC}, DOOR)


def test_without_lateness_a_window_waits_for_ever() -> None:
    subject = join(DOOR, lateness_ns=None)
    assert subject.expire(10**6 * T).units == ()


def test_a_late_chunk_is_handed_back_by_the_policy_drop() -> None:
    subject = join(DOOR)
    subject.expire(T + LATENESS)
    late = piece(DOOR, T - 1)
    assert subject.add(late) == Joined(late=(late,))
    assert subject.num_pending == 0


def test_a_late_chunk_is_in_the_next_unit_by_the_policy_carry_and_named() -> None:
    subject = join(MIC, late="carry")
    subject.expire(T + LATENESS)
    late, on_time = piece(MIC, T - 1, seq=0), piece(MIC, T, seq=1)
    assert (subject.add(late), subject.add(on_time)) == (Joined(carried=(late,)), Joined())
    (unit,) = subject.advance(MIC, 2 * T).units
    assert (unit.index, unit.chunks.get(MIC, ())) == (1, (late, on_time))


def test_the_policy_is_each_streams_own_and_drop_where_none_is_given() -> None:
    subject = WindowJoin(SESSION, inputs(DOOR, late="drop") | inputs(MIC, late="carry"), window_ns=T, lateness_ns=0)
    subject.expire(T)
    assert len(subject.add(piece(DOOR, 0)).late) == 1
    assert len(subject.add(piece(MIC, 0)).late) == 0


def test_a_chunk_carried_after_the_last_window_leaves_in_one_window_more() -> None:
    subject = join(DOOR, MIC, late="carry")
    subject.end(DOOR, T)
    subject.expire(T + LATENESS)
    late = piece(MIC, T // 2)
    subject.add(late)
    assert subject.end(MIC, T).units == ()
    assert subject.expires_ns == 2 * T
    assert subject.expire(2 * T - 1).units == ()
    (unit,) = subject.expire(2 * T).units
    assert (unit.index, unit.chunks.get(MIC, ()), unit.is_afterword) == (1, (late,), True)
    assert subject.finished


def test_in_virtual_time_what_comes_after_the_end_leaves_at_once() -> None:
    subject = join(MIC, lateness_ns=None)
    subject.add(piece(MIC, T))
    units = subject.end(MIC, T).units
    assert [(unit.index, unit.is_afterword) for unit in units] == [(0, False), (1, True)]


def test_after_the_last_window_more_are_to_be_had_and_they_are_empty() -> None:
    subject = join(MIC)
    subject.add(piece(MIC, 0))
    subject.end(MIC, T)
    units = [unit for _ in range(2) for unit in subject.extend().units]
    assert [(unit.index, unit.is_afterword, unit.chunks) for unit in units] == [(1, True, {}), (2, True, {})]
    assert subject.finished


def test_the_ends_of_all_streams_close_the_windows_that_remain() -> None:
    subject = join(DOOR, MIC)
    subject.add(piece(DOOR, 2 * T))
    assert subject.end(MIC, T).units == ()
    assert not subject.finished
    units = subject.end(DOOR, 2 * T + T // 2).units
    assert [unit.index for unit in units] == [0, 1, 2]
    assert [unit.missing for unit in units] == [{DOOR, MIC}, {DOOR, MIC}, {MIC}]
    assert subject.finished


def test_of_two_words_of_an_end_the_first_stands() -> None:
    subject = join(DOOR)
    assert len(subject.end(DOOR, 2 * T).units) == 2
    assert subject.end(DOOR, 5 * T).units == ()
    assert subject.finished


def test_a_join_may_begin_with_any_window() -> None:
    subject = join(DOOR)
    subject.begin_at(3)
    assert subject.add(piece(DOOR, 3 * T - 1)).late
    subject.add(piece(DOOR, 3 * T))
    (unit,) = subject.advance(DOOR, 4 * T).units
    assert (unit.index, unit.start_ns, len(unit.chunks.get(DOOR, ()))) == (3, 3 * T, 1)


def test_one_stream_that_has_ended_holds_no_window_open() -> None:
    subject = join(DOOR, MIC)
    subject.end(DOOR, T)
    assert [unit.index for unit in subject.advance(MIC, 3 * T).units] == [0, 1, 2]


def test_a_finished_join_expires_no_more() -> None:
    subject = join(DOOR)
    subject.end(DOOR, 2 * T)
    assert subject.expire(FOREVER_NS).units == ()


def test_streams_that_end_before_they_began_give_no_unit() -> None:
    subject = join(DOOR, MIC)
    subject.end(DOOR, 0)
    assert subject.end(MIC, 0).units == ()
    assert subject.finished


def test_a_trace_rides_with_the_window_that_its_watermark_ends() -> None:
    subject = join(DOOR, MIC)
    seen = Trace(digest="seen", spans=(Span("vision_encoder", 0, 1, 2),))
    subject.advance(DOOR, T, Trace(digest="before"))
    subject.advance(DOOR, 2 * T, seen)
    first, second = subject.advance(MIC, 2 * T).units
    assert (dict(first.traces), dict(second.traces)) == ({DOOR: Trace(digest="before")}, {DOOR: seen})


def test_a_trace_of_a_window_that_has_left_is_forgotten() -> None:
    subject = join(DOOR)
    subject.expire(T + LATENESS)
    subject.advance(DOOR, T, Trace(digest="too late"))
    (unit,) = subject.advance(DOOR, 2 * T).units
    assert unit.traces == {}


def test_what_a_unit_emits_covers_its_window() -> None:
    (_, unit) = join(DOOR).advance(DOOR, 2 * T).units
    made = Llm.text.over(unit, attrs={"listen": True})
    assert (made.session, made.stream, made.start_ns, made.end_ns) == (SESSION, "text", T, 2 * T)
    assert made.attrs == {"listen": True}


# ---- side inputs -----------------------------------------------------------------------------------------------------


def beside(lateness_ns: int | None = LATENESS) -> WindowJoin:
    """Sound on the way, pictures beside it."""
    taken = inputs(MIC) | {DOOR: replace(inputs(DOOR)[DOOR], is_side=True)}
    return WindowJoin(SESSION, taken, window_ns=T, lateness_ns=lateness_ns)


def test_a_side_input_is_in_the_unit_and_holds_it_up_no_moment() -> None:
    subject = beside()
    subject.add(piece(DOOR, T // 2))
    (unit,) = subject.advance(MIC, T).units
    assert (unit.chunks[DOOR], unit.closed_by) == ((piece(DOOR, T // 2),), MIC)


def test_a_side_input_that_gave_nothing_is_not_missing_and_awaited_by_none() -> None:
    (unit,) = beside().expire(T + LATENESS).units
    assert (unit.missing, unit.awaited) == ({MIC}, {MIC})


def test_a_side_input_ends_nothing_and_what_comes_of_it_after_the_end_is_late() -> None:
    subject = beside()
    subject.add(piece(DOOR, T + T // 2))
    subject.end(DOOR, 9 * T)
    assert not subject.finished
    subject.end(MIC, T)
    subject.expire(T)
    assert (subject.finished, subject.ended, subject.rest()) == (True, True, (piece(DOOR, T + T // 2),))


def test_a_join_that_has_finished_has_not_ended_before_its_side_inputs_have() -> None:
    subject = beside(lateness_ns=None)
    subject.end(MIC, 0)
    assert (subject.finished, subject.ended) == (True, False)
    assert subject.add(piece(DOOR, 5 * T)).late == (piece(DOOR, 5 * T),)
    subject.end(DOOR, 6 * T)
    assert subject.ended


def test_where_all_inputs_are_beside_they_are_waited_for_like_others() -> None:
    taken = {DOOR: replace(inputs(DOOR)[DOOR], is_side=True)}
    subject = WindowJoin(SESSION, taken, window_ns=T, lateness_ns=None)
    assert subject.expire(9 * T).units == ()
    assert len(subject.advance(DOOR, 2 * T).units) == 2


# ---- windows of their own --------------------------------------------------------------------------------------------


def test_an_input_of_two_seconds_gives_each_chunk_twice_and_its_credit_once() -> None:
    taken = inputs(DOOR) | {MIC: replace(inputs(MIC)[MIC], window_ns=2 * T)}
    subject = WindowJoin(SESSION, taken, window_ns=T, lateness_ns=None)
    for index in range(3):
        subject.add(piece(MIC, index * T, T, seq=index))
        subject.add(piece(DOOR, index * T, seq=index))
    subject.advance(DOOR, 3 * T)
    units = subject.advance(MIC, 3 * T).units
    assert [[chunk.seq for chunk in unit.chunks[MIC]] for unit in units] == [[0], [0, 1], [1, 2]]
    assert [[chunk.seq for chunk in unit.chunks[DOOR]] for unit in units] == [[0], [1], [2]]


def test_an_input_may_be_waited_for_longer_than_the_others() -> None:
    taken = inputs(DOOR) | {MIC: replace(inputs(MIC)[MIC], lateness_ns=T)}
    subject = WindowJoin(SESSION, taken, window_ns=T, lateness_ns=LATENESS)
    assert subject.expires_ns == 2 * T
    assert subject.expire(T + LATENESS).units == ()
    subject.advance(MIC, T)
    assert subject.expires_ns == T + LATENESS
    (unit,) = subject.expire(T + LATENESS).units
    assert unit.awaited == {DOOR}
