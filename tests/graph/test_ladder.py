from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graph.chunk import NS_PER_S, SessionId
from graph.ladder import HOLD_NS, MOST_PATIENCE_NS, STEPS, Ladder, Level, holds_window, sheds_picture

DOOR = SessionId("door")
T = NS_PER_S
LATE, CLOSE, CALM = 2 * T, 9 * T // 10, T // 4

latencies = st.lists(st.sampled_from([CALM, T // 2, CLOSE, LATE]), max_size=200)


def levels(latencies_ns: list[int], ladder: Ladder | None = None) -> list[int]:
    """The level after each of these windows, one per second."""
    ladder = ladder or Ladder(STEPS, T)
    after = []
    for index, latency_ns in enumerate(latencies_ns):
        ladder.window((index + 1) * T, latency_ns, 8)
        after.append(ladder.level)
    return after


def test_windows_that_are_on_time_shed_nothing() -> None:
    assert levels([CALM] * 100) == [0] * 100


def test_a_single_late_window_sheds_nothing() -> None:
    assert levels([CALM] * 10 + [LATE] + [CALM] * 10) == [0] * 21


def test_the_second_window_that_is_nearly_late_takes_the_first_step_at_once() -> None:
    assert levels([CALM, CLOSE, CALM, CLOSE]) == [0, 0, 0, 1]


def test_windows_that_take_longer_and_longer_take_the_first_step_before_one_is_late() -> None:
    assert levels([k * T // 10 for k in (2, 2, 3, 4, 6)]) == [0, 0, 0, 0, 0]
    assert levels([k * T // 10 for k in (1, 2, 4, 6)]) == [0, 0, 0, 1]
    assert levels([k * T // 10 for k in (1, 2, 4, 3, 4, 5)]) == [0] * 6


def test_it_goes_down_a_step_each_five_seconds_and_no_deeper_than_there_are_steps() -> None:
    after = levels([CLOSE] * 40)
    assert [after.index(level) for level in (1, 2, 3, 4)] == [1, 6, 11, 16]
    assert max(after) == len(STEPS)


def test_it_comes_back_a_step_each_ten_seconds() -> None:
    after = levels([CLOSE] * 17 + [CALM] * 40)
    assert [after.index(level, 17) for level in (3, 2, 1, 0)] == [26, 36, 46, 56]


def test_where_windows_are_neither_late_nor_early_a_step_is_tried_now_and_then() -> None:
    after = levels([CLOSE] * 7 + [T // 2] * 200)
    assert [after.index(level, 6) for level in (2, 1, 0)] == [6, 86, 166]


def test_a_step_that_was_given_back_too_early_is_given_back_later_the_next_time() -> None:
    ladder = Ladder(STEPS, T)
    num_moves, level_changes = 0, []
    for index in range(300):
        latency_ns = CLOSE if ladder.level == 0 else CALM  # level 1 is what there is room for
        num_moves += ladder.window(index * T, latency_ns, 8)
        level_changes.append(ladder.level)
    times_back = [i for i in range(1, 300) if level_changes[i] < level_changes[i - 1]]
    gaps = [b - a for a, b in itertools.pairwise(times_back)]
    assert gaps == sorted(gaps)
    assert gaps[-1] >= 2 * gaps[0]


def test_when_most_sessions_have_gone_everything_comes_back_at_once() -> None:
    ladder = Ladder(STEPS, T)
    assert levels([CLOSE] * 17, ladder)[-1] == 4
    after = []
    for index in range(17, 30):
        ladder.window((index + 1) * T, CALM, 2)
        after.append(ladder.level)
    assert after == [4, 4, 4, 4] + [0] * 9  # 5 s after the last move


def test_when_some_sessions_have_gone_what_was_enough_for_so_many_comes_back() -> None:
    ladder = Ladder(STEPS, T)
    for index in range(17):
        ladder.window((index + 1) * T, CLOSE, 4 if index < 5 else 16)
    for index in range(17, 22):
        ladder.window((index + 1) * T, CALM, 8)
    assert ladder.level == 1  # 4 were too many for none, 16 for the first step


def test_a_session_that_begins_below_comes_back_like_any_other() -> None:
    after = levels([CALM] * 60, Ladder(STEPS, T, level=2))
    assert [after.index(level) for level in (2, 1, 0)] == [0, 5, 15]


@given(latencies)
def test_moves_are_single_steps_and_five_seconds_apart(latencies_ns: list[int]) -> None:
    ladder = Ladder(STEPS, T)
    moved_ns: list[int] = []
    now_ns = level = 0
    for latency_ns in latencies_ns:
        now_ns += T
        if ladder.window(now_ns, latency_ns, 8):
            assert abs(ladder.level - level) == 1
            moved_ns.append(now_ns)
        else:
            assert ladder.level == level
        level = ladder.level
        assert 0 <= level <= len(STEPS)
    assert all(b - a >= HOLD_NS for a, b in itertools.pairwise(moved_ns))


@given(latencies)
def test_whatever_was_before_calm_gives_everything_back(latencies_ns: list[int]) -> None:
    ladder = Ladder(STEPS, T)
    levels(latencies_ns, ladder)
    before_ns = (len(latencies_ns) + 1) * T
    most = len(STEPS) * (MOST_PATIENCE_NS // T)
    for index in range(most):
        ladder.window(before_ns + index * T, CALM, 8)
    assert ladder.level == 0


def test_a_ladder_without_steps_stays_where_it_is() -> None:
    assert levels([LATE] * 50, Ladder((), T)) == [0] * 50


def test_of_the_words_of_the_sink_the_newest_counts_in_any_order() -> None:
    level = Level()
    for at_ns, num_steps in ((2 * T, 1), (T, 0), (2 * T, 1)):
        level.update(at_ns, num_steps)
    assert level.num_steps == 1


@pytest.mark.parametrize(("num_steps", "shed"), [(0, 0), (1, 50), (2, 100), (4, 100)])
def test_pictures_go_by_halves_and_then_all(num_steps: int, shed: int) -> None:
    assert sum(sheds_picture(STEPS[:num_steps], DOOR, seq) for seq in range(100)) == shed


def test_of_two_windows_one_waits_for_the_other() -> None:
    waits = [merges(3, index) for index in range(10)]
    assert waits in ([True, False] * 5, [False, True] * 5)
    assert not any(merges(2, index) for index in range(10))
    assert not any(holds_window(STEPS, DOOR, index, num_held=1, overdue=False) for index in range(10))


def merges(num_steps: int, index: int) -> bool:
    return holds_window(STEPS[:num_steps], DOOR, index, num_held=0, overdue=False)


@pytest.mark.parametrize("num_steps", [0, 4])
def test_windows_that_come_too_late_wait_a_few_in_a_row(num_steps: int) -> None:
    waits = [holds_window(STEPS[:num_steps], DOOR, 7, num_held=held, overdue=True) for held in range(6)]
    assert waits == [True] * 4 + [False] * 2


def test_half_of_the_sessions_take_turns_with_the_others() -> None:
    sessions = [SessionId(f"camera{n}") for n in range(200)]
    assert 70 < sum(sheds_picture(STEPS[:1], session, 0) for session in sessions) < 130
