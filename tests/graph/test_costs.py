"""What a window costs: fitted to measurements, and read from a file."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graph.costs import (
    ActorCost,
    Overheads,
    Profile,
    ProfileError,
    Speaking,
    StageCost,
    fit,
    quantiles,
    read_profile,
)


@given(st.integers(0, 10**9), st.integers(1, 10**8), st.sets(st.integers(1, 32), min_size=2, max_size=6))
def test_what_follows_the_rule_is_found(fixed_ns: int, each_ns: int, sizes: set[int]):
    cost = fit([(size, fixed_ns + size * each_ns) for size in sizes for _ in range(3)])
    assert cost.fixed_ns == pytest.approx(fixed_ns, abs=2 + 1e-6 * each_ns * 32)
    assert cost.each_ns == pytest.approx(each_ns, rel=1e-6, abs=2)
    assert cost.spread <= 0.001


@given(st.lists(st.tuples(st.integers(1, 32), st.integers(1, 10**9)), min_size=1, max_size=40))
def test_no_part_of_a_cost_is_below_zero(samples: list[tuple[int, int]]):
    cost = fit(samples)
    assert min(cost.fixed_ns, cost.each_ns, cost.spread) >= 0


def test_spread_tells_of_the_slow_ones():
    assert fit([(1, 100)] * 50 + [(1, 300)] * 2).spread == 2.0


def test_of_nothing_nothing_is_fitted():
    with pytest.raises(ProfileError, match="nothing was measured"):
        fit([])


def test_a_window_of_many_is_worked_off_in_batches():
    assert StageCost(10, 3).batch_ns(4) == 22
    assert StageCost(10, 3).window_ns(num_sessions=9, batch=4) == 3 * 10 + 9 * 3


def test_what_is_written_is_read(tmp_path: Path):
    profile = Profile("nano", {"cpu": "x"}, 2, {"llm": StageCost(1, 2, 0.5)})
    (tmp_path / "p.json").write_text(profile.as_json())
    assert read_profile(tmp_path / "p.json") == profile


def test_a_stage_that_was_not_measured_is_told():
    with pytest.raises(ProfileError, match="nothing of tts; it has: llm"):
        Profile("nano", {}, 2, {"llm": StageCost(1, 2)}).of("tts")


WHOLE = {"version": 1, "model": "nano", "machine": {}, "num_cores": 2, "stages": {}}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([], "no profile of version 1"),
        (WHOLE | {"version": 2}, "no profile of version 1"),
        (WHOLE | {"stages": 3}, "no profile of version 1"),
        (WHOLE | {"num_cores": 0}, "num_cores must be a whole number"),
        (WHOLE | {"stages": {"llm": 7}}, "stages.llm: fixed_ns, each_ns and spread must be numbers"),
        (WHOLE | {"stages": {"llm": {"fixed_ns": 1, "each_ns": -1, "spread": 0}}}, "stages.llm: fixed_ns"),
        (
            WHOLE | {"stages": {"llm": {"fixed_ns": 1, "each_ns": 1, "spread": 0, "picture_ns": "x"}}},
            "so must the others where they are given",
        ),
    ],
)
def test_a_file_that_is_no_profile_is_told(tmp_path: Path, content: object, problem: str):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ProfileError, match=problem):
        read_profile(path)


def test_a_file_that_is_missing_or_no_json_is_told(tmp_path: Path):
    with pytest.raises(ProfileError, match="can't be read"):
        read_profile(tmp_path / "none.json")
    (tmp_path / "p.json").write_text("{")
    with pytest.raises(ProfileError, match="not JSON"):
        read_profile(tmp_path / "p.json")


def test_what_a_further_picture_costs_is_in_the_profile_where_it_was_measured(tmp_path: Path):
    path = tmp_path / "p.json"
    profile = Profile("nano", {}, 2, {"llm": StageCost(10, 3, 0.1, picture_ns=2), "tts": StageCost(10, 3, 0.1)})
    path.write_text(profile.as_json())
    assert read_profile(path) == profile
    assert "picture_ns" not in json.loads(path.read_text())["stages"]["tts"]
    assert profile.of("llm").window_ns(num_sessions=2, batch=4, num_more=5) == 10 + 2 * 3 + 5 * 2


COMPLETE = Profile(
    "nano",
    {},
    2,
    {"llm": StageCost(10, 3, 0.1, picture_ns=2, age_ns=4, most_age=20, token_ns=6, ratios=(0.9, 1.1))},
    Speaking(0.25, 1.9, 2.8, 310_000_000),
    Overheads({"llm": ActorCost(12, 3), "media": ActorCost(9, 1)}, source_ns=5, other_ns=7),
)


def test_a_profile_with_all_that_can_be_measured_is_read_as_it_was_written(tmp_path: Path):
    (tmp_path / "p.json").write_text(COMPLETE.as_json())
    assert read_profile(tmp_path / "p.json") == COMPLETE


@pytest.mark.parametrize(
    ("part", "broken", "message"),
    [
        ("speaking", {"begins": 1}, "speaking: begins, windows"),
        ("speaking", 3, "speaking: begins, windows"),
        ("overheads", [], "overheads: source_ns"),
        ("overheads", {"actors": {"llm": 1}, "source_ns": 1, "other_ns": 1}, "overheads: source_ns"),
        ("overheads", {"actors": {"llm": {"idle_ns": -1, "chunk_ns": 1}}, "source_ns": 1, "other_ns": 1}, "overheads"),
        ("stages", {"llm": {"fixed_ns": 1, "each_ns": 1, "spread": 0, "ratios": 3}}, "ratios must be a list"),
        ("stages", {"llm": {"fixed_ns": 1, "each_ns": 1, "spread": 0, "age_ns": "x"}}, "stages.llm: fixed_ns"),
    ],
)
def test_what_a_profile_says_in_other_words_is_told_with_its_place(
    tmp_path: Path, part: str, broken: object, message: str
):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(json.loads(COMPLETE.as_json()) | {part: broken}))
    with pytest.raises(ProfileError, match=message):
        read_profile(path)


def test_a_window_costs_more_for_those_before_it_up_to_the_most():
    cost = StageCost(10, 3, age_ns=2, most_age=4)
    assert cost.aged_ns([0, 3, 9]) == 2 * (0 + 3 + 4)
    assert StageCost(10, 3).aged_ns([7]) == 0


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=200))
def test_quantiles_stand_for_all(ratios: list[float]):
    few = quantiles(ratios)
    assert list(few) == sorted(few)
    assert min(ratios) - 0.001 <= few[0] <= few[-1] <= max(ratios) + 0.001
