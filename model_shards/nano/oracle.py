"""What nano should say, window by window.

Rules:
- What is new is remarked once; what was asked is answered. Utterances wait in a queue: answers before remarks, else in
  the order of their windows. Within a window: requests in their order, then changes in the order of SCENE_EVENTS
  (people by place), then sounds in their order.
- An utterance is a turn of its own. It begins in the unit of the window in which its cause was seen or heard, unless
  another one is under way. Each unit gets the words whose speech begins in that second; the turn ends in the unit in
  which the speech ends.
- "stop" while a turn is under way (it began in an earlier unit) ends it in this unit; what was being said is forgotten,
  what waits goes on waiting. "stop" in silence means nothing.
- The first windows of a session are for listening: nothing is said, and what happened then is not told later.

The oracle can follow a model which says something else than it should: see `Oracle.step`. Needs no torch.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from model_shards.nano import phrases
from model_shards.nano.phrases import AWAITED, Awaited, Request, SceneEvent, Sound
from model_shards.nano.scene import Change, Scene
from model_shards.nano.timing import num_units, words_by_unit

NUM_SILENT: Final = 3  # windows at the start of a session; DuplexConfig.force_listen_count
MAX_TRIES: Final = 2  # of one utterance, when the model does not say it, or wrongly

Cause: TypeAlias = SceneEvent | Sound | Request
Kind: TypeAlias = Literal["remark", "promise", "sound", "answer"]


@dataclass(frozen=True, slots=True)
class Window:
    """What can be known in one window.

    scene: in the window's picture. changes: against the picture before. sounds: which began. requests: which ended.
    """

    index: int
    scene: Scene
    changes: tuple[Change, ...] = ()
    sounds: tuple[Sound, ...] = ()
    requests: tuple[Request, ...] = ()


@dataclass(frozen=True, slots=True)
class Listen:
    """Nothing is said in this unit."""


@dataclass(frozen=True, slots=True)
class Speak:
    """words: whose speech begins in the next second, maybe none. end_of_turn: the speech ends in it."""

    words: tuple[str, ...]
    end_of_turn: bool


Output: TypeAlias = Listen | Speak
LISTEN: Final = Listen()
BREAK_OFF: Final = Speak((), True)


@dataclass(frozen=True, slots=True)
class Utterance:
    """One thing to say. window: of its cause. tries: how often it has been begun."""

    text: str
    kind: Kind
    cause: Cause
    window: int
    tries: int = 0

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(self.text.split())


@dataclass(slots=True)
class _Turn:
    """A turn under way. utterance: None when the model says something that nobody asked for."""

    utterance: Utterance | None
    num_words: int = 0  # given out
    num_units: int = 0

    @property
    def is_whole(self) -> bool:
        return self.utterance is not None and self.num_words == len(self.utterance.words)


class Oracle:
    """One session's ideal. Ask once per window, in order.

    max_tries: how often an utterance is begun, when the model stays silent instead or says something else. 1 for who
    learns from it: a model that has missed something can't know later what it was.
    """

    def __init__(self, max_tries: int = MAX_TRIES) -> None:
        self._max_tries = max_tries
        self._answers: deque[Utterance] = deque()
        self._remarks: deque[Utterance] = deque()
        self._turn: _Turn | None = None
        self._is_stopped = False
        self._awaited: set[Awaited] = set()
        self._last_sound: Sound | None = None
        self._label: Output | None = None
        self._saying: Utterance | None = None

    @property
    def saying(self) -> Utterance | None:
        """What the last step's unit is about; None: nothing, or something that nobody asked for."""
        return self._saying

    @property
    def awaited(self) -> frozenset[Awaited]:
        """What somebody has asked to be told, and that has not come since."""
        return frozenset(self._awaited)

    @property
    def last_sound(self) -> Sound | None:
        return self._last_sound

    @property
    def is_lost(self) -> bool:
        """Whether the model goes on with something that nobody asked for: there is no right way to do that."""
        return self._turn is not None and self._turn.utterance is None

    @property
    def under_way(self) -> Utterance | None:
        """What goes on in the next window, if the last step is followed."""
        return self._saying if isinstance(self._label, Speak) and not self._label.end_of_turn else None

    @property
    def waiting(self) -> tuple[Utterance, ...]:
        """What will be said after that."""
        return tuple(utterance for utterance in self._queue if utterance is not self._saying)

    @property
    def backlog(self) -> int:
        """How many units, from the next window on, are taken by what is under way and by what waits."""
        turn, under_way = self._turn, self.under_way
        given = 1 if turn is None else turn.num_units + 1
        left = 0 if under_way is None else max(1, num_units(under_way.text) - given)
        return left + sum(num_units(utterance.text) for utterance in self.waiting)

    @property
    def _queue(self) -> tuple[Utterance, ...]:
        return (*self._answers, *self._remarks)

    def step(self, window: Window, said_before: Output | None = None) -> Output:
        """The unit of this window.

        said_before: what was really given out for the window before; None: what this said it should be.
        """
        if self._label is not None:
            self._commit(said_before or self._label)
        if window.index >= NUM_SILENT:
            self._notice(window)
        elif window.sounds:
            self._last_sound = window.sounds[-1]
        self._is_stopped |= "stop" in window.requests and self._turn is not None
        self._saying = None
        self._label = LISTEN if window.index < NUM_SILENT else self._decide("stop" in window.requests)
        return self._label

    # --- what there is to say -------------------------------------------------------------------------------------

    def _notice(self, window: Window) -> None:
        self._remarks += [self._remark(change, window) for change in window.changes]
        for sound in window.sounds:
            self._last_sound = sound
            self._remarks.append(Utterance(phrases.remark_sound(sound), "sound", sound, window.index))
        for request in window.requests:
            if request != "stop":
                self._answers.append(Utterance(self._answer(request, window.scene), "answer", request, window.index))

    def _remark(self, change: Change, window: Window) -> Utterance:
        text = phrases.remark(change.event, change.colour)
        awaited = _FULFILS.get(change.event)
        if awaited not in self._awaited:
            return Utterance(text, "remark", change.event, window.index)
        self._awaited.discard(awaited)
        return Utterance(phrases.keep_promise(text), "promise", change.event, window.index)

    def _answer(self, request: Request, scene: Scene) -> str:
        if request in AWAITED:
            self._awaited.add(AWAITED[request])
        return answer(request, scene, self._last_sound)

    # --- what is said now -----------------------------------------------------------------------------------------

    def _decide(self, stop_heard: bool) -> Output:
        turn = self._turn
        if turn is None:
            if stop_heard or not self._queue:
                return LISTEN
            self._saying = self._queue[0]
            units = words_by_unit(self._saying.text)
            return Speak(units[0], len(units) == 1)
        self._saying = turn.utterance
        if self._is_stopped or turn.utterance is None:
            return BREAK_OFF
        units = words_by_unit(turn.utterance.text)
        due = sum(len(words) for words in units[: turn.num_units + 1])
        return Speak(turn.utterance.words[turn.num_words : due], turn.num_units + 1 >= len(units))

    # --- what was really said -------------------------------------------------------------------------------------

    def _commit(self, said: Output) -> None:
        if isinstance(said, Listen):
            if self._turn is not None:  # the engine forbids it; taken as the turn's end
                self._end_turn()
            elif self._saying is not None:
                (self._answers if self._saying.kind == "answer" else self._remarks).remove(self._saying)
                self._put_back(self._saying)
            return
        if self._turn is None:
            self._turn = _Turn(self._take(said.words))
        self._advance(self._turn, said.words)
        if said.end_of_turn:
            self._end_turn()

    def _take(self, words: tuple[str, ...]) -> Utterance | None:
        """The first waiting utterance which begins with these words; it waits no longer."""
        for queue in (self._answers, self._remarks):
            for utterance in queue:
                if words and utterance.words[: len(words)] == words:
                    queue.remove(utterance)
                    return utterance
        return None

    def _advance(self, turn: _Turn, words: tuple[str, ...]) -> None:
        turn.num_units += 1
        if turn.utterance is None:
            return
        end = turn.num_words + len(words)
        if turn.utterance.words[turn.num_words : end] == words:
            turn.num_words = end
        else:
            self._put_back(turn.utterance)
            turn.utterance = None

    def _end_turn(self) -> None:
        turn = self._turn
        if turn is not None and turn.utterance is not None and not turn.is_whole and not self._is_stopped:
            self._put_back(turn.utterance)
        self._turn, self._is_stopped = None, False

    def _put_back(self, utterance: Utterance) -> None:
        """What was said wrongly is said again, once."""
        if self._is_stopped or utterance.tries + 1 >= self._max_tries:
            return
        again = Utterance(utterance.text, utterance.kind, utterance.cause, utterance.window, utterance.tries + 1)
        (self._answers if utterance.kind == "answer" else self._remarks).appendleft(again)


_FULFILS: Final[dict[SceneEvent, Awaited]] = {"dog_in": "dog", "cat_in": "cat", "person_in": "person"}


def answer(request: Request, scene: Scene, last_sound: Sound | None) -> str:
    """The right answer to anything but "stop". A covered lens shows nothing and nobody."""
    if scene.lens_covered:
        scene = Scene(door_open=scene.door_open)
    match request:
        case "what_see":
            return phrases.tell_seen(len(scene.people), scene.things)
        case "how_many":
            return phrases.tell_count(len(scene.people))
        case "door_open":
            return phrases.tell_door(is_open=scene.door_open)
        case "what_heard":
            return phrases.tell_heard(last_sound)
        case "where_dog":
            return phrases.tell_place("dog", scene.dog)
        case "where_cat":
            return phrases.tell_place("cat", scene.cat)
        case _:
            assert request in AWAITED, f"{request} is not answered"
            return phrases.OKAY
