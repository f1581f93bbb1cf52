"""The watched room's picture at one moment.

Rule: a picture depends on the seed, the scene and the time only, whatever was painted before. Needs numpy and Pillow
only; about half a millisecond per picture of 224 × 224.
"""

from __future__ import annotations

from functools import lru_cache
from random import Random
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageFilter

from model_shards.nano.phrases import Colour
from model_shards.nano.room import (
    DOOR_REACH,
    DOOR_SIZE,
    MARGIN,
    SIDE,
    Look,
    draw_cover,
    draw_door,
    draw_outside,
    draw_room,
)
from model_shards.nano.scene import Person, Scene
from model_shards.nano.sprites import (
    ANIMALS,
    FALLEN_SCALE,
    FIRE_SIZE,
    NUM_FLAMES,
    NUM_POSES,
    PERSON_SIZE,
    Pen,
    fire,
    person,
)

POSE_NS: Final = 2_000_000_000  # people and animals stay in one pose for about so long
FLAME_NS: Final = 150_000_000
_NUM_NOISES: Final = 12  # drawn once per process and level
_LEVELS: Final = np.arange(256, dtype=np.float64)


class Painter:
    """Paints one room; keeps sprites which have been drawn once."""

    def __init__(self, look_seed: int, side: int = 224) -> None:
        """side: of the picture, in pixels."""
        self.look = Look.draw(look_seed)
        self._side = side
        self._scale = side / SIDE
        self._sprites: dict[tuple[object, ...], Image.Image] = {}
        self._curves: dict[tuple[int, bool], list[int]] = {}

    def paint(self, scene: Scene, t_ns: int) -> npt.NDArray[np.uint8]:
        """(side, side, 3) uint8, RGB."""
        return np.asarray(self.picture(scene, t_ns))

    def picture(self, scene: Scene, t_ns: int) -> Image.Image:
        rng = Random(self.look.seed * 1_000_003 + t_ns)
        shake = (rng.gauss(0, self.look.shake), rng.gauss(0, self.look.shake))
        flicker = rng.gauss(0, 0.012)
        if scene.lens_covered:
            canvas = self._crop(self._cover(), shake).point(self._curve(flicker, light_on=True))
        else:
            canvas = self._crop(self._room(), shake)
            self._put_things(canvas, scene, t_ns, shake)
            canvas = canvas.point(self._curve(flicker, light_on=scene.light_on))
            self._put_fire(canvas, scene, t_ns, shake)
        return self._grain(canvas, rng)

    # --- what stays where it is -----------------------------------------------------------------------------------

    def _room(self) -> Image.Image:
        if ("room",) not in self._sprites:
            self._sprites["room",] = draw_room(self.look, self._scale).finish(self._blur)
        return self._sprites["room",]

    def _cover(self) -> Image.Image:
        if ("cover",) not in self._sprites:
            cover = draw_cover(self.look, self._scale).finish()
            self._sprites["cover",] = cover.filter(ImageFilter.GaussianBlur(16 * self._scale))
        return self._sprites["cover",]

    @property
    def _blur(self) -> float:
        return self.look.blur * self._scale

    def _crop(self, sheet: Image.Image, shake: tuple[float, float]) -> Image.Image:
        left, top = (self._pixels(MARGIN - max(-MARGIN, min(MARGIN, by))) for by in shake)
        return sheet.crop((left, top, left + self._side, top + self._side))

    def _pixels(self, units: float) -> int:
        return round(units * self._scale)

    # --- what comes and goes --------------------------------------------------------------------------------------

    def _put_things(self, canvas: Image.Image, scene: Scene, t_ns: int, shake: tuple[float, float]) -> None:
        look = self.look
        if scene.car:
            window = look.window
            self._put(canvas, self._outside(), (window[0] + shake[0], window[1] + shake[1]))
        if scene.door_open:
            left = look.door_x - DOOR_SIZE[0] / 2 - DOOR_REACH - 2
            top = look.horizon + 3 - DOOR_SIZE[1] - 6
            self._put(canvas, self._open_door(left, top), (left + shake[0], top + shake[1]))
        for figure in sorted(scene.people, key=lambda figure: figure.fallen):
            sprite, (x, bottom) = self._person(figure, t_ns)
            self._stand(canvas, sprite, x + shake[0], bottom + shake[1])
        for kind, place in (("dog", scene.dog), ("cat", scene.cat), ("parcel", scene.parcel)):
            if place is not None:
                pose = 0 if kind == "parcel" else self._pose(kind, t_ns)
                x = look.columns[place] + self._offset(kind, 3)
                self._stand(canvas, self._animal(kind, pose), x + shake[0], look.front_row + shake[1])

    def _put_fire(self, canvas: Image.Image, scene: Scene, t_ns: int, shake: tuple[float, float]) -> None:
        if scene.fire is not None:
            sprite = self._flames(t_ns // FLAME_NS % NUM_FLAMES)
            self._stand(canvas, sprite, self.look.columns[scene.fire] + shake[0], self.look.front_row + shake[1])

    def _stand(self, canvas: Image.Image, sprite: Image.Image, x: float, bottom: float) -> None:
        """With its feet at (x, bottom), inside the picture."""
        left = min(max(self._pixels(x) - sprite.width // 2, 0), self._side - sprite.width)
        canvas.paste(sprite, (left, self._pixels(bottom) - sprite.height), sprite)

    def _put(self, canvas: Image.Image, sprite: Image.Image, corner: tuple[float, float]) -> None:
        mask = sprite if sprite.mode == "RGBA" else None
        canvas.paste(sprite, (self._pixels(corner[0]), self._pixels(corner[1])), mask)

    def _person(self, figure: Person, t_ns: int) -> tuple[Image.Image, tuple[float, float]]:
        """The sprite, and where its feet are."""
        place = (self.look.columns[figure.place] + self._offset(figure.colour, 3), self.look.back_row)
        pose = self._pose(figure.colour, t_ns)
        if figure.fallen:
            return self._lying(figure.colour, pose), (place[0], place[1] + 6)
        sway = Random(self.look.seed + t_ns // POSE_NS).uniform(-0.8, 0.8)
        return self._standing(figure.colour, pose), (place[0] + sway, place[1])

    def _pose(self, colour: str, t_ns: int) -> int:
        return Random(f"{self.look.seed} {colour} {t_ns // POSE_NS}").randrange(NUM_POSES)

    def _offset(self, colour: str, most: float) -> float:
        return Random(f"{self.look.seed} {colour}").uniform(-most, most)

    # --- sprites --------------------------------------------------------------------------------------------------

    def _standing(self, colour: Colour, pose: int) -> Image.Image:
        key = ("standing", colour, pose)
        if key not in self._sprites:
            scale = self._scale * self.look.size
            pen = Pen(*PERSON_SIZE, scale)
            person(self.look.wears[colour], pose, pen)
            self._sprites[key] = pen.finish(self._blur)
        return self._sprites[key]

    def _lying(self, colour: Colour, pose: int) -> Image.Image:
        key = ("lying", colour, pose)
        if key not in self._sprites:
            pen = Pen(*PERSON_SIZE, self._scale * self.look.size * FALLEN_SCALE)
            person(self.look.wears[colour], pose, pen)
            turn = Image.Transpose.ROTATE_90 if self._offset(colour, 1) > 0 else Image.Transpose.ROTATE_270
            self._sprites[key] = pen.finish(self._blur).transpose(turn)
        return self._sprites[key]

    def _animal(self, kind: str, pose: int) -> Image.Image:
        key = (kind, pose)
        if key not in self._sprites:
            size, draw = ANIMALS[kind]
            pen = Pen(*size, self._scale * self.look.size)
            draw(self.look.furs[kind], pose, pen)
            sprite = pen.finish(self._blur)
            if self._offset(kind, 1) > 0 and kind != "parcel":
                sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            self._sprites[key] = sprite
        return self._sprites[key]

    def _flames(self, pose: int) -> Image.Image:
        if ("fire", pose) not in self._sprites:
            pen = Pen(*FIRE_SIZE, self._scale * self.look.size)
            fire(pose, pen)
            self._sprites["fire", pose] = pen.finish(self._blur)
        return self._sprites["fire", pose]

    def _outside(self) -> Image.Image:
        if ("car",) not in self._sprites:
            left, top, right, bottom = self.look.window
            pen = Pen(right - left, bottom - top, self._scale, self.look.sky)
            draw_outside(self.look, pen, 0, 0, with_car=True)
            self._sprites["car",] = pen.finish(self._blur)
        return self._sprites["car",]

    def _open_door(self, left: float, top: float) -> Image.Image:
        if ("door",) not in self._sprites:
            pen = Pen(DOOR_SIZE[0] + DOOR_REACH + 8, DOOR_SIZE[1] + 20, self._scale)
            draw_door(self.look, pen, (-left, -top), is_open=True)
            self._sprites["door",] = pen.finish(self._blur)
        return self._sprites["door",]

    # --- the camera -----------------------------------------------------------------------------------------------

    def _curve(self, flicker: float, *, light_on: bool) -> list[int]:
        """What the camera makes of each level of red, green and blue; flicker in steps of half a per cent."""
        key = (round(flicker * 200), light_on)
        if key not in self._curves:
            self._curves[key] = self._make_curve(1 + key[0] / 200, light_on=light_on)
        return self._curves[key]

    def _make_curve(self, brightness: float, *, light_on: bool) -> list[int]:
        look = self.look
        levels = (_LEVELS - 128) * look.contrast + 128 * look.light
        tint = (1 + look.warmth, 1.0, 1 - look.warmth) if light_on else (0.36, 0.4, 0.52)
        bands = [np.clip(levels * brightness * part + (0 if light_on else 6), 0, 255) for part in tint]
        return [int(level) for level in np.concatenate(bands).round()]

    def _grain(self, canvas: Image.Image, rng: Random) -> Image.Image:
        if not self.look.noise:
            return canvas
        noise = _noises(self.look.noise, self._side)[rng.randrange(_NUM_NOISES)]
        left, top = rng.randrange(16), rng.randrange(16)
        return ImageChops.add(canvas, noise.crop((left, top, left + self._side, top + self._side)), 1, -128)


@lru_cache(maxsize=8)
def _noises(level: float, side: int) -> tuple[Image.Image, ...]:
    draw = np.random.default_rng(int(level * 100))
    sheets = draw.normal(128, level, (_NUM_NOISES, side + 16, side + 16, 3)).clip(0, 255).astype(np.uint8)
    return tuple(Image.fromarray(sheet) for sheet in sheets)
