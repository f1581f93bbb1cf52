"""How one room looks: its colours, where things stand, what its camera is like. Drawn from a seed, it never changes.

Needs Pillow only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from types import MappingProxyType
from typing import Final

from model_shards.nano.phrases import COLOURS, Colour, Place
from model_shards.nano.sprites import BLACK, WHITE, Pen, Point, Rgb, Wear, car, mix, pick_fur, vary

SIDE: Final = 224.0
MARGIN: Final = 6.0  # of the room beyond the picture's edge, which a shaking camera sees

_WALLS: Final[tuple[Rgb, ...]] = (
    (214, 204, 186), (186, 198, 206), (196, 206, 184), (216, 190, 176), (172, 176, 184), (206, 200, 214),
    (158, 172, 164), (226, 222, 208), (186, 166, 150), (150, 160, 178),
)  # fmt: skip
_FLOORS: Final[tuple[Rgb, ...]] = (
    (150, 112, 78), (122, 96, 74), (172, 146, 112), (110, 112, 118), (138, 136, 128), (96, 84, 80), (132, 122, 140),
)  # fmt: skip
_DOORS: Final[tuple[Rgb, ...]] = ((134, 88, 54), (168, 126, 82), (96, 110, 126), (206, 200, 190), (110, 70, 60))
_FRAMES: Final[tuple[Rgb, ...]] = ((240, 238, 230), (96, 74, 58), (60, 62, 68), (190, 180, 164))
_COLUMNS: Final = MappingProxyType[Place, float]({"left": 33.0, "middle": 88.0, "right": 141.0, "door": 195.0})


@dataclass(frozen=True, slots=True)
class Look:
    """Lengths are in units of a picture 224 wide. Places give the middle of who stands there.

    size: of all things, relative. light, contrast, warmth: of the camera's picture. blur: radius in pixels.
    noise: standard deviation in levels. shake: how far the camera moves. decor: things at the wall, by index.
    """

    seed: int
    wall: Rgb
    floor: Rgb
    door: Rgb
    frame: Rgb
    sky: Rgb
    ground: Rgb
    horizon: float
    window: tuple[float, float, float, float]
    door_x: float
    columns: Mapping[Place, float]
    back_row: float
    front_row: float
    size: float
    wears: Mapping[Colour, Wear]
    furs: Mapping[str, Rgb]
    cover: Rgb
    light: float
    contrast: float
    warmth: float
    blur: float
    noise: float
    shake: float
    decor: tuple[int, ...]

    @staticmethod
    def draw(seed: int) -> Look:
        rng = Random(seed)
        left, top = rng.uniform(12, 42), rng.uniform(16, 26)
        return Look(
            seed=seed,
            wall=vary(rng.choice(_WALLS), rng, 14),
            floor=vary(rng.choice(_FLOORS), rng, 14),
            door=vary(rng.choice(_DOORS), rng, 12),
            frame=vary(rng.choice(_FRAMES), rng, 10),
            sky=vary(rng.choice(((168, 206, 236), (206, 216, 222), (232, 214, 190))), rng, 10),
            ground=vary(rng.choice(((112, 118, 112), (124, 148, 96), (140, 136, 130))), rng, 10),
            horizon=rng.uniform(132, 146),
            window=(left, top, left + rng.uniform(76, 96), top + rng.uniform(48, 54)),
            door_x=rng.uniform(193, 198),
            columns={place: x + rng.uniform(-4, 4) for place, x in _COLUMNS.items()},
            back_row=rng.uniform(164, 170),
            front_row=rng.uniform(203, 212),
            size=rng.uniform(0.94, 1.1),
            wears={colour: Wear.draw(colour, rng) for colour in COLOURS},
            furs={kind: pick_fur(kind, rng) for kind in ("dog", "cat", "parcel", "car")},
            cover=vary(rng.choice(((34, 26, 20), (22, 22, 24), (48, 40, 34), (30, 34, 30))), rng, 8),
            light=rng.uniform(0.8, 1.12),
            contrast=rng.uniform(0.85, 1.12),
            warmth=rng.uniform(-0.06, 0.06),
            blur=rng.choice((0.0, 0.0, 0.0, rng.uniform(0.4, 1.1))),
            noise=rng.choice((0.0, 3.0, 6.0, 9.0)),
            shake=rng.choice((0.0, 0.5, 1.0, 2.5)),
            decor=tuple(index for index in range(NUM_DECOR) if rng.random() < 0.4),
        )


NUM_DECOR: Final = 5


def draw_room(look: Look, scale: float) -> Pen:
    """The room with its door closed and nothing outside. Its upper left corner is (-MARGIN, -MARGIN)."""
    pen = Pen(SIDE + 2 * MARGIN, SIDE + 2 * MARGIN, scale, look.wall)
    m, end = MARGIN, SIDE + 2 * MARGIN
    horizon = look.horizon + m
    pen.box(0, 0, end, 8 + m, mix(look.wall, WHITE, 0.25))
    pen.box(0, horizon, end, end, look.floor)
    for row in range(1, 6):  # boards come closer together towards the wall
        y = horizon + (end - horizon) * (row / 6) ** 1.6
        pen.box(0, y, end, y + 0.8, mix(look.floor, BLACK, 0.14))
    pen.box(0, horizon - 4, end, horizon, mix(look.frame, look.wall, 0.35))
    _draw_decor(look, pen)
    _draw_window(look, pen, m)
    draw_door(look, pen, (m, m), is_open=False)
    return pen


def _draw_window(look: Look, pen: Pen, m: float) -> None:
    left, top, right, bottom = (value + m for value in look.window)
    pen.box(left - 4, top - 4, right + 4, bottom + 4, look.frame)
    draw_outside(look, pen, left, top)
    pen.box(left - 6, bottom + 3, right + 6, bottom + 6, mix(look.frame, BLACK, 0.2))


def draw_outside(look: Look, pen: Pen, left: float, top: float, *, with_car: bool = False) -> None:
    """What is behind the panes; (left, top) is where their corner is on the sheet."""
    width, height = look.window[2] - look.window[0], look.window[3] - look.window[1]
    street = top + height * 0.7
    pen.box(left, top, left + width, top + height, look.sky)
    pen.box(left, street, left + width, top + height, look.ground)
    hedge = mix(look.ground, (60, 110, 60), 0.5)
    for index in range(4):
        pen.blob(left + width * (index + 0.5) / 4, street, width / 7.5, 5 + 2 * ((look.seed >> index) & 1), hedge)
    pen.box(left, street + 2, left + width, top + height, look.ground)
    if with_car:
        x = left + width * (0.44 + 0.12 * (look.seed % 7) / 6)
        car(look.furs["car"], pen, x, top + height - 3, min(66.0, width - 14))
    pen.box(left + width / 2 - 1, top, left + width / 2 + 1, top + height, look.frame)


DOOR_SIZE: Final = (36.0, 84.0)
DOOR_REACH: Final = 20.0  # how far an open leaf stands out to the left of the opening


def draw_door(look: Look, pen: Pen, zero: Point, *, is_open: bool) -> None:
    """zero: where the picture's corner is on the sheet."""
    width, height = DOOR_SIZE
    left, bottom = look.door_x - width / 2 + zero[0], look.horizon + 3 + zero[1]
    right, top = left + width, bottom - height
    pen.box(left - 4, top - 4, right + 4, bottom, look.frame)
    if is_open:
        pen.box(left, top, right, bottom, (26, 24, 30))
        pen.shape([(left, bottom), (right, bottom), (right, bottom - 10), (left + 8, bottom - 14)], (52, 46, 44))
        edge = left - DOOR_REACH
        pen.shape([(left, top), (edge, top + 6), (edge, bottom + 9), (left, bottom)], mix(look.door, BLACK, 0.45))
        pen.shape([(left, top + 1), (edge + 1, top + 7), (edge + 1, bottom + 7), (left, bottom - 1)], look.door)
        pen.blob(edge + 4, (top + bottom) / 2 + 6, 1.8, 1.8, (230, 200, 90))
        return
    pen.box(left, top, right, bottom, look.door)
    inset = mix(look.door, BLACK, 0.2)
    for upper, lower in ((0.08, 0.42), (0.52, 0.92)):
        pen.box(left + 6, top + height * upper, right - 6, top + height * lower, inset, 1.5)
        pen.box(left + 7.5, top + height * upper + 1.5, right - 7.5, top + height * lower - 1.5, look.door, 1)
    pen.blob(left + 4, (top + bottom) / 2 + 3, 2, 2, (230, 200, 90))


def _draw_decor(look: Look, pen: Pen) -> None:
    """Things which are never talked about, between the places."""
    draws = (_draw_picture, _draw_lamp, _draw_plant, _draw_rug, _draw_shelf)
    for index in look.decor:
        draws[index](look, pen, Random(look.seed + index))


def _draw_picture(look: Look, pen: Pen, rng: Random) -> None:
    x, y = MARGIN + rng.uniform(143, 152), MARGIN + rng.uniform(26, 44)
    tones = [vary((150, 140, 130), rng, 70) for _ in range(2)]
    pen.box(x - 15, y - 12, x + 15, y + 12, look.frame)
    pen.box(x - 12, y - 9, x + 12, y + 9, tones[0])
    pen.shape([(x - 12, y + 9), (x - 3, y - 3), (x + 4, y + 4), (x + 12, y - 1), (x + 12, y + 9)], tones[1])


def _draw_lamp(look: Look, pen: Pen, rng: Random) -> None:
    x = MARGIN + rng.uniform(112, 168)
    pen.box(x - 0.7, 0, x + 0.7, MARGIN + 8, (60, 60, 60))
    pen.shape([(x - 9, MARGIN + 15), (x - 5, MARGIN + 7), (x + 5, MARGIN + 7), (x + 9, MARGIN + 15)], look.frame)


def _draw_plant(look: Look, pen: Pen, rng: Random) -> None:
    x, y = MARGIN + rng.choice((4.0, 62.0, 115.0)), MARGIN + look.horizon + 8
    leaf = vary((60, 120, 66), rng, 18)
    for turn in range(-3, 4):
        tip: Point = (x + turn * 4.5, y - 34 + abs(turn) * 4 + rng.uniform(-2, 2))
        pen.stroke([(x, y - 10), tip], 2.4, mix(leaf, BLACK, 0.12 * abs(turn)))
    pen.shape([(x - 7, y - 11), (x + 7, y - 11), (x + 5, y + 2), (x - 5, y + 2)], vary((170, 96, 66), rng, 20))


def _draw_rug(look: Look, pen: Pen, rng: Random) -> None:
    tone = mix(vary((140, 100, 100), rng, 50), look.floor, 0.35)
    x, y, width = MARGIN + rng.uniform(80, 130), MARGIN + rng.uniform(188, 200), rng.uniform(56, 84)
    pen.blob(x, y, width, 15, mix(tone, BLACK, 0.18))
    pen.blob(x, y, width - 4, 12.5, tone)


def _draw_shelf(look: Look, pen: Pen, rng: Random) -> None:
    left, y = MARGIN + look.window[2] + rng.uniform(8, 14), MARGIN + rng.uniform(58, 72)
    pen.box(left, y, left + 36, y + 3, mix(look.frame, BLACK, 0.25))
    x = left + 3
    while x < left + 28:
        width, height = rng.uniform(3, 6), rng.uniform(9, 15)
        pen.box(x, y - height, x + width, y, vary((130, 120, 120), rng, 60))
        x += width + 0.6


def draw_cover(look: Look, scale: float) -> Pen:
    """What the camera sees through whatever covers its lens."""
    side = SIDE + 2 * MARGIN
    pen = Pen(side, side, scale, look.cover)
    rng = Random(look.seed + 1)
    for _ in range(6):
        x, y, size = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(40, 110)
        pen.blob(x, y, size, size * rng.uniform(0.6, 1.2), vary(look.cover, rng, 9))
    return pen
