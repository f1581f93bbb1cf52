"""Threads on cores: equal shares, no more done than can be, and nobody's end told twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.simulator.cores import Cores, Thread
from deploy.simulator.world import World

WORK_NS = 1_000


def at(world: World, time_ns: int, thread: Thread, work_ns: int = WORK_NS) -> int:
    """When a thread is through with work that it begins then."""
    world.now_ns = time_ns
    thread.work(work_ns)
    return world.now_ns


@pytest.mark.parametrize(("num_cores", "ends_ns"), [(2, [1000, 1000, 1500, 2000]), (1, [1000, 2000, 3000, 4000])])
def test_who_begins_shares_the_cores_with_those_that_work(num_cores: int, ends_ns: list[int]) -> None:
    cores = Cores(world := World(), num_cores)
    assert [at(world, 0, cores.thread()) for _ in ends_ns] == ends_ns


def test_a_short_turn_beside_long_ones_is_soon_over() -> None:
    cores = Cores(world := World(), 1)
    at(world, 0, cores.thread(), 100_000)
    assert at(world, 10, cores.thread(), 100) == 10 + 2 * 100


def test_what_a_thread_still_owes_comes_before_its_next_turn() -> None:
    """The first was told 1000, and could not know of the second: half of its work is left then."""
    cores = Cores(world := World(), 1)
    first, second = cores.thread(), cores.thread()
    assert at(world, 0, first) == 1000
    at(world, 0, second, 5000)
    assert at(world, 1000, first, 100) == 1000 + 2 * (500 + 100)


def test_two_pieces_of_one_turn_take_as_long_as_one() -> None:
    whole, parts = (Cores(World(), 1) for _ in range(2))
    ends = []
    for cores, pieces in ((whole, [900]), (parts, [300, 600])):
        world = cores._world
        thread, other = cores.thread(), cores.thread()
        at(world, 0, other, 5000)
        world.now_ns = 0
        for piece in pieces:
            thread.work(piece)
        ends.append(world.now_ns)
    assert ends[0] == ends[1]


def test_rivals_take_their_share_and_half_a_core_takes_twice_as_long() -> None:
    beside, half = Cores(World(), 1, rivals=1.0), Cores(World(), 0.5)
    assert [at(cores._world, 0, cores.thread()) for cores in (beside, half)] == [2000, 2000]


def test_what_others_have_of_a_machine_slows_nobody_down_as_long_as_there_is_room_beside_it() -> None:
    cores = Cores(world := World(), 1.5)
    assert [at(world, 0, cores.thread()) for _ in range(2)] == [1000, 1000 + 1000 // 3]


@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2_000), st.integers(1, 3_000)), min_size=1, max_size=40),
)
def test_no_more_is_done_than_the_cores_can_do(num_cores: int, turns: list[tuple[int, int, int]]) -> None:
    """Once all that was begun before is over, so much time has passed as it takes."""
    cores = Cores(world := World(), num_cores)
    threads = [cores.thread() for _ in range(6)]
    free_ns, now_ns = [0] * 6, 0
    for number, pause_ns, work_ns in turns:
        now_ns = max(now_ns + pause_ns, free_ns[number])
        free_ns[number] = at(world, now_ns, threads[number], work_ns)
        assert free_ns[number] >= now_ns + work_ns - 2, "a nanosecond may be rounded away"
    # Whoever comes then has the rest of all others before it: it has ended when they have.
    end_ns = at(world, max(now_ns, *free_ns), cores.thread(), 1_000_000)
    assert (end_ns + 40) * num_cores >= sum(thread.busy_ns for thread in threads)
    assert all(thread.busy_ns <= end_ns for thread in threads)
