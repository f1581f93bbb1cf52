"""How many replicas so many cameras need, and how many cameras so many replicas serve."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from deploy.cli import app as cli
from deploy.control.capacity import MAX_LOAD, CapacityError, Demand, Plan, admit, most_cameras, plan_for, reckon
from graph.chunk import NS_PER_MS
from graph.costs import Profile, ProfileError, StageCost
from graph.spec import PipelineSpec, default_spec_path
from tests.support.specs import load_spec

COST = StageCost(10 * NS_PER_MS, 4 * NS_PER_MS)
ON_GPU = [f"stages.{stage}.gpus=0.2" for stage in ("vision_encoder", "audio_encoder", "llm", "tts", "vocoder")]
VIEWS = ", ".join(f"{name}: 'test://pattern'" for name in "wxyz")
FOUR_VIEWS = f"cameras={{a: {{views: {{{VIEWS}}}}}}}"


def spec(*overrides: str) -> PipelineSpec:
    return load_spec(default_spec_path(), list(overrides))


def profile(num_cores: int = 2, **costs: StageCost) -> Profile:
    stages = dict.fromkeys(("vision_encoder", "audio_encoder", "llm", "tts", "vocoder"), COST)
    return Profile("nano", {}, num_cores, stages | costs)


def cameras(count: int, num_pictures: int = 1) -> Demand:
    """So many, each with so many pictures in a window."""
    return Demand.of([num_pictures] * count)


def alike(spec: PipelineSpec, profile: Profile, count: int) -> Plan:
    return reckon(spec, profile, cameras(count))


def test_a_window_passes_the_encoders_side_by_side_and_the_rest_in_a_row():
    plan = alike(spec(), profile(), 1)
    assert plan.latency_p99_ns == 4 * 14 * NS_PER_MS


def test_stages_without_a_gpu_take_cores():
    assert alike(spec(), profile(), 1).cores == pytest.approx(5 * 0.014)
    assert alike(spec("stages.llm.gpus=1"), profile(), 1).cores == pytest.approx(4 * 0.014)


def test_phases_shorten_the_way_and_cost_more_batches():
    together, in_turns = (alike(spec(f"window.phases={phases}"), profile(), 8) for phases in (1, 4))
    assert in_turns.latency_p99_ns == 4 * (10 + 2 * 4) * NS_PER_MS < together.latency_p99_ns
    assert in_turns.cores == pytest.approx(5 * 4 * 0.018)
    assert in_turns.cores > together.cores


def test_the_busiest_stage_saturates_first():
    assert alike(spec(), profile(tts=StageCost(0, 90 * NS_PER_MS)), 2).first == "tts"


def test_as_many_cameras_as_fit_fit_and_one_more_does_not():
    most = most_cameras(spec(), profile())
    assert most > 1
    assert alike(spec(), profile(), most).problems == []
    assert alike(spec(), profile(), most + 1).problems != []


def test_where_one_camera_is_too_much_none_fits():
    assert most_cameras(spec(), profile(llm=StageCost(2000 * NS_PER_MS, 0))) == 0


def test_more_cameras_get_more_replicas_where_it_is_tight():
    plan = plan_for(spec(*ON_GPU), profile(llm=StageCost(20 * NS_PER_MS, 20 * NS_PER_MS)), 100)
    assert plan.problems == []
    assert plan.stages["llm"].replicas > plan.stages["vision_encoder"].replicas
    assert plan.gpus == pytest.approx(0.2 * sum(stage.replicas for stage in plan.stages.values()))


def test_what_no_number_of_replicas_can_do_is_told_with_the_reason():
    slow = profile(vocoder=StageCost(900 * NS_PER_MS, 100 * NS_PER_MS))
    with pytest.raises(CapacityError, match="vocoder would be busy 100 % of the time"):
        plan_for(spec(*ON_GPU), slow, 3)
    with pytest.raises(CapacityError, match=r"cores would be busy, 1\.6 is the most"):
        plan_for(spec(), profile(), 1000)


@pytest.mark.parametrize("num_cameras", [0, -1, 10_000_000])
def test_a_number_of_cameras_that_makes_no_sense_is_told(num_cameras: int):
    with pytest.raises(CapacityError, match="--cameras must be 1 to"):
        plan_for(spec(), profile(), num_cameras)


def test_a_stage_that_was_not_measured_is_told():
    with pytest.raises(ProfileError, match="says nothing of llm"):
        alike(spec(), Profile("nano", {}, 2, {"vision_encoder": COST, "audio_encoder": COST}), 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 100), st.integers(1, 30))
def test_a_plan_keeps_every_promise(num_cameras: int, fixed_ms: int, each_ms: int):
    measured = profile(llm=StageCost(fixed_ms * NS_PER_MS, each_ms * NS_PER_MS, 0.3))
    plan = plan_for(spec(*ON_GPU), measured, num_cameras)
    assert plan.problems == []
    assert all(stage.load <= MAX_LOAD for stage in plan.stages.values())
    assert all(stage.replicas * stage.sessions >= num_cameras for stage in plan.stages.values())


# ---- views: pictures are paid by the picture, windows by the window --------------------------------------------------


def test_every_view_costs_the_stage_that_makes_pictures_and_no_other_one():
    one, four = (reckon(spec("window.phases=2"), profile(), cameras(3, views)) for views in (1, 4))
    assert four.stages["vision_encoder"].p99_ns - one.stages["vision_encoder"].p99_ns == 2 * 3 * 4 * NS_PER_MS, (
        "three more pictures of each of the two that a phase has"
    )
    assert four.stages["vision_encoder"].load == pytest.approx((2 * 18 + 9 * 4) / 1000)
    others = {"audio_encoder", "llm", "tts", "vocoder"}
    assert {four.stages[name] for name in others} == {one.stages[name] for name in others}
    assert four.cores - one.cores == pytest.approx(9 * 0.004)


def test_a_window_with_more_pictures_costs_the_llm_more_where_that_was_measured():
    measured = profile(llm=StageCost(10 * NS_PER_MS, 4 * NS_PER_MS, picture_ns=2 * NS_PER_MS))
    one, four = (reckon(spec(), measured, cameras(1, views)) for views in (1, 4))
    assert four.stages["llm"].p99_ns - one.stages["llm"].p99_ns == 3 * 2 * NS_PER_MS
    blind = spec("stages.vision_encoder.replicas=0")
    assert reckon(blind, measured, cameras(1, 4)).stages["llm"] == one.stages["llm"], "nothing is seen"


def test_the_rate_of_pictures_counts_as_views_do():
    views = spec(
        "cameras={a: {views: {x: 'test://pattern', y: 'test://pattern'}, fps: 1.5}, b: {source: 'test://pattern'}}"
    )
    assert Demand.described(views) == Demand(((4, 1), (1, 1)))
    assert Demand.described(spec("cameras={a: {source: 'test://pattern', fps: 0.1}}")) == Demand(((1, 1),))


def test_the_cameras_with_most_pictures_may_share_a_replica():
    two = spec("stages.vision_encoder.replicas=2", "window.phases=2")
    uneven = reckon(two, profile(), Demand.of([1, 4, 1, 4]))
    assert uneven.stages["vision_encoder"].load == pytest.approx((2 * 14 + 6 * 4) / 1000)
    assert uneven.cores == pytest.approx(4 * 2 * 0.018 + 2 * 2 * 0.014 + 6 * 0.004)


def test_a_plan_is_for_cameras_like_those_described():
    three = ", ".join(f"{name}: 'test://pattern'" for name in "xyz")
    described = spec(f"cameras={{a: {{views: {{{three}}}}}, b: {{source: 'test://pattern'}}}}")
    assert [str(Demand.like(described, count)) for count in (1, 2, 3, 5)] == [
        "1 camera with 3 pictures in a window",
        "2 cameras with 4 pictures in a window",
        "3 cameras with 7 pictures in a window",
        "5 cameras with 11 pictures in a window",
    ]
    assert most_cameras(described, profile()) < most_cameras(spec(), profile())
    fewer, more = (plan_for(each(*ON_GPU), profile(), 60) for each in (spec, lambda *o: spec(*o, FOUR_VIEWS)))
    assert more.stages["vision_encoder"].replicas > fewer.stages["vision_encoder"].replicas
    assert more.stages["tts"] == fewer.stages["tts"]


def test_a_camera_of_many_views_is_refused_where_one_of_one_view_is_admitted(tmp_path: Path):
    slow = profile(vision_encoder=StageCost(0, 300 * NS_PER_MS))
    admit(admitting(tmp_path, slow), cameras(2))
    message = r"1 camera with 4 pictures in a window can't be served on time, 2 with one picture each can \(admission"
    with pytest.raises(CapacityError, match=message):
        admit(admitting(tmp_path, slow), cameras(1, 4))


# ---- admission -------------------------------------------------------------------------------------------------------


def admitting(tmp_path: Path, measured: Profile) -> PipelineSpec:
    (tmp_path / "p.json").write_text(measured.as_json())
    return spec(f"admission.profile={tmp_path / 'p.json'}")


def test_as_many_as_are_served_on_time_are_admitted(tmp_path: Path):
    admit(admitting(tmp_path, profile()), cameras(most_cameras(spec(), profile())))
    admit(spec(), cameras(1_000_000))


def test_one_more_is_refused_with_the_number_that_fits_and_the_reason(tmp_path: Path):
    most = most_cameras(spec(), profile())
    with pytest.raises(CapacityError, match=rf"{most + 1} cameras can't be served on time, {most} can .*is the most"):
        admit(admitting(tmp_path, profile()), cameras(most + 1))


def test_the_command_tells_the_plan_or_how_many_fit(tmp_path: Path):
    path = tmp_path / "p.json"
    path.write_text(profile(llm=StageCost(100 * NS_PER_MS, 60 * NS_PER_MS)).as_json())
    fitting = CliRunner().invoke(cli.app, ["plan", "--profile", str(path), "--json"])
    assert fitting.exit_code == 0
    report = json.loads(fitting.stdout)
    assert report["cameras"] >= 1 and report["fits"]
    assert 1 <= report["served"]["0.99"] <= report["served"]["0.9"]
    assert {each["sessions"] for each in report["foreseen"]} >= {1, report["served"]["0.99"], report["served"]["0.9"]}
    args = ["plan", "--profile", str(path), "--cameras", "20", *(text for one in ON_GPU for text in ("--set", one))]
    planned = CliRunner().invoke(cli.app, args)
    assert planned.exit_code == 0
    assert "20 cameras: a window takes" in planned.stdout and "saturates first" in planned.stdout
    assert "on time" in planned.stdout
    assert "there is no GPU here" in planned.stderr


def test_what_is_too_much_to_be_foreseen_is_reckoned_and_that_is_told(tmp_path: Path):
    path = tmp_path / "p.json"
    path.write_text(profile().as_json())
    on_gpu = [text for one in ON_GPU for text in ("--set", one)]
    for arguments, reason in (
        (["--cameras", "300"], "more than 256"),
        (["--set", FOUR_VIEWS, "--cameras", "2"], "several"),
    ):
        result = CliRunner().invoke(cli.app, ["plan", "--profile", str(path), *arguments, *on_gpu])
        assert result.exit_code == 0 and "saturates first" in result.stdout and "on time" not in result.stdout
        assert "nothing is foreseen" in result.stderr and reason in result.stderr


def test_a_plan_is_applied_to_what_is_described():
    on_gpu = spec(*ON_GPU)
    plan = plan_for(on_gpu, profile(llm=StageCost(20 * NS_PER_MS, 20 * NS_PER_MS)), 100)
    applied = plan.applied_to(on_gpu)
    assert {name: applied.stages[name].replicas for name in plan.stages} == {
        name: stage.replicas for name, stage in plan.stages.items()
    }


def test_windows_of_old_sessions_count_where_they_cost_more():
    old = profile(llm=StageCost(10 * NS_PER_MS, 4 * NS_PER_MS, age_ns=NS_PER_MS, most_age=20))
    assert alike(spec(), old, 1).stages["llm"].load == pytest.approx(0.034)


def test_the_command_says_what_is_wrong_with_the_profile(tmp_path: Path):
    result = CliRunner().invoke(cli.app, ["plan", "--profile", str(tmp_path / "none.json")])
    assert result.exit_code == 2
    assert "none.json: can't be read" in result.stderr
