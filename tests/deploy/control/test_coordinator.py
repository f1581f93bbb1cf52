"""deploy/control/coordinator.py: sessions open together, and one event time for all, whatever the nodes' clocks say."""

from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.actor.accounts import EdgeEnds
from deploy.actor.clock import clock_ahead_ns
from deploy.actor.session_plan import SessionPlan, SessionSnapshot
from deploy.control.coordinator import Coordinator, CoordinatorError
from deploy.control.sessions import DECODER_START_NS, FIRST_WINDOW_NS, HEAD_START_NS
from graph.chunk import NS_PER_MS, NS_PER_S, SessionId
from graph.ledger import Account
from stages.stage import StageError
from tests.support.actors import AHEAD_NS, HEARD, FakeCluster, of, replicas_at, sessions, started
from tests.support.specs import model_stages

Poll = Callable[[], object]


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster()


@pytest.fixture
def coordinator(cluster: FakeCluster, tmp_path: Path) -> Coordinator:
    return started(cluster, tmp_path, "stages.llm.replicas=2", "window.phases=1")


def poll_until(coordinator: Coordinator, cluster: FakeCluster, is_so: Callable[[], object]) -> None:
    """As `pipeline up` does it, four times a second."""
    for _ in range(10_000):
        if is_so():
            return
        coordinator.poll()
        cluster.clock.advance(0.25)
    raise AssertionError("it never came to be")


def look(coordinator: Coordinator) -> None:
    """Often enough for everything that waits for nobody."""
    for _ in range(20):
        coordinator.poll()


def settle(coordinator: Coordinator, cluster: FakeCluster) -> None:
    """Until everybody is up and everything is done."""
    coordinator.poll()
    poll_until(coordinator, cluster, lambda: not (coordinator.problem or coordinator.is_busy))
    coordinator.poll()


def test_sessions_open_together_stage_by_stage_and_begin_when_all_are_open(
    coordinator: Coordinator, cluster: FakeCluster
):
    coordinator.open_sessions(sessions("a", "b", "c"))
    methods = [method for method, _, _ in cluster.calls]
    assert methods == sorted(methods, reverse=True), "all are open before one begins"
    opened = [stage for _, stage, _ in of(cluster.calls, "open_sessions")]
    assert sorted(opened) == sorted([*coordinator._spec.stages, "llm"])
    assert [stage for stage in opened if stage in ("microphone", "camera")] == ["microphone", "camera"]
    assert [stage for stage in opened if stage in ("events", "speaker")] == ["events", "speaker"]
    begun = [(stage, list(origins)) for _, stage, (origins,) in of(cluster.calls, "begin_sessions")]
    takers = [stage for stage in opened if stage not in ("microphone", "camera")]
    assert [stage for stage, _ in begun[: len(takers)]] == takers
    sources = [(stage, [one]) for one in ("a", "b", "c") for stage in ("microphone", "camera")]
    assert begun[len(takers) :] == sources, "one after the other, since each starts a decoder"


def test_that_a_stage_is_ready_is_told_with_what_it_computes_with(cluster: FakeCluster, tmp_path: Path):
    lines: list[str] = []
    started(cluster, tmp_path, lines=lines)
    assert {"  llm.0 ready (cpu)", "  tts.0 ready"} <= set(lines)


def test_replicas_share_the_sessions(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a", "b", "c"))
    plans: list[list[SessionPlan]] = [call[2][0] for call in of(cluster.calls, "open_sessions") if call[1] == "llm"]
    assert [[plan.session.id for plan in at_one] for at_one in plans] == [["a", "c"], ["b"]]


def test_sessions_are_counted_only_where_they_pass(cluster: FakeCluster, tmp_path: Path):
    coordinator = started(cluster, tmp_path, "stages.audio_encoder.replicas=2")
    for name in "abcd":
        coordinator.open_sessions(sessions(name, microphone=False))
    for name in "efgh":
        coordinator.open_sessions(sessions(name))
    assert coordinator.load_of("audio_encoder") == [2, 2]


def test_what_was_counted_in_is_counted_out(cluster: FakeCluster, tmp_path: Path):
    """After moves, failed openings, deaths and closings, of sessions with and without a microphone."""
    coordinator = started(cluster, tmp_path, "stages.llm.replicas=2", "stages.audio_encoder.replicas=2")
    coordinator.open_sessions([*sessions("a", "b", "c"), *sessions("d", microphone=False)])
    cluster.actors["llm.1"].full_at = "llm"
    with pytest.raises(StageError, match="no room"):
        coordinator.open_sessions(sessions("e", "f"))
    cluster.actors["llm.1"].full_at = ""
    cluster.actors["llm.0"].is_dead = True
    settle(coordinator, cluster)
    assert sorted(coordinator.load_of("llm")) == [0, 4]
    assert coordinator.load_of("audio_encoder") == [2, 1]
    for name in "abcd":
        coordinator.close_session(SessionId(name))
    assert [coordinator.load_of(stage) for stage in ("llm", "audio_encoder", "tts")] == [[0, 0], [0, 0], [0]]


def test_a_session_without_ears_passes_no_microphone(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions([*sessions("deaf", microphone=False), *sessions("all")])
    begun = [(stage, one) for _, stage, (origins,) in of(cluster.calls, "begin_sessions") for one in origins]
    stages = {one: {stage for stage, other in begun if other == one} for one in ("deaf", "all")}
    assert stages["all"] - stages["deaf"] == {"microphone", "audio_encoder"}
    assert stages["all"] == set(coordinator._spec.stages)


def test_time_begins_after_all_are_open_and_is_the_same_on_every_node(coordinator: Coordinator, cluster: FakeCluster):
    before_ns = cluster.clock.now_ns()
    coordinator.open_sessions(sessions("a", "b"))
    origins = {stage: set(at.values()) for _, stage, (at,) in of(cluster.calls, "begin_sessions")}
    here = set().union(*(at for stage, at in origins.items() if stage != "llm"))
    assert len(here) == 1
    assert before_ns + HEAD_START_NS <= min(here) <= cluster.clock.now_ns() + HEAD_START_NS + 2 * DECODER_START_NS
    assert abs(min(origins["llm"]) - min(here) - AHEAD_NS) < AHEAD_NS // 2  # how long a reading takes


def test_sessions_that_open_later_are_in_step_with_the_first(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a"))
    coordinator.open_sessions(sessions("b"))
    first_ns, *_, last_ns = (
        min(at.values()) for _, stage, (at,) in of(cluster.calls, "begin_sessions") if stage != "llm"
    )
    assert (last_ns - first_ns) % NS_PER_S == 0


def test_a_clock_that_was_set_between_two_openings_is_read_anew(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a"))
    for actor in cluster.actors.values():
        actor.ahead_ns *= -1
    cluster.calls.clear()
    coordinator.open_sessions(sessions("b"))
    origins = {stage: at[SessionId("b")] for _, stage, (at,) in of(cluster.calls, "begin_sessions")}
    assert abs(origins["llm"] - origins["camera"] + AHEAD_NS) < AHEAD_NS // 2  # how long a reading takes


def test_a_recovered_replica_is_on_its_sessions_axis_after_a_step_of_the_wall_clock(
    coordinator: Coordinator, cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
):
    coordinator.open_sessions(sessions("a"))
    (before_ns,) = [at[SessionId("a")] for _, stage, (at,) in of(cluster.calls, "begin_sessions") if stage == "tts"]
    monkeypatch.setattr("time.time", lambda: 3600.0)
    monkeypatch.setattr("time.time_ns", lambda: 3600 * NS_PER_S)
    cluster.calls.clear()
    cluster.actors["tts.0"].is_dead = True
    settle(coordinator, cluster)
    assert [origin_ns for _, _, (_, origin_ns) in of(cluster.calls, "resume_session")] == [before_ns]


def test_phases_take_turns_within_a_window(cluster: FakeCluster, tmp_path: Path):
    coordinator = started(cluster, tmp_path, "window.phases=3")
    coordinator.open_sessions(sessions("a", "b"))
    coordinator.open_sessions(sessions("c", "d"))
    at_camera = [at for _, stage, (at,) in of(cluster.calls, "begin_sessions") if stage == "camera"]
    origins = {one: at_ns for at in at_camera for one, at_ns in at.items()}
    behind_ns = [(origins[one] - origins["a"]) % NS_PER_S for one in ("a", "b", "c", "d")]
    phases_ns = [0, NS_PER_S // 3, 2 * NS_PER_S // 3]
    assert behind_ns[:3] == phases_ns
    assert behind_ns[3] in phases_ns


def test_phases_are_filled_evenly_whichever_cameras_go(cluster: FakeCluster, tmp_path: Path):
    coordinator = started(cluster, tmp_path, "window.phases=2")
    coordinator.open_sessions(sessions(*(f"camera{number}" for number in range(8))))
    phases = {name: placement.phase for name, placement in coordinator._table.placements.items()}
    for name in [name for name, phase in phases.items() if phase == 1]:
        coordinator.close_session(name)
    for number in range(8, 12):
        coordinator.open_sessions(sessions(f"camera{number}"))
        cluster.clock.advance(0.3)
    now = [placement.phase for placement in coordinator._table.placements.values()]
    assert (now.count(0), now.count(1)) == (4, 4)


@pytest.mark.parametrize(("replicas", "counts"), [(1, [7, 6, 7, 0]), (2, [10, 10, 0, 0])])
def test_on_gpus_the_more_sessions_a_replica_has_the_more_phases_there_are(
    cluster: FakeCluster, tmp_path: Path, replicas: int, counts: list[int]
):
    models = [f"stages.{stage}.{what}" for stage in model_stages() for what in (f"replicas={replicas}", "batch=8")]
    coordinator = started(cluster, tmp_path, "stages.llm.gpus=1", *models)
    coordinator.open_sessions(sessions(*(f"camera{number}" for number in range(20))))
    phases = [placement.phase for placement in coordinator._table.placements.values()]
    assert [phases.count(phase) for phase in range(4)] == counts


def test_in_virtual_time_there_are_no_phases(cluster: FakeCluster, tmp_path: Path):
    started(cluster, tmp_path, "window.phases=2").open_sessions(sessions("a", "b", paced=False))
    (at_llm,) = [at for _, stage, (at,) in of(cluster.calls, "begin_sessions") if stage == "llm"]
    assert at_llm[SessionId("a")] == at_llm[SessionId("b")]


def test_where_one_has_no_room_none_stays_open(coordinator: Coordinator, cluster: FakeCluster):
    for actor in cluster.actors.values():
        actor.full_at = "tts"
    with pytest.raises(StageError, match="no room"):
        coordinator.open_sessions(sessions("a", "b"))
    assert coordinator.sessions == []
    assert of(cluster.calls, "begin_sessions") == []
    coordinator.poll()
    opened = {(stage, plan.session.id) for _, stage, (plans,) in of(cluster.calls, "open_sessions") for plan in plans}
    assert opened == {(stage, session) for _, stage, (session,) in of(cluster.calls, "close_session")}


def test_the_quickest_answer_tells_another_clock():
    # Given: a clock 700 ahead; the second answer takes 10 there and 10 back, the others are long under way.
    now = iter([0, 110, 1000, 1020, 2000, 2210])
    theirs = iter([100 + 700, 1010 + 700, 2200 + 700])
    assert clock_ahead_ns(lambda: next(theirs), lambda: next(now), num_questions=3) == 700


# ---- who dies --------------------------------------------------------------------------------------------------------


def test_sessions_of_a_dead_replica_go_on_at_another_one(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a", "b"))
    assert replicas_at(coordinator, "llm") == {"a": 0, "b": 1}
    cluster.starts_at_once = False
    cluster.actors["llm.0"].is_dead = True
    cluster.calls.clear()
    look(coordinator)
    assert replicas_at(coordinator, "llm") == {"a": 1, "b": 1}
    (resumed,) = of(cluster.calls, "resume_session")
    assert (resumed[1], resumed[2][0].resume_from) == ("llm", HEARD)
    buried = {stage: ends for _, stage, (ends,) in of(cluster.calls, "bury")}
    assert buried["vision_encoder"] == [("vision_encoder.image->llm.image", 0)]
    assert (cluster.peers, coordinator.problem) == (["llm.0-1"], "llm.0 started again after it has died")
    assert not of(cluster.calls, "reconnect"), "nobody sends there until it is up"


def test_what_has_come_late_where_windows_end_is_known_however_often_that_dies(
    coordinator: Coordinator, cluster: FakeCluster
):
    coordinator.open_sessions(sessions("a"))
    look(coordinator)
    late: list[int] = []
    for seen in (SessionSnapshot(52, 8), SessionSnapshot(0, 0), SessionSnapshot(70, 11)):
        cluster.actors["io.0"].at_end = seen
        look(coordinator)
        cluster.actors["io.0"].is_dead = True
        cluster.calls.clear()
        settle(coordinator, cluster)
        late += [what[0].num_late for _, stage, what in of(cluster.calls, "resume_session") if stage == "speaker"]
    assert late == [8, 8, 11]


def test_one_that_takes_the_place_of_a_dead_one_is_sent_to_once_its_sessions_are_open(
    coordinator: Coordinator, cluster: FakeCluster
):
    coordinator.open_sessions(sessions("a", "b"))
    cluster.starts_at_once = False
    cluster.actors["tts.0"].is_dead = True
    look(coordinator)
    cluster.calls.clear()
    look(coordinator)
    assert cluster.calls == [], "it loads"
    cluster.actors["tts.0"].is_up = True
    settle(coordinator, cluster)
    calls = [call for call in cluster.calls if call[2] != ([],)]
    assert [method for method, _, _ in calls[:2]] == ["resume_session"] * 2
    llms = [method for method, stage, _ in calls if stage == "llm"]
    assert llms == ["reroute", "reconnect"] * 2, "before anything flows, who sends knows that it begins anew"
    assert {method for method, _, _ in calls} == {"resume_session", "reroute", "reconnect", "tell"}
    assert (coordinator.problem, coordinator.num_deaths) == ("", {"tts.0": 1})


def test_one_that_is_back_before_its_neighbour_sends_nothing_there_before_its_sessions_are_open(
    coordinator: Coordinator, cluster: FakeCluster
):
    coordinator.open_sessions(sessions("a"))
    cluster.starts_at_once = False
    cluster.actors["tts.0"].is_dead = cluster.actors["vocoder.0"].is_dead = True
    look(coordinator)
    for name in ("tts.0", "vocoder.0"):
        cluster.actors[name].is_up = True
        look(coordinator)
    held = {stage: plan.held for _, stage, (plan, _) in of(cluster.calls, "resume_session")}
    assert held == {"tts": {"tts.codes->vocoder.codes"}, "vocoder": set()}
    assert ("tts", "tts.codes->vocoder.codes") in [(call[1], call[2][1]) for call in of(cluster.calls, "reroute")]


def test_sessions_that_find_no_room_elsewhere_wait_for_the_next_one(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a", "b"))
    cluster.starts_at_once = False
    cluster.actors["llm.1"].full_at = "llm"
    cluster.actors["llm.0"].is_dead = True
    cluster.calls.clear()
    look(coordinator)
    assert [plan.session.id for _, _, (plan, _) in of(cluster.calls, "resume_session")] == ["a"]
    assert replicas_at(coordinator, "llm") == {"a": 0, "b": 1}
    assert coordinator.sessions == ["a", "b"]


def test_a_session_for_which_the_next_one_has_no_room_is_over(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a", "b"))
    cluster.starts_at_once = False
    cluster.actors["tts.0"].is_dead = True
    coordinator.poll()
    cluster.actors["tts.0"].full_at = "tts"
    cluster.actors["tts.0"].is_up = True
    settle(coordinator, cluster)
    assert (coordinator.sessions, coordinator.problem) == ([], "")


def test_new_sessions_go_where_a_replica_lives_or_are_refused(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a"))
    cluster.starts_at_once = False
    cluster.actors["llm.0"].is_dead = True
    coordinator.poll()
    coordinator.open_sessions(sessions("b"))
    assert replicas_at(coordinator, "llm")["b"] == 1
    cluster.actors["tts.0"].is_dead = True
    coordinator.poll()
    with pytest.raises(StageError, match="tts has died and is being started again"):
        coordinator.open_sessions(sessions("c"))
    assert coordinator.sessions == ["a", "b"]


def test_who_dies_while_a_session_opens_costs_that_session(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a"))
    cluster.actors["tts.0"].is_dead = True
    with pytest.raises(StageError, match=r"tts\.0 has died: killed"):
        coordinator.open_sessions(sessions("b"))
    coordinator.poll()
    assert coordinator.sessions == ["a"]


def test_stages_of_one_process_are_resumed_together(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a", "b"))
    cluster.actors["media.0"].is_dead = True
    cluster.calls.clear()
    look(coordinator)
    settle(coordinator, cluster)
    resumed = [(stage, plan.session.id) for _, stage, (plan, _) in of(cluster.calls, "resume_session")]
    assert resumed == [("microphone", "a"), ("camera", "a"), ("microphone", "b"), ("camera", "b")]
    assert coordinator.sessions == ["a", "b"]


def test_sources_that_are_down_when_a_session_is_to_end_are_ended_when_they_are_back(
    coordinator: Coordinator, cluster: FakeCluster
):
    coordinator.open_sessions(sessions("a"))
    cluster.starts_at_once = False
    cluster.actors["media.0"].is_dead = True
    coordinator.poll()
    coordinator.end_session(SessionId("a"))
    assert of(cluster.calls, "end_session") == []
    cluster.actors["media.0"].is_up = True
    settle(coordinator, cluster)
    assert sorted(stage for _, stage, _ in of(cluster.calls, "end_session")) == ["camera", "microphone"]


def test_in_virtual_time_a_run_is_whole_or_none(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a", paced=False))
    cluster.actors["llm.0"].is_dead = True
    with pytest.raises(CoordinatorError, match=r"llm\.0 has died"):
        coordinator.poll()


def test_one_that_dies_again_and_again_is_started_again_each_time(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a"))
    for number in range(1, 6):
        cluster.actors["tts.0"].is_dead = True
        coordinator.poll()
        settle(coordinator, cluster)
        assert len(cluster.peers) == number
    assert coordinator.sessions == ["a"]


def test_where_another_replica_lives_the_run_goes_on_however_often_one_dies(
    coordinator: Coordinator, cluster: FakeCluster
):
    coordinator.open_sessions(sessions("a", "b"))
    for number in range(1, 6):
        cluster.actors["llm.0"].is_dead = True
        coordinator.poll()
        settle(coordinator, cluster)
        assert len(cluster.peers) == number
    assert replicas_at(coordinator, "llm") == {"a": 1, "b": 1}


def test_one_that_dies_while_it_starts_again_is_started_once_more(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a"))
    cluster.starts_at_once = False
    cluster.actors["tts.0"].is_dead = True
    coordinator.poll()
    cluster.actors["tts.0"].is_dead = True
    poll_until(coordinator, cluster, lambda: len(cluster.peers) == 2)
    assert cluster.peers == ["tts.0-1", "tts.0-2"]


def test_the_ledger_knows_the_dead(coordinator: Coordinator, cluster: FakeCluster):
    edge = "llm.text->tts.text"
    coordinator.open_sessions(sessions("a"))
    cluster.actors["llm.0"].ends = {edge: EdgeEnds(sent=Account(5))}
    cluster.actors["tts.0"].ends = {edge: EdgeEnds(received=Account(0, 2), arrived={"llm.0": 3})}
    coordinator.poll()
    assert coordinator.ledger()[edge].in_flight == 3
    cluster.actors["llm.0"].is_dead = True
    coordinator.poll()
    account = coordinator.ledger()[edge]
    assert (account.accepted, account.delivered, account.dropped["crash"], account.in_flight) == (5, 2, 2, 1)


def test_who_loads_while_another_comes_back_sends_to_the_new_one(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a"))
    cluster.starts_at_once = False
    cluster.actors["llm.0"].is_dead = cluster.actors["tts.0"].is_dead = True
    look(coordinator)
    coordinator._tools.wiring._endpoints["llm.text->tts.text"][0] = "ipc://now"
    cluster.calls.clear()
    cluster.actors["llm.0"].is_up = True
    look(coordinator)
    ends = [ends for _, stage, (ends,) in of(cluster.calls, "reconnect") if stage == "llm"]
    assert ends[0] == [("llm.text->tts.text", 0, "ipc://now")]


def test_a_neighbour_whose_loop_has_failed_costs_the_run_nothing(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a", "b"))
    cluster.actors["llm.0"].is_dead = cluster.actors["llm.1"].is_dead = True
    settle(coordinator, cluster)
    assert coordinator.sessions == ["a", "b"]


def test_one_that_comes_while_others_run_is_in_its_first_window_at_once(coordinator: Coordinator, cluster: FakeCluster):
    """Also the 61st: its window ends within one and a bit, and within a few answers of every actor it is open."""
    coordinator.open_sessions(sessions("first"))
    for number in range(60):
        name = f"camera{number}"
        coordinator.begin_to_open(sessions(name)[0], lambda: None)
        look(coordinator)
        coordinator.close_session(SessionId(name))
        cluster.clock.advance(0.7)
    cluster.calls.clear()
    before, now_ns = cluster.actors["media.0"].num_batches, cluster.clock.now_ns()
    reply = coordinator.begin_to_open(sessions("last")[0], lambda: None)
    poll_until(coordinator, cluster, lambda: reply.is_done)
    (origin_ns,) = [
        at[SessionId("last")] for _, stage, (at,) in of(cluster.calls, "begin_sessions") if stage == "camera"
    ]
    ends_after_ns = origin_ns + NS_PER_S - now_ns
    assert FIRST_WINDOW_NS <= ends_after_ns <= FIRST_WINDOW_NS + NS_PER_S + 250 * NS_PER_MS
    assert cluster.actors["media.0"].num_batches - before <= 6


def test_a_session_at_which_a_stage_has_failed_too_often_is_reported_once_and_its_sources_end(
    cluster: FakeCluster, tmp_path: Path
):
    lines: list[str] = []
    coordinator = started(cluster, tmp_path, lines=lines)
    coordinator.open_sessions(sessions("a", "b"))
    reason = "stage vision_encoder failed three times in a row: ValueError: no such picture"
    cluster.actors["vision_encoder.0"].given_up = {SessionId("a"): reason}
    for _ in range(3):
        look(coordinator)
    assert lines.count(f"camera a: closed: {reason}") == 1
    ended = [(stage, session) for _, stage, (session,) in of(cluster.calls, "end_session")]
    assert sorted(ended) == [("camera", "a"), ("microphone", "a")]
    (event,) = [arguments for _, stage, arguments in of(cluster.calls, "tell")]
    assert event[:3] == ("a", "session_closed", {"reason": reason})


def test_a_session_goes_on_without_a_side_branch_that_has_failed_at_it_too_often(cluster: FakeCluster, tmp_path: Path):
    lines: list[str] = []
    coordinator = started(cluster, tmp_path, lines=lines)
    coordinator.open_sessions(sessions("a"))
    reason = "stage counter failed three times in a row: ValueError: no such picture"
    cluster.actors["vision_encoder.0"].given_up_aside = {SessionId("a"): reason}
    for _ in range(3):
        look(coordinator)
    assert lines.count(f"camera a: {reason}; the camera goes on without vision_encoder") == 1
    assert of(cluster.calls, "end_session") == []


def test_a_session_that_was_given_up_and_has_ended_before_anybody_looked_is_reported(
    cluster: FakeCluster, tmp_path: Path
):
    lines: list[str] = []
    coordinator = started(cluster, tmp_path, lines=lines)
    coordinator.open_sessions(sessions("a", "b"))
    cluster.actors["vision_encoder.0"].given_up_aside = {SessionId("a"): "stage x failed three times in a row: why"}
    cluster.actors["llm.0"].given_up_before = {SessionId("b"): "stage y failed three times in a row: why"}
    coordinator.end()
    coordinator.end()
    assert [line for line in lines if line.startswith("camera ")] == [
        "camera a: stage x failed three times in a row: why; the camera goes on without vision_encoder",
        "camera b: closed: stage y failed three times in a row: why",
    ]


def test_sessions_are_closed_downstream_and_each_has_its_own_incarnation(
    coordinator: Coordinator, cluster: FakeCluster
):
    for _ in range(2):
        coordinator.open_sessions(sessions("a"))
        coordinator.close_session(SessionId("a"))
        look(coordinator)
    plans = [plan for _, _, (here,) in of(cluster.calls, "open_sessions") for plan in here]
    assert {plan.incarnation for plan in plans} == {1, 2}
    closed = [stage for _, stage, _ in of(cluster.calls, "close_session")]
    assert closed.index("camera") < closed.index("speaker") < closed.index("events"), (
        "calls to one actor keep their order"
    )
