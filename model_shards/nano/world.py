"""What happens in a watched room: episodes, planned from a seed, and their truth.

Rule: everything is placed so that it can be known in its window. Window k is the second from k on; its picture is the
one at k + 0.8 s. What is seen happens early enough for that picture, sounds are well inside their second, requests end
well inside theirs. Needs neither torch nor numpy.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from typing import Final, Literal, TypeAlias, TypeVar, get_args

from model_shards.nano.oracle import BREAK_OFF, NUM_SILENT, Kind, Oracle, Utterance, Window, answer
from model_shards.nano.phrases import AWAITED, PERSON_EVENTS, REQUESTS, SOUNDS, Request, SceneEvent, Sound
from model_shards.nano.scene import Change, Scene, apply, changes_between, possible_changes, random_scene

NS_PER_S: Final = 1_000_000_000
NS_PER_MS: Final = 1_000_000
WINDOW_NS: Final = NS_PER_S
PICTURE_NS: Final = 800 * NS_PER_MS  # after the window's start
UNSEEN: Final = 900_000_000  # seeds from here on are never trained on

SCENE_SPAN_MS: Final = (50, 650)  # after a window's start
SOUND_SPAN_MS: Final = (50, 450)
REQUEST_END_SPAN_MS: Final = (350, 800)
EFFECT_NS: Final = 1200 * NS_PER_MS  # the longest sound effect
HUSH_NS: Final = 200 * NS_PER_MS  # between any two things to hear
NUM_LAST: Final = 5  # windows at the end in which nothing happens, so that all can be told

Activity = Literal["quiet", "calm", "busy"]
ACTIVITIES: Final = get_args(Activity)
Happens: TypeAlias = SceneEvent | Sound | Request
DurationOf: TypeAlias = Callable[[Request, int], int]
"""How long the clip of a request is, in ns, by its clip's seed: `sounds.Bank.duration_ns`."""
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Happening:
    """start_ns: when it is first seen or heard; end_ns: of the clip of a request, else start_ns.

    change: of a scene event. clip_seed: of what is heard.
    """

    kind: Happens
    start_ns: int
    end_ns: int
    clip_seed: int = 0
    change: Change | None = None


@dataclass(frozen=True)
class Episode:
    """`happenings` in the order of their start. The room's look and sound are drawn from the seed too."""

    seed: int
    duration_ns: int
    opening: Scene
    happenings: tuple[Happening, ...]

    @cached_property
    def _scenes(self) -> tuple[list[int], list[Scene]]:
        """Start of each scene, and the scenes."""
        starts, scenes = [0], [self.opening]
        for happening in self.happenings:
            if happening.change is not None:
                starts.append(happening.start_ns)
                scenes.append(apply(scenes[-1], happening.change))
        return starts, scenes

    def scene_at(self, t_ns: int) -> Scene:
        starts, scenes = self._scenes
        return scenes[max(0, bisect_right(starts, t_ns) - 1)]

    @property
    def num_windows(self) -> int:
        return self.duration_ns // WINDOW_NS

    def windows(self) -> list[Window]:
        """What can be known in each whole window; the first picture is what the others are compared with."""
        heard: dict[int, list[Happening]] = {}
        for happening in self.happenings:
            if happening.change is None:
                heard.setdefault(happening.end_ns // WINDOW_NS, []).append(happening)
        before = self.scene_at(PICTURE_NS)
        windows = []
        for index in range(self.num_windows):
            scene = self.scene_at(index * WINDOW_NS + PICTURE_NS)
            kinds = [happening.kind for happening in heard.get(index, ())]
            windows.append(
                Window(
                    index,
                    scene,
                    changes=() if scene is before else tuple(changes_between(before, scene)),
                    sounds=tuple(sound for sound in SOUNDS if sound in kinds),
                    requests=tuple(request for kind in kinds if (request := _request(kind)) is not None),
                )
            )
            before = scene
        return windows


@dataclass(frozen=True, slots=True)
class Mix:
    """How often what is placed, relative to each other, and how a session goes.

    stop: in how many windows of speech somebody says "stop". idle_stop: part of the requests which are a "stop" in
    silence. heard_later: after how many sounds it is asked what was heard. decoy: how often something else comes before
    what is awaited. twin: how often two things happen in one window; rush: in how many windows something may happen
    though there is more than one unit still to be spoken, so that it is told late. standing: how often requests are
    standing ones, and events are of people, relative to what is usual. fullness: of the room at the start.
    """

    scene: float = 0.55
    sound: float = 0.15
    request: float = 0.3
    stop: float = 0.06
    idle_stop: float = 0.08
    heard_later: float = 0.25
    decoy: float = 0.5
    twin: float = 0.02
    rush: float = 0.04
    standing: float = 1.0
    people: float = 1.0
    fullness: float = 0.35


SIMPLE: Final = Mix(scene=0.75, sound=0.25, request=0.0, stop=0.0, idle_stop=0.0, heard_later=0.0, twin=0.0)
"""Nobody says anything: for the beginning of a training."""

_EVENT_WEIGHTS: Final[dict[SceneEvent, float]] = {
    "person_in": 3.0, "person_out": 2.5, "person_fell": 1.5, "person_up": 3.0,
    "dog_in": 1.5, "dog_out": 1.8, "cat_in": 1.5, "cat_out": 1.8, "parcel_put": 1.2, "parcel_taken": 1.5,
    "car_in": 1.2, "car_out": 2.0, "fire_on": 1.0, "fire_out": 1.5, "light_off": 0.8, "light_on": 3.0,
    "lens_covered": 0.6, "lens_clear": 3.0, "door_opened": 1.3, "door_closed": 1.5,
}  # fmt: skip
_QUESTION_WEIGHTS: Final[dict[Request, float]] = {
    "what_see": 2.0, "how_many": 1.5, "door_open": 1.5, "what_heard": 1.2, "where_dog": 1.3, "where_cat": 1.3,
    "await_dog": 1.6, "await_cat": 1.6, "await_person": 1.6,
}  # fmt: skip
_SIGHT: Final[frozenset[Request]] = frozenset({"how_many", "door_open", "where_dog", "where_cat"})
_AWAITED_EVENT: Final[dict[Request, SceneEvent]] = {
    "await_dog": "dog_in", "await_cat": "cat_in", "await_person": "person_in",
}  # fmt: skip
_LONGEST_IDLE: Final = 1 << 30


def plan_episode(
    seed: int,
    duration_ns: int,
    activity: Activity,
    duration_of: DurationOf,
    mix: Mix | None = None,
    opening: Scene | None = None,
) -> Episode:
    """An episode in which everything is told in time if nano is good.

    activity: "quiet": nothing happens; "calm": something each 6 to 15 s; "busy": half of the windows have speech.
    opening: the scene to begin with; by default any.
    """
    rng = Random(f"{seed} {activity}")
    mix = mix or Mix()
    if opening is None:
        opening = random_scene(rng, mix.fullness)
    return _Planner(seed, duration_ns, activity, duration_of, mix, opening, rng).plan()


@dataclass(order=True, slots=True)
class _Due:
    """Something which is to happen from a window on, as soon as it is possible."""

    window: int
    kind: Happens = field(compare=False)


class _Planner:
    """Goes through the windows with an oracle beside it, so that never more than two utterances wait."""

    def __init__(
        self,
        seed: int,
        duration_ns: int,
        activity: Activity,
        duration_of: DurationOf,
        mix: Mix,
        opening: Scene,
        rng: Random,
    ) -> None:
        self._seed, self._duration_ns, self._opening = seed, duration_ns, opening
        self._activity, self._duration_of, self._mix, self._rng = activity, duration_of, mix, rng
        self._scene = opening
        self._happenings: list[Happening] = []
        self._oracle = Oracle()
        self._dues: list[_Due] = []
        self._hushed_until_ns = 0
        self._next = NUM_SILENT + self._gap() // 2 if activity != "quiet" else _LONGEST_IDLE

    def plan(self) -> Episode:
        num_windows = self._duration_ns // WINDOW_NS
        for index in range(num_windows):
            placed: list[Happening] = []
            if NUM_SILENT <= index < num_windows - NUM_LAST:
                placed = self._place(index)
            self._happenings += placed
            self._step(index, placed)
        happenings = tuple(sorted(self._happenings, key=lambda happening: happening.start_ns))
        return Episode(self._seed, self._duration_ns, self._opening, happenings)

    def _step(self, index: int, placed: list[Happening]) -> None:
        before = self._scene
        for happening in placed:
            if happening.change is not None:
                self._scene = apply(self._scene, happening.change)
        self._oracle.step(
            Window(
                index,
                self._scene,
                changes=tuple(changes_between(before, self._scene)) if before is not self._scene else (),
                sounds=tuple(sound for sound in SOUNDS if any(h.kind == sound for h in placed)),
                requests=tuple(kind for h in placed if (kind := _request(h.kind)) is not None),
            )
        )

    # --- what to place --------------------------------------------------------------------------------------------

    def _place(self, index: int) -> list[Happening]:
        if self._oracle.under_way is not None and self._rng.random() < self._mix.stop:
            stop = self._speak("stop", index)
            return [stop] if stop is not None else []
        if len(self._oracle.waiting) > 1 or (self._oracle.backlog > 1 and self._rng.random() > self._mix.rush):
            return []
        for due in sorted(self._dues):
            if due.window <= index and (placed := self._make(due.kind, index)):
                self._dues.remove(due)
                return placed
        if index < self._next or self._is_waiting_for_sight():
            return []
        placed = self._make_any(index)
        if placed:
            self._next = index + self._gap()
        return placed

    def _gap(self) -> int:
        if self._activity == "calm":
            return self._rng.randint(6, 15)
        return self._rng.choice((1, 2, 3, 3, 4, 4, 5, 6, 8))

    def _is_waiting_for_sight(self) -> bool:
        """In the dark, and behind a cover, not much happens."""
        is_blind = self._scene.lens_covered or not self._scene.light_on
        return is_blind and self._rng.random() < 0.75

    def _make_any(self, index: int) -> list[Happening]:
        weights = (self._mix.scene, self._mix.sound, self._mix.request)
        what = self._rng.choices(("scene", "sound", "request"), weights)[0]
        if what == "scene":
            return self._make_scene(index)
        if what == "sound":
            return self._make(self._rng.choice(SOUNDS), index)
        return self._make(self._choose_request(), index)

    def _make_scene(self, index: int) -> list[Happening]:
        changes = possible_changes(self._scene, self._rng)
        people = self._mix.people
        weights = {e: _EVENT_WEIGHTS[e] * (people if e in PERSON_EVENTS else 1.0) for e in changes}
        kind = self._weighted(weights)
        placed = self._make(kind, index)
        if placed and self._rng.random() < self._mix.twin and not self._oracle.waiting:
            placed += self._make_twin(kind, index)
        return placed

    def _make_twin(self, kind: SceneEvent, index: int) -> list[Happening]:
        """Something to hear or to see in the same window."""
        if self._rng.random() < 0.5:
            return self._make(self._rng.choice(SOUNDS), index)
        twins: dict[SceneEvent, SceneEvent] = {"person_in": "door_opened", "door_opened": "person_in"}
        return self._make(twins[kind], index) if kind in twins else []

    def _choose_request(self) -> Request:
        if self._rng.random() < self._mix.idle_stop:
            return "stop"
        standing = self._mix.standing
        return self._weighted(
            {
                request: weight * (standing if request in AWAITED else 1.0)
                for request, weight in _QUESTION_WEIGHTS.items()
            }
        )

    def _weighted(self, weights: dict[Item, float]) -> Item:
        return self._rng.choices(list(weights), list(weights.values()))[0]

    # --- placing it -----------------------------------------------------------------------------------------------

    def _make(self, kind: Happens, index: int) -> list[Happening]:
        """The happening with its consequences planned; nothing where it isn't possible in this window."""
        request = _request(kind)
        if request is not None:
            happening = self._ask(request, index)
        elif kind in SOUNDS:
            happening = self._sound(kind, index)
        else:
            happening = self._change(kind, index)
        if happening is None:
            return []
        self._follow_up(kind, index)
        return [happening]

    def _change(self, kind: Happens, index: int) -> Happening | None:
        change = next((c for c in possible_changes(self._scene, self._rng).values() if c.event == kind), None)
        if change is None or self._is_untold(change):
            return None
        start_ns = self._within(index, SCENE_SPAN_MS)
        return Happening(change.event, start_ns, start_ns, change=change)

    def _is_untold(self, change: Change) -> bool:
        """Whether the same thing's last change still waits to be told."""
        return change.event.split("_")[0] in {utterance.cause.split("_")[0] for utterance in self._oracle.waiting}

    def _sound(self, kind: Happens, index: int) -> Happening | None:
        start_ns = self._within(index, SOUND_SPAN_MS)
        if start_ns < self._hushed_until_ns + HUSH_NS:
            return None
        self._hushed_until_ns = start_ns + EFFECT_NS
        return Happening(kind, start_ns, start_ns, clip_seed=self._rng.getrandbits(31))

    def _ask(self, request: Request, index: int) -> Happening | None:
        if request == "stop":
            is_silent = self._oracle.under_way is None and not self._oracle.waiting
            return self._speak(request, index) if is_silent else None
        if self._scene.lens_covered and request in _SIGHT:
            return None
        if any(utterance.kind == "answer" for utterance in self._oracle.waiting):
            return None
        return self._speak(request, index)

    def _speak(self, request: Request, index: int) -> Happening | None:
        clip_seed = self._rng.getrandbits(31)
        end_ns = self._within(index, REQUEST_END_SPAN_MS)
        start_ns = end_ns - self._duration_of(request, clip_seed)
        if start_ns < self._hushed_until_ns + HUSH_NS:
            return None
        self._hushed_until_ns = end_ns
        return Happening(request, start_ns, end_ns, clip_seed=clip_seed)

    def _within(self, index: int, span_ms: tuple[int, int]) -> int:
        return index * WINDOW_NS + self._rng.randint(*span_ms) * NS_PER_MS

    def _follow_up(self, kind: Happens, index: int) -> None:
        rng = self._rng
        if kind == "light_off":
            self._dues.append(_Due(index + rng.randint(3, 12), "light_on"))
        elif kind == "lens_covered":
            self._dues.append(_Due(index + rng.randint(2, 8), "lens_clear"))
        elif kind in SOUNDS and rng.random() < self._mix.heard_later:
            self._dues.append(_Due(index + rng.randint(3, 16), "what_heard"))
        elif kind in _AWAITED_EVENT:
            self._follow_promise(kind, index)

    def _follow_promise(self, request: Happens, index: int) -> None:
        """What was asked for happens, after something else that wasn't."""
        gap = self._rng.randint(3, 20)
        awaited = next(event for each, event in _AWAITED_EVENT.items() if each == request)
        self._dues.append(_Due(index + gap, awaited))
        if gap > 6 and self._rng.random() < self._mix.decoy:
            others = [event for event in _AWAITED_EVENT.values() if event != awaited]
            self._dues.append(_Due(index + self._rng.randint(3, gap - 3), self._rng.choice(others)))


def _request(kind: Happens) -> Request | None:
    return next((request for request in REQUESTS if request == kind), None)


# --- what is expected to be said ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Expected:
    """One utterance which nano should give.

    cause: what it is about; cause_ns: when that was first seen or heard, or had been asked. text: the ideal sentence;
    accept: all sentences which are true. A promise kept is in `accept` with its words, the plain remark isn't.
    window: of the cause, the earliest in which it can begin. ideal_window: in which the oracle began it; None when it
    never did, since it was over. is_cut: a "stop" ended it.
    """

    kind: Kind
    cause: Happens
    cause_ns: int
    text: str
    accept: frozenset[str]
    window: int
    ideal_window: int | None
    is_cut: bool


def expected(episode: Episode) -> list[Expected]:
    """What nano should say in this episode, in the order of the causes."""
    windows = episode.windows()
    oracle = Oracle()
    said: dict[Utterance, tuple[int | None, bool]] = {}
    for window in windows:
        label = oracle.step(window)
        for utterance in oracle.waiting:
            said.setdefault(utterance, (None, False))
        if oracle.saying is not None:
            first, _ = said.get(oracle.saying, (None, False))
            is_cut = label == BREAK_OFF and "stop" in window.requests
            said[oracle.saying] = (window.index if first is None else first, is_cut)
    utterances = sorted(said.items(), key=lambda item: item[0].window)
    return [_expect(episode, windows, utterance, first, is_cut) for utterance, (first, is_cut) in utterances]


def _expect(episode: Episode, windows: list[Window], utterance: Utterance, first: int | None, is_cut: bool) -> Expected:
    accept = {utterance.text}
    if utterance.kind == "answer" and utterance.cause not in AWAITED and utterance.cause != "what_heard":
        request = _request(utterance.cause)
        assert request is not None
        near = windows[max(0, utterance.window - 1) : utterance.window + 2]
        accept |= {answer(request, window.scene, None) for window in near}
    cause_ns = next(
        happening.end_ns if utterance.kind == "answer" else happening.start_ns
        for happening in episode.happenings
        if happening.kind == utterance.cause and happening.end_ns // WINDOW_NS == utterance.window
    )
    return Expected(
        utterance.kind,
        utterance.cause,
        cause_ns,
        utterance.text,
        frozenset(accept),
        utterance.window,
        first,
        is_cut,
    )
