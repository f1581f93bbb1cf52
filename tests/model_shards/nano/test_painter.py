import numpy as np
import pytest

from model_shards.nano.painter import POSE_NS, Painter
from model_shards.nano.scene import Person, Scene

ROOM = Scene(people=(Person("red", "left"),), door_open=False)


def far_apart(first: np.ndarray, second: np.ndarray) -> int:
    """Pixels of the two that are clearly different."""
    return int((np.abs(first.astype(int) - second).max(axis=2) > 40).sum())


def steady_painter(side: int = 224) -> Painter:
    """A room whose camera neither shakes nor has much noise."""
    return next(p for p in (Painter(seed, side) for seed in range(200)) if p.look.shake == 0 and p.look.noise <= 3)


def test_a_picture_is_the_same_whatever_was_painted_before():
    fresh, used = Painter(3), Painter(3)
    for t_ns in range(0, 10 * POSE_NS, POSE_NS):
        used.paint(Scene(dog="left", fire="right"), t_ns)
    assert np.array_equal(fresh.paint(ROOM, 5), used.paint(ROOM, 5))


@pytest.mark.parametrize("side", [64, 112, 224, 448])
def test_a_picture_is_as_large_as_is_asked(side):
    picture = Painter(1, side).paint(ROOM, 0)
    assert picture.shape == (side, side, 3) and picture.dtype == np.uint8


@pytest.mark.parametrize(
    "scene",
    [
        Scene(),
        Scene(people=(Person("blue", "left"),)),
        Scene(people=(Person("red", "left", fallen=True),)),
        Scene(people=(Person("red", "right"),)),
        Scene(people=ROOM.people, dog="middle"),
        Scene(people=ROOM.people, cat="middle"),
        Scene(people=ROOM.people, parcel="right"),
        Scene(people=ROOM.people, fire="left"),
        Scene(people=ROOM.people, car=True),
        Scene(people=ROOM.people, light_on=False),
        Scene(people=ROOM.people, door_open=True),
        Scene(lens_covered=True),
    ],
)
def test_whatever_differs_is_seen(scene):
    painter = steady_painter()
    assert far_apart(painter.paint(ROOM, 0), painter.paint(scene, 0)) > 150


def test_what_stays_looks_the_same_a_second_later():
    painter = steady_painter()
    assert far_apart(painter.paint(ROOM, 0), painter.paint(ROOM, 100)) < 30


def test_nothing_hides_a_person_and_a_thing_at_the_same_place():
    painter = steady_painter()
    for place in ("left", "middle", "right", "door"):
        both = Scene(people=(Person("yellow", place),), dog=place)
        pictures = [painter.paint(scene, 0) for scene in (both, Scene(people=both.people), Scene(dog=place))]
        assert far_apart(pictures[0], pictures[1]) > 150
        assert far_apart(pictures[0], pictures[2]) > 400
