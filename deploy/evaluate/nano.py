"""`pipeline nano eval`: episodes of the synthetic room through the real pipeline, and how well nano did in them.

Rule: nothing here decides what nano says. The pipeline runs as by `pipeline up --speed max` with greedy decoding; this
reads what the run left (events, windows, WAVs) and holds it against what really happened in the room.
"""

from __future__ import annotations

import json
import sys
import tempfile
import wave
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from deploy.run.state import StateFolder
from deploy.run.up import UpOptions, run_up
from graph.chunk import NS_PER_S
from graph.errors import GraphError
from graph.sections import NANO
from graph.spec import parse_spec
from model_shards.errors import DependencyError
from model_shards.nano.listening import Spoken, WordErrors, count_errors, listen
from model_shards.nano.phrases import sentences
from model_shards.nano.recogniser import Recogniser
from model_shards.nano.score import Mistake, Score, Truth, score, summary
from model_shards.nano.synthetic import SyntheticRoom
from model_shards.nano.teacher import Teacher
from model_shards.nano.truth import truth_of
from model_shards.nano.world import Activity
from stages.catalog import CATALOG

EPISODE_S: Final = 60
GROUP: Final = 12
"""Cameras at once: each has a decoder process and a session."""
ACTIVITIES: Final[tuple[Activity, ...]] = ("calm", "busy", "quiet")
FIRST_SEED: Final = 900_000_000
"""Rooms in which nothing was ever tuned; none that `synthetic://` shows is one of the training's."""
NUM_SEEDS: Final = 100_000
MAX_EPISODES: Final = 1000
GREEDY: Final = ("stages.llm.decoding=greedy", "stages.tts.decoding=greedy")


class NanoError(GraphError):
    """There is no such evaluation; says which there are."""


@dataclass(frozen=True, slots=True)
class Ablation:
    """Something taken away from a trained model. settings: as by --set. fps, query: of the cameras."""

    about: str
    settings: tuple[str, ...] = ()
    fps: float = 1.0
    query: str = ""


WHOLE: Final = "whole"
EVERY: Final = "all"
ABLATIONS: Final = MappingProxyType(
    {
        WHOLE: Ablation("nothing taken away"),
        "tail-off": Ablation("a lead so long that it never binds", ("tail.lead=60s",)),
        "frames-late": Ablation("pictures one window late", query="&picture_delay=1"),
        "half-frames": Ablation("every second picture missing", fps=0.5),
        "audio-late": Ablation("sound one window late", query="&sound_delay=1"),
    }
)


@dataclass(frozen=True, slots=True)
class Episode:
    """One camera in a room of its own; its session has its name."""

    name: str
    seed: int
    activity: Activity

    def source(self, ablation: Ablation) -> str:
        return f"synthetic://room?seed={self.seed}&events={self.activity}&voices=evaluation{ablation.query}"

    def truth(self) -> Truth:
        """What the room's first minute really was like."""
        return truth_of(SyntheticRoom(self.seed, self.activity, "evaluation").episode(0), EPISODE_S)


@dataclass(frozen=True, slots=True)
class Result:
    """What a number of episodes gave."""

    scores: tuple[Score, ...]
    words: WordErrors
    unheard_max_s: float

    def measures(self) -> dict[str, object]:
        """The keys of `--json`."""
        results = summary(self.scores)
        by_kind = results.pop("by_kind")
        rates = {"wer": self.words.rate, "teacher_wer": self.words.teacher_rate}
        return {**results, **rates, "unheard_max_s": self.unheard_max_s, "by_kind": by_kind}


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """ablation: one of ABLATIONS, or "all". settings: further --set. out: a folder that keeps what the runs left."""

    seed: int = 0
    num_episodes: int = 12
    ablation: str = WHOLE
    as_json: bool = False
    settings: tuple[str, ...] = ()
    out: Path | None = None

    def __post_init__(self) -> None:
        """Raises NanoError for what there is not."""
        if self.ablation not in (*ABLATIONS, EVERY):
            raise NanoError(f"--ablation {self.ablation}: there are {', '.join(ABLATIONS)}, {EVERY}")
        if not (0 <= self.seed < NUM_SEEDS and 1 <= self.num_episodes <= MAX_EPISODES):
            raise NanoError(f"--seed is 0 to {NUM_SEEDS - 1}, --episodes 1 to {MAX_EPISODES}")


def run_eval(options: EvalOptions) -> None:
    """Measure, and print. Raises what `run_up` raises."""
    names = list(ABLATIONS) if options.ablation == EVERY else [options.ablation]
    episodes = plan(options.seed, options.num_episodes)
    with tempfile.TemporaryDirectory(prefix="omni-nano-") as scratch:
        folder = options.out or Path(scratch)
        results = {name: measure(episodes, ABLATIONS[name], options.settings, folder / name) for name in names}
    about = {"seed": options.seed, "episodes": options.num_episodes, "episode_s": EPISODE_S}
    if options.as_json:
        measured = {name: result.measures() for name, result in results.items()}
        print(json.dumps(about | (measured if len(names) > 1 else measured[names[0]]), indent=2))
        return
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(*report(results), sep="\n")


def plan(seed: int, num_episodes: int) -> list[Episode]:
    """Episodes which are calm, busy and quiet in turn."""
    first = FIRST_SEED + MAX_EPISODES * seed
    return [Episode(f"room{k}", first + k, ACTIVITIES[k % len(ACTIVITIES)]) for k in range(num_episodes)]


def measure(episodes: Sequence[Episode], ablation: Ablation, settings: Sequence[str], folder: Path) -> Result:
    """Run the episodes, some at a time, and judge them."""
    scores: list[Score] = []
    sounds: list[Spoken] = []
    unheard_s: list[float] = []
    for start in range(0, len(episodes), GROUP):
        group = episodes[start : start + GROUP]
        _tell(f"episodes {start + 1} to {start + len(group)} of {len(episodes)}, {ablation.about}")
        out = folder / f"from-{start}"
        _run(group, ablation, settings, out)
        for episode in group:
            spoken = listen(_rows(out / "events.jsonl", episode.name), _samples(out / f"{episode.name}.wav"))
            scores.append(score(episode.truth(), [one.utterance for one in spoken]))
            sounds += spoken
            unheard_s += [row["lead_s"] for row in _rows(out / "windows.jsonl", episode.name)]
    return Result(tuple(scores), _word_errors(sounds), max(unheard_s, default=0.0))


def _run(episodes: Iterable[Episode], ablation: Ablation, settings: Sequence[str], out: Path) -> None:
    """`pipeline up --speed max --for 60s --out …` over these rooms, with the defaults for all the rest."""
    cameras = {episode.name: {"source": episode.source(ablation), "fps": ablation.fps} for episode in episodes}
    config = {"version": 1, "model": NANO, "cameras": cameras, "console": {"listen": "127.0.0.1:0"}}
    spec = parse_spec(json.dumps(config), "nano eval", CATALOG, [*GREEDY, *ablation.settings, *settings])
    options = UpOptions(EPISODE_S * NS_PER_S, out, paced=False, state=StateFolder(Path.cwd() / "nano eval"))
    if run_up(spec, options, _tell).interrupted:
        raise KeyboardInterrupt  # half an episode can't be judged


def _word_errors(sounds: Sequence[Spoken]) -> WordErrors:
    """What an independent recogniser makes of it; who is not installed is told."""
    try:
        ear = Recogniser(sentences())
    except DependencyError as error:
        _tell(f"word errors are not measured: {error}")
        return WordErrors()
    try:
        teacher = Teacher()
    except DependencyError as error:
        _tell(f"the teacher's word errors are not measured: {error}")
        return count_errors(sounds, ear, None)
    return count_errors(sounds, ear, teacher)


# What is printed

_ROWS: Final = MappingProxyType(
    {
        "recall": ("events remarked", "%", ">= 95"),
        "precision": ("remarks that are true", "%", ">= 95"),
        "reaction_p95_s": ("event to first word heard, p95", "s", "<= 2.5"),
        "false_per_10min": ("false remarks in 10 quiet minutes", "", "<= 1"),
        "question_accuracy": ("questions answered right", "%", ">= 90"),
        "standing_honoured": ("standing requests honoured", "%", ">= 85"),
        "stop_obeyed": ("stop obeyed", "%", ">= 95"),
        "wer": ("words of speech heard wrong", "%", "<= 8"),
        "teacher_wer": ("the teacher's, of the same sentences", "%", ""),
        "unheard_max_s": ("most speech not yet heard", "s", "<= 2"),
    }
)


def report(results: Mapping[str, Result]) -> list[str]:
    """The measures and the dues, a column per ablation, and the mistakes of the first one."""
    first = next(iter(results.values()))
    return [*_measure_lines(results), *_kind_lines(results), *_mistake_lines(first.scores)]


def _measure_lines(results: Mapping[str, Result]) -> list[str]:
    """A row per measure, a column per ablation."""
    measured = [result.measures() for result in results.values()]
    rows = [["", "reach", *results]]
    for key, (label, unit, reach) in _ROWS.items():
        rows.append([label, f"{reach} {unit}".strip() if reach else "", *(_shown(one[key], unit) for one in measured)])
    return ["", *_aligned(rows)]


def _kind_lines(results: Mapping[str, Result]) -> list[str]:
    """How many of each kind of due were met."""
    wholes = [sum(result.scores, Score()) for result in results.values()]
    causes = sorted({cause for whole in wholes for cause in whole.totals})
    rows = [["said of due", "", *results]]
    rows += [[*cause, *(f"{w.hits.get(cause, 0)} of {w.totals.get(cause, 0)}" for w in wholes)] for cause in causes]
    return ["", *_aligned(rows)]


def _mistake_lines(scores: Iterable[Score], most: int = 40) -> list[str]:
    """What went wrong, the most frequent first."""
    counts = Counter(_cells_of(mistake) for one in scores for mistake in one.mistakes)
    rows = [["times", "kind", "what", "expected", "said instead"]]
    rows += [[str(count), *cells] for cells, count in counts.most_common(most)]
    return ["", *_aligned(rows)] if counts else []


def _cells_of(mistake: Mistake) -> tuple[str, str, str, str]:
    return mistake.kind, mistake.name, mistake.expected or "-", mistake.said or "-"


def _shown(value: object, unit: str) -> str:
    if not isinstance(value, float | int):
        return "-"
    return f"{100 * value:.1f} %" if unit == "%" else f"{value:.2f} {unit}".strip()


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


# What a run left


def _rows(path: Path, session: str) -> list[dict[str, Any]]:
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row["session"] == session]


def _samples(path: Path) -> npt.NDArray[np.float32]:
    """Nothing, where the checkpoint does not speak."""
    if not path.is_file():
        return np.zeros(0, np.float32)
    with wave.open(str(path), "rb") as file:
        pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return pcm.astype(np.float32) / np.float32(32767)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
