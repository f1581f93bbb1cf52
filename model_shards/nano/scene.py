"""What there is to see in the watched room, and how it may change.

Rule: a scene says what is really visible. So two things never share a spot, and while the lens is covered nothing
changes behind it. Needs neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from types import MappingProxyType
from typing import Final, Literal

from model_shards.nano.phrases import (
    COLOURS,
    MAX_LISTED,
    MAX_PEOPLE,
    PLACES,
    SCENE_EVENTS,
    Animal,
    Colour,
    Place,
    SceneEvent,
    Thing,
)

Spot = Literal["dog", "cat", "parcel", "fire"]
"""A thing on the floor: it has a place, which it shares with none of the others."""

FLOOR_PLACES: Final[tuple[Place, ...]] = ("left", "middle", "right")
"""Where parcels and fires are: never in the way of the door."""


@dataclass(frozen=True, slots=True)
class Person:
    colour: Colour  # of the clothes
    place: Place
    fallen: bool = False


@dataclass(frozen=True, slots=True)
class Scene:
    """The room at one moment. None: there is no such thing.

    people: in the order of PLACES; one per place, no colour twice.
    """

    people: tuple[Person, ...] = ()
    dog: Place | None = None
    cat: Place | None = None
    parcel: Place | None = None
    fire: Place | None = None
    car: bool = False
    light_on: bool = True
    lens_covered: bool = False
    door_open: bool = False

    @property
    def things(self) -> tuple[Thing, ...]:
        """What a list of all there is to see names besides people."""
        present = {"dog": self.dog, "cat": self.cat, "parcel": self.parcel, "car": self.car or None, "fire": self.fire}
        return tuple(thing for thing in _THINGS if present[thing] is not None)

    @property
    def taken(self) -> frozenset[Place]:
        """Places on the floor where something is."""
        return frozenset(place for place in (self.dog, self.cat, self.parcel, self.fire) if place is not None)

    def animal(self, animal: Animal) -> Place | None:
        return self.dog if animal == "dog" else self.cat

    def person_in(self, colour: Colour) -> Person | None:
        return next((person for person in self.people if person.colour == colour), None)


_THINGS: Final[tuple[Thing, ...]] = ("dog", "cat", "parcel", "car", "fire")


@dataclass(frozen=True, slots=True)
class Change:
    """One event which is seen. colour: of the person; place: where somebody or something came to be."""

    event: SceneEvent
    colour: Colour | None = None
    place: Place | None = None


_APPEARING: Final = MappingProxyType[SceneEvent, Spot](
    {"dog_in": "dog", "cat_in": "cat", "parcel_put": "parcel", "fire_on": "fire"}
)
_GOING: Final = MappingProxyType[SceneEvent, Spot](
    {"dog_out": "dog", "cat_out": "cat", "parcel_taken": "parcel", "fire_out": "fire"}
)
_FLAGS: Final = MappingProxyType[SceneEvent, tuple[str, bool]](
    {
        "car_in": ("car", True),
        "car_out": ("car", False),
        "light_off": ("light_on", False),
        "light_on": ("light_on", True),
        "lens_covered": ("lens_covered", True),
        "lens_clear": ("lens_covered", False),
        "door_opened": ("door_open", True),
        "door_closed": ("door_open", False),
    }
)


def apply(scene: Scene, change: Change) -> Scene:
    """The scene after the change, which must be possible in it."""
    event = change.event
    if event in _FLAGS:
        name, value = _FLAGS[event]
        return _with(scene, name, value)
    if event in _APPEARING:
        return _with(scene, _APPEARING[event], change.place)
    if event in _GOING:
        return _with(scene, _GOING[event], None)
    return replace(scene, people=tuple(sorted(_people_after(scene, change), key=lambda p: PLACES.index(p.place))))


def _with(scene: Scene, name: str, value: Place | bool | None) -> Scene:
    return replace(scene, **{name: value})  # type: ignore[arg-type]  # names are of fields with such values


def _people_after(scene: Scene, change: Change) -> list[Person]:
    assert change.colour is not None, f"{change.event} is of a person, who has a colour"
    others = [person for person in scene.people if person.colour != change.colour]
    if change.event == "person_in":
        assert change.place is not None, "who comes in is somewhere"
        return [*others, Person(change.colour, change.place)]
    if change.event == "person_out":
        return others
    person = scene.person_in(change.colour)
    assert person is not None, f"{change.event} is of somebody who is there"
    return [*others, replace(person, fallen=change.event == "person_fell")]


def changes_between(before: Scene, after: Scene) -> list[Change]:
    """What one sees has changed, in the order of SCENE_EVENTS, people by place.

    A covered lens hides all the rest, so that covering and clearing come alone.
    """
    if before.lens_covered != after.lens_covered:
        return [Change("lens_covered" if after.lens_covered else "lens_clear")]
    changes = [*_changes_of_people(before, after), *_changes_of_spots(before, after), *_changes_of_flags(before, after)]
    return sorted(changes, key=lambda change: SCENE_EVENTS.index(change.event))


def _changes_of_people(before: Scene, after: Scene) -> Iterator[Change]:
    for person in after.people:
        was = before.person_in(person.colour)
        if was is None:
            yield Change("person_in", person.colour, person.place)
        elif was.fallen != person.fallen:
            yield Change("person_fell" if person.fallen else "person_up", person.colour)
    for person in before.people:
        if after.person_in(person.colour) is None:
            yield Change("person_out", person.colour)


def _changes_of_spots(before: Scene, after: Scene) -> Iterator[Change]:
    for event, spot in _APPEARING.items():
        if getattr(before, spot) is None and getattr(after, spot) is not None:
            yield Change(event, place=getattr(after, spot))
    for event, spot in _GOING.items():
        if getattr(before, spot) is not None and getattr(after, spot) is None:
            yield Change(event)


def _changes_of_flags(before: Scene, after: Scene) -> Iterator[Change]:
    for event, (name, value) in _FLAGS.items():
        if name != "lens_covered" and getattr(before, name) != value == getattr(after, name):
            yield Change(event)


def possible_changes(scene: Scene, rng: Random) -> dict[SceneEvent, Change]:
    """One way in which each event that is possible now could happen."""
    if scene.lens_covered:
        return {"lens_clear": Change("lens_clear")}
    changes = [*_people_changes(scene, rng), *_spot_changes(scene, rng), *_flag_changes(scene)]
    return {change.event: change for change in changes}


def _people_changes(scene: Scene, rng: Random) -> Iterator[Change]:
    colours = [colour for colour in COLOURS if scene.person_in(colour) is None]
    places = [place for place in PLACES if all(person.place != place for person in scene.people)]
    if len(scene.people) < MAX_PEOPLE:
        yield Change("person_in", rng.choice(colours), rng.choice(places))
    if scene.people:
        yield Change("person_out", rng.choice(scene.people).colour)
    if standing := [person for person in scene.people if not person.fallen]:
        yield Change("person_fell", rng.choice(standing).colour)
    if fallen := [person for person in scene.people if person.fallen]:
        yield Change("person_up", rng.choice(fallen).colour)


def _spot_changes(scene: Scene, rng: Random) -> Iterator[Change]:
    if len(scene.things) < MAX_LISTED:
        for event, spot in _APPEARING.items():
            places = PLACES if spot in ("dog", "cat") else FLOOR_PLACES
            free = [place for place in places if place not in scene.taken]
            if getattr(scene, spot) is None and free:
                yield Change(event, place=rng.choice(free))
    for event, spot in _GOING.items():
        if getattr(scene, spot) is not None:
            yield Change(event)


def _flag_changes(scene: Scene) -> Iterator[Change]:
    for event, (name, value) in _FLAGS.items():
        is_full = event == "car_in" and len(scene.things) >= MAX_LISTED
        if getattr(scene, name) != value and not is_full:
            yield Change(event)


def random_scene(rng: Random, fullness: float = 0.4, fallen: float = 0.15) -> Scene:
    """Any scene with its lens clear. fullness: how likely each thing is there, 0 to 1; fallen: each person lies."""
    count = rng.choices(range(MAX_PEOPLE + 1), weights=(4, 5, 4, 3))[0]
    colours, places = rng.sample(COLOURS, count), sorted(rng.sample(PLACES, count), key=PLACES.index)
    people = tuple(Person(colours[i], places[i], rng.random() < fallen) for i in range(count))
    scene = Scene(people=people, light_on=rng.random() > 0.12, door_open=rng.random() < 0.35)
    for event in rng.sample(_THINGS_COMING, len(_THINGS_COMING)):
        change = possible_changes(scene, rng).get(event)
        if change is not None and rng.random() < fullness:
            scene = apply(scene, change)
    return scene


_THINGS_COMING: Final[tuple[SceneEvent, ...]] = ("dog_in", "cat_in", "parcel_put", "car_in", "fire_on")
