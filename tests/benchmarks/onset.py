"""How soon a turn is heard after its window has closed, and how often it breaks: simulated, with what stages cost.

The pipeline in virtual time (`pipeline simulate`), where stages cost what a profile in profiles/ says: `h200`, the full
model on one GPU that does one thing at a time, which is assumed from published numbers; and `two-cores`, nano. Beside
it `before`: two phases, nothing held for the deadline of the ear, the same playout delay for each turn; and `fifo`, one
session at a time in each model stage. An underrun is a break inside a turn, be it a millisecond; how long they are all
together is told with it. First audio: from a window's end until its speech begins, where nothing was being heard; the
silence that the model puts in front of a short first second is not counted.

Then what each part brings by itself, where it brings most.

Options: OMNI_BENCH_SESSIONS, the numbers of sessions (default: 16,32,64 and 16,24,32,40); OMNI_BENCH_WINDOWS, of each
session (default: 40); OMNI_BENCH_SEEDS, how many (default: 1).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from deploy.evaluate.bench import FOLDER, ROOT, BenchError, Row, command_of, less_is_better, more_is_better, option
from deploy.simulator.figures import Figures
from deploy.simulator.scenarios import Scenario
from deploy.simulator.simulate import Simulation
from graph.chunk import NS_PER_S, Chunk
from graph.costs import read_profile
from graph.spec import PipelineSpec
from graph.window import Unit
from stages.catalog import stage_class
from stages.kinds import SPEECH
from stages.speaker import Speaker, _Open
from stages.stage import Stage
from tests.support.specs import load_spec, model_stages

NAME = "onset"
BEFORE = "before: two phases, nothing held, the same playout delay for all turns"
FIFO = "fifo: one session at a time in each model stage (batch: 1, wait: 0s)"
UNHELD = [f"stages.{stage}.hold=0s" for stage in model_stages()]
UNBATCHED = [f"stages.{stage}.{setting}" for stage in model_stages() for setting in ("batch=1", "wait=0s", "hold=0s")]
SHARES = {"25 %": 0.05, "50 %": 1 / 6}
"""Of the windows that are spoken: how likely a silent one begins a turn."""


@dataclass(frozen=True, slots=True)
class Machine:
    """num_at_once: stages that compute side by side. token_ns: a decode step of the LLM that no profile has."""

    name: str
    num_at_once: int
    token_ns: int
    sessions: str
    settings: list[str]


H200 = Machine("h200", 1, 4_500_000, "16,32,64", [f"stages.{stage}.gpus=0.2" for stage in model_stages()])
MACHINES = (H200, Machine("two-cores", 2, 0, "16,24,32,40", []))


def run() -> list[Row]:
    """For each machine, number of sessions and share of speech the listener's rows; then what the parts bring."""
    rows: list[Row] = []
    for machine in MACHINES:
        for count in map(int, option("SESSIONS", machine.sessions).split(",")):
            for share, talks in SHARES.items():
                _tell(f"{machine.name}: {count} sessions, {share} spoken")
                measure = partial(_measure, machine, count, talks)
                before = measure([*UNHELD, "window.phases=2"], is_fixed=True)
                name = f"{machine.name}, {count} sessions, {share} spoken"
                rows += _rows(name, measure([]), before, measure(UNBATCHED, is_fixed=True))
    return [*rows, *_parts()]


def _rows(name: str, ours: Measured, before: Measured, fifo: Measured) -> Iterator[Row]:
    command = command_of(NAME)
    for rival, other in ((BEFORE, before), (FIFO, fifo)):
        less = partial(less_is_better, rival=rival, command=command)
        yield less(f"{name}: underruns per spoken minute", ours.underruns, "", rival_value=other.underruns)
        yield less(f"{name}: broken off per spoken minute", ours.stalled_ms, "ms", rival_value=other.stalled_ms)
        for q in (50, 95, 99):
            yield less(f"{name}: first audio p{q}", ours.onset_ms(q), "ms", rival_value=other.onset_ms(q))
        yield more_is_better(f"{name}: windows on time", ours.on_time, "%", rival, other.on_time, command)
    for stage in ("tts", "vocoder"):
        sizes = [each.figures.mean_batch(stage) for each in (ours, before)]
        yield more_is_better(f"{name}: mean batch of {stage}", sizes[0], "units", BEFORE, sizes[1], command)


def _parts() -> list[Row]:
    """Each part beside the same without it."""
    command, some, many = command_of(NAME), SHARES["50 %"], SHARES["25 %"]
    _tell("what the parts bring")
    phases = [_measure(H200, 64, some, [f"window.phases={n}"]) for n in ("null", "2")]
    delays = [_measure(H200, 64, some, ["window.phases=2"], is_fixed=fixed) for fixed in (False, True)]
    spread = ["window.phases=8", "tail.delay=600ms"]
    holds = [_measure(H200, 24, some, [*spread, *settings]) for settings in ([], UNHELD)]
    batches = [_measure(H200, 96, many, [f"stages.{s}.batch={n}" for s in model_stages()]) for n in (32, 16)]
    late = [each.latency_ms(99) for each in phases]
    breaks = [each.underruns for each in delays]
    busy, sizes = ([of(each) for each in holds] for of in (_busy, _vocoder_batch))
    kept = [each.on_time for each in batches]
    return [
        less_is_better("h200, 64 sessions: latency p99, four phases", late[0], "ms", "two", late[1], command),
        less_is_better(
            "… in two phases: underruns per spoken minute, late turns delayed", breaks[0], "", "not", breaks[1], command
        ),
        more_is_better(
            "h200, 24 in eight phases, delay 600 ms: batch of vocoder, held", sizes[0], "", "not", sizes[1], command
        ),
        less_is_better("… the GPU is busy", busy[0], "%", "not", busy[1], command),
        more_is_better("h200, 96 sessions: on time, batches of 32", kept[0], "%", "of 16", kept[1], command),
    ]


def _busy(measured: Measured) -> float:
    return measured.busy


def _vocoder_batch(measured: Measured) -> float:
    return measured.figures.mean_batch("vocoder")


@dataclass(slots=True)
class Measured:
    """Some seeds. onsets_s: of turns before which nothing was being heard. busy: the device, percent."""

    figures: Figures = field(default_factory=Figures)
    onsets_s: list[float] = field(default_factory=list)
    busy: float = 0.0

    @property
    def underruns(self) -> float:
        return 60 * self.figures.num_underruns / max(self.figures.spoken_s, 1.0)

    @property
    def stalled_ms(self) -> float:
        return 60_000 * self.figures.stalled_s / max(self.figures.spoken_s, 1.0)

    @property
    def on_time(self) -> float:
        return 100 * (1 - self.figures.num_late / self.figures.num_windows)

    def onset_ms(self, q: int) -> float:
        return 1000 * float(np.percentile(self.onsets_s or [0.0], q))

    def latency_ms(self, q: int) -> float:
        return 1000 * float(np.percentile(self.figures.latencies_s, q))


def _measure(
    machine: Machine, num_sessions: int, talks: float, settings: Sequence[str], *, is_fixed: bool = False
) -> Measured:
    """is_fixed: each turn has the playout delay that is described. Raises BenchError where what must hold does not."""
    spec = load_spec(ROOT / "pipeline.yaml", ["shedding.ladder=[]", *machine.settings, *settings])
    num_windows, devices = int(option("WINDOWS", "40")), {"one": machine.num_at_once}
    scenario = Scenario(NAME, "", num_sessions, num_windows, devices=devices, talks=talks)
    priced = scenario.priced(read_profile(FOLDER / "profiles" / f"{machine.name}.json"), spec)
    priced = replace(priced, token_ns=machine.token_ns)
    measured = Measured()
    for seed in range(int(option("SEEDS", "1"))):
        heard = Heard(spec, priced, seed, FixedDelay if is_fixed else Onsets)
        heard.run()
        # Who is far too slow is late with its end as well; that is what is measured.
        if violations := [each for each in heard.violations if each.rule not in ("all is said", "no starvation")]:
            raise BenchError(f"what must hold does not: {violations[0]}")
        measured.figures.add(heard.figures)
        measured.onsets_s += heard.onsets_s
        measured.busy = 100 * heard.busy_ns / (num_windows * spec.window.length_ns * machine.num_at_once)
    return measured


class Heard(Simulation):
    """A seed of which it is known when turns are heard."""

    def __init__(self, spec: PipelineSpec, scenario: Scenario, seed: int, speaker: Callable[[], Onsets]) -> None:
        self._speaker, self._speakers = speaker, list[Onsets]()
        super().__init__(spec, scenario, seed)

    def make_stage(self, name: str) -> Stage:
        if stage_class(self.spec.types[name].use) is not Speaker:
            return super().make_stage(name)
        self._speakers.append(self._speaker())
        return self._speakers[-1]

    @property
    def onsets_s(self) -> list[float]:
        return [onset_s for speaker in self._speakers for onset_s in speaker.onsets_s]

    @property
    def busy_ns(self) -> int:
        return sum(device.busy_ns for device in self._devices.values())


class Onsets(Speaker):
    """Notes when turns begin, after their windows' ends."""

    def __init__(self) -> None:
        super().__init__()
        self.onsets_s: list[float] = []

    def _receive(self, state: _Open, chunk: Chunk, unit: Unit) -> list[Chunk]:
        was_quiet = not state.player.unheard_ns
        made = super()._receive(state, chunk, unit)
        if was_quiet and SPEECH.read(chunk).turn_start:
            begin_ns = state.player.last_end_ns - chunk.duration_ns
            self.onsets_s.append((begin_ns - unit.end_ns) / NS_PER_S)
        return made


class FixedDelay(Onsets):
    """Delays no turn for others that came late."""

    most_delay = 0.0


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
