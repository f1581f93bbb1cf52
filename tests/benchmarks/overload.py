"""Windows on time while the load goes from 1x to 2x and 4x and back, with the shedding ladder and without it.

The scenario `overload` of `pipeline simulate`, in virtual time: the real loops, edges and ladders, stages replaced by
their costs. A window is on time where it comes to its end within a window's length; windows from the first new session
on count for the higher load. Full quality: no session has a step of the ladder taken.

Options: OMNI_BENCH_SEEDS, how many (default: 3; each takes ten seconds).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from deploy.evaluate.bench import ROOT, BenchError, Row, command_of, more_is_better, option
from deploy.simulator.scenarios import LOADS, SCENARIOS
from deploy.simulator.simulate import Simulation
from graph.chunk import Scalar
from tests.support.specs import load_spec

NAME = "overload"
RIVAL = "the same without a ladder (shedding.ladder: [])"
SOUND = ("microphone.sound->audio_encoder.sound", "audio_encoder.audio->llm.audio")


def run() -> list[Row]:
    """A row per load, then how long it takes until all is as before, and what was shed of the sound."""
    seeds = range(int(option("SEEDS", "3")))
    ours, rival = ([_simulate(ladder, seed) for seed in seeds] for ladder in (None, "[]"))
    command = command_of(NAME)
    rows = [
        more_is_better(f"{load}: windows on time", _on_time(ours, load), "%", RIVAL, _on_time(rival, load), command)
        for load in LOADS
    ]
    restored_s, sound_shed = max(run.restored_s() for run in ours), sum(run.num_sound_shed for run in ours)
    return [
        *rows,
        Row("back to 1x: full quality after, at most", restored_s, "s", "", None, None, command),
        Row("chunks of sound that were shed", sound_shed, "chunks", "", None, None, command),
    ]


@dataclass(frozen=True, slots=True)
class Overloaded:
    """One seed. windows: when each came to its end, and what was told of it."""

    windows: list[tuple[float, Mapping[str, Scalar]]]
    num_sound_shed: int

    def restored_s(self) -> float:
        """From the end of the overload to the last window that lacked something."""
        begin_s, end_s = LOADS["1x again"]
        if any(window["level"] for at_s, window in self.windows if at_s >= end_s - 1):
            raise BenchError("at the end of the scenario some sessions have not come back to full quality")
        lacking = [at_s for at_s, window in self.windows if at_s >= begin_s and window["level"]]
        return max(lacking, default=begin_s) - begin_s


def _simulate(ladder: str | None, seed: int) -> Overloaded:
    spec = load_spec(ROOT / "pipeline.yaml", [] if ladder is None else [f"shedding.ladder={ladder}"])
    simulation = Simulation(spec, SCENARIOS["overload"], seed)
    simulation.run()
    # Without a ladder speech comes so late that some is given up behind the end, and a camera that comes is refused
    # until it finds room, so that it runs on when the scenario is over: which is what the ladder is for.
    excused = () if ladder is None else ("all is said", "no starvation", "ledger")
    if violations := [violation for violation in simulation.violations if violation.rule not in excused]:
        raise BenchError(f"what must hold does not: {violations[0]}")
    accounts = simulation.accounts()
    return Overloaded(list(simulation.windows()), sum(accounts[edge].dropped["shed"] for edge in SOUND))


def _on_time(runs: Iterable[Overloaded], load: str) -> float:
    begin_s, end_s = LOADS[load]
    on_time = [bool(window["on_time"]) for run in runs for at_s, window in run.windows if begin_s <= at_s < end_s]
    return 100 * sum(on_time) / len(on_time)
