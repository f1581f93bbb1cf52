from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_shards.nano.phrases import MAX_LISTED, MAX_PEOPLE, SCENE_EVENTS
from model_shards.nano.scene import Change, Person, Scene, apply, changes_between, possible_changes, random_scene

seeds = st.integers(0, 1 << 32)


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_what_one_sees_of_a_change_is_the_change(seed):
    rng = Random(seed)
    scene = random_scene(rng)
    for change in possible_changes(scene, rng).values():
        (seen,) = changes_between(scene, apply(scene, change))
        assert (seen.event, seen.colour) == (change.event, change.colour)


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_nothing_hides_anything_whatever_happens(seed):
    rng = Random(seed)
    scene = random_scene(rng, fullness=0.8)
    for _ in range(30):
        scene = apply(scene, rng.choice(list(possible_changes(scene, rng).values())))
        spots = [place for place in (scene.dog, scene.cat, scene.parcel, scene.fire) if place is not None]
        assert len(set(spots)) == len(spots)
        assert len({person.place for person in scene.people}) == len(scene.people) <= MAX_PEOPLE
        assert len({person.colour for person in scene.people}) == len(scene.people)
        assert len(scene.things) <= MAX_LISTED


def test_every_event_is_possible_somewhere():
    rng = Random(1)
    scenes = [random_scene(rng) for _ in range(200)] + [Scene(lens_covered=True)]
    assert {event for scene in scenes for event in possible_changes(scene, rng)} == set(SCENE_EVENTS)


def test_behind_a_covered_lens_nothing_happens_but_its_clearing():
    assert list(possible_changes(Scene(lens_covered=True), Random(0))) == ["lens_clear"]


def test_several_changes_come_in_the_order_of_the_events():
    before = Scene(people=(Person("red", "left"), Person("blue", "right")))
    after = Scene(people=(Person("green", "left"), Person("blue", "right", True)), dog="left", door_open=True)
    events = [change.event for change in changes_between(before, after)]
    assert events == ["person_in", "person_out", "person_fell", "dog_in", "door_opened"]


@pytest.mark.parametrize("is_covered", [True, False])
def test_covering_and_clearing_hide_what_else_has_changed(is_covered):
    before, after = Scene(lens_covered=not is_covered), Scene(dog="left", lens_covered=is_covered)
    assert changes_between(before, after) == [Change("lens_covered" if is_covered else "lens_clear")]
