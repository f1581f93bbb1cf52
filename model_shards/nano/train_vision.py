"""Stage "vision": teaches nano's eyes, by heads which are thrown away afterwards.

Rule: a head is one linear layer on a picture's flattened embeddings, so that whatever it can read, the language model
can read too. Pictures are painted as they are needed; none comes twice, but a scene that was read wrongly comes again,
in the same room.
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_shards.nano import sizes
from model_shards.nano.painter import Painter
from model_shards.nano.phrases import COLOURS, MAX_PEOPLE, PLACES, SCENE_EVENTS
from model_shards.nano.scene import FLOOR_PLACES, Scene, apply, changes_between, possible_changes, random_scene
from model_shards.nano.training import Schedule, Training
from model_shards.vision import PatchBatch, VisionEncoder

FEW_SEQUENCES, MANY_SEQUENCES = 12, 24  # per step, of three pictures each: many steps first, then sure ones
NUM_ROOMS: Final = 160  # which take turns
ROOM_LASTS: Final = 20  # sequences, on average: a new room costs as much as ten pictures
EVAL_SEED: Final = 1_000_000_000  # rooms from here on are never trained on
UNKNOWN: Final = -100  # behind a covered lens
FALLEN: Final = 0.3  # of the people: twice as many as there are, since who lies beside whom is the hardest to see
MAX_AGAIN: Final = 64  # scenes which wait to come again

_NUM_CLASSES: Final = MappingProxyType[str, int](
    {
        "count": MAX_PEOPLE + 1,
        **{f"at_{place}": len(COLOURS) + 1 for place in PLACES},
        **{f"fallen_{place}": 2 for place in PLACES},
        **{f"where_{colour}": len(PLACES) + 1 for colour in COLOURS},
        "dog": len(PLACES) + 1,
        "cat": len(PLACES) + 1,
        "parcel": len(FLOOR_PLACES) + 1,
        "fire": len(FLOOR_PLACES) + 1,
        "car": 2,
        "light": 2,
        "door": 2,
        "covered": 2,
    }
)
ATTRIBUTES: Final = tuple(_NUM_CLASSES)
_WEIGHTS: Final = MappingProxyType[str, float]({"count": 2.0, "dog": 2.0, "cat": 2.0, "parcel": 1.5})


def attribute_classes() -> list[int]:
    """How many classes each of ATTRIBUTES has."""
    return list(_NUM_CLASSES.values())


def describe(scene: Scene) -> list[int]:
    """The class of each of ATTRIBUTES; UNKNOWN where the covered lens hides it."""
    by_place = {person.place: person for person in scene.people}
    seen = {
        "count": len(scene.people),
        "car": int(scene.car),
        "light": int(scene.light_on),
        "door": int(scene.door_open),
    }
    for place in PLACES:
        person = by_place.get(place)
        seen[f"at_{place}"] = 0 if person is None else COLOURS.index(person.colour) + 1
        seen[f"fallen_{place}"] = int(person is not None and person.fallen)
    for colour in COLOURS:
        person = scene.person_in(colour)
        seen[f"where_{colour}"] = 0 if person is None else PLACES.index(person.place) + 1
    for spot, place in (("dog", scene.dog), ("cat", scene.cat), ("parcel", scene.parcel), ("fire", scene.fire)):
        seen[spot] = 0 if place is None else PLACES.index(place) + 1
    if scene.lens_covered:
        seen = dict.fromkeys(seen, UNKNOWN)
    return [{**seen, "covered": int(scene.lens_covered)}[name] for name in ATTRIBUTES]


@dataclass(frozen=True, slots=True)
class Examples:
    """B sequences of three pictures: before, the same scene a little later, and after something may have changed.

    pixels: (3 · B, 112, 112, 3) uint8: all first pictures, all second ones, all third ones.
    attributes: (3 · B, len(ATTRIBUTES)) int64. events: (B, len(SCENE_EVENTS)) float32, what the third one shows anew.
    """

    pixels: Tensor
    attributes: Tensor
    events: Tensor


class Rooms:
    """An endless supply of pictures."""

    def __init__(self, seed: int, num_rooms: int = NUM_ROOMS) -> None:
        self._rng = Random(seed)
        self._next_room = seed
        self._painters = [self._new_painter() for _ in range(num_rooms)]
        self._shown: list[tuple[int, Scene]] = []
        self._again: deque[tuple[int, Scene]] = deque(maxlen=MAX_AGAIN)

    def _new_painter(self) -> Painter:
        self._next_room += 1
        return Painter(self._next_room)

    def examples(self, num_sequences: int) -> Examples:
        pictures: list[list[npt.NDArray[np.uint8]]] = [[], [], []]
        scenes: list[list[Scene]] = [[], [], []]
        self._shown = [self._next(number < num_sequences // 2) for number in range(num_sequences)]
        for index, before in self._shown:
            t_ns = self._rng.randrange(10**12)
            for turn, scene in enumerate((before, before, self._later(before))):
                pictures[turn].append(self._painters[index].paint(scene, t_ns + turn * 10**9))
                scenes[turn].append(scene)
        self._renew()
        every = [scene for turn in scenes for scene in turn]
        return Examples(
            pixels=shrink(np.stack([picture for turn in pictures for picture in turn])),
            attributes=torch.tensor([describe(scene) for scene in every]),
            events=torch.tensor([_events(*pair) for pair in zip(scenes[0], scenes[2], strict=True)]),
        )

    def read(self, is_wrong: Tensor) -> None:
        """How the last examples were read. is_wrong: (B,) bool."""
        self._again.extend(shown for shown, wrong in zip(self._shown, is_wrong.tolist(), strict=True) if wrong)

    def _next(self, may_be_again: bool) -> tuple[int, Scene]:
        """A room, and what is in it."""
        if may_be_again and self._again:
            return self._again.popleft()
        return self._rng.randrange(len(self._painters)), self._scene()

    def _renew(self) -> None:
        """Rooms go, but not those in which something is to be seen again."""
        kept = {index for index, _ in self._again}
        for index, _ in self._shown:
            if index not in kept and self._rng.random() < 1 / ROOM_LASTS:
                self._painters[index] = self._new_painter()

    def _scene(self) -> Scene:
        if self._rng.random() < 0.04:
            return Scene(lens_covered=True)
        return random_scene(self._rng, self._rng.choice((0.15, 0.4, 0.7)), fallen=FALLEN)

    def _later(self, scene: Scene) -> Scene:
        """The same in every fifth case; two changes in one of ten."""
        for _ in range(self._rng.choices((0, 1, 2), weights=(2, 7, 1))[0]):
            changes = possible_changes(scene, self._rng)
            scene = apply(scene, changes[self._rng.choice(list(changes))])
        return scene


def _events(before: Scene, after: Scene) -> list[float]:
    happened = {change.event for change in changes_between(before, after)}
    return [float(event in happened) for event in SCENE_EVENTS]


def shrink(pictures: npt.NDArray[np.uint8]) -> Tensor:
    """(B, 224, 224, 3) to (B, 112, 112, 3) uint8 as model_shards/image.py does it, within one level of 255; a third of
    the time."""
    channels_first = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    side = sizes.CELL_PX
    small = F.interpolate(channels_first, size=(side, side), mode="bicubic", antialias=True)
    return small.permute(0, 2, 3, 1)


def to_patches(pixels: Tensor) -> PatchBatch:
    """Pictures (B, 112, 112, 3) uint8 as the encoder takes them: equal to `gather_patches` of `slice_image`."""
    patch, side = sizes.VISION.patch_size, sizes.VISION.image_size // sizes.VISION.patch_size
    cells = pixels.view(-1, side, patch, side, patch, 3)  # (B, row, y, col, x, channel)
    vectors = cells.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)
    rows = torch.arange(side).repeat_interleave(side).expand(len(pixels), -1)
    cols = torch.arange(side).repeat(side).expand(len(pixels), -1)
    return PatchBatch(vectors.float().div_(255).sub_(0.5).div_(0.5), rows, cols, rows * side + cols, None, side)


class Seeing(nn.Module):
    """The encoder with its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = VisionEncoder(sizes.VISION)
        width = sizes.VISION.query_num * sizes.VISION.embed_dim
        self.attributes = nn.Linear(width, sum(_NUM_CLASSES.values()))
        self.events = nn.Linear(2 * width, len(SCENE_EVENTS))
        _initialise(self.encoder)

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """returns: (B, query_num · embed_dim), and the logits of each of ATTRIBUTES."""
        flat = self.encoder.encode_batch(to_patches(pixels)).flatten(1)
        return flat, list(self.attributes(flat).float().split(list(_NUM_CLASSES.values()), dim=1))


def _initialise(encoder: VisionEncoder) -> None:
    for name, parameter in encoder.named_parameters():
        if name.endswith(("query", "position_embedding.weight")):
            nn.init.normal_(parameter, std=0.02 if "position" in name else 1.0)
        elif parameter.ndim > 1:
            nn.init.normal_(
                parameter, std=parameter[0].numel() ** -0.5 * (0.5 if "out_proj" in name or "fc2" in name else 1)
            )
        elif "norm" not in name and "ln_" not in name:
            nn.init.zeros_(parameter)


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as two products and a softmax: on a CPU in bfloat16 its way back is five times faster for 64 patches
    than torch's own, with which it agrees up to rounding."""
    own = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _attend  # type: ignore[assignment]  # takes what is used of it
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    assert attn_mask is None, "all pictures are of one size"
    weights = ((query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)).softmax(-1)
    heads: Tensor = weights.to(value.dtype) @ value
    return heads


def loss_of(model: Seeing, examples: Examples) -> tuple[Tensor, dict[str, float], Tensor]:
    """returns: the loss, numbers, and in which of the B sequences something was read wrongly, (B,) bool."""
    with torch.autocast("cpu", torch.bfloat16):
        flat, logits = model(examples.pixels)
        before, again, after = flat.chunk(3)
        events = model.events(torch.cat([torch.cat([again, before], 1), torch.cat([again, after], 1)])).float()
    weights = torch.tensor([_WEIGHTS.get(name, 1.0) for name in ATTRIBUTES])
    losses = torch.stack([F.cross_entropy(of, examples.attributes[:, i]) for i, of in enumerate(logits)])
    attributes = (losses * weights).sum() / weights.sum()
    nothing = torch.zeros_like(examples.events)
    changes = F.binary_cross_entropy_with_logits(events, torch.cat([nothing, examples.events])) * 4
    steady = _difference(logits)
    with torch.no_grad():
        wrong = _wrong(logits, examples.attributes)
    numbers = {
        "attributes": float(attributes.detach()),
        "changes": float(changes.detach()),
        "steady": float(steady.detach()),
        "right": 1 - float(wrong.float().mean()),
        "pictures_right": 1 - float(wrong.any(1).float().mean()),
    }
    return attributes + changes + 0.1 * steady, numbers, wrong.any(1).view(3, -1).any(0)


def _difference(logits: Sequence[Tensor]) -> Tensor:
    """How much two pictures of one scene disagree, as a divergence both ways, mean over attributes."""
    sums = []
    for of in logits:
        first, second, _ = of.log_softmax(1).chunk(3)
        sums.append(((first.exp() - second.exp()) * (first - second)).sum(1).mean())
    return torch.stack(sums).mean()


def _wrong(logits: Sequence[Tensor], truth: Tensor) -> Tensor:
    """(B, len(ATTRIBUTES)) bool."""
    said = torch.stack([of.argmax(1) for of in logits], dim=1)
    return (said != truth) & (truth != UNKNOWN)


@torch.inference_mode()
def evaluate(model: nn.Module, rooms: Rooms, num_batches: int = 8) -> Mapping[str, float]:
    """Shares of pictures of unseen rooms. flicker: pictures in which an attribute differs from one second before
    though nothing has changed; event_*: of sequences with a change, and of those without."""
    assert isinstance(model, Seeing)
    wrong, flicker, missed, false = [], [], [], []
    for _ in range(num_batches):
        examples = rooms.examples(64)
        flat, logits = model(examples.pixels)
        before, again, after = flat.chunk(3)
        wrong.append(_wrong(logits, examples.attributes))
        said = torch.stack([of.argmax(1) for of in logits], dim=1).chunk(3)
        known = examples.attributes.chunk(3)[0] != UNKNOWN
        flicker.append(((said[0] != said[1]) & known).any(1))
        happened = model.events(torch.cat([again, after], 1)) > 0
        missed.append((happened != examples.events.bool()).any(1))
        false.append((model.events(torch.cat([again, before], 1)) > 0).any(1))
    each = torch.cat(wrong).float().mean(0)
    scores = {
        "attributes_right": 1 - float(each.mean()),
        "pictures_wrong": float(torch.cat(wrong).any(1).float().mean()),
        "flicker": float(torch.cat(flicker).float().mean()),
        "event_wrong": float(torch.cat(missed).float().mean()),
        "event_false": float(torch.cat(false).float().mean()),
    }
    return scores | {name: 1 - float(each[i]) for i, name in enumerate(ATTRIBUTES)}


def train(folder: Path, minutes: float) -> None:
    """Train in `folder`, on one core."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Seeing()
    schedule = Schedule(minutes=minutes, rate=1.5e-3, constant=0.2, average=0.998, eval_every_minutes=4.0)
    training = Training(folder, model, schedule)
    rooms = Rooms(seed=training.step * 1000)
    unseen = Rooms(EVAL_SEED)

    def loss(step: int, passed: float) -> tuple[Tensor, Mapping[str, float]]:
        value, numbers, is_wrong = loss_of(model, rooms.examples(FEW_SEQUENCES if passed < 0.6 else MANY_SEQUENCES))
        rooms.read(is_wrong)
        return value, numbers

    with plain_attention():
        best = training.run(loss, lambda averaged: evaluate(averaged, unseen))
    scores = evaluate(best, Rooms(2 * EVAL_SEED), num_batches=40)
    (folder / "scores.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
