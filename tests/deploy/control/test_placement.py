"""deploy/control/placement.py: processes from descriptions, and whether a cluster can hold them."""

import pytest

from deploy.control.placement import PlacementError, Process, check_fits, num_cpus_for, processes_of
from graph.spec import PipelineSpec
from tests.support.specs import parse_spec

MINIMAL = "version: 1\ncameras: {test: {source: 'test://pattern'}}\n"


def spec(*overrides: str) -> PipelineSpec:
    return parse_spec(MINIMAL, "pipeline.yaml", overrides)


def process(name: str, **resources: float) -> Process:
    return Process(name, 0, {}, False, resources)


def by_name(*overrides: str) -> dict[str, Process]:
    return {process.name: process for process in processes_of(spec(*overrides))}


def test_a_model_stage_has_a_process_and_light_ones_share_some():
    processes = by_name()
    models = {"vision_encoder.0", "audio_encoder.0", "llm.0", "tts.0", "vocoder.0"}
    assert set(processes) == {*models, "media.0", "io.0"}
    assert set(processes["media.0"].stages) == {"camera", "microphone"}
    assert set(processes["io.0"].stages) == {"speaker", "events"}


def test_every_replica_is_a_process_with_a_number():
    processes = by_name("stages.llm.replicas=3")
    assert [processes[f"llm.{n}"].replica for n in range(3)] == [0, 1, 2]


def test_stages_that_share_a_process_may_have_several_of_it():
    processes = by_name("stages.camera.replicas=2", "stages.microphone.replicas=2")
    media = [processes[f"media.{n}"] for n in range(2)]
    names = {"camera", "microphone"}
    assert [(process.replica, set(process.stages), process.is_local) for process in media] == [
        (n, names, True) for n in range(2)
    ]


@pytest.mark.parametrize(
    ("num_cameras", "num_cores", "num_processes"), [(1, 8, 1), (64, 8, 1), (65, 8, 2), (200, 8, 4), (200, 2, 2)]
)
def test_cameras_have_as_many_processes_as_they_need_and_there_are_cores(
    num_cameras: int, num_cores: int, num_processes: int
):
    (camera,) = spec().cameras.values()
    many = spec().with_cameras({f"camera{n}": camera for n in range(num_cameras)}, num_cores)
    replicas = [process.name for process in processes_of(many) if process.group == "media"]
    assert replicas == [f"media.{n}" for n in range(num_processes)]


@pytest.mark.parametrize(
    "written",
    [["stages.camera.replicas=1"], ["stages.camera.process=io", "stages.microphone.process=io"]],
)
def test_what_says_how_many_it_has_or_shares_its_process_with_others_keeps_to_that(written: list[str]):
    (camera,) = spec().cameras.values()
    many = spec(*written).with_cameras({f"camera{n}": camera for n in range(200)}, num_cores=8)
    assert {many.stages[name].replicas for name in ("camera", "microphone")} == {1}


def test_light_stages_may_be_taken_apart():
    processes = by_name("stages.speaker.process=null", "stages.events.process=notes")
    assert set(processes["notes.0"].stages) == {"events"}
    assert set(processes["speaker.0"].stages) == {"speaker"}


def test_what_opens_files_and_devices_stays_here():
    processes = by_name("stages.speaker.process=null")
    assert {name for name, process in processes.items() if process.is_local} == {"media.0", "io.0", "speaker.0"}


def test_a_shared_process_asks_for_what_its_stages_ask_together():
    processes = by_name("stages.camera.cpus=0.5", "stages.microphone.resources.site=1")
    assert processes["media.0"].resources == {"CPU": 0.75, "site": 1.0}


def test_a_replica_asks_for_its_stage_s_resources():
    processes = by_name("stages.llm.gpus=0.5", "stages.llm.cpus=2", "stages.llm.resources.node_a=1")
    assert processes["llm.0"].resources == {"CPU": 2.0, "GPU": 0.5, "node_a": 1.0}


def test_a_stage_that_is_off_has_no_process():
    assert "vision_encoder.0" not in by_name("stages.vision_encoder.replicas=0")


def test_what_fits_is_not_told():
    check_fits([process("a", CPU=1.0), process("b", CPU=1.0)], [{"CPU": 1.0}, {"CPU": 1.0}])
    check_fits(processes_of(spec()), [{"CPU": 4.0}])
    check_fits([], [])


def test_shares_that_add_up_fit_in_spite_of_rounding():
    check_fits([process(str(n), CPU=0.1) for n in range(10)], [{"CPU": 1.0}])


def test_the_large_are_placed_first():
    check_fits([process("small", CPU=1.0), process("large", CPU=3.0)], [{"CPU": 3.0}, {"CPU": 1.0}])


def test_what_is_missing_is_said():
    message = r"can't hold the pipeline:\n  llm.0 asks for 2 CPU, 1 GPU; GPU: no node has more than 0 left$"
    with pytest.raises(PlacementError, match=message):
        check_fits([process("llm.0", CPU=2.0, GPU=1.0)], [{"CPU": 8.0}, {"CPU": 2.0}])


def test_what_is_missing_is_said_of_every_process():
    with pytest.raises(PlacementError) as error:
        check_fits([process("a", GPU=1.0), process("b", GPU=1.0), process("c", node_a=1.0)], [{"GPU": 1.0}])
    assert "a asks" not in str(error.value)
    assert "b asks for 1 GPU; GPU: no node has more than 0 left" in str(error.value)
    assert "c asks for 1 node_a; node_a: no node has more than 0 left" in str(error.value)


def test_resources_that_no_node_has_together_are_said():
    with pytest.raises(PlacementError, match="no node has all of it left"):
        check_fits([process("a", CPU=4.0, GPU=1.0)], [{"CPU": 8.0}, {"GPU": 1.0}])


def test_an_empty_cluster_holds_nothing():
    with pytest.raises(PlacementError, match="no node has more than 0 left"):
        check_fits([process("a", CPU=1.0)], [])


def test_our_own_ray_announces_what_there_is_or_what_is_asked_for():
    processes = [process("a", CPU=1.5), process("b", CPU=1.0), process("c", GPU=1.0)]
    assert (num_cpus_for(processes, 2), num_cpus_for(processes, 16), num_cpus_for([], 2)) == (3, 16, 2)
