"""What follows from the wiring of the pipeline that is shipped, and the way a session takes through it."""

import pytest

from deploy.control.routing import num_phases, phase_ns, session_plan, stages_of
from graph.chunk import NS_PER_MS
from graph.spec import PipelineSpec, default_spec_path
from stages.session import View
from tests.support.specs import load_spec, parse_spec
from tests.support.units import session


@pytest.mark.parametrize(
    "settings",
    [[], ["stages.tts.replicas=0"], ["stages.vision_encoder.replicas=0"], ["stages.audio_encoder.replicas=0"]],
)
def test_who_sends_is_closed_before_those_that_it_sends_to(settings: list[str]):
    spec = load_spec(default_spec_path(), settings)
    order = spec.wiring.upstream_first
    assert sorted(order) == sorted(spec.stages)
    forward = [(e.source.stage, e.target.stage) for e in spec.edges if not e.target.is_feedback]
    assert [(source, target) for source, target in forward if order.index(source) > order.index(target)] == []


def test_the_cameras_are_closed_first_and_the_events_last():
    spec: PipelineSpec = load_spec(default_spec_path())
    assert (set(spec.wiring.upstream_first[:2]), spec.wiring.upstream_first[-1]) == ({"camera", "microphone"}, "events")


@pytest.mark.parametrize(
    ("settings", "last"),
    [([], "speaker"), (["stages.tts.replicas=0"], "llm"), (["stages.audio_encoder.replicas=0"], "speaker")],
)
def test_windows_end_where_speech_is_heard_else_at_the_llm(settings: list[str], last: str):
    spec = load_spec(default_spec_path(), settings)
    assert spec.wiring.ends(spec.ends_windows) == {last}


def test_the_cameras_and_microphones_are_the_sources():
    assert load_spec(default_spec_path()).wiring.sources == ("microphone", "camera")


def test_a_session_without_a_microphone_has_no_ears():
    spec = load_spec(default_spec_path())
    assert spec.stages.keys() - stages_of(session(microphone=False), spec) == {"microphone", "audio_encoder"}
    assert stages_of(session(), spec) == spec.stages.keys()


def test_what_works_side_by_side_is_counted_once():
    spec = load_spec(default_spec_path())
    costs = {"vision_encoder": 80, "audio_encoder": 30, "llm": 100, "tts": 50, "vocoder": 20}
    assert spec.wiring.longest(costs) == 80 + 100 + 50 + 20


def test_no_window_ends_behind_a_side_branch():
    spec = parse_spec(
        'version: 1\ncameras: {hall: {source: "test://pattern"}}\nstages:\n  census: {}\n'
        '  motion: {use: "omni_outside.motion:MotionGate"}\n  vision_encoder: {inputs: {frames: motion.moving}}\n',
        "p.yaml",
        ["stages.census.inputs.frames=motion.moving"],
    )
    replicas = dict.fromkeys(spec.stages, 0)
    aside = {name for name in spec.stages if session_plan(spec, name, session(), replicas, 0).is_aside}
    assert aside == {"census", "events"}


def test_each_view_is_a_stream_of_its_own_where_pictures_are_taken_and_one_behind():
    spec = load_spec(default_spec_path())
    porch = session("porch", views=(View("front", "a.mp4"), View("back", "b.mp4")), heard="back")
    replicas = dict.fromkeys(spec.stages, 0)
    taken = {stage: session_plan(spec, stage, porch, replicas, 1).inputs for stage in ("vision_encoder", "llm")}
    assert set(taken["vision_encoder"]) == {"camera/porch/front", "camera/porch/back"}
    assert set(taken["llm"]) == {"image", "audio"}
    (output,) = (each for each in session_plan(spec, "camera", porch, replicas, 1).outputs.values() if each.is_many)
    assert (output.stream_of(""), output.stream_of("back")) == ("camera/porch", "camera/porch/back")


def test_two_inputs_that_take_the_same_views_have_streams_of_their_own():
    spec = parse_spec(
        'version: 1\ncameras: {hall: {source: "test://pattern"}}\nstages:\n'
        '  views: {use: "omni_outside.views:Views"}\n',
        "p.yaml",
    )
    views = (View("front", "a.mp4"), View("back", "b.mp4"))
    plan = session_plan(spec, "views", session("hall", views=views), dict.fromkeys(spec.stages, 0), 1)
    expected = {f"{port}/camera/hall/{view.name}" for port in ("frames", "lately") for view in views}
    assert {stream for stream, each in plan.inputs.items() if each.is_many} == expected


ON_GPU = ["stages.llm.gpus=1", "stages.tts.batch=64"]
SIZES = (1, 16, 17, 32, 33, 48, 49, 500)


def test_on_cpus_there_are_three_phases_however_many_sessions():
    assert {num_phases(size, load_spec(default_spec_path())) for size in SIZES} == {3}


def test_on_gpus_a_phase_is_what_a_batch_takes_and_there_are_two_to_four():
    assert [num_phases(size, load_spec(default_spec_path(), ON_GPU)) for size in SIZES] == [2, 2, 2, 2, 3, 3, 4, 4]


def test_so_many_phases_as_are_written_there_are():
    assert num_phases(1, load_spec(default_spec_path(), ["window.phases=7"])) == 7


@pytest.mark.parametrize(
    ("settings", "at_ms"), [(["window.phases=4"], [0, 250, 500, 750]), (ON_GPU, [0, 500, 250, 750])]
)
def test_phases_take_turns_within_a_window_and_where_more_may_come_far_from_each_other(
    settings: list[str], at_ms: list[int]
):
    spec = load_spec(default_spec_path(), settings)
    assert [phase_ns(phase, spec) // NS_PER_MS for phase in range(4)] == at_ms
