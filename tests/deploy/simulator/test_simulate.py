"""The simulator: what must hold does, under every fault; and where it does not, that is seen."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from typer.testing import CliRunner

from deploy.actor.afterword import Afterword
from deploy.actor.session_state import OpenSession
from deploy.cli import app as cli
from deploy.cli.common import EXIT_USAGE, EXIT_VIOLATED
from deploy.control.routing import session_plan
from deploy.simulator.invariants import MAX_VIOLATIONS
from deploy.simulator.report import Report, parse_seeds
from deploy.simulator.scenarios import SCENARIOS, Scenario, SimulateError, find_scenario
from deploy.simulator.shrink import faults_of, shrink
from deploy.simulator.simulate import DAY_NS, Simulation, run_scenario
from deploy.simulator.speech import VirtualLlm
from deploy.simulator.stages import PICTURE_EMBEDS
from deploy.simulator.world import Device, Network, World
from graph.chunk import NS_PER_MS, NS_PER_S
from graph.costs import Profile, ProfileError, StageCost
from graph.credit import ReceiveCredit, SendCredit
from graph.edge import Sender
from graph.epoch import EpochFence
from graph.ledger import Ledger
from graph.spec import PipelineSpec, default_spec_path
from graph.spec import load_spec as read_spec
from graph.tail import SpeechCredit
from graph.window import WindowJoin
from stages.catalog import StageCatalog
from tests.support import units
from tests.support.specs import load_spec, model_stages

NUM_SEEDS = 6


@pytest.fixture(scope="module")
def spec() -> PipelineSpec:
    return load_spec(default_spec_path())


@pytest.fixture
def broken() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def run(spec: PipelineSpec, name: str, num_seeds: int = NUM_SEEDS) -> Report:
    return run_scenario(spec, SCENARIOS[name], range(num_seeds))


def rules(report: Report) -> set[str]:
    return {violation.rule for violation in report.violations}


@pytest.mark.parametrize("name", SCENARIOS)
def test_whatever_happens_what_must_hold_does(spec: PipelineSpec, name: str):
    scenario = SCENARIOS[name] if name != "diurnal" else a_fifth_of(SCENARIOS[name])
    num_seeds = 1 if scenario.arrivals else NUM_SEEDS
    report = run_scenario(spec, scenario, range(num_seeds))
    assert report.violations == ()
    if not scenario.interrupted:
        assert report.figures.num_windows >= num_seeds * scenario.num_sessions * scenario.num_windows


def a_fifth_of(scenario: Scenario) -> Scenario:
    """With a fifth of the sessions: a test shall not take a quarter of a minute."""
    arrivals = tuple(replace(each, num_sessions=each.num_sessions // 5) for each in scenario.arrivals)
    return replace(scenario, arrivals=arrivals)


def test_a_day_has_a_fifth_of_its_cameras_at_night_and_all_of_them_at_noon(spec: PipelineSpec):
    def num_open(at_s: float) -> int:
        coming = [(begin, each.until_ns) for each in SCENARIOS["diurnal"].arrivals for begin in each.begins_ns()]
        return sum(begin <= at_s * NS_PER_S < until for begin, until in coming)

    assert [num_open(hour * 5) for hour in (0, 5, 13, 15, 23)] == [20, 20, 100, 100, 20]


def test_a_profile_says_what_stages_cost(spec: PipelineSpec):
    steady = SCENARIOS["steady"]
    slow = {name: StageCost(900 * NS_PER_MS, 0) for name in model_stages()}
    profile = Profile("tiny", {}, 2, slow)
    usual, figures = (
        run_scenario(spec, each, range(1)).figures.as_dict() for each in (steady, steady.priced(profile, spec))
    )
    assert figures["latency_p50_s"] > 3 * usual["latency_p50_s"]
    with pytest.raises(ProfileError, match="the profile says nothing of vocoder"):
        SCENARIOS["steady"].priced(replace(profile, stages={n: c for n, c in slow.items() if n != "vocoder"}), spec)


def test_each_further_picture_of_a_window_costs_the_llm_what_its_profile_says():
    costs_ns = []
    for num_pictures in (1, 3):
        device = Device(World(), 1)
        llm = VirtualLlm(StageCost(5 * NS_PER_MS, NS_PER_MS, picture_ns=300 * NS_PER_MS), 0, 0, 0.3, device, Random(0))
        llm.open_session(units.session())
        pictures = [units.image("door", at_ns, PICTURE_EMBEDS["embeds"]) for at_ns in range(num_pictures)]
        llm.process([units.unit("door", 0, *pictures)])
        costs_ns.append(device.busy_ns)
    assert costs_ns == [6 * NS_PER_MS, 606 * NS_PER_MS]


def test_a_seed_happens_the_same_each_time(spec: PipelineSpec):
    first, second = run(spec, "storm", 2), run(spec, "storm", 2)
    assert first.figures == second.figures
    assert first.simulated_s == second.simulated_s


def test_a_seed_happens_the_same_in_any_process():
    def report_of(hash_seed: str) -> dict[str, object]:
        result = subprocess.run(
            [sys.executable, "-m", "deploy", "simulate", "storm", "--seeds", "0:2", "--json"],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        return {key: value for key, value in json.loads(result.stdout).items() if key != "cpu_s"}

    assert report_of("1") == report_of("2")


def test_with_replicas_and_without_pictures_or_speech_all_holds_too(spec: PipelineSpec):
    for settings in (
        ["stages.llm.replicas=2", "stages.vocoder.replicas=3"],
        ["stages.vision_encoder.replicas=0"],
        ["stages.tts.replicas=0"],
        ["stages.audio_encoder.replicas=0"],
    ):
        assert run(load_spec(default_spec_path(), settings), "storm", 4).violations == (), settings


def test_nothing_goes_wrong_where_nothing_goes_wrong(spec: PipelineSpec):
    figures = run(spec, "steady").figures.as_dict()
    assert (figures["on_time"], figures["missing"], figures["drops"]) == (1.0, {}, {})


def test_faults_leave_their_marks(spec: PipelineSpec):
    assert run(spec, "stalled-camera").figures.missing["image"] > 0
    assert run(spec, "slow-tts").figures.late_stages["tts"] > 0
    storm = run(spec, "storm", 20).figures
    assert storm.drops["stale"] > 0
    assert storm.wasted_tokens


def test_in_a_kill_storm_actors_die_and_what_they_held_is_named(spec: PipelineSpec):
    figures = run(spec, "kill-storm").figures
    assert figures.num_deaths > NUM_SEEDS
    assert figures.drops["crash"] > 0
    assert 0.4 < figures.as_dict()["on_time"] < 1.0


@pytest.mark.parametrize("settings", [[], ["stages.tts.replicas=0"], ["stages.audio_encoder.replicas=0"]])
@pytest.mark.parametrize("replicas", [{}, {"vision_encoder": 2, "audio_encoder": 2, "llm": 3, "tts": 2}])
def test_whoever_dies_in_a_storm_what_must_hold_does(settings: list[str], replicas: dict[str, int]):
    storm = replace(SCENARIOS["storm"], deaths=1.0, replicas=replicas)
    report = run_scenario(load_spec(default_spec_path(), settings), storm, range(4))
    assert report.violations == ()
    assert report.figures.num_deaths > 0


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        # One of two dead replicas was back, and was sent the last window of a session that went on at the other one.
        ("kill-storm", 16),
        # The vocoder came back after the sources' end, and the TTS gave up a listener whom it could not have reached.
        ("squall", 1964),
        # The last windows of a session were owed by a speaker that was down, and nobody waited until it was back.
        ("squall", 143),
        # All that had heard of the listener had ended before another speaker asked them.
        ("hangs", 1),
        # TTS and vocoder were resumed while the speaker was down, and what others knew of the listener was not asked.
        ("kill-storm", 22),
        # A camera died when it had got another view: those behind it waited for a stream that never came again.
        ("views", 11),
    ],
)
def test_what_has_failed_once_does_not_fail_again(spec: PipelineSpec, name: str, seed: int):
    assert run_scenario(spec, SCENARIOS[name], range(seed, seed + 1)).violations == ()


def test_with_another_replica_a_death_costs_fewer_windows(spec: PipelineSpec):
    alone = replace(SCENARIOS["kill-storm"], replicas={})
    both = dict.fromkeys(("image", "audio", "text", "codes", "speech"), 2)
    ours, theirs = (
        run_scenario(spec, replace(alone, replicas=replicas), range(NUM_SEEDS)).figures.as_dict()["on_time"]
        for replicas in (both, {})
    )
    assert ours > theirs


def test_who_hangs_is_taken_for_dead_and_what_must_hold_does(spec: PipelineSpec):
    report = run(spec, "hangs", 3)
    assert report.violations == ()
    assert report.figures.num_deaths > 0
    assert report.figures.drops["crash"] > 0


def test_wall_clocks_that_are_set_to_other_hours_change_nothing(spec: PipelineSpec):
    set_often, never = (replace(SCENARIOS["squall"], steps=steps) for steps in (1.0, 0.0))
    ours, theirs = (run_scenario(spec, scenario, range(NUM_SEEDS)) for scenario in (set_often, never))
    assert (ours.figures, ours.simulated_s, ours.violations) == (theirs.figures, theirs.simulated_s, ())


def test_where_something_went_by_the_wall_clock_that_is_seen(spec: PipelineSpec, broken: pytest.MonkeyPatch):
    def wall_ns(state: OpenSession) -> int:
        clock = state.clock
        return state.session_ns(clock.wall_ns() - DAY_NS + clock._begun_ns)  # type: ignore[attr-defined]

    broken.setattr(OpenSession, "now_ns", wall_ns)
    assert run(spec, "steady", 1).violations == (), "as long as nobody sets it"
    assert rules(run_scenario(spec, replace(SCENARIOS["steady"], steps=1.0), range(1)))


def test_sessions_that_are_closed_by_force_come_again_under_their_names(spec: PipelineSpec):
    report = run(spec, "comings-and-goings")
    assert report.violations == ()
    assert report.figures.drops["closed"] > 0
    scenario = SCENARIOS["comings-and-goings"]
    assert report.figures.num_windows > NUM_SEEDS * scenario.num_sessions * scenario.num_windows


def test_whoever_dies_while_sessions_come_and_go_what_must_hold_does(spec: PipelineSpec):
    report = run_scenario(spec, replace(SCENARIOS["kill-storm"], returns=0.6), range(4))
    assert report.violations == ()


def test_bad_units_are_failed_windows_of_their_sessions_and_cost_nobody_else_anything(spec: PipelineSpec):
    report = run(spec, "bad-units")
    assert report.violations == ()
    assert report.figures.drops["failed"] > 0
    whole = NUM_SEEDS * SCENARIOS["bad-units"].num_sessions * SCENARIOS["bad-units"].num_windows
    assert report.figures.num_windows >= whole


THERMOMETER = """
from stages.api import EVENTS, In, Kind, Out, Source, Stage
TEMPERATURE = Kind("temperature")
class Thermometer(Source):
    readings = Out(TEMPERATURE)
class Heat(Stage):
    readings, notes = In(TEMPERATURE), Out(EVENTS)
    def process(self, units):
        return []
"""


def with_own(folder: Path, module: str, code: str, stages: str) -> PipelineSpec:
    """A pipeline with stages of a module beside it, of a name that no other test has used: it stays loaded."""
    (folder / f"{module}.py").write_text(code)
    camera = 'cameras: {a: {source: "test://pattern"}}'
    (folder / "p.yaml").write_text(f"version: 1\n{camera}\nstages: {{{stages}}}\n")
    return read_spec(folder / "p.yaml", StageCatalog(folder))


def test_a_source_of_ones_own_has_its_windows(tmp_path: Path):
    stages = 'thermo: {use: "thermometer:Thermometer"}, heat: {use: "thermometer:Heat"}'
    own = with_own(tmp_path, "thermometer", THERMOMETER, stages)
    report = run_scenario(own, SCENARIOS["squall"], range(3))
    assert report.violations == ()
    assert report.figures.num_windows > 0


def test_a_source_of_ones_own_may_have_a_stream_per_view(tmp_path: Path):
    code = THERMOMETER.replace("Out(TEMPERATURE)", "Out(TEMPERATURE, many=True)")
    stages = 'thermo: {use: "thermometers:Thermometer"}, heat: {use: "thermometers:Heat"}'
    own = with_own(tmp_path, "thermometers", code, stages)
    assert own.types["thermo"].outputs["readings"].many
    report = run_scenario(own, SCENARIOS["views"], range(3))
    assert report.violations == ()
    assert report.figures.num_windows > 0


def test_views_come_and_go_and_are_missing_by_their_names(spec: PipelineSpec):
    missing = run(spec, "views", 60).figures.missing
    assert [stream for stream in missing if stream.endswith("/view1")]
    assert [stream for stream in missing if stream.endswith("/later")]


RECOGNIZER = """
from stages.api import EVENTS, NS_PER_MS, SOUND, In, Out, Stage, StageCost
class Asr(Stage):
    sound, heard = In(SOUND, side=True), Out(EVENTS)
    cost = StageCost(2500 * NS_PER_MS, 0)
    def process(self, units):
        return []
"""


def test_a_run_that_is_ended_beside_a_slow_side_branch_has_an_exact_ledger(tmp_path: Path):
    stages = 'asr: {use: "asr_stage:Asr", inputs: {sound: microphone.sound}}'
    spec = with_own(tmp_path, "asr_stage", RECOGNIZER, stages)
    # In 257 one that sends to a hanging one hangs itself when it is to bury that.
    for seed in (0, 1, 2, 257):
        assert run_scenario(spec, SCENARIOS["interrupted"], range(seed, seed + 1)).violations == ()


def test_where_the_last_ledger_is_taken_while_something_is_in_flight_that_is_seen(
    spec: PipelineSpec, broken: pytest.MonkeyPatch
):
    broken.setattr("deploy.control.ending._is_in_flight", lambda tools: False)
    assert "ledger" in rules(run_scenario(spec, SCENARIOS["interrupted"], range(23, 24)))


def test_where_sessions_of_one_name_are_taken_for_one_another_that_is_seen(
    spec: PipelineSpec, broken: pytest.MonkeyPatch
):
    def without_incarnation(spec, stage, session, replicas, incarnation):
        return session_plan(spec, stage, session, replicas, 0)

    broken.setattr("deploy.control.opening.session_plan", without_incarnation)
    assert "credit" in rules(run(spec, "comings-and-goings", 20))


def test_what_a_death_loses_and_nobody_names_is_seen(spec: PipelineSpec, broken: pytest.MonkeyPatch):
    broken.setattr(Sender, "bury", lambda self: setattr(self, "_is_down", True))
    assert "ledger" in rules(run(spec, "kill-storm"))


def test_overload_sheds_pictures_and_never_sound_and_everything_comes_back(spec: PipelineSpec):
    simulation = Simulation(spec, SCENARIOS["overload"], 0)
    simulation.run()
    assert simulation.violations == []
    shed = {edge: account.dropped["shed"] for edge, account in simulation.accounts().items()}
    assert shed.pop("camera.frames->vision_encoder.frames") > 0
    assert not any(shed.values())
    levels = [(at_s, int(window["level"] or 0)) for at_s, window in simulation.windows()]
    assert {level for _, level in levels} == {0, 1, 2, 3, 4}
    assert {level for at_s, level in levels if at_s <= 20 or at_s > 170} == {0}


def test_with_the_shedding_ladder_more_windows_are_on_time(spec: PipelineSpec):
    without = load_spec(default_spec_path(), ["shedding.ladder=[]"])
    ours, theirs = (run(each, "overload", 1).figures.as_dict()["on_time"] for each in (spec, without))
    assert ours > 0.85 > 0.6 > theirs


def test_speech_that_runs_ahead_is_seen(spec: PipelineSpec, broken: pytest.MonkeyPatch):
    broken.setattr(SpeechCredit, "allows", lambda self, duration_ns, now_ns: True)
    broken.setattr("graph.tail.TextBudget.tokens", lambda self, now_ns: 18)
    assert "TAIL" in rules(run(spec, "storm", 12))


def test_what_is_not_said_at_the_end_is_seen(spec: PipelineSpec, broken: pytest.MonkeyPatch):
    broken.setattr(Afterword, "is_needed", lambda self, state: False)
    assert "all is said" in rules(run(spec, "slow-tts", 20))


def test_a_listener_who_is_never_heard_of_is_not_spoken_to_for_long(spec: PipelineSpec):
    def num_pieces(lost: float) -> int:
        scenario = replace(SCENARIOS["steady"], num_windows=20, acks=Network(lost=lost))
        return run_scenario(spec, scenario, range(2)).figures.num_pieces

    assert num_pieces(lost=1.0) < num_pieces(lost=0.0) / 3


def test_a_scenario_can_have_more_sessions_and_windows():
    result = CliRunner().invoke(
        cli.app, ["simulate", "steady", "--seeds", "3", "--sessions", "7", "--windows", "5", "--json"]
    )
    assert json.loads(result.stdout)["windows"] == 35


def test_sessions_that_come_and_go_are_as_many_as_they_are():
    result = CliRunner().invoke(cli.app, ["simulate", "overload", "--sessions", "7"])
    assert result.exit_code == EXIT_USAGE
    assert "sessions come and go" in result.output


def test_a_seed_that_fails_is_made_as_simple_as_it_can_be(spec: PipelineSpec, broken: pytest.MonkeyPatch):
    broken.setattr(SendCredit, "fits", lambda self, duration_ns: True)
    (violation, *_) = run(spec, "tight", 1).violations
    shortest = shrink(spec, SCENARIOS["tight"], violation)
    assert (shortest.violation.rule, shortest.scenario.num_sessions) == ("credit", 1)
    assert faults_of(shortest.scenario) == ["credit"]  # all it takes
    assert shortest.scenario.num_windows < SCENARIOS["tight"].num_windows
    assert any("sends chunk" in event for event in shortest.events)


def test_what_fails_is_told_with_the_simplest_run_in_which_it_does(broken: pytest.MonkeyPatch):
    broken.setattr(SendCredit, "fits", lambda self, duration_ns: True)
    result = CliRunner().invoke(cli.app, ["simulate", "tight", "--seeds", "0:1"])
    assert result.exit_code == EXIT_VIOLATED
    assert "the simplest that fails: 1 session(s)" in result.stdout
    assert re.fullmatch(r"\d+ violations? \(credit; \d+ windows of 1 seed\)", result.stdout.splitlines()[-1])


def test_the_last_line_is_the_verdict_and_no_line_is_python():
    lines = CliRunner().invoke(cli.app, ["simulate", "steady", "--seeds", "0:2"]).stdout.splitlines()
    assert lines[-1] == "all that must hold did hold (64 windows of 2 seeds)"
    shown = dict(line.split(maxsplit=1) for line in lines[:-1])
    assert (shown["on_time"], shown["levels"], shown["drops"]) == ("100.0 %", "0: 64", "none")
    assert shown["wasted_tokens_per_barge_in"] == "none"


def test_what_each_scenario_is_about_stands_in_one_column():
    lines = CliRunner().invoke(cli.app, ["simulate"]).stdout.splitlines()
    assert len({line.index(SCENARIOS[line.split()[0]].about) for line in lines}) == 1


@pytest.mark.parametrize("length", ["500ms", "2s"])
def test_windows_of_any_length_come_to_their_end(length: str):
    report = run(load_spec(default_spec_path(), [f"window.length={length}"]), "steady", 2)
    assert (report.violations, report.figures.num_windows) == ((), 64)


def test_what_is_sent_without_credit_is_seen(spec: PipelineSpec, broken: pytest.MonkeyPatch):
    broken.setattr(SendCredit, "fits", lambda self, duration_ns: True)
    assert "credit" in rules(run(spec, "tight"))


def test_credit_that_is_given_back_twice_is_seen(spec: PipelineSpec, broken: pytest.MonkeyPatch):
    release = ReceiveCredit.release

    def twice(self: ReceiveCredit, duration_ns: int) -> None:
        release(self, duration_ns), release(self, duration_ns)

    broken.setattr(ReceiveCredit, "release", twice)
    assert "credit" in rules(run(spec, "tight"))


def test_a_crash_is_told_with_its_seed(spec: PipelineSpec, broken: pytest.MonkeyPatch):
    broken.setattr(WindowJoin, "add", lambda self, chunk: {}["nothing"])
    report = run(spec, "steady", 2)
    assert [(violation.seed, violation.rule) for violation in report.violations] == [(0, "no crash"), (1, "no crash")]


def test_a_chunk_that_vanishes_is_seen(spec: PipelineSpec, broken: pytest.MonkeyPatch):
    broken.setattr(Ledger, "drop", lambda self, reason, number=1: None)
    assert "ledger" in rules(run(spec, "storm", 20))


def test_a_window_that_is_skipped_is_seen(spec: PipelineSpec, broken: pytest.MonkeyPatch):
    close = WindowJoin._close

    def skip(self: WindowJoin):
        self._index += self._index == 3
        return close(self)

    broken.setattr(WindowJoin, "_close", skip)
    assert "order" in rules(run(spec, "steady", 1))


def test_credit_that_never_comes_back_is_seen(spec: PipelineSpec, broken: pytest.MonkeyPatch):
    broken.setattr(ReceiveCredit, "release", lambda self, duration_ns: None)
    assert "bounded queues" in rules(run(spec, "tight", 1))


def test_what_is_said_after_a_barge_in_by_who_does_not_know_of_it_is_stale(
    spec: PipelineSpec, broken: pytest.MonkeyPatch
):
    assert run(spec, "storm", 20).figures.drops["stale"] > 0
    broken.setattr(EpochFence, "is_stale", lambda self, chunk: False)
    assert run(spec, "storm", 20).figures.drops["stale"] == 0


def test_violations_are_bounded_and_told_with_their_seed(spec: PipelineSpec, broken: pytest.MonkeyPatch):
    broken.setattr(Ledger, "deliver", lambda self, number=1: None)
    report = run(spec, "steady", 2)
    assert {violation.seed for violation in report.violations} == {0, 1}
    assert len(report.violations) <= 2 * MAX_VIOLATIONS


@pytest.mark.parametrize(("text", "seeds"), [("0:3", range(3)), ("7", range(7, 8)), ("2:4", range(2, 4))])
def test_seeds_are_a_range_or_one(text: str, seeds: range):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "x", "3:3", "5:2", "-1", "1:2:3"])
def test_wrong_seeds_are_told(text: str):
    with pytest.raises(SimulateError, match="--seeds"):
        parse_seeds(text)


def test_a_wrong_scenario_is_told_with_those_there_are():
    with pytest.raises(SimulateError, match=r"no scenario 'stork'; there are: steady, .*storm"):
        find_scenario("stork")


def test_the_command_prints_json_and_exits_with_3_when_something_did_not_hold(broken: pytest.MonkeyPatch):
    arguments = ["simulate", "steady", "--seeds", "0:2", "--json"]
    result = CliRunner().invoke(cli.app, arguments)
    report = json.loads(result.stdout)
    assert (result.exit_code, report["violations"], report["windows"], report["seeds"]) == (0, [], 64, "0:2")
    broken.setattr(Ledger, "deliver", lambda self, number=1: None)
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 3
    assert json.loads(result.stdout)["violations"][0]["rule"] == "ledger"
