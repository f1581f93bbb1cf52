import numpy as np
import pytest
import torch

from model_shards.image import slice_image
from model_shards.nano import sizes
from model_shards.nano.painter import Painter
from model_shards.nano.scene import Person, Scene
from model_shards.nano.train_vision import (
    ATTRIBUTES,
    UNKNOWN,
    Rooms,
    Seeing,
    attribute_classes,
    describe,
    evaluate,
    loss_of,
    plain_attention,
    shrink,
    to_patches,
)

pytestmark = pytest.mark.filterwarnings("ignore:CUDA")


def pictures() -> np.ndarray:
    scene = Scene(people=(Person("red", "left"), Person("white", "door", True)), dog="middle", car=True)
    return np.stack([Painter(seed).paint(scene, seed) for seed in range(4)])


def test_training_sees_what_the_camera_gives_within_one_level():
    at_run_time = Seeing().encoder.gather([slice_image(picture, sizes.VISION.slices)[0] for picture in pictures()])
    trained = to_patches(shrink(pictures()))
    assert (trained.pixels - at_run_time.pixels).abs().max() <= 1.01 * 2 / 255
    for name in ("rows", "cols", "positions"):
        assert torch.equal(getattr(trained, name), getattr(at_run_time, name))


@torch.inference_mode()
def test_training_and_the_running_encoder_are_one():
    model = Seeing().eval()
    official = model.encoder.encode([slice_image(picture, sizes.VISION.slices)[0] for picture in pictures()])
    with plain_attention():
        flat, _ = model(shrink(pictures()))
    # A level of rounding in a pixel is all that differs.
    torch.testing.assert_close(flat.view_as(official), official, atol=0.05, rtol=0.05)


def test_a_description_is_what_is_seen():
    seen = dict(zip(ATTRIBUTES, describe(Scene(people=(Person("blue", "right", True),), cat="door")), strict=True))
    assert seen["count"] == 1 and seen["at_right"] == 2 and seen["fallen_right"] == 1
    assert seen["where_blue"] == 3 and seen["where_red"] == 0 and seen["cat"] == 4 and seen["dog"] == 0
    covered = dict(zip(ATTRIBUTES, describe(Scene(lens_covered=True)), strict=True))
    assert covered.pop("covered") == 1 and set(covered.values()) == {UNKNOWN}


def test_pictures_of_a_sequence_are_twice_the_same_scene_and_then_another():
    examples = Rooms(5, num_rooms=2).examples(30)
    before, again, after = examples.attributes.chunk(3)
    assert torch.equal(before, again)
    changed = (again != after).any(1)
    assert torch.equal(changed, examples.events.bool().any(1))
    assert 0.5 < changed.float().mean() < 1.0
    assert all(examples.attributes[:, i].max() < most for i, most in enumerate(attribute_classes()))


def test_a_scene_that_was_read_wrongly_comes_again_in_its_room_with_other_noise():
    rooms = Rooms(5, num_rooms=2)
    first = rooms.examples(4)
    rooms.read(torch.tensor([False, True, False, False]))
    second = rooms.examples(4)
    wrong, again = first.attributes[1], second.attributes[0]
    assert torch.equal(wrong, again)
    difference = (first.pixels[1].int() - second.pixels[0].int()).abs().float().mean()
    assert 0 < difference < 20
    assert (first.pixels[0].int() - second.pixels[0].int()).abs().float().mean() > difference


def test_a_few_steps_make_the_loss_less():
    torch.manual_seed(0)
    model, examples = Seeing(), Rooms(5, num_rooms=2).examples(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    with plain_attention():
        for _ in range(8):
            loss, _, _ = loss_of(model, examples)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        scores = evaluate(model.eval(), Rooms(6, num_rooms=2), num_batches=1)
    assert losses[-1] < losses[0]
    assert {"flicker", "event_wrong", "event_false", *ATTRIBUTES} <= scores.keys()
