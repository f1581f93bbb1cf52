"""How well nano watched: what it said in an episode, held against what should have been said.

Rules:
- A sentence counts whole. It is true when a due that it fits is open in the window of its first word and has not been
  met before; of several the one that ends first is met. So one sentence meets one due, in the order of time.
- An answer that fits no open due, while a question is open, is a wrong answer to it, and uses it up. Everything else
  that fits nothing is a false remark. Precision is of remarks: wrong answers count among the questions.
- What "stop", or the end of the episode, cuts off is right as far as it goes: the due of which it is the beginning is
  then neither met nor missed.
- "stop" counts where there was something to stop. It is obeyed when no word of that sentence comes in a later window.
- A second is quiet when no due is open in its window and nothing has just been asked for.

Needs no torch; times are int nanoseconds of the session, windows count from 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import ceil
from typing import Final, Literal, get_args

from model_shards.nano.phrases import answers

Kind = Literal["scene", "sound", "standing", "question", "okay"]
"""scene, sound: remarks on what happened; standing: a promise kept; question: an answer; okay: a promise made."""

Cause = tuple[Kind, str]
"""Kind and name of a due."""

EVENT_KINDS: Final[tuple[Kind, ...]] = ("scene", "sound", "standing")
REQUESTED_KINDS: Final[tuple[Kind, ...]] = ("question", "okay")
NS_PER_S: Final = 1_000_000_000
_ANSWERS: Final = frozenset(answers())


@dataclass(frozen=True, slots=True)
class Due:
    """One sentence that should be said.

    name: of what caused it, a SceneEvent, Sound or Request. cause_ns: when that began, or, of a request, ended.
    sentences: any of them will do. half_right: true as well, but not what was asked for: a remark where a promise was
    to be kept. first_window, last_window: when its first word may come, both included.
    """

    kind: Kind
    name: str
    cause_ns: int
    sentences: tuple[str, ...]
    first_window: int
    last_window: int
    half_right: tuple[str, ...] = ()

    def is_open(self, window: int) -> bool:
        return self.first_window <= window <= self.last_window

    def begins_with(self, text: str) -> bool:
        return any(f"{sentence} ".startswith(f"{text} ") for sentence in (*self.sentences, *self.half_right))


@dataclass(frozen=True, slots=True)
class Truth:
    """An episode's dues in the order of their causes, and the windows in which somebody's "stop" ended.

    first_window: the first in which the session does not just listen. requests: windows in which any request ended.
    """

    dues: tuple[Due, ...]
    stops: tuple[int, ...]
    num_windows: int
    first_window: int = 0
    requests: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Utterance:
    """One turn. words: (window, words) of each unit that said any, in order, one at least.

    heard_ns: when its first word sounded; None: never. last_window: of its last unit. ended: nano closed the turn.
    """

    words: tuple[tuple[int, str], ...]
    heard_ns: int | None
    last_window: int
    ended: bool = True

    @property
    def text(self) -> str:
        return " ".join(" ".join(text for _, text in self.words).split())

    @property
    def first_window(self) -> int:
        return self.words[0][0]


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing that went wrong. expected "": nothing was to be said; said "": nothing was said."""

    kind: Kind | Literal["false", "stop"]
    name: str
    window: int
    expected: str
    said: str


@dataclass(frozen=True, slots=True)
class Score:
    """Counts that can be added up over episodes.

    hits, totals: of dues, by (kind, name). half_hits: promises of which a remark was made only.
    """

    hits: Mapping[Cause, int] = field(default_factory=dict)
    totals: Mapping[Cause, int] = field(default_factory=dict)
    half_hits: int = 0
    true_remarks: int = 0
    false_remarks: int = 0
    quiet_windows: int = 0
    quiet_false: int = 0
    stops: int = 0
    stops_obeyed: int = 0
    reactions_ns: tuple[int, ...] = ()
    mistakes: tuple[Mistake, ...] = ()

    def __add__(self, other: Score) -> Score:
        return Score(
            hits=Counter(self.hits) + Counter(other.hits),
            totals=Counter(self.totals) + Counter(other.totals),
            half_hits=self.half_hits + other.half_hits,
            true_remarks=self.true_remarks + other.true_remarks,
            false_remarks=self.false_remarks + other.false_remarks,
            quiet_windows=self.quiet_windows + other.quiet_windows,
            quiet_false=self.quiet_false + other.quiet_false,
            stops=self.stops + other.stops,
            stops_obeyed=self.stops_obeyed + other.stops_obeyed,
            reactions_ns=self.reactions_ns + other.reactions_ns,
            mistakes=self.mistakes + other.mistakes,
        )

    def hit(self, *kinds: Kind) -> int:
        return sum(count for (kind, _), count in self.hits.items() if kind in kinds)

    def total(self, *kinds: Kind) -> int:
        return sum(count for (kind, _), count in self.totals.items() if kind in kinds)


def score(truth: Truth, said: Sequence[Utterance]) -> Score:
    """Judge one episode. said: in the order of their first windows."""
    return _Judge(truth).judge(said)


def summary(scores: Iterable[Score]) -> dict[str, object]:
    """The measures of `pipeline nano eval --json`; None where there was nothing to measure."""
    whole = reduce(Score.__add__, scores, Score())
    events_hit = whole.hit(*EVENT_KINDS) + whole.half_hits
    return {
        "recall": _share(events_hit, whole.total(*EVENT_KINDS)),
        "precision": _share(whole.true_remarks, whole.true_remarks + whole.false_remarks),
        "reaction_p95_s": _percentile_s(whole.reactions_ns, 0.95),
        "false_per_10min": _share(600 * whole.quiet_false, whole.quiet_windows),
        "question_accuracy": _share(whole.hit("question"), whole.total("question")),
        "standing_honoured": _share(whole.hit("standing"), whole.total("standing")),
        "stop_obeyed": _share(whole.stops_obeyed, whole.stops),
        "by_kind": _by_kind(whole),
    }


class _Judge:
    """One episode: which dues are met, half met, used up by a wrong answer, or let go."""

    def __init__(self, truth: Truth) -> None:
        self._truth = truth
        self._open = list(truth.dues)
        self._met: list[tuple[Due, Utterance]] = []
        self._half_met: list[tuple[Due, Utterance]] = []
        self._wrong: list[tuple[Due, Utterance]] = []
        self._false: list[Utterance] = []
        self._stopped: list[tuple[int, Utterance]] = []

    def judge(self, said: Sequence[Utterance]) -> Score:
        for utterance in said:
            stop = self._stop_of(utterance)
            if stop is not None:
                self._stopped.append((stop, utterance))
            self._take(utterance, cut=stop is not None or not utterance.ended)
        return self._score()

    def _stop_of(self, utterance: Utterance) -> int | None:
        """The window of the "stop" that found this utterance under way, with something left to say."""
        is_whole = self._meets(utterance) is not None
        for window in self._truth.stops:
            nothing_left = is_whole and utterance.words[-1][0] < window
            if utterance.first_window < window <= utterance.last_window and not nothing_left:
                return window
        return None

    def _take(self, utterance: Utterance, *, cut: bool) -> None:
        text = utterance.text
        if due := self._meets(utterance):
            (self._met if text in due.sentences else self._half_met).append((due, utterance))
        elif cut and (due := self._first(utterance, lambda due: due.begins_with(text))):
            pass  # let go
        elif text in _ANSWERS and (due := self._first(utterance, lambda due: due.kind in REQUESTED_KINDS)):
            self._wrong.append((due, utterance))
        else:
            self._false.append(utterance)
            return
        self._open.remove(due)

    def _meets(self, utterance: Utterance) -> Due | None:
        text = utterance.text
        whole = self._first(utterance, lambda due: text in due.sentences)
        return whole or self._first(utterance, lambda due: text in due.half_right)

    def _first(self, utterance: Utterance, fits: Callable[[Due], bool]) -> Due | None:
        """Of the open dues that fit, the one that ends first."""
        matches = [due for due in self._open if due.is_open(utterance.first_window) and fits(due)]
        return min(matches, key=lambda due: due.last_window, default=None)

    def _score(self) -> Score:
        missed = [due for due in self._open if due.last_window < self._truth.num_windows]
        done = [due for due, _ in (*self._met, *self._half_met, *self._wrong)]
        remarks = [due for due, _ in (*self._met, *self._half_met) if due.kind in EVENT_KINDS]
        quiet = self._quiet_windows()
        return Score(
            hits=Counter((due.kind, due.name) for due, _ in self._met),
            totals=Counter((due.kind, due.name) for due in (*done, *missed)),
            half_hits=len(self._half_met),
            true_remarks=len(remarks),
            false_remarks=len(self._false),
            quiet_windows=len(quiet),
            quiet_false=sum(utterance.first_window in quiet for utterance in self._false),
            stops=len(self._stopped),
            stops_obeyed=sum(_obeyed(*stopped) for stopped in self._stopped),
            reactions_ns=tuple(
                utterance.heard_ns - due.cause_ns
                for due, utterance in (*self._met, *self._half_met)
                if due.kind in EVENT_KINDS and utterance.heard_ns is not None
            ),
            mistakes=tuple(sorted(self._mistakes(missed), key=lambda mistake: mistake.window)),
        )

    def _quiet_windows(self) -> frozenset[int]:
        truth = self._truth
        busy = {window for due in truth.dues for window in range(due.first_window, due.last_window + 1)}
        return frozenset(range(truth.first_window, truth.num_windows)) - busy - {*truth.requests, *truth.stops}

    def _mistakes(self, missed: Sequence[Due]) -> Iterator[Mistake]:
        """What was said while a missed due was open is taken as said instead of it, once."""
        instead = list(self._false)
        for due in missed:
            said = next((utterance for utterance in instead if due.is_open(utterance.first_window)), None)
            if said is not None:
                instead.remove(said)
            yield _mistake(due, said)
        yield from (_mistake(due, utterance) for due, utterance in (*self._half_met, *self._wrong))
        for utterance in instead:
            yield Mistake("false", "nothing", utterance.first_window, "", utterance.text)
        for window, utterance in self._stopped:
            if not _obeyed(window, utterance):
                yield Mistake("stop", "stop", window, "", utterance.text)


def _obeyed(stop: int, utterance: Utterance) -> bool:
    return utterance.words[-1][0] <= stop


def _mistake(due: Due, said: Utterance | None) -> Mistake:
    return Mistake(due.kind, due.name, due.first_window, due.sentences[0], said.text if said else "")


def _by_kind(score: Score) -> dict[str, dict[str, dict[str, int]]]:
    """{kind: {name: {said, due}}}, as the kinds stand in Kind."""
    table: dict[str, dict[str, dict[str, int]]] = {kind: {} for kind in get_args(Kind)}
    for (kind, name), total in sorted(score.totals.items()):
        table[kind][name] = {"said": score.hits.get((kind, name), 0), "due": total}
    return table


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _percentile_s(values_ns: Sequence[int], share: float) -> float | None:
    """The smallest value which so many of them don't pass."""
    if not values_ns:
        return None
    return sorted(values_ns)[ceil(share * len(values_ns)) - 1] / NS_PER_S
