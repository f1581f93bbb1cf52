"""deploy/coordinator.py: sessions open together, and one event time for all, whatever the nodes' clocks say."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from deploy.clock import clock_ahead_ns
from deploy.coordinator import DECODER_START_NS, HEAD_START_NS, Coordinator
from deploy.plan import Address
from deploy.runner import SessionPlan
from graph.chunk import NS_PER_MS, NS_PER_S, SessionId
from graph.spec import default_spec_path, load_spec
from stages.stage import Session, StageError

AHEAD_NS = 5 * NS_PER_S
Call = tuple[str, str, Any]  # method, stage, what for


class FakeActor:
    """An actor whose calls are written down; its node's clock may be ahead. What it returns is its own reference."""

    def __init__(self, node: str, calls: list[Call]) -> None:
        self.node = node
        self.calls = calls
        self.full_at = ""
        self.ahead_ns = AHEAD_NS if node != "here" else 0

    def __getattr__(self, method: str) -> "FakeMethod":
        return FakeMethod(lambda *arguments: self.do(method, *arguments))

    def do(self, method: str, *arguments: Any) -> Any:
        match method:
            case "address":
                return Address(self.node, "127.0.0.1", 1, 9)
            case "clock":
                return time.time_ns() + self.ahead_ns
            case "bind":
                return dict.fromkeys(arguments[0], "ipc://edge")
            case "open_sessions" | "begin_sessions" | "close_session":
                self.calls.append((method, arguments[0], arguments[1:]))
                if method == "open_sessions" and arguments[0] == self.full_at:
                    return StageError("no room")
        return None


class FakeMethod:
    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call


class FakeCluster:
    node_id = "here"

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.actors: dict[str, FakeActor] = {}

    def place(self, processes: Sequence[Any], plans: object) -> Mapping[str, FakeActor]:
        """Only the LLM is on another node."""
        self.actors = {p.name: FakeActor("there" if "llm" in p.stages else "here", self.calls) for p in processes}
        return self.actors


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    def get(answer: object, timeout: float) -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("ray.get", get)
    monkeypatch.setattr("ray.wait", lambda answers, num_returns, timeout: (answers[:num_returns], []))
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


def test_a_session_without_ears_passes_no_microphone(coordinator: Coordinator, cluster: FakeCluster):
    coordinator.open_sessions([*sessions("deaf", microphone=False), *sessions("all")])
    begun = [(stage, one) for _, stage, (origins,) in of(cluster.calls, "begin_sessions") for one in origins]
    stages = {one: {stage for stage, other in begun if other == one} for one in ("deaf", "all")}
    assert stages["all"] - stages["deaf"] == {"microphone", "audio_encoder"}
    assert stages["all"] == set(coordinator._spec.stages)


def test_time_begins_after_all_are_open_and_is_the_same_on_every_node(coordinator: Coordinator, cluster: FakeCluster):
    before_ns = time.time_ns()
    coordinator.open_sessions(sessions("a", "b"))
    origins = {stage: set(at.values()) for _, stage, (at,) in of(cluster.calls, "begin_sessions")}
    here = set().union(*(at for stage, at in origins.items() if stage != "llm"))
    assert len(here) == 1
    assert before_ns + HEAD_START_NS < min(here) < time.time_ns() + HEAD_START_NS + 2 * DECODER_START_NS
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
