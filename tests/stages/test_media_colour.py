"""stages/media/colour.py, and the sizes of stages/media/still.py: pictures as viewers show them, however made."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from stages.media.reader import Failed
from tests.stages.test_media_pictures import BLUE, GREEN, RED, WHITE, noise, quartered
from tests.support.reading import first_image, frames_of, quarters, read_all


def profile(swapped: bool = True) -> bytes:
    """sRGB, in which what is called red is blue, and blue is red."""
    whole = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    names = [whole.index(tag, 128) for tag in (b"rXYZ", b"bXYZ")]
    whole[names[0] : names[0] + 4], whole[names[1] : names[1] + 4] = (
        (b"bXYZ", b"rXYZ") if swapped else (b"rXYZ", b"bXYZ")
    )
    return bytes(whole)


def saved(path: Path, image: Image.Image, data: bytes) -> Path:
    image.save(path, icc_profile=data)
    return path


# --- colours ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "a.jpg", "a.avif"])
def test_colours_are_those_which_the_embedded_profile_means(tmp_path, name):
    image = first_image(saved(tmp_path / name, quartered(), profile()))
    assert np.abs(np.array(quarters(image)) - [BLUE, GREEN, RED, WHITE]).max() <= 12


def test_see_through_pictures_and_palettes_have_their_profiles_colours_too(tmp_path):
    layer = quartered().convert("RGBA")
    layer.putpixel((0, 0), (0, 0, 0, 0))
    assert quarters(first_image(saved(tmp_path / "a.png", layer, profile()))) == [BLUE, GREEN, RED, WHITE]
    flat = quartered().convert("P", palette=Image.Palette.ADAPTIVE)
    assert quarters(first_image(saved(tmp_path / "b.png", flat, profile()))) == [BLUE, GREEN, RED, WHITE]


def test_a_profile_which_says_what_is_so_anyway_changes_nothing(tmp_path):
    image = noise(1)
    assert np.array_equal(first_image(saved(tmp_path / "a.png", image, profile(swapped=False))), np.asarray(image))


BAD_PROFILES = {
    "noise": np.random.default_rng(1).bytes(3000),
    "cut off": profile()[:200],
    "empty": b"",
    "of another kind": ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(),
    "larger than any": profile() + bytes(5 << 20),
}


@pytest.mark.parametrize("kind", BAD_PROFILES)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_damaged_profile_costs_nothing(tmp_path, kind, mode):
    image = Image.new("RGB", (64, 48), tuple(WHITE)).convert(mode)
    items = read_all(saved(tmp_path / "a.tif", image, BAD_PROFILES[kind]))
    assert quarters(frames_of(items)[0].image) == [WHITE] * 4


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_profile_of_other_colours_than_the_pictures_leaves_white_white(tmp_path, mode):
    image = Image.new("RGB", (64, 48), tuple(WHITE)).convert(mode)
    assert quarters(first_image(saved(tmp_path / "a.jpg", image, profile()))) == [WHITE] * 4


@pytest.mark.parametrize(("photometric", "shades"), [(0, [255, 127]), (1, [0, 127])])
def test_deep_grey_in_which_0_is_white_is_shown_so(tmp_path, photometric, shades):
    values = np.zeros((48, 64), "<u2")
    values[:, 32:] = 0x7FFF
    tags = {256: 64, 257: 48, 258: 16, 259: 1, 262: photometric, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: 48, 279: 6144}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    (tmp_path / "a.tif").write_bytes(head + values.tobytes())
    image = first_image(tmp_path / "a.tif")
    assert np.abs(image[24, [8, 56], 0].astype(int) - shades).max() <= 1


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"), [("a.jpg", (17_000, 300)), ("a.png", (300, 17_000)), ("b.png", (65_535, 16))]
)
def test_a_panorama_is_shown_whole(tmp_path, name, size):
    quartered(size).save(tmp_path / name, quality=95)
    image = first_image(tmp_path / name, max_pixels=448 * 448)
    assert np.abs(np.array(quarters(image)) - [RED, GREEN, BLUE, WHITE]).max() <= 12
    shown = image.shape[1] / image.shape[0]
    assert shown == pytest.approx(size[0] / size[1], rel=0.2), "sides are even"


@pytest.mark.parametrize("progressive", [False, True])
def test_a_photograph_of_108_megapixels_is_read_at_the_size_that_is_asked_for(tmp_path, progressive):
    Image.new("L", (12_000, 9_000), 200).save(tmp_path / "a.jpg", progressive=progressive)
    items = read_all(tmp_path / "a.jpg", max_pixels=448 * 448)
    assert quarters(frames_of(items)[0].image) == [[200, 200, 200]] * 4


def test_a_photograph_larger_than_any_is_told_with_the_limit_it_breaks(tmp_path):
    quartered().save(whole := io.BytesIO(), "JPEG")
    data = bytearray(whole.getvalue())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 30_000, 40_000)
    (tmp_path / "a.jpg").write_bytes(data)
    (failed,) = read_all(tmp_path / "a.jpg")
    assert isinstance(failed, Failed)
    assert failed.message.endswith("is 40000x30000, 1200 Mpixel; at most 64 Mi pixels are read")
