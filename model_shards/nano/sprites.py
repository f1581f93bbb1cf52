"""Pictures of single things: people, animals, a parcel, fire, a car, and the room itself.

Rule: drawn in units of a picture 224 wide, several times larger than needed, then reduced, so that edges are smooth at
every size. Needs Pillow only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from types import MappingProxyType
from typing import Final

from PIL import Image, ImageDraw, ImageFilter

from model_shards.nano.phrases import Colour

Rgb = tuple[int, int, int]
Point = tuple[float, float]

OVERSIZE: Final = 3
CLOTHES: Final = MappingProxyType[Colour, Rgb](
    {
        "red": (205, 38, 38),
        "blue": (40, 84, 205),
        "green": (38, 150, 66),
        "yellow": (238, 202, 36),
        "purple": (142, 56, 176),
        "white": (242, 242, 240),
    }
)
_SKIN: Final[tuple[Rgb, ...]] = ((244, 208, 177), (224, 172, 130), (176, 122, 84), (120, 80, 56))
_HAIR: Final[tuple[Rgb, ...]] = ((40, 30, 26), (92, 58, 30), (168, 120, 60), (120, 120, 124), (20, 20, 24))
_TROUSERS: Final[tuple[Rgb, ...]] = ((58, 60, 70), (84, 84, 88), (72, 62, 54), (44, 46, 52))
_DOG_FUR: Final[tuple[Rgb, ...]] = ((150, 98, 54), (112, 72, 42), (196, 150, 96), (86, 62, 46), (214, 184, 140))
_CAT_FUR: Final[tuple[Rgb, ...]] = ((112, 114, 120), (46, 46, 52), (216, 138, 60), (150, 152, 158), (72, 70, 74))
_BOX: Final[tuple[Rgb, ...]] = ((196, 152, 98), (180, 136, 84), (208, 170, 118))
_CARS: Final[tuple[Rgb, ...]] = ((190, 44, 44), (52, 92, 170), (236, 236, 236), (60, 64, 70), (216, 176, 60))


class Pen:
    """Draws in units of the picture onto an oversized sheet of `width` × `height` units."""

    def __init__(self, width: float, height: float, scale: float, ground: Rgb | None = None) -> None:
        """scale: pixels per unit of the finished sprite."""
        self._k = scale * OVERSIZE
        size = (math.ceil(width * scale) * OVERSIZE, math.ceil(height * scale) * OVERSIZE)
        if ground is None:
            self._sheet = Image.new("RGBA", size, (0, 0, 0, 0))
        else:
            self._sheet = Image.new("RGB", size, ground)
        self._draw = ImageDraw.Draw(self._sheet)

    def blob(self, x: float, y: float, radius_x: float, radius_y: float, colour: Rgb) -> None:
        k = self._k
        self._draw.ellipse(
            (k * (x - radius_x), k * (y - radius_y), k * (x + radius_x), k * (y + radius_y)), fill=colour
        )

    def box(self, left: float, top: float, right: float, bottom: float, colour: Rgb, round_by: float = 0.0) -> None:
        k = self._k
        corners = (k * left, k * top, k * right, k * bottom)
        if round_by:
            self._draw.rounded_rectangle(corners, radius=k * round_by, fill=colour)
        else:
            self._draw.rectangle(corners, fill=colour)

    def shape(self, points: Sequence[Point], colour: Rgb) -> None:
        self._draw.polygon([(self._k * x, self._k * y) for x, y in points], fill=colour)

    def stroke(self, points: Sequence[Point], width: float, colour: Rgb) -> None:
        """A bent line with round ends and joints."""
        k = self._k
        self._draw.line([(k * x, k * y) for x, y in points], fill=colour, width=max(1, round(k * width)))
        for x, y in points:
            self.blob(x, y, width / 2, width / 2, colour)

    def finish(self, blur: float = 0.0) -> Image.Image:
        """RGBA, or RGB when there is a ground. blur: radius in finished pixels."""
        picture = self._sheet
        if picture.mode == "RGB":
            picture = picture.reduce(OVERSIZE)
            return picture.filter(ImageFilter.GaussianBlur(blur)) if blur else picture
        # Colours are mixed by how much of them there is, so that edges don't turn dark.
        picture = picture.convert("RGBa").reduce(OVERSIZE)
        if blur:
            picture = picture.filter(ImageFilter.GaussianBlur(blur))
        return picture.convert("RGBA")


def mix(first: Rgb, second: Rgb, part: float) -> Rgb:
    """`part` of the second colour, the rest of the first."""
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(first, second, strict=True))
    return red, green, blue


def vary(colour: Rgb, rng: Random, by: int) -> Rgb:
    red, green, blue = (min(255, max(0, value + rng.randint(-by, by))) for value in colour)
    return red, green, blue


BLACK: Final[Rgb] = (0, 0, 0)
WHITE: Final[Rgb] = (255, 255, 255)
_INK: Final[Rgb] = (30, 28, 32)


@dataclass(frozen=True, slots=True)
class Wear:
    """How one person looks all the time."""

    clothes: Rgb
    skin: Rgb
    hair: Rgb
    trousers: Rgb
    long_hair: bool

    @staticmethod
    def draw(colour: Colour, rng: Random) -> Wear:
        return Wear(
            clothes=vary(CLOTHES[colour], rng, 12),
            skin=vary(rng.choice(_SKIN), rng, 8),
            hair=vary(rng.choice(_HAIR), rng, 8),
            trousers=vary(rng.choice(_TROUSERS), rng, 8),
            long_hair=rng.random() < 0.5,
        )


NUM_POSES: Final = 4
PERSON_SIZE: Final = (40.0, 86.0)


def person(wear: Wear, pose: int, pen: Pen) -> None:
    """Standing, seen from the front; feet in the middle of the lower edge."""
    x = 20.0
    spread, left_hand, right_hand = (
        (5.0, (-13.5, 49.0), (13.5, 49.0)),
        (6.0, (-15.0, 44.0), (12.5, 50.0)),
        (4.5, (-12.5, 50.0), (16.0, 26.0)),
        (5.5, (-9.0, 40.0), (14.0, 47.0)),
    )[pose]
    for side in (-1, 1):
        pen.stroke([(x + side * 4.0, 50), (x + side * spread, 82)], 8.6, _INK)
    for side in (-1, 1):
        pen.stroke([(x + side * 4.0, 50), (x + side * spread, 80)], 7.0, wear.trousers)
        pen.box(x + side * spread - 4.5, 80, x + side * spread + 4.5, 85, _INK, 2)
    sleeves = mix(wear.clothes, BLACK, 0.16)
    for side, (hand_x, hand_y) in ((-1, left_hand), (1, right_hand)):
        arm = [(x + side * 8.5, 26.0), (x + hand_x, hand_y)]
        pen.stroke(arm, 7.4, _INK)
        pen.stroke(arm, 5.8, sleeves)
        pen.blob(x + hand_x, hand_y + 1.5, 3, 3, wear.skin)
    pen.box(x - 11.3, 19.2, x + 11.3, 55.8, _INK, 5)
    pen.box(x - 10.5, 20, x + 10.5, 55, wear.clothes, 4.5)
    pen.box(x - 10.5, 48, x + 10.5, 55, sleeves, 2)
    if wear.long_hair:
        pen.box(x - 8.6, 8, x + 8.6, 23, wear.hair, 4)
    pen.box(x - 3, 15, x + 3, 22, mix(wear.skin, BLACK, 0.15))
    pen.blob(x, 11, 8.2, 9.2, _INK)
    pen.blob(x, 11, 7.5, 8.5, wear.skin)
    pen.shape([(x - 8, 10), (x - 6, 4), (x, 1.6), (x + 6, 4), (x + 8, 10), (x + 4, 6.5), (x - 4, 6.5)], wear.hair)
    for side in (-1, 1):
        pen.blob(x + side * 2.8, 11, 1.0, 1.2, _INK)
    pen.stroke([(x - 2, 15.5), (x + 2, 15.5)], 0.9, (150, 70, 66))


FALLEN_SCALE: Final = 0.74  # so that who lies doesn't reach the neighbours' places

DOG_SIZE: Final = (50.0, 36.0)


def dog(fur: Rgb, pose: int, pen: Pen) -> None:
    """From the side, looking left: long snout, hanging ear, tail up."""
    dark = mix(fur, BLACK, 0.35)
    tail = [(41.0, 16.0), (46.0, 9.0), (47.5, 3.0)] if pose % 2 else [(41.0, 16.0), (47.0, 11.0), (46.0, 4.0)]
    pen.stroke(tail, 4.4, _INK)
    pen.stroke(tail, 3.0, fur)
    swing = 1.5 if pose >= 2 else 0.0
    for leg_x, tone in ((19 + swing, dark), (39 - swing, dark), (16 - swing, fur), (36 + swing, fur)):
        pen.stroke([(leg_x, 22), (leg_x, 33)], 5.4, _INK)
        pen.stroke([(leg_x, 22), (leg_x, 33)], 4.0, tone)
    pen.box(13, 12.2, 43.8, 26.8, _INK, 7)
    pen.box(13.7, 13, 43, 26, fur, 6.5)
    pen.stroke([(17, 17), (13, 11)], 10.4, _INK)
    pen.stroke([(17, 17), (13, 11)], 9, fur)
    pen.stroke([(4, 12.5), (13, 9.5)], 7.6, _INK)
    pen.blob(13, 8.5, 7.2, 7.0, _INK)
    pen.blob(13, 8.5, 6.4, 6.2, fur)
    pen.stroke([(4, 12.5), (13, 10)], 6, mix(fur, WHITE, 0.18))
    pen.blob(1.9, 11.2, 1.9, 1.7, BLACK)
    pen.stroke([(17, 6), (19, 13)], 4.6, dark)
    pen.blob(10.5, 6.8, 1.1, 1.2, BLACK)


CAT_SIZE: Final = (38.0, 36.0)


def cat(fur: Rgb, pose: int, pen: Pen) -> None:
    """Sitting, seen from the front: pointed ears, whiskers, a tail around its side."""
    dark, light = mix(fur, BLACK, 0.35), mix(fur, WHITE, 0.45)
    tail = [(22.0, 32.0), (31.0, 32.0), (35.0, 25.0), (33.0 if pose % 2 else 36.0, 17.0)]
    pen.stroke(tail, 5.4, _INK)
    pen.stroke(tail, 4.0, fur)
    pen.blob(15, 27, 10.8, 9.6, _INK)
    pen.blob(15, 27, 10, 8.8, fur)
    pen.blob(15, 28, 4.5, 6.5, light)
    for side in (-1, 1):
        pen.blob(15 + side * 4, 34, 3.4, 2.0, dark)
        ear = [(15 + side * 9.4, 12.0), (15 + side * 9.2, 0.2), (15 + side * 1.8, 6.5)]
        pen.shape(ear, _INK)
        pen.shape([(15 + side * 8.2, 10.5), (15 + side * 8.1, 2.6), (15 + side * 2.6, 7.0)], (222, 150, 150))
    pen.blob(15, 13.5, 10.2, 8.8, _INK)
    pen.blob(15, 13.5, 9.4, 8.0, fur)
    for side in (-1, 1):
        pen.blob(15 + side * 4, 12.5, 2.3, 2.0, (196, 220, 90))
        pen.blob(15 + side * 4, 12.5, 0.9, 1.8, BLACK)
        pen.stroke([(15 + side * 3, 17), (15 + side * 11, 15.6)], 0.7, light)
        pen.stroke([(15 + side * 3, 18), (15 + side * 11, 19)], 0.7, light)
    pen.shape([(13.4, 15.6), (16.6, 15.6), (15, 17.6)], (222, 130, 130))


PARCEL_SIZE: Final = (36.0, 30.0)


def parcel(card: Rgb, pose: int, pen: Pen) -> None:
    """A cardboard box with tape and a label."""
    pen.shape([(1, 9), (8, 1), (35, 1), (35, 22), (28, 29), (1, 29)], _INK)
    pen.shape([(2, 9), (8.5, 2), (34, 2), (27.5, 9)], mix(card, WHITE, 0.25))
    pen.shape([(28, 9.4), (34.2, 3), (34.2, 21.6), (28, 28)], mix(card, BLACK, 0.3))
    pen.box(2, 9.5, 27.2, 28, card)
    tape = (232, 216, 170)
    pen.box(12.5, 9.5, 16.5, 28, tape)
    pen.shape([(12.5, 9), (18.5, 2), (22.5, 2), (16.5, 9)], tape)
    pen.box(4, 20, 10.5, 25.5, (246, 246, 240))


FIRE_SIZE: Final = (36.0, 46.0)
NUM_FLAMES: Final = 4


def fire(pose: int, pen: Pen) -> None:
    """Flames over two logs; the shape of the flames is the pose's."""
    rng = Random(pose)
    for colour, width, height in (
        ((226, 60, 20), 15.0, 43.0),
        ((250, 140, 24), 11.0, 32.0),
        ((255, 228, 96), 6.5, 19.0),
    ):
        pen.shape(_flame(18, 42, width, height, rng), colour)
    for turn in (-1, 1):
        pen.stroke([(18 - 13 * turn, 43.5), (18 + 13 * turn, 40)], 4, (84, 54, 34))


def _flame(x: float, bottom: float, width: float, height: float, rng: Random) -> list[Point]:
    tips = [(-0.62, 0.58), (0.05, 1.0), (0.6, 0.66)]
    points: list[Point] = [(x - width * 0.7, bottom), (x - width, bottom - height * 0.25)]
    for index, (across, up) in enumerate(tips):
        lean = rng.uniform(-0.18, 0.18)
        points.append((x + width * (across + lean), bottom - height * up * rng.uniform(0.86, 1.0)))
        if index < len(tips) - 1:
            valley = (across + tips[index + 1][0]) / 2
            points.append((x + width * valley, bottom - height * rng.uniform(0.36, 0.48)))
    return [*points, (x + width, bottom - height * 0.25), (x + width * 0.7, bottom)]


def car(paint: Rgb, pen: Pen, x: float, bottom: float, size: float) -> None:
    """From the side, wheels on `bottom`, `size` units long, its middle at `x`."""
    u = size / 64
    glass = (176, 206, 226)
    roof = [(-20, -14), (-12, -25), (11, -25), (21, -14)]
    pen.shape([(x + u * (a * 1.06), bottom + u * (b * 1.04)) for a, b in roof], _INK)
    pen.shape([(x + u * a, bottom + u * b) for a, b in roof], paint)
    pen.shape(
        [(x + u * a, bottom + u * b) for a, b in [(-16, -14.5), (-10, -22.5), (-1.5, -22.5), (-1.5, -14.5)]], glass
    )
    pen.shape([(x + u * a, bottom + u * b) for a, b in [(1.5, -14.5), (1.5, -22.5), (9.5, -22.5), (16, -14.5)]], glass)
    pen.box(x - 32 * u, bottom - 16 * u, x + 32 * u, bottom - 3.5 * u, _INK, 4 * u)
    pen.box(x - 31 * u, bottom - 15 * u, x + 31 * u, bottom - 4.5 * u, paint, 3.5 * u)
    pen.box(x - 31 * u, bottom - 12.5 * u, x - 27 * u, bottom - 9.5 * u, (250, 240, 170))
    pen.box(x + 27 * u, bottom - 12.5 * u, x + 31 * u, bottom - 9.5 * u, (220, 60, 50))
    for wheel in (-18, 18):
        pen.blob(x + wheel * u, bottom - 4.5 * u, 6 * u, 6 * u, (24, 24, 26))
        pen.blob(x + wheel * u, bottom - 4.5 * u, 2.6 * u, 2.6 * u, (170, 170, 176))


def pick_fur(kind: str, rng: Random) -> Rgb:
    """A colour for one "dog", "cat", "parcel" or "car"."""
    choices = {"dog": _DOG_FUR, "cat": _CAT_FUR, "parcel": _BOX, "car": _CARS}[kind]
    return vary(rng.choice(choices), rng, 10)


ANIMALS: Final = MappingProxyType[str, tuple[tuple[float, float], Callable[[Rgb, int, Pen], None]]](
    {"dog": (DOG_SIZE, dog), "cat": (CAT_SIZE, cat), "parcel": (PARCEL_SIZE, parcel)}
)
