"""Windows that the simulator runs through in a CPU-second, and the calls that one takes, beside another checkout of it.

The simulator runs the loops, joins and edges that ship, so this is what a window costs in Python, without what stages
compute. Ours and the other one's are measured in turns, each in a process of its own; the best turn of each counts, in
time of the CPU, so that others on the machine show least. Calls are those of Python functions.

Options: OMNI_BENCH_BASE, the folder of the other checkout (default: none); OMNI_BENCH_TURNS (default: 3);
OMNI_BENCH_SESSIONS and OMNI_BENCH_WINDOWS, of the steady scenario (default: 16 and 30); OMNI_BENCH_SEEDS, how many
squalls (default: 20).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from deploy.evaluate.bench import ROOT, BenchError, Row, command_of, less_is_better, more_is_better, option
from deploy.simulator.scenarios import SCENARIOS, Scenario
from deploy.simulator.simulate import Simulation
from graph.spec import PipelineSpec
from tests.support.specs import load_spec

NAME = "simulate"
TURN_TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one scenario."""

    windows_per_s: float
    calls_per_window: float


def run() -> list[Row]:
    """Two rows per scenario."""
    base = option("BASE", "")
    ours, theirs = list[Mapping[str, Speed]](), list[Mapping[str, Speed]]()
    for turn in range(int(option("TURNS", "3"))):
        print(f"turn {turn + 1}", file=sys.stderr, flush=True)
        ours.append(_turn_in(ROOT))
        theirs += [_turn_in(Path(base))] if base else []
    best_of = {name: _best([turn[name] for turn in ours]) for name in ours[0]}
    return [row for name, best in best_of.items() for row in _rows(name, best, [turn[name] for turn in theirs], base)]


def _rows(name: str, best: Speed, theirs: list[Speed], base: str) -> list[Row]:
    speed, calls, command = f"{name}: windows per CPU-second", f"{name}: calls per window", command_of(NAME)
    if not theirs:
        return [
            Row(speed, best.windows_per_s, "windows", "", None, None, command),
            Row(calls, best.calls_per_window, "calls", "", None, None, command),
        ]
    rival, other = f"the checkout in {base}", _best(theirs)
    return [
        more_is_better(speed, best.windows_per_s, "windows", rival, other.windows_per_s, command),
        less_is_better(calls, best.calls_per_window, "calls", rival, other.calls_per_window, command),
    ]


def _best(turns: list[Speed]) -> Speed:
    return max(turns, key=lambda turn: turn.windows_per_s)


# ---- one turn, in a process of its own -------------------------------------------------------------------------------


def _turn_in(root: Path) -> Mapping[str, Speed]:
    """Raises BenchError where the folder is no checkout that has what is measured."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-P", __file__]  # -P: a module beside this one has the name of a package
    turn = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, timeout=TURN_TIMEOUT_S)
    if turn.returncode:
        raise BenchError(f"{root}: its simulator could not be measured; what it said stands above")
    return {name: Speed(**speed) for name, speed in json.loads(turn.stdout).items()}


def _measure() -> dict[str, Speed]:
    spec = load_spec(Path("pipeline.yaml"))
    num_sessions, num_windows = int(option("SESSIONS", "16")), int(option("WINDOWS", "30"))
    steady = SCENARIOS["steady"].sized(num_sessions, num_windows)
    return {
        "steady": _speed(spec, steady, 1),
        "squall": _speed(spec, SCENARIOS["squall"], int(option("SEEDS", "20"))),
    }


def _speed(spec: PipelineSpec, scenario: Scenario, num_seeds: int) -> Speed:
    calls = Calls()
    sys.setprofile(calls.count)
    num_windows = _windows(spec, scenario, num_seeds)  # and all is warm
    sys.setprofile(None)
    begin_s = time.process_time()
    _windows(spec, scenario, num_seeds)
    return Speed(num_windows / (time.process_time() - begin_s), calls.num / num_windows)


def _windows(spec: PipelineSpec, scenario: Scenario, num_seeds: int) -> int:
    """How many came to their end."""
    simulations = [Simulation(spec, scenario, seed) for seed in range(num_seeds)]
    for simulation in simulations:
        simulation.run()
    return sum(simulation.figures.num_windows for simulation in simulations)


class Calls:
    """Counts calls of Python functions."""

    def __init__(self) -> None:
        self.num = 0

    def count(self, frame: FrameType, event: str, argument: object) -> None:
        self.num += event == "call"


if __name__ == "__main__":
    print(json.dumps({name: asdict(speed) for name, speed in _measure().items()}))
