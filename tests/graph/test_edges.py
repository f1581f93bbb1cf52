"""From what is written of inputs to the edges that there are; what is said where that can't be is in specs/."""

from graph.spec import PipelineSpec, render
from tests.support.specs import parse_spec

HEAD = 'version: 1\ncameras: {hall: {source: "test://pattern"}}\nstages:\n'
GATE = '  motion: {use: "omni_outside.motion:MotionGate"}\n'
BEHIND = "  vision_encoder: {inputs: {frames: motion.moving}}\n"


def wired(*stages: str) -> PipelineSpec:
    return parse_spec(HEAD + "".join(stages), "p.yaml")


def edges_of(spec: PipelineSpec, *stages: str) -> set[str]:
    """The edges of these stages."""
    return {edge.id for edge in spec.edges if {edge.source.stage, edge.target.stage} & set(stages)}


def test_an_input_comes_from_the_one_output_of_its_kind():
    gate = wired(GATE, BEHIND)
    assert edges_of(gate, "motion") == {
        "camera.frames->motion.frames",
        "motion.moving->vision_encoder.frames",
        "motion.alarms->events.events",
    }


def test_a_stage_that_is_off_leaves_nothing_to_choose():
    off = '  motion: {use: "omni_outside.motion:MotionGate", replicas: 0}\n'
    assert edges_of(wired(off), "vision_encoder") == {
        "camera.frames->vision_encoder.frames",
        "vision_encoder.image->llm.image",
    }
    other = '  other: {use: "omni_outside.motion:MotionGate", inputs: {frames: camera.frames}}\n'
    assert edges_of(wired(off, other, "  vision_encoder: {inputs: {frames: other.moving}}\n"), "motion") == set()


def test_a_description_with_a_stage_of_ones_own_that_is_off_is_read_back():
    events = "  events: {inputs: {events: [motion.alarms, speaker.events]}}\n"
    off = wired(GATE.replace("}", ", replicas: 0}"), "  vision_encoder: {inputs: {frames: camera.frames}}\n", events)
    again = parse_spec(render(off), "again.yaml")
    assert (again, again.off) == (off, {"motion"})


def test_what_is_written_of_an_input_goes_before_what_its_class_says():
    census = "  census: {inputs: {frames: {side: false, window: 4s, lateness: 20ms, late: carry}}}\n"
    (edge,) = [edge for edge in wired(census).edges if edge.target.stage == "census"]
    assert str(edge.source) == "camera.frames", "where it comes from is not written"
    assert not edge.target.is_side and edge.when_full == "drop_oldest", "a full edge of pictures is the kind's matter"
    assert (edge.window_ns, edge.lateness_ns, edge.late) == (4 * 10**9, 20 * 10**6, "carry")


def test_an_input_of_many_takes_those_that_are_written():
    events = "  events: {inputs: {events: [motion.alarms, speaker.events]}}\n"
    assert edges_of(wired(GATE, BEHIND, events), "events") == {
        "motion.alarms->events.events",
        "speaker.events->events.events",
    }


def test_an_optional_input_may_be_left_without_a_source():
    assert "audio_encoder.audio->llm.audio" not in edges_of(wired("  llm: {inputs: {audio: }}\n"), "llm")


def test_what_is_cut_off_from_all_that_takes_it_has_nothing_to_do():
    deaf = wired("  llm: {inputs: {audio: []}}\n")
    assert deaf.stages.keys() & {"microphone", "audio_encoder"} == set()
    detector = wired(GATE, "  vision_encoder: {inputs: {frames: camera.frames}}\n")
    assert "motion" in detector.stages, "its alarms are of use"


def test_edges_change_what_is_wired():
    edges = "edges:\n  - {from: camera.frames, to: vision_encoder.frames, credit: {chunks: 6}}\n"
    (edge,) = [edge for edge in wired("  llm: {}\n", edges).edges if edge.target.stage == "vision_encoder"]
    assert edge.credit.chunks == 6
