"""What is said in the watched room: nano's remarks and answers, and the requests it is spoken to with.

Rule: every sentence of nano is made here. So the closed vocabulary, the grammar of the recogniser, the training text of
the talker and the labels of the duplex model can't disagree. Sentences are lower case words with single spaces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from types import MappingProxyType
from typing import Final, Literal, get_args

Colour = Literal["red", "blue", "green", "yellow", "purple", "white"]
Place = Literal["left", "middle", "right", "door"]
Animal = Literal["dog", "cat"]
Sound = Literal["doorbell", "knock", "alarm", "glass", "bark"]
Thing = Literal["dog", "cat", "parcel", "car", "fire"]
Awaited = Literal["dog", "cat", "person"]
Request = Literal[
    "what_see", "how_many", "door_open", "what_heard", "where_dog", "where_cat",
    "await_dog", "await_cat", "await_person", "stop",
]  # fmt: skip
SceneEvent = Literal[
    "person_in", "person_out", "person_fell", "person_up", "dog_in", "dog_out", "cat_in", "cat_out",
    "parcel_put", "parcel_taken", "car_in", "car_out", "fire_on", "fire_out", "light_off", "light_on",
    "lens_covered", "lens_clear", "door_opened", "door_closed",
]  # fmt: skip

COLOURS: Final = get_args(Colour)
PLACES: Final = get_args(Place)
ANIMALS: Final = get_args(Animal)
SOUNDS: Final = get_args(Sound)
THINGS: Final = get_args(Thing)  # in the order in which they are listed
REQUESTS: Final = get_args(Request)
SCENE_EVENTS: Final = get_args(SceneEvent)
MAX_PEOPLE: Final = 3

REQUEST_WORDING: Final = MappingProxyType[Request, str](
    {
        "what_see": "what do you see",
        "how_many": "how many people are there",
        "door_open": "is the door open",
        "what_heard": "what did you hear",
        "where_dog": "where is the dog",
        "where_cat": "where is the cat",
        "await_dog": "tell me when the dog comes in",
        "await_cat": "tell me when the cat comes in",
        "await_person": "tell me when a person comes in",
        "stop": "stop",
    }
)
"""What people say to nano. Others' words; nano itself never says them."""

AWAITED: Final = MappingProxyType[Request, Awaited]({"await_dog": "dog", "await_cat": "cat", "await_person": "person"})
OKAY: Final = "okay i will tell you"
NOTHING_SEEN: Final = "i see nothing"
NOTHING_HEARD: Final = "i heard nothing"

_PLAIN_EVENTS: Final = MappingProxyType[SceneEvent, str](
    {
        "dog_in": "a dog came in",
        "dog_out": "the dog left",
        "cat_in": "a cat came in",
        "cat_out": "the cat left",
        "parcel_put": "a parcel was put down",
        "parcel_taken": "the parcel was taken away",
        "car_in": "a car is at the window",
        "car_out": "the car drove away",
        "fire_on": "i see a fire",
        "fire_out": "the fire is out",
        "light_off": "the light went off",
        "light_on": "the light went on",
        "lens_covered": "the lens is covered",
        "lens_clear": "the lens is clear",
        "door_opened": "the door is open",
        "door_closed": "the door is closed",
    }
)
_PERSON_EVENTS: Final = MappingProxyType[SceneEvent, str](
    {
        "person_in": "a person in {} came in",
        "person_out": "the person in {} left",
        "person_fell": "the person in {} fell",
        "person_up": "the person in {} got up",
    }
)
PERSON_EVENTS: Final = tuple(_PERSON_EVENTS)
_SOUND_NAMES: Final = MappingProxyType[Sound, str](
    {"doorbell": "the doorbell", "knock": "a knock", "alarm": "an alarm", "glass": "breaking glass", "bark": "a bark"}
)
_PLACE_NAMES: Final = MappingProxyType[Place, str](
    {"left": "on the left", "middle": "in the middle", "right": "on the right", "door": "at the door"}
)
_COUNTS: Final = ("no people", "one person", "two people", "three people")


def remark(event: SceneEvent, colour: Colour | None = None) -> str:
    """What is said, unasked, about something that was seen. `colour`: of the person, where the event is a person's."""
    if event in _PERSON_EVENTS:
        assert colour is not None, f"{event} is of a person, who has a colour"
        return _PERSON_EVENTS[event].format(colour)
    return _PLAIN_EVENTS[event]


def remark_sound(sound: Sound) -> str:
    """What is said, unasked, about something that was heard."""
    return f"i hear {_SOUND_NAMES[sound]}"


def keep_promise(awaited_remark: str) -> str:
    """What is said instead of a remark when somebody has asked to be told."""
    return f"as you asked {awaited_remark}"


def tell_count(num_people: int) -> str:
    return _COUNTS[num_people]


def tell_seen(num_people: int, things: Iterable[Thing]) -> str:
    """All there is to see: people first, then things in the order of THINGS."""
    present = frozenset(things)
    items = [_COUNTS[num_people]] if num_people else []
    items += [f"a {thing}" for thing in THINGS if thing in present]
    return f"i see {' and '.join(items)}" if items else NOTHING_SEEN


def tell_door(*, is_open: bool) -> str:
    return "yes the door is open" if is_open else "no the door is closed"


def tell_heard(sound: Sound | None) -> str:
    """The last sound, whenever it was; None: there has been none."""
    return NOTHING_HEARD if sound is None else f"i heard {_SOUND_NAMES[sound]}"


def tell_place(animal: Animal, place: Place | None) -> str:
    """None: there is no such animal."""
    return f"i see no {animal}" if place is None else f"the {animal} is {_PLACE_NAMES[place]}"


def remarks() -> list[str]:
    """All sentences that nano says unasked."""
    people = [remark(event, colour) for event, colour in product(_PERSON_EVENTS, COLOURS)]
    return [*people, *_PLAIN_EVENTS.values(), *map(remark_sound, SOUNDS), *promises_kept()]


def promises_kept() -> list[str]:
    """All sentences with which nano does what it was asked to do later."""
    people = [remark("person_in", colour) for colour in COLOURS]
    return [keep_promise(text) for text in (remark("dog_in"), remark("cat_in"), *people)]


def answers() -> list[str]:
    """All sentences that nano says when it is asked. The lists are many: see `max_listed`."""
    seen = [tell_seen(count, things) for count in range(MAX_PEOPLE + 1) for things in _subsets(THINGS, MAX_LISTED)]
    places = [tell_place(animal, place) for animal in ANIMALS for place in (*PLACES, None)]
    heard = [tell_heard(sound) for sound in (*SOUNDS, None)]
    return [*seen, *map(tell_count, range(MAX_PEOPLE + 1)), tell_door(is_open=True), tell_door(is_open=False),
            *heard, *places, OKAY]  # fmt: skip


MAX_LISTED: Final = 3
"""Things that are in the room at once, besides people: a longer answer would take more than five seconds."""


def sentences() -> list[str]:
    """All that nano ever says, each once."""
    return list(dict.fromkeys([*remarks(), *answers()]))


def vocabulary() -> list[str]:
    """The words of `sentences`, sorted."""
    return sorted({word for sentence in sentences() for word in sentence.split()})


def _subsets(items: Sequence[Thing], most: int) -> list[tuple[Thing, ...]]:
    every: list[tuple[Thing, ...]] = [()]
    for item in items:
        every += [(*subset, item) for subset in every if len(subset) < most]
    return every
