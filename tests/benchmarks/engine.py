"""What a window of a session costs where 32 sessions share each batch, beside each of them alone; and the scheduler.

The same rooms are watched twice by the real stages, in one process and one thread, in virtual time: once in batches
over all sessions, once with a batch for each. The scheduler is what the actor's loop takes beside the stage's own work:
receive, join, gather, account and send, in the simulated pipeline with stages that cost nothing.

Options: OMNI_BENCH_BATCHED, how many sessions share a batch (default: 32); OMNI_BENCH_WINDOWS, how many windows each
(default: 20); OMNI_BENCH_SCHEDULED, how many sessions the scheduler has (default: 256); OMNI_BENCH_MODEL, a checkpoint
(default: nano).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from deploy.evaluate.bench import FOLDER, ROOT, Row, command_of, find_benchmarks, less_is_better, option
from deploy.run.checkpoints import open_checkpoint
from deploy.simulator.scenarios import SCENARIOS, Scenario
from deploy.simulator.simulate import Simulation
from graph.chunk import NS_PER_MS
from graph.costs import StageCost
from tests.support.specs import load_spec, model_stages

NAME = "engine"
RIVAL = "each of them alone (batch: 1)"
STAGE = "llm"  # where most messages meet
NUM_WINDOWS = 6  # of each session, for the scheduler


def run() -> list[Row]:
    """A row per stage and one for all of them, then two of the scheduler."""
    num_sessions = int(option("BATCHED", "32"))
    together, alone = _work(num_sessions, num_sessions), _work(num_sessions, 1)
    name, command = f"of {num_sessions} sessions, work per window", command_of(NAME)
    rows = [
        less_is_better(f"{stage}: {name}", together[stage], "ms", RIVAL, alone[stage], command) for stage in together
    ]
    whole = less_is_better(f"all stages: {name}", sum(together.values()), "ms", RIVAL, sum(alone.values()), command)
    return [*rows, whole, *_scheduler(int(option("SCHEDULED", "256")))]


def _work(num_sessions: int, batch: int) -> Mapping[str, float]:
    """ms of each stage per session and window."""
    model, num_windows = option("MODEL", "nano"), int(option("WINDOWS", "20"))
    print(f"{num_sessions} sessions, batches of {batch}", file=sys.stderr, flush=True)
    settings = [f"stages.{stage}.batch={batch}" for stage in model_stages()]
    spec = load_spec(ROOT / "pipeline.yaml", [f"model={model}", "shedding.ladder=[]", *settings])
    checkpoint = open_checkpoint(spec, lambda line: None)
    watched: type[Any] = find_benchmarks(FOLDER)["stages"].Watched
    scenario = Scenario("engine", "", num_sessions, num_windows, devices={"cpu": 16})
    samples = watched(checkpoint.fit(spec), scenario, checkpoint.path).watch(num_warm_up=0)
    windows = num_sessions * num_windows
    return {stage: sum(batch.ns for batch in samples[stage]) / NS_PER_MS / windows for stage in model_stages()}


def _scheduler(num_sessions: int) -> list[Row]:
    nothing = {name: StageCost(0, 0) for name in model_stages()}
    scenario = replace(
        SCENARIOS["steady"], num_sessions=num_sessions, num_windows=NUM_WINDOWS, costs=nothing, token_ns=0
    )
    simulation = Simulation(load_spec(ROOT / "pipeline.yaml"), scenario, 0)
    clock = Stopwatch()
    (actor,) = (actor for actor in simulation.actors.values() if STAGE in actor.runners)
    loop, stage = actor.loop, actor.runners[STAGE].stage
    loop.turn = clock.adds(loop.turn)  # type: ignore[method-assign]
    loop.due_in_ns = clock.adds(loop.due_in_ns)  # type: ignore[method-assign]
    stage.process = clock.takes(stage.process)  # type: ignore[method-assign]
    simulation.run()
    name, command = f"scheduler of {STAGE} with {num_sessions} sessions", command_of(NAME)
    per_unit_us = clock.spent_s / simulation.figures.num_windows * 1e6
    return [
        Row(f"{name}, per batch", clock.spent_s / clock.num_batches * 1e3, "ms", "", None, None, command),
        Row(f"{name}, per unit", per_unit_us, "us", "", None, None, command),
    ]


class Stopwatch:
    """Adds up what some calls take of the CPU, without what others take inside them."""

    def __init__(self) -> None:
        self.spent_s = 0.0
        self.num_batches = 0

    def adds(self, call: Callable[..., Any]) -> Callable[..., Any]:
        return self._timed(call, 1)

    def takes(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self.num_batches += 1
            return timed(*args)

        timed = self._timed(call, -1)
        return counted

    def _timed(self, call: Callable[..., Any], sign: int) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begin_s = time.process_time()
            try:
                return call(*args)
            finally:
                self.spent_s += sign * (time.process_time() - begin_s)

        return timed
