"""What is foreseen of so many sessions: it follows what was measured, and what it is measured on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deploy.simulator.foresee import GRADES, Foreseen, Foresight, foresee, lines, most_served, served
from graph.chunk import NS_PER_MS
from graph.costs import ActorCost, Overheads, Profile, ProfileError, Speaking, StageCost
from graph.spec import PipelineSpec, default_spec_path
from tests.support.specs import load_spec, model_stages

SHORT = 12  # windows


def spec(*overrides: str) -> PipelineSpec:
    return load_spec(default_spec_path(), ["shedding.ladder=[]", "window.phases=2", *overrides])


def profile(fixed_ms: float = 10, each_ms: float = 4, num_cores: int = 2, **fields: object) -> Profile:
    cost = StageCost(round(fixed_ms * NS_PER_MS), round(each_ms * NS_PER_MS))
    return replace(Profile("nano", {}, num_cores, dict.fromkeys(model_stages(), cost)), **fields)  # type: ignore[arg-type]


def latency(measured: Profile, num_sessions: int = 4) -> float:
    return foresee(spec(), measured, num_sessions, SHORT).latency_p50_s


def test_the_same_is_foreseen_each_time() -> None:
    assert foresee(spec(), profile(), 4, SHORT) == foresee(spec(), profile(), 4, SHORT)


def test_stages_that_cost_more_and_fewer_cores_take_longer() -> None:
    assert latency(profile(each_ms=30)) > 2 * latency(profile())
    assert latency(profile(each_ms=30, num_cores=1)) > latency(profile(each_ms=30))


def test_windows_of_sessions_that_have_lasted_long_cost_what_was_measured_of_them() -> None:
    llm = StageCost(10 * NS_PER_MS, 4 * NS_PER_MS, age_ns=20 * NS_PER_MS, most_age=5)
    aged = profile(stages=profile().stages | {"llm": llm})
    assert latency(aged) == pytest.approx(latency(profile()) + 2 * 5 * 0.020, abs=0.02), "two sessions are in a phase"


def test_what_processes_take_beside_their_stages_counts() -> None:
    actors = dict.fromkeys((*model_stages(), "media", "io"), ActorCost(idle_ns=100 * NS_PER_MS, chunk_ns=NS_PER_MS))
    beside = profile(overheads=Overheads(actors, source_ns=10 * NS_PER_MS, other_ns=50 * NS_PER_MS))
    bare, full = (foresee(spec(), each, 4, SHORT) for each in (profile(), beside))
    assert full.latency_p50_s > bare.latency_p50_s
    assert full.cores > bare.cores + 7 * 0.1 + 4 * 0.01 + 0.05


def test_so_much_is_said_as_was_measured() -> None:
    shares = []
    for begins, num_windows in ((0.0, 1.0), (0.3, 2.0)):
        run = Foresight(spec(), profile(speaking=Speaking(begins, num_windows, 3.0, 320 * NS_PER_MS)), 8, 40)
        run.run()
        shares.append(run.threads["vocoder.0"].busy_ns)
    assert shares[0] == 0 < shares[1]


def test_windows_in_which_something_is_said_cost_the_llm_its_text() -> None:
    says = Speaking(0.1, 1.0, 4.0, 250 * NS_PER_MS)
    llm = StageCost(10 * NS_PER_MS, 4 * NS_PER_MS, token_ns=50 * NS_PER_MS)
    silent, with_text = (
        foresee(spec(), profile(stages=profile().stages | {"llm": cost}, speaking=says), 2, 30)
        for cost in (replace(llm, token_ns=0), llm)
    )
    assert with_text.latency_p50_s == pytest.approx(silent.latency_p50_s, abs=0.005), "most windows are silent"
    assert with_text.latency_p99_s > silent.latency_p99_s + 0.15


def test_stages_of_one_gpu_share_it_and_leave_the_cores() -> None:
    on_gpu = [f"stages.{name}.gpus=0.2" for name in model_stages()]
    shared, apart = (
        foresee(
            spec(*(setting.replace("0.2", share) for setting in on_gpu)), profile(each_ms=30, num_cores=1), 8, SHORT
        )
        for share in ("0.2", "1")
    )
    assert shared.cores == apart.cores == 0
    assert apart.latency_p99_s <= shared.latency_p99_s


def test_rivals_on_the_cores_make_it_later() -> None:
    alone, beside = (foresee(spec(), profile(), 4, SHORT, rivals=rivals) for rivals in (0.0, 4.0))
    assert beside.latency_p50_s > 2 * alone.latency_p50_s


def test_as_many_are_served_as_are_on_time_and_one_more_is_not() -> None:
    tried = served(spec(), profile(each_ms=30), most=40)
    for grade in GRADES:
        most = most_served(tried, grade)
        assert 1 <= most < 40
        worse = [each for each in tried if each.num_sessions > most]
        assert worse[0].num_sessions == most + 1 and worse[0].on_time < grade
    assert "foreseen to be served" in lines(tried)[-1]


def test_where_one_is_too_much_none_is_served() -> None:
    tried = served(spec(), profile(fixed_ms=2000), most=4)
    assert [most_served(tried, grade) for grade in GRADES] == [0, 0]


def test_no_more_are_served_than_were_tried_without_a_gap() -> None:
    tried = [Foreseen(number, share, 0, 0, 0) for number, share in ((1, 1.0), (2, 0.5), (4, 1.0))]
    assert most_served(tried, 0.99) == 1


def test_a_stage_that_was_not_measured_is_told() -> None:
    with pytest.raises(ProfileError, match="says nothing of"):
        foresee(spec(), Profile("nano", {}, 2, {"llm": StageCost(1, 1)}), 1)
