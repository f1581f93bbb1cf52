"""control/coordinator.py: actors that hang, restarts that take long, data that kill: who pays, and who waits."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from deploy.actor.accounts import EdgeEnds
from deploy.actor.suspects import NUM_ALONE, WorkNote, note_path
from deploy.control.calls import LONGEST_LOOK_S
from deploy.control.coordinator import LOOK_S, OPEN_TIMEOUT_S, Coordinator, CoordinatorError
from deploy.control.restarts import STALL_S, START_TIMEOUT_S
from deploy.process.deadline import Deadline
from graph.chunk import NS_PER_S, SessionId
from graph.ledger import Account
from graph.window import Unit
from stages.stage import StageError
from tests.support.actors import Batch, FakeActor, FakeCluster, of, replicas_at, sessions, started


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster()


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def coordinator(cluster: FakeCluster, tmp_path: Path, lines: list[str]) -> Coordinator:
    return started(cluster, tmp_path, "stages.llm.replicas=2", lines=lines)


def poll_until(coordinator: Coordinator, cluster: FakeCluster, is_so: Callable[[], object]) -> None:
    """As `pipeline up` does it, four times a second."""
    for _ in range(20_000):
        if is_so():
            return
        coordinator.poll()
        cluster.clock.advance(0.25)
    raise AssertionError("it never came to be")


def settle(coordinator: Coordinator, cluster: FakeCluster) -> None:
    coordinator.poll()
    poll_until(coordinator, cluster, lambda: not (coordinator.problem or coordinator.is_busy))
    coordinator.poll()


# ---- actors that hang ------------------------------------------------------------------------------------------------


def test_a_poll_waits_a_moment_for_one_that_hangs_and_what_it_reported_last_stands(
    coordinator: Coordinator, cluster: FakeCluster
):
    coordinator.open_sessions(sessions("a", "b"))
    before = coordinator.poll()
    cluster.actors["llm.0"].is_stopped = True
    began_s = cluster.clock.now_s
    after = coordinator.poll()
    assert cluster.clock.now_s - began_s == pytest.approx(LOOK_S)
    assert after["llm.0"] == before["llm.0"]
    assert (coordinator.sessions, coordinator.problem) == (["a", "b"], "")


def test_it_is_asked_once_however_often_is_polled(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a"))
    llm = cluster.actors["llm.0"]
    coordinator.poll()
    before = llm.num_batches
    llm.is_stopped = True
    for _ in range(10):
        coordinator.poll()
    llm.is_stopped = False
    coordinator.poll()
    assert llm.num_batches == before + 1


def test_one_that_takes_no_call_for_long_is_replaced_like_a_dead_one(
    coordinator: Coordinator, cluster: FakeCluster, lines: list[str]
):
    coordinator.open_sessions(sessions("a", "b"))
    stopped, began_s = cluster.actors["llm.0"], cluster.clock.now_s
    stopped.is_stopped = True
    poll_until(coordinator, cluster, lambda: coordinator.problem)
    assert STALL_S <= cluster.clock.now_s - began_s <= STALL_S + 1
    assert stopped in cluster.killed
    assert f"llm.0 has not answered for {STALL_S:g} s" in lines
    settle(coordinator, cluster)
    assert (cluster.peers, replicas_at(coordinator, "llm")) == (["llm.0-1"], {"a": 1, "b": 1})


def test_nobody_is_taken_for_dead_because_we_were_stopped_ourselves(coordinator: Coordinator, cluster: FakeCluster):
    """All were, as by a lid that is closed; the answers come when everybody goes on."""
    coordinator.open_sessions(sessions("a"))
    for actor in cluster.actors.values():
        actor.is_stopped = True
    coordinator.poll()
    cluster.clock.advance(3600.0)
    coordinator.poll()
    for actor in cluster.actors.values():
        actor.is_stopped = False
    coordinator.poll()
    assert (cluster.killed, coordinator.sessions) == ([], ["a"])


def test_many_short_stops_of_ours_count_a_moment_each(coordinator: Coordinator, cluster: FakeCluster):
    cluster.actors["llm.0"].is_stopped = True
    for _ in range(int(STALL_S / LONGEST_LOOK_S) // 2):
        coordinator.poll()
        cluster.clock.advance(60.0)
    assert cluster.killed == []


def test_in_virtual_time_a_batch_takes_as_long_as_it_takes(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a", paced=False))
    cluster.actors["llm.0"].is_stopped = True
    began_s = cluster.clock.now_s
    poll_until(coordinator, cluster, lambda: cluster.clock.now_s > began_s + 4 * STALL_S)
    cluster.actors["llm.0"].is_stopped = False
    coordinator.poll()
    assert (cluster.killed, coordinator.sessions) == ([], ["a"])


def test_one_that_can_not_say_any_more_what_it_does_is_replaced(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a"))
    cluster.actors["tts.0"].faulty_at = "report"
    settle(coordinator, cluster)
    assert (cluster.peers, coordinator.sessions) == (["tts.0-1"], ["a"])


# ---- openings --------------------------------------------------------------------------------------------------------


def test_a_camera_that_can_not_be_opened_for_one_that_hangs_is_refused_and_nobody_else_waits(
    coordinator: Coordinator, cluster: FakeCluster
):
    coordinator.open_sessions(sessions("a"))
    cluster.actors["tts.0"].is_stopped = True
    began_s = cluster.clock.now_s
    reply = coordinator.begin_to_open(sessions("b")[0], lambda: None)
    assert cluster.clock.now_s == began_s
    poll_until(coordinator, cluster, lambda: reply.is_done)
    assert OPEN_TIMEOUT_S <= cluster.clock.now_s - began_s <= OPEN_TIMEOUT_S + 1
    with pytest.raises(StageError, match=r"^tts\.0 has not answered for 10 s$"):
        reply.result()
    assert coordinator.sessions == ["a"]
    coordinator.poll()
    opened = {stage for _, stage, (plans,) in of(cluster.calls, "open_sessions") if plans[0].session.id == "b"}
    assert {stage for _, stage, (session,) in of(cluster.calls, "close_session") if session == "b"} == opened


def test_one_that_was_asked_to_open_and_goes_on_late_closes_again(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a"))
    tts = cluster.actors["tts.0"]
    tts.is_stopped = True
    reply = coordinator.begin_to_open(sessions("b")[0], lambda: None)
    poll_until(coordinator, cluster, lambda: reply.is_done)
    tts.is_stopped = False
    coordinator.poll()
    coordinator.poll()
    assert tts.sessions == {"a"}


def test_while_one_camera_waits_for_a_replica_another_one_opens(coordinator: Coordinator, cluster: FakeCluster):
    cluster.actors["llm.0"].is_stopped = True
    first, second = (coordinator.begin_to_open(each, lambda: None) for each in sessions("a", "b"))
    poll_until(coordinator, cluster, lambda: second.is_done)
    assert (first.is_done, second.error) == (False, None)
    assert replicas_at(coordinator, "llm") == {"a": 0, "b": 1}


def test_a_camera_that_comes_later_goes_to_a_replica_that_answers(coordinator: Coordinator, cluster: FakeCluster):
    cluster.actors["llm.0"].is_stopped = True
    began_s = cluster.clock.now_s
    poll_until(coordinator, cluster, lambda: cluster.clock.now_s > began_s + 3)
    replies = [coordinator.begin_to_open(each, lambda: None) for each in sessions("a", "b")]
    poll_until(coordinator, cluster, lambda: all(reply.is_done for reply in replies))
    assert replicas_at(coordinator, "llm") == {"a": 1, "b": 1}


def test_a_fault_of_a_stage_while_a_session_opens_costs_that_session(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a"))
    cluster.actors["vocoder.0"].faulty_at = "vocoder"
    reply = coordinator.begin_to_open(sessions("b")[0], lambda: None)
    poll_until(coordinator, cluster, lambda: reply.is_done)
    assert isinstance(reply.error, StageError)
    assert "vocoder.0: 'a fault'" in str(reply.error)
    coordinator.poll()
    assert (coordinator.sessions, cluster.killed) == (["a"], [])


def test_a_camera_that_opens_while_its_stage_dies_is_refused_and_the_others_go_on(
    coordinator: Coordinator, cluster: FakeCluster
):
    coordinator.open_sessions(sessions("a"))
    cluster.actors["events.0" if "events.0" in cluster.actors else "vocoder.0"].is_stopped = True
    reply = coordinator.begin_to_open(sessions("b")[0], lambda: None)
    for _ in range(8):
        coordinator.poll()
    cluster.actors["vision_encoder.0"].is_dead = True
    poll_until(coordinator, cluster, lambda: reply.is_done)
    assert isinstance(reply.error, StageError)
    assert coordinator.sessions == ["a"]


# ---- restarts --------------------------------------------------------------------------------------------------------


def test_the_calls_of_thirty_sessions_that_move_are_a_few_batches_per_actor(
    coordinator: Coordinator, cluster: FakeCluster
):
    coordinator.open_sessions(sessions(*(f"camera{number}" for number in range(30))))
    before = {name: actor.num_batches for name, actor in cluster.actors.items()}
    cluster.starts_at_once = False
    cluster.actors["llm.0"].is_dead = True
    poll_until(coordinator, cluster, lambda: set(replicas_at(coordinator, "llm").values()) == {1})
    coordinator.poll()
    coordinator.poll()
    assert len(of(cluster.calls, "resume_session")) == 15
    living = [name for name in before if name != "llm.0"]
    assert max(cluster.actors[name].num_batches - before[name] for name in living) < 10


def test_a_neighbour_that_hangs_holds_up_no_session_that_does_not_need_it(
    coordinator: Coordinator, cluster: FakeCluster
):
    coordinator.open_sessions(sessions("a", "b"))
    cluster.actors["llm.0"].is_stopped = True
    cluster.actors["tts.0"].is_dead = True
    cluster.calls.clear()
    for _ in range(20):
        coordinator.poll()
    recovered = [session for _, _, (session, kind, *_) in of(cluster.calls, "tell") if kind == "recovered"]
    assert recovered == ["b"], "whose LLM is llm.1; it hears of it long before llm.0 is given up"


def test_a_restart_that_takes_longer_than_a_start_may_is_tried_again_and_the_run_goes_on(
    coordinator: Coordinator, cluster: FakeCluster, lines: list[str]
):
    coordinator.open_sessions(sessions("a"))
    cluster.starts_at_once = False
    cluster.actors["tts.0"].is_dead = True
    began_s = cluster.clock.now_s
    poll_until(coordinator, cluster, lambda: len(cluster.peers) == 4)
    assert cluster.clock.now_s - began_s > 3 * START_TIMEOUT_S
    line = f"tts.0 has not answered for {START_TIMEOUT_S:g} s"
    assert lines.count(line) == 3, "once for each try"
    cluster.actors["tts.0"].is_up = True
    settle(coordinator, cluster)
    assert coordinator.sessions == ["a"]


def test_between_two_tries_there_is_an_ever_longer_pause(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a", "b"))
    tries_s: list[float] = []
    for number in range(1, 5):
        cluster.actors["llm.0"].is_dead = True
        died_s = cluster.clock.now_s
        poll_until(coordinator, cluster, lambda number=number: len(cluster.peers) == number)
        tries_s.append(round(cluster.clock.now_s - died_s))
    assert tries_s == sorted(tries_s)
    assert tries_s[-1] >= 15


def test_a_stage_that_can_not_be_brought_up_is_tried_again_after_ever_longer_pauses(
    coordinator: Coordinator, cluster: FakeCluster, lines: list[str]
):
    coordinator.open_sessions(sessions("a"))
    replace = cluster.replace

    def broken(process: object, plan: object) -> FakeActor:
        actor = replace(process, plan)
        actor.is_dead = True
        return actor

    cluster.replace = broken  # type: ignore[method-assign, assignment]
    cluster.actors["tts.0"].is_dead = True
    poll_until(coordinator, cluster, lambda: len(cluster.peers) == 6)
    pauses = [line.rpartition(" in ")[2] for line in lines if "tried again" in line]
    assert pauses[:5] == ["1 s", "5 s", "15 s", "60 s", "60 s"]
    assert (coordinator.sessions, coordinator.problem) == (["a"], "tts.0 started again after it has died")


# ---- data that kill --------------------------------------------------------------------------------------------------


def works_on(cluster: FakeCluster, folder: Path, name: str, *sessions: str, stage: str = "") -> None:
    """It is at window 2 of each. stage: of an actor that has several."""
    peer = next((peer for peer in reversed(cluster.peers) if peer.startswith(name)), name)
    units = [Unit(SessionId(session), 2, 2 * NS_PER_S, 3 * NS_PER_S) for session in sessions]
    cluster.actors[name].works = WorkNote(note_path(folder / "bus", peer)).of(stage or name.partition(".")[0], units)
    cluster.actors[name].works.__enter__()


def test_a_stage_that_takes_long_is_named_with_what_it_is_at_and_again_seldom(
    coordinator: Coordinator, cluster: FakeCluster, tmp_path: Path, lines: list[str]
):
    coordinator.open_sessions(sessions("hall", "yard"))
    works_on(cluster, tmp_path, "tts.0", "hall", "yard")
    cluster.actors["tts.0"].is_stopped = True
    seen: list[str] = []
    for _ in range(200):
        coordinator.poll()
        seen += [what for _, what in coordinator.slow.values()]
    assert [line for line in lines if "stage tts has" in line] == [
        f"stage tts has been at window 2 of hall, window 2 of yard for {seconds} s" for seconds in (5, 10, 20)
    ]
    assert seen and coordinator.slow == {}, "it is taken for dead by now"
    (dead,) = [line for line in lines if f"has not answered for {STALL_S:g} s" in line]
    assert dead.endswith("; stage tts was at window 2 of hall, window 2 of yard")


def test_one_that_is_slow_on_another_machine_is_named(coordinator: Coordinator, cluster: FakeCluster, lines: list[str]):
    coordinator.open_sessions(sessions("hall"))
    cluster.actors["tts.0"].is_stopped = True
    for _ in range(40):
        coordinator.poll()
    assert lines[-1] == "tts.0 has not answered for 5 s"


def dies_of(cluster: FakeCluster, folder: Path, name: str, *working_on: str, stage: str = "") -> None:
    """As a process does whose memory is gone, in the middle of a batch."""
    works_on(cluster, folder, name, *working_on, stage=stage)
    cluster.actors[name].is_dead = True


def test_a_camera_whose_data_kill_a_stage_twice_in_a_row_is_closed_and_the_others_go_on(
    coordinator: Coordinator, cluster: FakeCluster, tmp_path: Path, lines: list[str]
):
    coordinator.open_sessions(sessions("good", "bad"))
    for _ in range(2):
        dies_of(cluster, tmp_path, "tts.0", "bad")
        settle(coordinator, cluster)
    assert coordinator.sessions == ["good"]
    line = "camera bad: its session is over: tts died twice in a row while it worked on its data"
    assert lines.count(line) == 1
    (event,) = [call for _, _, call in of(cluster.calls, "tell") if call[1] == "session_closed"]
    assert event[0] == "bad"
    closed = [stage for _, stage, (session,) in of(cluster.calls, "close_session") if session == "bad"]
    assert "speaker" in closed
    dies_of(cluster, tmp_path, "tts.0", "good")
    settle(coordinator, cluster)
    assert coordinator.sessions == ["good"], "three deaths, of which none is the stage's own, end nothing"


def test_a_camera_whose_data_kill_a_stage_behind_which_no_window_ends_goes_on_without_it(
    coordinator: Coordinator, cluster: FakeCluster, tmp_path: Path, lines: list[str]
):
    coordinator.open_sessions(sessions("good", "bad"))
    for _ in range(2):
        dies_of(cluster, tmp_path, "io.0", "bad", stage="events")
        settle(coordinator, cluster)
    assert coordinator.sessions == ["good", "bad"]
    assert not any("its session is over" in line for line in lines)
    given_up = {(s, plan.session.id): plan.given_up for _, s, (plan, _) in of(cluster.calls, "resume_session")}
    assert {place: reason for place, reason in given_up.items() if reason} == {
        ("events", "bad"): "io died twice in a row while it worked on its data"
    }
    assert {("events", "good"), ("speaker", "bad"), ("speaker", "good")} <= given_up.keys()


def test_those_that_were_in_a_batch_that_died_go_alone_so_that_the_next_death_has_one_name(
    coordinator: Coordinator, cluster: FakeCluster, tmp_path: Path
):
    coordinator.open_sessions(sessions("a", "b", "c"))
    dies_of(cluster, tmp_path, "tts.0", "a", "b")
    settle(coordinator, cluster)
    alone = {plan.session.id: plan.alone_for for _, _, (plan, _) in of(cluster.calls, "resume_session")}
    assert alone == {"a": NUM_ALONE, "b": NUM_ALONE, "c": 0}
    dies_of(cluster, tmp_path, "tts.0", "b")
    settle(coordinator, cluster)
    assert coordinator.sessions == ["a", "c"]


def test_who_dies_of_another_camera_each_time_closes_none(
    coordinator: Coordinator, cluster: FakeCluster, tmp_path: Path
):
    coordinator.open_sessions(sessions("a", "b"))
    for name in ("a", "b", "a"):
        dies_of(cluster, tmp_path, "tts.0", name)
        settle(coordinator, cluster)
    assert coordinator.sessions == ["a", "b"]


def test_a_run_whose_last_camera_is_closed_for_its_data_has_failed(
    coordinator: Coordinator, cluster: FakeCluster, tmp_path: Path
):
    coordinator.open_sessions(sessions("bad"))
    dies_of(cluster, tmp_path, "tts.0", "bad")
    settle(coordinator, cluster)
    dies_of(cluster, tmp_path, "tts.0", "bad")
    with pytest.raises(CoordinatorError, match="no session is left"):
        settle(coordinator, cluster)


# ---- the end ---------------------------------------------------------------------------------------------------------


def test_the_end_has_an_end_whatever_hangs_and_its_ledger_is_exact(coordinator: Coordinator, cluster: FakeCluster):
    edge = "llm.text->tts.text"
    coordinator.open_sessions(sessions("a", "b"))
    cluster.actors["llm.0"].ends = {edge: EdgeEnds(sent=Account(5))}
    cluster.actors["tts.0"].ends = {edge: EdgeEnds(received=Account(0, 3), arrived={"llm.0": 3})}
    coordinator.poll()
    cluster.actors["llm.0"].is_stopped = cluster.actors["vocoder.0"].is_stopped = True
    began_s, deadline = cluster.clock.now_s, Deadline(4.0, cluster.clock)
    ledger = coordinator.end(deadline)
    coordinator.stop(deadline)
    assert cluster.clock.now_s - began_s <= 4.0
    assert (ledger[edge].accepted, ledger[edge].delivered, dict(ledger[edge].dropped)["crash"]) == (5, 3, 2)
    assert all(account.in_flight == 0 for account in ledger.values())
    assert {actor for actor in cluster.actors.values() if actor not in cluster.killed} == set()


def test_who_is_slow_at_the_end_is_waited_for_while_there_is_time(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a"))
    coordinator.poll()
    slow, finished = cluster.actors["media.0"], cluster.finished
    slow.is_stopped = True

    def after_a_while(references: Sequence[Batch], timeout_s: float) -> Sequence[Batch]:
        slow.is_stopped = cluster.clock.now_s < began_s + 2.0
        return finished(references, min(timeout_s, 0.1))

    cluster.finished = after_a_while  # type: ignore[method-assign]
    began_s = cluster.clock.now_s
    coordinator.end(Deadline(10.0, cluster.clock))
    assert cluster.killed == []
    assert slow.sessions == set()


def test_an_end_for_which_no_time_is_left_still_has_what_was_reported(coordinator: Coordinator, cluster: FakeCluster):
    edge = "llm.text->tts.text"
    coordinator.open_sessions(sessions("a"))
    cluster.actors["llm.0"].ends = {edge: EdgeEnds(sent=Account(2, 2))}
    coordinator.poll()
    for actor in cluster.actors.values():
        actor.is_stopped = True
    account = coordinator.end(Deadline(0.0, cluster.clock))[edge]
    assert (account.accepted, account.delivered, account.in_flight) == (2, 2, 0)


def test_ending_a_session_whose_actor_hangs_waits_for_nobody(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a", "b"))
    for actor in cluster.actors.values():
        actor.is_stopped = True
    began_s = cluster.clock.now_s
    coordinator.end_session(SessionId("a"))
    coordinator.close_session(SessionId("b"))
    assert cluster.clock.now_s == began_s


def test_what_waits_for_one_that_loads_for_long_is_not_looked_at_more_often(
    coordinator: Coordinator, cluster: FakeCluster
):
    coordinator.open_sessions(sessions("a"))
    cluster.starts_at_once = False
    cluster.actors["tts.0"].is_dead = True
    expected: list[bool] = []
    for _ in range(20):
        coordinator.poll()
        cluster.clock.advance(0.25)
        expected.append(coordinator.expects_answers)
    assert (expected[0], expected[-1], coordinator.is_busy) == (True, False, True)
    cluster.actors["tts.0"].is_up = True
    coordinator.poll()
    assert coordinator.expects_answers
