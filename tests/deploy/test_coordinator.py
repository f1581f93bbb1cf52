"""deploy/coordinator.py: sessions open together, and one event time for all, whatever the nodes' clocks say."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError

from deploy.accounts import EdgeEnds
from deploy.clock import clock_ahead_ns
from deploy.coordinator import DECODER_START_NS, HEAD_START_NS, MAX_DEATHS, Coordinator, CoordinatorError
from deploy.plan import ActorPlan, Address
from deploy.runner import Listener, SessionPlan, SessionSnapshot, StageSnapshot
from graph.chunk import NS_PER_MS, NS_PER_S, SessionId
from graph.ledger import Account
from graph.spec import default_spec_path, load_spec
from graph.tail import Ack
from stages.stage import Session, StageError

AHEAD_NS = 5 * NS_PER_S
Call = tuple[str, str, Any]  # method, stage, what for


class FakeActor:
    """An actor whose calls are written down; its node's clock may be ahead. What it returns is its own reference."""

    def __init__(self, node: str, calls: list[Call], stages: Sequence[str] = ()) -> None:
        self.node = node
        self.calls = calls
        self.stages = stages
        self.sessions: set[SessionId] = set()
        self.ends: dict[str, EdgeEnds] = {}
        self.is_dead = False
        self.is_up = True
        self.full_at = ""
        self.ahead_ns = AHEAD_NS if node != "here" else 0

    def __getattr__(self, method: str) -> "FakeMethod":
        return FakeMethod(lambda *arguments: self.do(method, *arguments))

    def do(self, method: str, *arguments: Any) -> Any:
        if self.is_dead:
            return RayActorError()
        match method:
            case "load":
                return None if self.is_up else NOT_YET
            case "snapshot":
                seen = dict.fromkeys(self.sessions, SessionSnapshot(0, 0))
                return dict.fromkeys(self.stages, StageSnapshot(0, 0, seen))
            case "accounts":
                return self.ends
            case "listener":
                return HEARD
            case "bury" | "reconnect" | "reroute" | "tell" | "end_input":
                self.calls.append((method, self.stages[0], arguments))
                return method == "reroute"
            case "address":
                return Address(self.node, "127.0.0.1", 1, 9)
            case "clock":
                return time.monotonic_ns() + self.ahead_ns
            case "bind":
                return dict.fromkeys(arguments[0], "ipc://edge")
            case "open_sessions" | "begin_sessions" | "close_session":
                self.calls.append((method, arguments[0], arguments[1:]))
                if method == "open_sessions" and arguments[0] == self.full_at:
                    return StageError("no room")
                if method == "open_sessions":
                    self.sessions |= {plan.session.id for plan in arguments[1]}
        return None


NOT_YET = object()
HEARD = Listener(Ack(3), 1)


class FakeMethod:
    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call


class FakeCluster:
    node_id = "here"

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.peers: list[str] = []  # of those which took a dead one's place
        self.starts_at_once = True
        self.actors: dict[str, FakeActor] = {}

    def place(self, processes: Sequence[Any], plans: object) -> Mapping[str, FakeActor]:
        """Only the LLM is on another node."""
        self.actors = {process.name: self.made(process) for process in processes}
        return self.actors

    def replace(self, process: Any, plan: ActorPlan) -> FakeActor:
        self.peers.append(plan.peer)
        self.actors[process.name] = self.made(process)
        return self.actors[process.name]

    def made(self, process: Any) -> FakeActor:
        actor = FakeActor("there" if "llm" in process.stages else "here", self.calls, list(process.stages))
        actor.is_up = self.starts_at_once
        return actor


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    def get(answer: object, timeout: float) -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("ray.get", get)

    def wait(answers: Sequence[object], num_returns: int, timeout: float) -> tuple[list[object], list[object]]:
        return [answer for answer in answers if answer is not NOT_YET][:num_returns], []

    monkeypatch.setattr("ray.wait", wait)
    monkeypatch.setattr("ray.kill", lambda handle: None)
    yield FakeCluster()


@pytest.fixture
def coordinator(cluster: FakeCluster, tmp_path: Path) -> Coordinator:
    return started(cluster, tmp_path, "stages.llm.replicas=2", "window.phases=1")


def started(cluster: FakeCluster, folder: Path, *overrides: str) -> Coordinator:
    subject = Coordinator(load_spec(default_spec_path(), overrides), folder, folder)
    subject.start(cluster, lambda name: None)  # type: ignore[arg-type]
    return subject


def sessions(*names: str, **fields: object) -> list[Session]:
    return [Session(SessionId(name), name, "test://pattern", **fields) for name in names]


def of(calls: Sequence[Call], method: str) -> list[Call]:
    return [call for call in calls if call[0] == method]


def test_sessions_open_together_stage_by_stage_and_begin_when_all_are_open(
    coordinator: Coordinator, cluster: FakeCluster
):
    coordinator.open_sessions(sessions("a", "b", "c"))
    methods = [method for method, _, _ in cluster.calls]
    assert methods == sorted(methods, reverse=True), "all are open before one begins"
    opened = [stage for _, stage, _ in of(cluster.calls, "open_sessions")]
    assert sorted(opened) == sorted([*coordinator._spec.stages, "llm"])
    assert opened[-4:] == ["events", "speaker", "microphone", "camera"]
    begun = [(stage, list(origins)) for _, stage, (origins,) in of(cluster.calls, "begin_sessions")]
    assert [stage for stage, _ in begun[: len(opened) - 2]] == opened[:-2]
    sources = [(stage, [one]) for one in ("a", "b", "c") for stage in ("microphone", "camera")]
    assert begun[len(opened) - 2 :] == sources, "one after the other, since each starts a decoder"


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
    coordinator.poll()
    coordinator.poll()
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
    before_ns = time.monotonic_ns()
    coordinator.open_sessions(sessions("a", "b"))
    origins = {stage: set(at.values()) for _, stage, (at,) in of(cluster.calls, "begin_sessions")}
    here = set().union(*(at for stage, at in origins.items() if stage != "llm"))
    assert len(here) == 1
    assert before_ns + HEAD_START_NS < min(here) < time.monotonic_ns() + HEAD_START_NS + 2 * DECODER_START_NS
    assert abs(min(origins["llm"]) - min(here) - AHEAD_NS) < 50 * NS_PER_MS


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
    assert abs(origins["llm"] - origins["camera"] + AHEAD_NS) < 50 * NS_PER_MS


def test_a_recovered_replica_is_on_its_sessions_axis_after_a_step_of_the_wall_clock(
    coordinator: Coordinator, cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
):
    coordinator.open_sessions(sessions("a"))
    (before_ns,) = [at[SessionId("a")] for _, stage, (at,) in of(cluster.calls, "begin_sessions") if stage == "tts"]
    now_s = time.time()
    monkeypatch.setattr("time.time", lambda: now_s + 3600.0)
    monkeypatch.setattr("time.time_ns", lambda: round((now_s + 3600.0) * NS_PER_S))
    cluster.calls.clear()
    cluster.actors["tts.0"].is_dead = True
    coordinator.poll()
    coordinator.poll()
    assert [at[SessionId("a")] for _, _, (at,) in of(cluster.calls, "begin_sessions")] == [before_ns]


def test_phases_take_turns_within_a_window(cluster: FakeCluster, tmp_path: Path):
    coordinator = started(cluster, tmp_path, "window.phases=3")
    coordinator.open_sessions(sessions("a", "b"))
    coordinator.open_sessions(sessions("c", "d"))
    at_camera = [at for _, stage, (at,) in of(cluster.calls, "begin_sessions") if stage == "camera"]
    origins = {one: at_ns for at in at_camera for one, at_ns in at.items()}
    behind_ns = [(origins[one] - origins["a"]) % NS_PER_S for one in ("a", "b", "c", "d")]
    assert behind_ns == [0, NS_PER_S // 3, 2 * NS_PER_S // 3, 0]


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
    opened = {(stage, plan.session.id) for _, stage, (plans,) in of(cluster.calls, "open_sessions") for plan in plans}
    assert opened == {(stage, session) for _, stage, (session,) in of(cluster.calls, "close_session")}


def test_the_quickest_answer_tells_another_clock():
    # Given: a clock 700 ahead; the second answer takes 10 there and 10 back, the others are long under way.
    now = iter([0, 110, 1000, 1020, 2000, 2210])
    theirs = iter([100 + 700, 1010 + 700, 2200 + 700])
    assert clock_ahead_ns(lambda: next(theirs), lambda: next(now), num_questions=3) == 700


# ---- who dies --------------------------------------------------------------------------------------------------------


def at_replica(coordinator: Coordinator, stage: str) -> dict[str, int]:
    return {name: placement.replicas[stage] for name, placement in coordinator._sessions.items()}


def test_sessions_of_a_dead_replica_go_on_at_another_one(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a", "b"))
    assert at_replica(coordinator, "llm") == {"a": 0, "b": 1}
    cluster.starts_at_once = False
    cluster.actors["llm.0"].is_dead = True
    cluster.calls.clear()
    coordinator.poll()
    assert at_replica(coordinator, "llm") == {"a": 1, "b": 1}
    (opened,) = of(cluster.calls, "open_sessions")
    assert (opened[1], [plan.goes_on for plan in opened[2][0]]) == ("llm", [HEARD])
    buried = {stage: ends for _, stage, (ends,) in of(cluster.calls, "bury")}
    assert buried["vision_encoder"] == [("vision_encoder.image->llm.image", 0)]
    assert (cluster.peers, coordinator.problem) == (["llm.0-1"], "llm.0 started again after it has died")
    assert not of(cluster.calls, "reconnect"), "nobody sends there until it is up"


def test_one_that_takes_the_place_of_a_dead_one_is_sent_to_once_its_sessions_are_open(
    coordinator: Coordinator, cluster: FakeCluster
):
    coordinator.open_sessions(sessions("a", "b"))
    cluster.starts_at_once = False
    cluster.actors["tts.0"].is_dead = True
    coordinator.poll()
    cluster.calls.clear()
    coordinator.poll()
    assert cluster.calls == [], "it loads"
    down = coordinator._down["tts.0"]
    down.awaited = None
    coordinator.poll()
    methods = [method for method, _, _ in cluster.calls if method != "bury"]
    first_sent = methods.index("reconnect")
    assert methods[:4] == ["open_sessions", "begin_sessions"] * 2
    assert set(methods[4:first_sent]) == {"reroute"}, "before anything flows, who sends knows that it begins anew"
    assert set(methods[first_sent:]) == {"reconnect", "tell"}
    assert (coordinator.problem, coordinator.num_deaths) == ("", {"tts.0": 1})


def test_sessions_that_find_no_room_elsewhere_wait_for_the_next_one(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a", "b"))
    cluster.starts_at_once = False
    cluster.actors["llm.1"].full_at = "llm"
    cluster.actors["llm.0"].is_dead = True
    cluster.calls.clear()
    coordinator.poll()
    assert [plan.session.id for _, stage, (plans,) in of(cluster.calls, "open_sessions") for plan in plans] == ["a"]
    assert at_replica(coordinator, "llm") == {"a": 0, "b": 1}
    assert coordinator.sessions == ["a", "b"]


def test_a_session_for_which_the_next_one_has_no_room_is_over(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a", "b"))
    cluster.starts_at_once = False
    cluster.actors["tts.0"].is_dead = True
    coordinator.poll()
    cluster.actors["tts.0"].full_at = "tts"
    coordinator._down["tts.0"].awaited = None
    coordinator.poll()
    assert (coordinator.sessions, coordinator.problem) == ([], "")


def test_new_sessions_go_where_a_replica_lives_or_are_refused(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a"))
    cluster.starts_at_once = False
    cluster.actors["llm.0"].is_dead = True
    coordinator.poll()
    coordinator.open_sessions(sessions("b"))
    assert at_replica(coordinator, "llm")["b"] == 1
    cluster.actors["tts.0"].is_dead = True
    coordinator.poll()
    with pytest.raises(StageError, match="tts has died and is being started again"):
        coordinator.open_sessions(sessions("c"))
    assert coordinator.sessions == ["a", "b"]


def test_who_dies_while_a_session_opens_costs_that_session(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a"))
    cluster.actors["tts.0"].is_dead = True
    with pytest.raises(StageError, match=r"tts\.0 has died: .*; try again"):
        coordinator.open_sessions(sessions("b"))
    coordinator.poll()
    assert coordinator.sessions == ["a"]


def test_who_holds_cameras_and_files_is_not_replaced(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a"))
    cluster.actors["io.0"].is_dead = True
    with pytest.raises(CoordinatorError, match=r"io\.0 has died"):
        coordinator.poll()


def test_in_virtual_time_a_run_is_whole_or_none(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a", paced=False))
    cluster.actors["llm.0"].is_dead = True
    with pytest.raises(CoordinatorError, match=r"llm\.0 has died"):
        coordinator.poll()


def test_one_that_dies_again_and_again_ends_the_run(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a"))
    for _ in range(MAX_DEATHS - 1):
        cluster.actors["tts.0"].is_dead = True
        coordinator.poll()
    cluster.actors["tts.0"].is_dead = True
    with pytest.raises(CoordinatorError, match="that was 3 times within 10 minutes"):
        coordinator.poll()


def test_one_that_dies_while_it_starts_again_is_started_once_more(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a"))
    cluster.starts_at_once = False
    cluster.actors["tts.0"].is_dead = True
    coordinator.poll()
    cluster.actors["tts.0"].is_dead = True
    coordinator._down["tts.0"].awaited = None
    coordinator.poll()
    assert cluster.peers == ["tts.0-1", "tts.0-2"]


def test_the_ledger_knows_the_dead(coordinator: Coordinator, cluster: FakeCluster):
    edge = "llm.text->tts.text"
    coordinator.open_sessions(sessions("a"))
    cluster.actors["llm.0"].ends = {edge: EdgeEnds(sent=Account(5))}
    cluster.actors["tts.0"].ends = {edge: EdgeEnds(received=Account(0, 2), arrived={"llm.0": 3})}
    assert coordinator.ledger()[edge].in_flight == 3
    cluster.actors["llm.0"].is_dead = True
    account = coordinator.ledger()[edge]
    assert (account.accepted, account.delivered, account.dropped["crash"], account.in_flight) == (5, 2, 2, 1)


def test_who_loads_while_another_comes_back_sends_to_the_new_one(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a"))
    cluster.starts_at_once = False
    cluster.actors["llm.0"].is_dead = cluster.actors["tts.0"].is_dead = True
    coordinator.poll()
    coordinator._endpoints["llm.text->tts.text"][0] = "ipc://now"
    cluster.calls.clear()
    coordinator._down["llm.0"].awaited = None
    coordinator.poll()
    ends = [ends for _, stage, (ends,) in of(cluster.calls, "reconnect") if stage == "llm"]
    assert ends[0] == [("llm.text->tts.text", 0, "ipc://now")]


def test_a_neighbour_whose_loop_has_failed_costs_the_run_nothing(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions(sessions("a", "b"))
    cluster.actors["llm.0"].is_dead = cluster.actors["llm.1"].is_dead = True
    coordinator.poll()
    coordinator.poll()
    assert coordinator.sessions == ["a", "b"]
    assert coordinator.problem == ""
