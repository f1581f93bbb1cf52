"""What a window costs at each model stage, by how many sessions share a batch, beside one session at a time.

The real stages with the shipped model, in one process and one thread, in virtual time: n busy rooms are watched, each
batch that a stage is given is timed, and `fixed + n x each` is fitted to it. TTS and vocoder count who speaks, the
vision encoder pictures. Once more with cameras of up to four views: what each further picture costs the LLM. Where
there is no GPU, time of the CPU counts, so that others on the machine show least. How much is said is measured, too.
Rows: a unit's share of a batch of the largest size, beside a batch of one.

Options: OMNI_BENCH_SIZES, how many sessions (default: 1,2,4,8,16); OMNI_BENCH_WINDOWS, how many windows each (default:
20); OMNI_BENCH_PROFILE, a file to write the profile to, for `pipeline plan`; OMNI_BENCH_MODEL, a checkpoint (default:
nano; any other one is shown the same rooms).
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch

from deploy.actor.build import build_stage
from deploy.actor.plan import StagePlan, stage_plan
from deploy.evaluate.bench import ROOT, BenchError, Row, command_of, describe_machine, less_is_better, option
from deploy.run.checkpoints import open_checkpoint
from deploy.simulator.scenarios import Scenario
from deploy.simulator.simulate import Simulation
from deploy.simulator.sources import VirtualCamera, VirtualMicrophone
from deploy.simulator.world import Computer
from graph.chunk import NS_PER_MS, Chunk, SessionId
from graph.costs import Profile, Speaking, StageCost, fit, quantiles
from graph.credit import Limit
from graph.spec import PipelineSpec
from graph.tail import Ack
from graph.window import Unit
from model_shards.nano.synthetic import SyntheticRoom
from stages.kinds import SPEECH, TEXT
from stages.llm import Llm
from stages.session import Session
from stages.stage import Stage
from tests.support.specs import load_spec, model_stages

NAME = "stages"
SIZES = "1,2,4,8,16"
NUM_WINDOWS = "20"
MANY_VIEWS = 4
ROOM_FOR_VIEWS = Limit(4 * MANY_VIEWS)
NUM_WARM_UP = 2  # batches of each stage
RIVAL = "one session's window alone"


@dataclass(frozen=True, slots=True)
class Batch:
    """num_units: what a batch's cost grows with. num_pictures: that the LLM was given; elsewhere 0."""

    num_units: int
    num_pictures: int
    ns: int
    ages: tuple[int, ...] = ()  # of each of its windows, how many its session has had before
    num_tokens: int = 0  # of text, of the session that says most


Samples = dict[str, list[Batch]]
"""By stage, what was measured."""


def run() -> list[Row]:
    """A row per model stage."""
    profile, samples = measure(bool(path := option("PROFILE", "")))
    if path:
        Path(path).write_text(profile.as_json() + "\n", encoding="utf-8")
    return [_row(name, measured) for name, measured in samples.items()]


def measure(with_views: bool) -> tuple[Profile, Samples]:
    """with_views: what more pictures cost the LLM, too."""
    sizes = sorted(int(size) for size in option("SIZES", SIZES).split(","))
    model = option("MODEL", "nano")
    settings = [f"stages.{stage}.batch={sizes[-1]}" for stage in model_stages()]
    spec = load_spec(ROOT / "pipeline.yaml", [f"model={model}", *settings])
    checkpoint = open_checkpoint(spec, _tell)
    spec = checkpoint.fit(spec)
    samples: Samples = defaultdict(list)
    said = Said()
    for size in sizes:
        _tell(f"{size} sessions")
        scenario = Scenario("stages", "", size, int(option("WINDOWS", NUM_WINDOWS)), devices={"cpu": 16})
        watched = Watched(spec, scenario, checkpoint.path, said)
        for name, measured in watched.watch().items():
            samples[name] += measured
    costs = {name: _cost(measured) for name, measured in samples.items()}
    if with_views:
        _tell(f"{size} sessions of up to {MANY_VIEWS} views")
        views = dataclasses.replace(scenario, most_views=MANY_VIEWS, credit=ROOM_FOR_VIEWS)
        batches = Watched(spec, views, checkpoint.path, Said()).watch()
        costs = {
            name: dataclasses.replace(cost, picture_ns=_picture_ns(cost, batches[name])) for name, cost in costs.items()
        }
    return Profile(model, describe_machine(), psutil.cpu_count() or 1, costs, said.speaking()), samples


def _cost(batches: list[Batch]) -> StageCost:
    """Least squares for what a batch's age and text cost; what is left follows `fit`."""
    columns = np.array([(1, batch.num_units, sum(batch.ages), batch.num_tokens) for batch in batches], float)
    spent = np.array([batch.ns for batch in batches], float)
    used = [0, 1, 2, 3]
    while min(slopes := np.linalg.lstsq(columns[:, used], spent)[0][2:], default=0) < 0:  # nothing costs less than none
        used.remove(used[2 + int(np.argmin(slopes))])
    by_column = dict(zip(used[2:], map(round, slopes.tolist()), strict=True))
    cost = StageCost(0, 0, age_ns=by_column.get(2, 0), token_ns=by_column.get(3, 0), most_age=_oldest(batches))
    plain = fit([(batch.num_units, max(batch.ns - _more_ns(cost, batch), 1)) for batch in batches])
    cost = dataclasses.replace(cost, fixed_ns=plain.fixed_ns, each_ns=plain.each_ns, spread=plain.spread)
    ratios = [batch.ns / (cost.batch_ns(batch.num_units) + _more_ns(cost, batch)) for batch in batches]
    return dataclasses.replace(cost, ratios=quantiles(ratios))


def _oldest(batches: list[Batch]) -> int:
    return max(max(batch.ages) for batch in batches)


def _more_ns(cost: StageCost, batch: Batch) -> int:
    """Of a batch, for its age and its text."""
    return cost.aged_ns(batch.ages) + batch.num_tokens * cost.token_ns


def _picture_ns(cost: StageCost, batches: list[Batch]) -> int:
    """What each picture of a window beyond the first costs: what batches with such take more than those without."""
    more = [(batch, batch.num_pictures - batch.num_units) for batch in batches]
    shares = [
        (batch.ns - cost.batch_ns(batch.num_units) - _more_ns(cost, batch)) / num_more
        for batch, num_more in more
        if num_more > 0
    ]
    return max(round(median(shares)), 0) if shares else 0


def _row(name: str, batches: list[Batch]) -> Row:
    samples = [(batch.num_units, batch.ns) for batch in batches]
    most = max(size for size, _ in samples)
    alone, together = (
        median([ns for size, ns in samples if size == n]) / n / NS_PER_MS for n in (_least(samples), most)
    )
    label = f"{name}: a unit's share of a batch of {most}"
    return less_is_better(label, together, "ms", RIVAL, alone, command_of(NAME))


def _least(samples: list[tuple[int, int]]) -> int:
    return min(size for size, _ in samples)


@dataclass(slots=True)
class Said:
    """What was said: windows of all sessions, those in which something was, turns, tokens, and the speech of it."""

    num_windows: int = 0
    num_spoken: int = 0
    num_turns: int = 0
    num_tokens: int = 0
    speech_ns: int = 0

    def add(self, units: list[Unit], made: list[Chunk], stage: Stage) -> None:
        self.num_windows += len(units) if isinstance(stage, Llm) else 0
        for chunk in made:
            if chunk.stream == SPEECH.name:
                self.speech_ns += chunk.duration_ns
            elif chunk.stream == TEXT.name:
                self.num_spoken += 1
                self.num_turns += TEXT.read(chunk).turn_start
                self.num_tokens += len(chunk.arrays["token_ids"])

    def speaking(self) -> Speaking:
        num_silent = max(self.num_windows - self.num_spoken + self.num_turns, 1)
        num_turns, num_tokens = max(self.num_turns, 1), max(self.num_tokens, 1)
        return Speaking(
            begins=self.num_turns / num_silent,
            windows=self.num_spoken / num_turns,
            tokens=self.num_tokens / max(self.num_spoken, 1),
            token_ns=round(self.speech_ns / num_tokens),
        )


class Watched(Simulation):
    """Rooms that real stages watch."""

    def __init__(self, spec: PipelineSpec, scenario: Scenario, checkpoint: Path, said: Said | None = None) -> None:
        """said: what is said is added to it."""
        self.prepare(checkpoint, said)
        super().__init__(spec, scenario, seed=0)

    def prepare(self, checkpoint: Path, said: Said | None = None) -> None:
        """Before stages are made."""
        self._checkpoint, self._said = checkpoint, said or Said()
        self._rooms: dict[SessionId, SyntheticRoom] = {}
        self._timed: dict[str, Timed] = {}

    def watch(self, num_warm_up: int = NUM_WARM_UP) -> Mapping[str, list[Batch]]:
        """What each batch took, without the first ones."""
        self.run()
        if self.violations:
            raise BenchError(f"what must hold does not: {self.violations[0]}")
        return {name: stage.samples[num_warm_up:] for name, stage in self._timed.items()}

    def make_stage(self, name: str) -> Stage:
        if name == "camera":
            return VirtualCamera(self._rng, {}, lambda session, at_ns: self._room(session).picture(at_ns), delay_ns=0)
        if name == "microphone":
            return VirtualMicrophone(lambda session, start, end: self._room(session).samples(start, end))
        if name not in model_stages():
            return super().make_stage(name)
        stage = build_stage(name, self._plan(name), self._checkpoint, {})
        counts_made = name in ("vision_encoder", "tts", "vocoder")
        self._timed[name] = Timed(stage, next(iter(self._devices.values())), self._said, counts_made)
        return self._timed[name]

    def _plan(self, name: str) -> StagePlan:
        return stage_plan(self.spec.types[name].use, self.spec.stages[name])

    def _room(self, session: SessionId) -> SyntheticRoom:
        if session not in self._rooms:
            self._rooms[session] = SyntheticRoom(seed=len(self._rooms), activity="busy")
        return self._rooms[session]


class Timed(Stage):
    """A stage whose batches are timed; virtual time moves on by what they take."""

    def __init__(self, stage: Stage, device: Computer, said: Said, counts_made: bool) -> None:
        """counts_made: its work is what it makes, not what it is given."""
        self._stage, self.device, self._said, self._counts_made = stage, device, said, counts_made
        self._now_ns = time.perf_counter_ns if torch.cuda.is_available() else time.thread_time_ns
        self._takes_pictures = isinstance(stage, Llm)
        self.paced_by_listener = stage.paced_by_listener  # type: ignore[misc]  # as the one within
        self.samples: list[Batch] = []

    def open_session(self, session: Session) -> None:
        self._stage.open_session(session)

    def close_session(self, session: SessionId) -> None:
        self._stage.close_session(session)

    def interrupt(self, session: SessionId, ack: Ack) -> list[Chunk]:
        return self._stage.interrupt(session, ack)

    def is_idle(self, unit: Unit) -> bool:
        return self._stage.is_idle(unit)

    def may_hold(self, unit: Unit) -> bool:
        return self._stage.may_hold(unit)

    def process(self, units: list[Unit]) -> list[Chunk]:
        begin_ns = self._now_ns()
        made = self._stage.process(units)
        spent_ns = self._now_ns() - begin_ns
        self._said.add(units, made, self._stage)
        num_items = len(made) if self._counts_made else len(units)
        if num_items:
            num_pictures = sum(len(unit.of(Llm.image)) for unit in units) if self._takes_pictures else 0
            ages = tuple(unit.index for unit in units)
            said = [len(chunk.arrays["token_ids"]) for chunk in made if chunk.stream == TEXT.name]
            self.samples.append(Batch(num_items, num_pictures, spent_ns, ages, max(said, default=0)))
        self.device.work(spent_ns)
        return made


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
