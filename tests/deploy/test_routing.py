"""deploy/routing.py: the order in which stages are closed."""

import pytest

from deploy.routing import closing_order, last_stage
from graph.spec import PipelineSpec, default_spec_path, load_spec


@pytest.mark.parametrize(
    "settings",
    [[], ["stages.tts.replicas=0"], ["stages.vision_encoder.replicas=0"], ["stages.audio_encoder.replicas=0"]],
)
def test_who_sends_is_closed_before_those_that_it_sends_to(settings: list[str]):
    spec = load_spec(default_spec_path(), settings)
    order = closing_order(spec)
    assert sorted(order) == sorted(spec.stages)
    forward = [(e.source.stage, e.target.stage) for e in spec.edges if not e.target.is_feedback]
    assert [(source, target) for source, target in forward if order.index(source) > order.index(target)] == []


def test_the_cameras_are_closed_first_and_the_events_last():
    spec: PipelineSpec = load_spec(default_spec_path())
    assert (set(closing_order(spec)[:2]), closing_order(spec)[-1]) == ({"camera", "microphone"}, "events")


@pytest.mark.parametrize(
    ("settings", "last"),
    [([], "speaker"), (["stages.tts.replicas=0"], "llm"), (["stages.audio_encoder.replicas=0"], "speaker")],
)
def test_windows_end_at_the_end_of_the_longest_way(settings: list[str], last: str):
    spec = load_spec(default_spec_path(), settings)
    assert last_stage(spec, spec.stages) == last


def test_a_stage_beside_the_way_which_nothing_follows_ends_no_windows():
    spec = load_spec(default_spec_path())
    beside = {"camera", "vision_encoder", "microphone", "audio_encoder", "llm", "tts", "events"}
    assert last_stage(spec, beside) == "tts"
    assert last_stage(spec, {"camera", "vision_encoder", "events"}) == "vision_encoder"
