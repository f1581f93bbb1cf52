"""deploy/control/recovery.py: what is done, and in which order, where a replica has died."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from deploy.actor.session_plan import Listener, SessionPlan
from deploy.control.calls import ActorDied, Reply, Steps, answered, failed
from deploy.control.recovery import Going, announce, redirect, reopen
from graph.chunk import Scalar, SessionId
from graph.spec import PipelineSpec, default_spec_path
from graph.tail import Ack
from stages.stage import Session
from tests.support.specs import load_spec

DOOR = SessionId("door")
HEARD = Listener(Ack(7, heard_ns=5, received_ns=6, epoch=2), level=1)


@dataclass
class Written:
    """Writes down what it is asked. gone: stages where the session has ended. dead: those that don't answer."""

    gone: tuple[str, ...] = ()
    dead: tuple[str, ...] = ()
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    plans: dict[str, SessionPlan] = field(default_factory=dict)

    def resume(self, stage: str, going: Going, plan: SessionPlan) -> Reply[None]:
        self.plans[stage] = plan
        self.calls.append(("resume", stage, going.replicas[stage]))
        return answered(stage, None)

    def listener(self, stage: str, going: Going) -> Reply[Listener | None]:
        return answered(stage, None if stage in self.gone else HEARD)

    def reroute(self, stage: str, going: Going, edge: str, target: int) -> Reply[bool]:
        self.calls.append(("reroute", stage, going.replicas[stage], edge.partition(".")[2], target))
        if stage in self.dead:
            return failed(ActorDied(stage))
        return answered(stage, stage not in self.gone)

    def end_input(self, stage: str, going: Going, edge: str) -> None:
        self.calls.append(("end_input", stage, going.replicas[stage], edge.partition(".")[2]))

    def tell(self, stage: str, going: Going, kind: str, attrs: dict[str, Scalar], *, cuts: bool) -> Reply[None]:
        self.calls.append(("tell", stage, kind, attrs["actor"], cuts))
        return answered(stage, None)


@pytest.fixture(scope="module")
def spec() -> PipelineSpec:
    return load_spec(default_spec_path(), ["stages.llm.replicas=2"])


def going(spec: PipelineSpec, **fields: object) -> Going:
    session = Session(DOOR, "door", "test://pattern", **fields)  # type: ignore[arg-type]
    return Going(session, {**dict.fromkeys(spec.stages, 0), "llm": 1}, incarnation=7)


def all_of(steps: Steps[Any]) -> None:
    """Every reply is there when it is returned."""
    for replies in steps:
        assert all(reply.is_done for reply in replies)


def recover(written: Written, spec: PipelineSpec, stage: str, going: Going) -> None:
    all_of(reopen(written, spec, stage, [going]))
    redirected = redirect(written, spec, stage, going)
    all_of(announce(written, spec, stage, going, "llm.0", redirected))


def recovered(spec: PipelineSpec, stage: str, gone: tuple[str, ...] = (), **fields: object) -> Written:
    written = Written(gone)
    recover(written, spec, stage, going(spec, **fields))
    return written


def test_a_session_is_open_and_its_clock_runs_before_anything_is_sent_there(spec: PipelineSpec) -> None:
    assert recovered(spec, "llm").calls == [
        ("resume", "llm", 1),
        ("reroute", "vision_encoder", 0, "image->llm.image", 1),
        ("reroute", "audio_encoder", 0, "audio->llm.audio", 1),
        ("reroute", "speaker", 0, "playback->llm.playback", 1),
        ("tell", "speaker", "recovered", "llm.0", True),
    ]


def test_it_goes_on_with_what_is_known_of_its_listener(spec: PipelineSpec) -> None:
    plan = recovered(spec, "llm").plans["llm"]
    assert plan.goes_on == HEARD
    assert plan.peers["llm.text->tts.text"] == 0
    assert plan.incarnation == 7


def test_where_nothing_is_said_nothing_is_cut_off(spec: PipelineSpec) -> None:
    assert recovered(spec, "vision_encoder").calls[-1] == ("tell", "speaker", "recovered", "llm.0", False)
    assert recovered(spec, "vocoder").calls[-1] == ("tell", "speaker", "recovered", "llm.0", True)


def test_what_has_ended_before_it_is_ended_for_it(spec: PipelineSpec) -> None:
    calls = recovered(spec, "llm", gone=("vision_encoder", "audio_encoder")).calls
    assert [call for call in calls if call[0] == "end_input"] == [
        ("end_input", "llm", 1, "image->llm.image"),
        ("end_input", "llm", 1, "audio->llm.audio"),
    ]


def test_nothing_is_ended_for_a_neighbour_that_is_dead_as_well(spec: PipelineSpec) -> None:
    written = Written(gone=("audio_encoder",), dead=("vision_encoder",))
    recover(written, spec, "llm", going(spec))
    assert [call for call in written.calls if call[0] == "end_input"] == [
        ("end_input", "llm", 1, "audio->llm.audio"),
    ]


def test_a_session_without_ears_asks_no_ears(spec: PipelineSpec) -> None:
    calls = recovered(spec, "llm", microphone=False).calls
    assert not any("audio_encoder" in call for call in calls)


def test_without_a_speaker_the_model_itself_tells_of_it() -> None:
    spec = load_spec(default_spec_path(), ["stages.tts.replicas=0"])
    written = Written()
    silent = Going(Session(DOOR, "door", "test://pattern", speech=False), dict.fromkeys(spec.stages, 0), incarnation=7)
    recover(written, spec, "llm", silent)
    assert written.plans["llm"].goes_on == Listener(Ack(0), 0)
    assert written.calls[-1] == ("tell", "llm", "recovered", "llm.0", False)


def test_where_nobody_listens_to_events_speech_is_cut_off_all_the_same(spec: PipelineSpec) -> None:
    deaf = replace(spec, edges=tuple(edge for edge in spec.edges if edge.kind.name != "events"))
    assert recovered(deaf, "vocoder").calls[-1] == ("tell", "speaker", "recovered", "llm.0", True)
