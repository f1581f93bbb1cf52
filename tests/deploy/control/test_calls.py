"""deploy/control/calls.py: one line per actor, in order; and procedures, which wait for nobody."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.control.calls import (
    ActorDied,
    CallError,
    CoordinatorError,
    Lines,
    Overdue,
    Procedures,
    Reply,
    Steps,
    answered,
)
from stages.stage import StageError
from tests.support.actors import Clock, FakeActor, FakeCluster


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster()


@pytest.fixture
def lines(cluster: FakeCluster) -> Lines:
    return Lines(cluster, Path("/logs"), cluster.clock)


@pytest.fixture
def actor(cluster: FakeCluster) -> FakeActor:
    return FakeActor("here", cluster.calls, ["llm"], cluster.clock)


def test_calls_go_out_in_order_one_batch_at_a_time(lines: Lines, actor: FakeActor, cluster: FakeCluster) -> None:
    line = lines.open("llm.0", actor, 30.0)
    first = line.post("bury", "a")
    actor.is_stopped = True
    lines.look(0.0)
    others = [line.post("bury", each) for each in "bcd"]
    lines.look(0.0)
    assert not first.is_done
    actor.is_stopped = False
    lines.look(0.0)
    assert [first.is_done, *(reply.is_done for reply in others)] == [True, False, False, False]
    lines.look(0.0)
    assert [arguments for _, _, arguments in cluster.calls] == [("a",), ("b",), ("c",), ("d",)]
    assert actor.num_batches == 2


def test_a_call_that_fails_fails_alone(lines: Lines, actor: FakeActor) -> None:
    line = lines.open("llm.0", actor, 30.0)
    actor.full_at = "llm"
    full, fine = line.post("open_sessions", "llm", []), line.post("bury", [])
    lines.look(0.0)
    with pytest.raises(StageError, match="no room"):
        full.result()
    assert (fine.error, line.error) == (None, None)


def test_a_fault_of_ours_names_the_actor_and_its_log(lines: Lines, actor: FakeActor) -> None:
    line = lines.open("llm.0", actor, 30.0)
    actor.faulty_at = "llm"
    reply = line.post("open_sessions", "llm", [])
    lines.look(0.0)
    with pytest.raises(CallError, match=r"^llm\.0: 'a fault'; see /logs/llm\.0\.log$"):
        reply.result()


def test_with_an_actor_everything_that_waits_for_it_has_failed(lines: Lines, actor: FakeActor) -> None:
    line = lines.open("llm.0", actor, 30.0)
    under_way = line.post("report")
    actor.is_stopped = True
    lines.look(0.0)
    waiting = line.post("report")
    actor.is_dead = True
    lines.look(0.0)
    later = line.post("report")
    assert all(isinstance(reply.error, ActorDied) for reply in (under_way, waiting, later))
    lines.look(0.0)
    assert line.reference is None, "nothing is sent there any more"


@pytest.mark.parametrize(("left", "read"), [("", "its log is empty"), ("a line\n", "see {log}"), (None, "see {log}")])
def test_one_is_sent_to_the_log_of_the_dead_only_where_it_says_something(
    tmp_path: Path, actor: FakeActor, cluster: FakeCluster, left: str | None, read: str
) -> None:
    log = tmp_path / "llm.0.log"
    if left is not None:  # else it is on another machine
        log.write_text(left)
    lines = Lines(cluster, tmp_path, cluster.clock)
    reply = lines.open("llm.0", actor, 30.0).post("report")
    actor.is_dead = True
    lines.look(0.0)
    assert str(reply.error).endswith(f"; {read.format(log=log)}")


def test_who_hangs_delays_no_other_line(lines: Lines, actor: FakeActor, cluster: FakeCluster) -> None:
    other = lines.open("tts.0", FakeActor("here", cluster.calls, ["tts"], cluster.clock), 30.0)
    actor.is_stopped = True
    hung, fine = lines.open("llm.0", actor, 30.0).post("report"), other.post("report")
    began_s = cluster.clock.now_s
    lines.look(10.0)
    assert (hung.is_done, fine.is_done, cluster.clock.now_s) == (False, True, began_s)


def test_a_procedure_goes_on_as_far_as_the_answers_are_there() -> None:
    first, second = Reply[int]("a"), Reply[int]("b")
    seen: list[int] = []

    def steps() -> Steps[None]:
        yield [first]
        seen.append(first.result())
        yield [second]
        seen.append(second.result())

    procedures = Procedures(Clock())
    procedures.begin(steps())
    procedures.step()
    assert seen == []
    second.answer(2)
    first.answer(1)
    procedures.step()
    assert (seen, procedures.are_running) == ([1, 2], False)


def test_one_that_takes_too_long_is_told_whom_it_waits_for_and_may_clean_up() -> None:
    clock, caught = Clock(), list[Exception]()

    def steps() -> Steps[None]:
        try:
            yield [answered("io.0", None), Reply("llm.0")]
        except CoordinatorError as error:
            caught.append(error)
            yield [answered("io.0", None)]

    procedures = Procedures(clock)
    procedures.begin(steps(), limit_s=10.0)
    clock.advance(9.9)
    procedures.step()
    assert not caught
    clock.advance(0.1)
    procedures.step()
    procedures.step()
    assert ([str(error) for error in caught], type(caught[0])) == (["llm.0 has not answered for 10 s"], Overdue)
    assert not procedures.are_running


def test_an_error_in_one_procedure_is_told_and_ends_no_other() -> None:
    def broken() -> Steps[None]:
        yield [reply]
        raise CoordinatorError("it is over")

    def fine() -> Iterator[list[Reply[None]]]:
        yield [reply]

    reply: Reply[None] = Reply("a")
    procedures = Procedures(Clock())
    procedures.begin(broken())
    procedures.begin(fine())  # type: ignore[arg-type]
    reply.answer(None)
    with pytest.raises(CoordinatorError, match="it is over"):
        procedures.step()
    procedures.step()
    assert not procedures.are_running
