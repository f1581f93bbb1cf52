"""deploy/routing.py: the order in which stages are closed."""

import pytest

from deploy.routing import closing_order
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
