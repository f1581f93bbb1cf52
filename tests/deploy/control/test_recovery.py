"""deploy/control/recovery.py: what is done, and in which order, where a replica has died."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from deploy.actor.session_plan import Listener, SessionPlan
from deploy.control.calls import ActorDied, Reply, Steps, answered, failed
from deploy.control.recovery import Resumption, announce, redirect, reopen
from graph.chunk import Scalar, SessionId
from graph.spec import PipelineSpec, default_spec_path
from graph.tail import Ack
from tests.support.sessions import make_session
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
    requests: list[str] = field(default_factory=list)  # what they know of the listener

    def resume(self, resumed: Resumption, plans: Mapping[str, SessionPlan]) -> Reply[None]:
        self.plans |= plans
        self.calls += [("resume", stage, resumed.replicas[stage]) for stage in plans]
        return answered("", None)

    def listener(self, stage: str, resumed: Resumption) -> Reply[Listener | None]:
        self.requests.append(stage)
        if stage in self.dead:
            return failed(ActorDied(stage))
        return answered(stage, None if stage in self.gone else HEARD)

    def reroute(self, stage: str, resumed: Resumption, edge: str, target: int) -> Reply[int | None]:
        self.calls.append(("reroute", stage, resumed.replicas[stage], edge.partition(".")[2], target))
        if stage in self.dead:
            return failed(ActorDied(stage))
        return answered(stage, 5 if stage in self.gone else None)

    def end_input(self, stage: str, resumed: Resumption, edge: str, num_windows: int) -> None:
        self.calls.append(("end_input", stage, resumed.replicas[stage], edge.partition(".")[2], num_windows))

    def tell(self, stage: str, resumed: Resumption, kind: str, attrs: dict[str, Scalar], *, cuts: bool) -> Reply[None]:
        self.calls.append(("tell", stage, kind, attrs["actor"], cuts))
        return answered(stage, None)


@pytest.fixture(scope="module")
def spec() -> PipelineSpec:
    return load_spec(default_spec_path(), ["stages.llm.replicas=2"])


def resumption(spec: PipelineSpec, **fields: object) -> Resumption:
    session = make_session("door", **fields)
    return Resumption(session, {**dict.fromkeys(spec.stages, 0), "llm": 1}, incarnation=7)


def all_of(steps: Steps[Any]) -> None:
    """Every reply is there when it is returned."""
    for replies in steps:
        assert all(reply.is_done for reply in replies)


def recover(written: Written, spec: PipelineSpec, stages: str, resumed: Resumption) -> None:
    """stages: of one process, downstream first."""
    all_of(reopen(written, spec, stages.split(), [resumed]))
    redirected = redirect(written, spec, stages.split(), resumed)
    all_of(announce(written, spec, stages.split(), resumed, "llm.0", redirected))


def recovered(spec: PipelineSpec, stages: str, gone: tuple[str, ...] = (), **fields: object) -> Written:
    written = Written(gone)
    recover(written, spec, stages, resumption(spec, **fields))
    return written


def test_a_session_is_open_and_its_clock_runs_before_anything_is_sent_there(spec: PipelineSpec) -> None:
    assert recovered(spec, "llm").calls == [
        ("resume", "llm", 1),
        ("reroute", "vision_encoder", 0, "image->llm.image", 1),
        ("reroute", "audio_encoder", 0, "audio->llm.audio", 1),
        ("reroute", "speaker", 0, "playback->llm.playback", 1),
        ("tell", "speaker", "recovered", "llm.0", True),
    ]


def test_it_is_resumed_with_what_is_known_of_its_listener(spec: PipelineSpec) -> None:
    plan = recovered(spec, "llm").plans["llm"]
    assert plan.resume_from == HEARD
    assert plan.peers["llm.text->tts.text"] == 0
    assert plan.incarnation == 7


def test_where_nothing_is_said_nothing_is_cut_off(spec: PipelineSpec) -> None:
    assert recovered(spec, "vision_encoder").calls[-1] == ("tell", "speaker", "recovered", "llm.0", False)
    assert recovered(spec, "vocoder").calls[-1] == ("tell", "speaker", "recovered", "llm.0", True)


def test_what_has_ended_before_it_is_ended_for_it(spec: PipelineSpec) -> None:
    calls = recovered(spec, "llm", gone=("vision_encoder", "audio_encoder")).calls
    assert [call for call in calls if call[0] == "end_input"] == [
        ("end_input", "llm", 1, "image->llm.image", 5),
        ("end_input", "llm", 1, "audio->llm.audio", 5),
    ]


def test_nothing_is_ended_for_a_neighbour_that_is_dead_as_well(spec: PipelineSpec) -> None:
    written = Written(gone=("audio_encoder",), dead=("vision_encoder",))
    recover(written, spec, "llm", resumption(spec))
    assert [call for call in written.calls if call[0] == "end_input"] == [
        ("end_input", "llm", 1, "audio->llm.audio", 5),
    ]


def test_a_session_without_ears_asks_no_ears(spec: PipelineSpec) -> None:
    calls = recovered(spec, "llm", microphone=False).calls
    assert not any("audio_encoder" in call for call in calls)


def test_without_a_speaker_the_model_itself_tells_of_it() -> None:
    spec = load_spec(default_spec_path(), ["stages.tts.replicas=0"])
    written = Written()
    silent = Resumption(make_session("door", speech=False), dict.fromkeys(spec.stages, 0), incarnation=7)
    recover(written, spec, "llm", silent)
    assert written.plans["llm"].resume_from == Listener(Ack(0), 0)
    assert written.calls[-1] == ("tell", "llm", "recovered", "llm.0", False)


def test_where_nobody_listens_to_events_speech_is_cut_off_all_the_same(spec: PipelineSpec) -> None:
    deaf = replace(spec, edges=tuple(edge for edge in spec.edges if edge.kind.name != "events"))
    assert recovered(deaf, "vocoder").calls[-1] == ("tell", "speaker", "recovered", "llm.0", True)


def test_stages_of_one_process_are_resumed_together_and_send_one_another_nothing_before(spec: PipelineSpec) -> None:
    calls = recovered(spec, "events speaker microphone camera").calls
    assert calls[:4] == [("resume", stage, 0) for stage in ("events", "speaker", "microphone", "camera")]
    rerouted = {call[1:4] for call in calls if call[0] == "reroute"}
    assert rerouted == {("vocoder", 0, "speech->speaker.speech"), ("llm", 1, "events->events.events")}


def test_where_the_listener_was_is_dead_those_are_asked_that_have_heard_of_him(spec: PipelineSpec) -> None:
    written = recovered(spec, "events speaker")
    assert set(written.requests) == {"llm", "tts", "vocoder", "camera"}
    assert written.plans["speaker"].resume_from == HEARD
    assert recovered(spec, "llm").requests == ["speaker"]
    written = Written(dead=("speaker",))  # which nobody has buried yet
    recover(written, spec, "tts", resumption(spec))
    assert (written.requests[0], set(written.requests[1:])) == ("speaker", {"llm", "vocoder", "camera"})


def test_what_the_dead_speaker_had_and_nobody_has_heard_is_cut_off(spec: PipelineSpec) -> None:
    assert recovered(spec, "events speaker").calls[-1] == ("tell", "speaker", "recovered", "llm.0", True)
    assert recovered(spec, "microphone camera").calls[-1] == ("tell", "speaker", "recovered", "llm.0", False)


def test_where_all_have_died_that_knew_the_listener_what_was_reported_counts(spec: PipelineSpec) -> None:
    written = Written(dead=("llm", "tts", "vocoder", "camera"))
    recover(written, spec, "events speaker", replace(resumption(spec), num_windows=12))
    assert written.plans["speaker"].resume_from == Listener(Ack(0, num_windows=12), 0)


def test_a_source_says_of_views_that_were_taken_away_that_they_are_over(spec: PipelineSpec) -> None:
    written = Written()
    recover(written, spec, "microphone camera", replace(resumption(spec), removed_views=("back",)))
    assert written.plans["camera"].removed_views == ("back",)
