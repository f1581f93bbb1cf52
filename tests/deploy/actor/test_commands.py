"""deploy/actor/commands.py: what comes in one batch of calls, and what it does at each stage."""

from pathlib import Path

import pytest

from deploy.actor.commands import Commands, Ends
from deploy.actor.plan import ActorPlan, Address, Call
from deploy.actor.session_plan import SessionPlan
from graph.chunk import SessionId
from graph.edge import SilentObserver
from stages.stage import Stage, StageError
from tests.support.house import House
from tests.support.units import session


@pytest.fixture
def stages() -> dict[str, Stage]:
    return {"camera": Keeping(), "speaker": Keeping()}


@pytest.fixture
def commands(stages: dict[str, Stage]):
    plan = ActorPlan("io.0", "io.0", 0, {}, (), tuple(stages), Path(), Path(), Path())
    with House(stages, ()) as house:
        ends = Ends(plan, house.bus, "", lambda edge: SilentObserver())
        subject = Commands(Address("here", "127.0.0.1", 1, 2), ends, lambda: list(house.runners.values()))
        subject.perform([Call("load", ())])
        yield subject


class Keeping(Stage):
    """Remembers the session that it was told of; has room for one."""

    def open_session(self, session):
        if hasattr(self, "session"):
            raise StageError("no room")
        self.session = session


class Choosing(Keeping):
    runs_with = "cuda bfloat16"


@pytest.mark.parametrize(("kinds", "runs_with"), [([Keeping, Choosing], "cuda bfloat16"), ([Keeping, Keeping], "")])
def test_what_the_stages_compute_with_is_told_when_they_are_loaded_and_in_reports(
    kinds: list[type[Stage]], runs_with: str
):
    stages = {"camera": kinds[0](), "speaker": kinds[1]()}
    with House(stages, ()) as house:
        plan = ActorPlan("io.0", "io.0", 0, {}, (), tuple(stages), Path(), Path(), Path())
        ends = Ends(plan, house.bus, "", lambda edge: SilentObserver())
        subject = Commands(Address("here", "127.0.0.1", 1, 2), ends, lambda: list(house.runners.values()))
        loaded, report = subject.perform([Call("load", ()), Call("report", ())])
    assert loaded.value == runs_with
    stages_seen = report.value.stages  # type: ignore[attr-defined]
    assert [stages_seen[name].runs_with for name in stages] == ["", runs_with]


def test_stages_of_one_process_know_of_a_session_what_each_was_told(commands: Commands, stages: dict[str, Stage]):
    door = session("door")
    commands.perform([Call("open_sessions", (stage, [SessionPlan(door)])) for stage in ("speaker", "camera")])
    speaker, camera = stages["speaker"].session, stages["camera"].session  # type: ignore[attr-defined]
    speaker.level.update(0, 3)
    assert (speaker.level.num_steps, camera.level.num_steps, door.level.num_steps) == (3, 0, 0)
    assert speaker.playback is not camera.playback


def test_each_call_is_done_whatever_became_of_those_before_it(commands: Commands):
    plans = [SessionPlan(session(name)) for name in ("door", "porch")]
    calls = [Call("open_sessions", ("camera", plans)), Call("none such", ()), Call("report", ())]
    full, unknown, report = commands.perform(calls)
    assert isinstance(full.error, StageError)
    assert isinstance(unknown.error, KeyError)
    assert set(report.value.stages["camera"].sessions) == {SessionId("door")}  # type: ignore[attr-defined]
