"""Pictures and folders of them as a viewer shows them: by their bytes, the right way up, in order, bad ones by name."""

import io
import os
import shutil
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from graph.chunk import NS_PER_S
from stages.media.pictures import natural_key, ticking
from stages.media.reader import FOREVER_NS, Ended, Failed, MediaItem, Progress, Warned, check_source
from stages.media.still import OutOfTime, limited_processor_time
from tests.support.media import Clip, times
from tests.support.reading import first_image, frames_of, quarters, read_all, starts_s

RED, GREEN, BLUE, WHITE, GREY = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [200, 200, 200]


def grey(path: Path, shade: int = 200, kind: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48), (shade,) * 3).save(path, kind)
    return path


def noise(seed: int, size: tuple[int, int] = (640, 480)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def quartered(size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Red, green, blue and white in its quarters."""
    image = Image.new("RGB", (2, 2))
    for at, colour in zip(((0, 0), (1, 0), (0, 1), (1, 1)), (RED, GREEN, BLUE, WHITE), strict=True):
        image.putpixel(at, tuple(colour))
    return image.resize(size, Image.Resampling.NEAREST)


def warnings(items: list[MediaItem]) -> list[tuple[str, str]]:
    return [(item.code, item.message) for item in items if isinstance(item, Warned)]


def num_bad(items: list[MediaItem]) -> int:
    return [item for item in items if isinstance(item, Progress)][-1].num_bad_video


def shades(items: list[MediaItem]) -> list[int]:
    return [int(frame.image[24, 32, 0]) for frame in frames_of(items)]


# --- by their bytes -----------------------------------------------------------------------------------------------


def test_photographs_of_any_length_are_read(tmp_path):
    for index, side in enumerate((16, 24, 32, 40, 48, 64, 96, 480)):  # from 500 bytes to 200 KB
        noise(index, (side, side)).save(tmp_path / f"{index}.jpg")
    items = read_all(tmp_path)
    assert isinstance(items[-1], Ended)
    assert starts_s(items) == [round(k + 0.8, 2) for k in range(8)]
    assert num_bad(items) == 0 and not warnings(items)


def test_pictures_are_read_whatever_they_are_called(tmp_path):
    grey(tmp_path / "1_jpeg.png", kind="JPEG")
    grey(tmp_path / "2_png.jpg", kind="PNG")
    noise(1).save(tmp_path / "3_large_jpeg.png", "JPEG")
    grey(tmp_path / "4_webp.jpg", kind="WEBP")
    grey(tmp_path / "5_without_suffix", kind="PNG")
    grey(tmp_path / "6.of-no-suffix-we-know", kind="JPEG")
    items = read_all(tmp_path)
    assert len(frames_of(items)) == 6
    assert not warnings(items)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "TIFF"])
@pytest.mark.parametrize("name", ["a", "a.jpg", "a.mp4"])
def test_a_single_picture_of_any_kind_and_name_is_one_frame(tmp_path, kind, name):
    Image.new("RGB", (64, 64), "red").save(tmp_path / name, kind)
    items = read_all(tmp_path / name)
    (frame,) = frames_of(items)
    assert (starts_s(items), frame.image.shape) == ([0.8], (64, 64, 3))
    assert np.abs(frame.image.astype(int) - RED).max() <= 3
    assert isinstance(items[-1], Ended)


@pytest.mark.parametrize(
    "name", ["100%done/a.png", "{front}/a.png", "q/what?.png", "p/img%03d.png", "s/star*.png", "b/[1].png", "-/-i.png"]
)
def test_names_are_no_patterns(tmp_path, name):
    grey(tmp_path / name)
    assert len(frames_of(read_all((tmp_path / name).parent))) == 1
    assert len(frames_of(read_all(tmp_path / name))) == 1


def test_a_film_of_jpegs_is_a_film(tmp_path):
    jpeg = io.BytesIO()
    noise(1, (64, 48)).save(jpeg, "JPEG")
    (tmp_path / "a.mjpeg").write_bytes(jpeg.getvalue() * 50)  # 2 s at 25 per second
    assert check_source(str(tmp_path / "a.mjpeg")) == "file"
    assert len(frames_of(read_all(tmp_path / "a.mjpeg"))) == 2


# --- as a viewer shows them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize(
    ("orientation", "size", "shown"),
    [
        (1, (64, 48), [RED, GREEN, BLUE, WHITE]),
        (2, (64, 48), [GREEN, RED, WHITE, BLUE]),
        (3, (64, 48), [WHITE, BLUE, GREEN, RED]),
        (4, (64, 48), [BLUE, WHITE, RED, GREEN]),
        (5, (48, 64), [RED, BLUE, GREEN, WHITE]),
        (6, (48, 64), [BLUE, RED, WHITE, GREEN]),
        (7, (48, 64), [WHITE, GREEN, BLUE, RED]),
        (8, (48, 64), [GREEN, WHITE, RED, BLUE]),
        (99, (64, 48), [RED, GREEN, BLUE, WHITE]),
    ],
)
def test_pictures_are_upright_as_they_were_taken(tmp_path, kind, orientation, size, shown):
    exif = Image.Exif()
    exif[0x0112] = orientation
    how: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": 95, "subsampling": 0},
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    }
    quartered().save(tmp_path / "a", kind, exif=exif, **how.get(kind, {}))
    image = first_image(tmp_path / "a")
    assert image.shape == (size[1], size[0], 3)
    assert np.abs(np.array(quarters(image)) - shown).max() <= 3


def test_the_second_picture_of_a_photograph_is_its_thumbnail(tmp_path):
    quartered().save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (64, 48))])
    items = read_all(tmp_path / "a.jpg")
    assert starts_s(items) == [0.8]
    assert np.abs(np.array(quarters(frames_of(items)[0].image)) - [RED, GREEN, BLUE, WHITE]).max() <= 3


def test_damaged_notes_beside_a_picture_cost_nothing(tmp_path):
    quartered().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x01\x00\x12\x01\x03\x00")
    assert len(frames_of(read_all(tmp_path / "a.jpg"))) == 1


MODES: dict[str, tuple[Image.Image, list[int]]] = {
    "1.png": (Image.new("1", (64, 48), 1), WHITE),
    "L.png": (Image.new("L", (64, 48), 200), GREY),
    "LA.png": (Image.new("LA", (64, 48), (0, 128)), [127, 127, 127]),
    "P.png": (Image.new("RGB", (64, 48), tuple(RED)).convert("P"), RED),
    "RGBA.png": (Image.new("RGBA", (64, 48), (255, 0, 0, 128)), [255, 127, 127]),
    "RGBA.webp": (Image.new("RGBA", (64, 48), (0, 0, 0, 0)), WHITE),
    "16.png": (Image.fromarray(np.full((48, 64), 200 * 257, np.uint16)), GREY),
    "16.tif": (Image.fromarray(np.full((48, 64), 200 * 257, np.uint16)), GREY),
    "F.tif": (Image.fromarray(np.full((48, 64), 200 / 255, np.float32)), GREY),
    "CMYK.jpg": (Image.new("CMYK", (64, 48), (0, 255, 255, 0)), [255, 0, 0]),
    "CMYK.tif": (Image.new("CMYK", (64, 48), (255, 0, 0, 0)), [0, 255, 255]),
    "L.jpg": (Image.new("L", (64, 48), 200), GREY),
    "P.gif": (Image.new("RGB", (64, 48), tuple(BLUE)).convert("P"), BLUE),
}


@pytest.mark.parametrize("name", MODES)
def test_pictures_of_every_colour_mode_look_as_in_a_viewer(tmp_path, name):
    image, colour = MODES[name]
    image.save(tmp_path / name)
    seen = first_image(tmp_path / name)
    assert np.abs(seen.reshape(-1, 3).astype(int) - colour).max() <= 3


def test_a_palette_with_a_see_through_colour_lies_over_white(tmp_path):
    image = Image.new("P", (64, 48), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(1, (0, 0, 32, 48))
    for name in ("a.png", "a.gif"):
        image.save(tmp_path / name, transparency=0)
        assert quarters(first_image(tmp_path / name)) == [RED, WHITE, RED, WHITE]


def test_a_large_photograph_is_scaled_down_to_what_is_asked_for(tmp_path):
    quartered((6000, 4000)).save(tmp_path / "a.jpg", quality=95)
    image = first_image(tmp_path / "a.jpg", max_pixels=448 * 448)
    height, width, _ = image.shape
    assert width * height <= 448 * 448 and width / height == pytest.approx(1.5, rel=0.02)
    assert np.abs(np.array(quarters(image)) - [RED, GREEN, BLUE, WHITE]).max() <= 4


def moving(path: Path, durations_ms: list[int], **how: Any) -> Path:
    pictures = [Image.new("RGB", (64, 48), (20 * index, 0, 0)) for index in range(len(durations_ms))]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations_ms, **how)
    return path


@pytest.mark.parametrize(
    ("name", "how"), [("a.gif", {}), ("a.webp", {"lossless": True}), ("a.png", {}), ("a.avif", {"quality": 100})]
)
def test_a_picture_which_moves_is_played_once(tmp_path, name, how):
    items = read_all(moving(tmp_path / name, [500, 500, 2000, 500], **how))
    assert starts_s(items) == [0.5, 1.0, 2.8]
    assert [frame.age_ns for frame in frames_of(items)] == [round(age * NS_PER_S) for age in (0.3, 0.8, 1.8)]
    assert np.abs(np.array([frame.image[9, 9, 0] for frame in frames_of(items)], int) - [20, 40, 40]).max() <= 2
    assert isinstance(items[-1], Ended)


def test_a_short_moving_picture_is_repeated_until_it_has_been_seen(tmp_path):
    items = read_all(moving(tmp_path / "a.gif", [100, 100, 100]))
    assert starts_s(items) == [0.8]


@pytest.mark.parametrize(
    ("name", "num_shown", "num_lost"),
    [("a.gif", 1, 1), ("a.gif", 2, 1), ("a.gif", 3, 1), ("a.png", 1, 3), ("a.png", 2, 2), ("a.png", 3, 1)],
)
def test_of_a_moving_picture_that_is_cut_off_what_is_whole_is_shown(tmp_path, name, num_shown, num_lost):
    pictures = [noise(seed, (64, 48)) for seed in range(4)]
    pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=1000)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) * (2 * num_shown + 1) // 8])  # the middle of the next one
    items = read_all(tmp_path / name)
    assert isinstance(items[-1], Ended)
    assert len(frames_of(items)) == num_shown
    assert num_bad(items) == num_lost
    ((code, message),) = warnings(items)
    assert code == "bad_picture" and f"its picture {num_shown + 1} can't be decoded" in message


def test_a_gif_that_ends_within_a_header_is_shown_as_far_as_it_is(tmp_path):
    path = moving(tmp_path / "a.gif", [1000, 1000, 1000])
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"\x21\xf9\x04") + 5])
    items = read_all(path)
    assert isinstance(items[-1], Ended) and len(frames_of(items)) == 2 and num_bad(items) == 1


def test_one_damaged_picture_of_a_moving_one_costs_itself(tmp_path):
    pictures = [noise(seed, (64, 48)) for seed in range(4)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=1000)
    data = bytearray((tmp_path / "a.gif").read_bytes())
    at = len(data) * 3 // 8  # within the second one
    data[at : at + 60] = b"\xff" * 60
    (tmp_path / "a.gif").write_bytes(data)
    items = read_all(tmp_path / "a.gif")
    assert isinstance(items[-1], Ended)
    assert (starts_s(items)[-2:], num_bad(items)) == ([2.0, 3.0], 1)


def test_a_picture_for_programs_that_can_not_play_is_no_part_of_what_is_played(tmp_path):
    pictures = [Image.new("RGB", (64, 48), (shade, 0, 0)) for shade in (50, 100, 150)]
    pictures[0].save(tmp_path / "a.png", save_all=True, append_images=pictures[1:], default_image=True, duration=1000)
    items = read_all(tmp_path / "a.png")
    assert starts_s(items) == [0.0, 1.0]
    assert [int(frame.image[9, 9, 0]) for frame in frames_of(items)] == [100, 150]


def test_a_moving_picture_which_says_no_speed_is_played_as_browsers_do(tmp_path):
    items = read_all(moving(tmp_path / "a.gif", [0] * 12))
    assert starts_s(items) == [0.8]


def test_of_a_moving_picture_in_a_folder_the_first_one_is_shown(tmp_path):
    moving(tmp_path / "a.gif", [500, 500])
    grey(tmp_path / "b.png")
    assert starts_s(read_all(tmp_path)) == [0.8, 1.8]


# --- folders ------------------------------------------------------------------------------------------------------


def test_a_folder_comes_in_natural_order(tmp_path):
    names = ["1.png", "2.png", "10.png", "A3.png", "a20.png", "img1.png", "IMG2.png", "img10.png", "img010.png"]
    for index, name in enumerate(names):
        grey(tmp_path / name, shade=20 * index)
    shown = shades(read_all(tmp_path))
    assert shown[:7] == [0, 20, 40, 60, 80, 100, 120]
    assert set(shown[7:]) == {140, 160}


def test_names_of_digits_only_and_of_other_scripts_are_sorted_too():
    names = ["9" * 200 + ".png", "²³.png", "٣.png", "1.png", "", "a1b22c333", "a1b3"]
    ordered = sorted(names, key=natural_key)
    assert ordered.index("a1b3") < ordered.index("a1b22c333")
    assert ordered.index("1.png") < ordered.index("9" * 200 + ".png")


def test_what_a_file_manager_hides_is_not_there(tmp_path):
    grey(tmp_path / "a.png")
    for name in (".hidden.png", "._a.png", ".DS_Store", "Thumbs.db", "desktop.ini", "a.png~", "a.png.bak", "#a.png#"):
        grey(tmp_path / name, kind="PNG")
    grey(tmp_path / "__MACOSX" / "._a.png")
    items = read_all(tmp_path)
    assert len(frames_of(items)) == 1
    assert not warnings(items)


def test_what_is_left_out_is_said_once_with_how_many(tmp_path):
    for index in range(5):
        grey(tmp_path / f"{index}.png")
    for name in ("a.txt", "b.txt", "LICENSE"):
        (tmp_path / name).write_text("no picture")
    Clip(tmp_path / "clip.mp4").video(times(1, 5)).write()
    (tmp_path / "folder").mkdir()
    outside = grey(tmp_path.parent / f"{tmp_path.name}-outside.png")
    (tmp_path / "link.png").symlink_to(outside)
    items = read_all(tmp_path)
    assert len(frames_of(items)) == 5
    ((code, message),) = warnings(items)
    assert code == "left_out"
    assert message.startswith(f"{tmp_path}: what is no picture is left out: 6 (2 .txt, ")
    for part in ("1 without suffix", "1 .mp4", "1 folder", "1 link out of the folder"):
        assert part in message


def test_a_link_in_a_circle_and_a_pipe_are_left_out(tmp_path):
    grey(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "b.png")
    os.mkfifo(tmp_path / "c.png")
    items = read_all(tmp_path)
    assert len(frames_of(items)) == 1
    assert "2 (" in warnings(items)[0][1]


# --- bad ones -----------------------------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(10_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def truncated(kind: str) -> bytes:
    whole = io.BytesIO()
    noise(1).save(whole, kind)
    return whole.getvalue()[: len(whole.getvalue()) // 2]


BAD = {
    "huge.png": (bomb(30_000, 30_000), "is 30000x30000, 900 Mpixel; at most 64 Mi pixels are read"),
    "wide.png": (bomb(65_536, 16), "is 65536x16, 1 Mpixel; sides of 1 to 65535 pixels are read"),
    "cut.jpg": (truncated("JPEG")[:600], "can't be decoded"),
    "cut.png": (truncated("PNG")[:60], "can't be decoded"),
    "cut.webp": (truncated("WEBP"), "can't be decoded"),
    "cut.tif": (truncated("TIFF")[:60], "can't be decoded"),
    "empty.jpg": (b"", "is empty"),
    "text.jpg": (b"dear reader, " * 100, "is no picture"),
    "header.png": (b"\x89PNG\r\n\x1a\n and then nothing", "can't be decoded"),
    "phone.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is a HEIC picture, which is not read here; save it as JPEG"),
    "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is an SVG drawing, which is not read here"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_leaves_its_period_empty_and_is_named(tmp_path, name):
    data, why = BAD[name]
    grey(tmp_path / "a.png")
    (tmp_path / f"b_{name}").write_bytes(data)
    grey(tmp_path / "c.png")
    items = read_all(tmp_path)
    assert starts_s(items) == [0.8, 2.8]
    assert num_bad(items) == 1
    ((code, message),) = warnings(items)
    assert code == "bad_picture"
    assert f"b_{name} {why}" in message
    assert isinstance(items[-1], Ended)


@pytest.mark.parametrize("name", [name for name in BAD if name != "text.jpg"])  # which is of another kind
def test_a_single_bad_picture_fails_with_its_reason(tmp_path, name):
    data, why = BAD[name]
    (tmp_path / name).write_bytes(data or b"\xff\xd8\xff")
    (failed,) = read_all(tmp_path / name)
    assert isinstance(failed, Failed) and failed.kind == "unreadable"
    assert (why if data else "can't be decoded") in failed.message


def test_a_picture_of_72_megapixels_costs_itself_only(tmp_path):
    grey(tmp_path / "a.png")
    Image.new("1", (9000, 8000)).save(tmp_path / "b.png")
    grey(tmp_path / "c.png")
    items = read_all(tmp_path)
    assert (starts_s(items), num_bad(items)) == ([0.8, 2.8], 1)
    assert "b.png is 9000x8000, 72 Mpixel" in warnings(items)[0][1]


def test_a_picture_of_64_megapixels_is_read_in_every_kind(tmp_path):
    large = Image.new("RGB", (8192, 8192), tuple(RED))
    large.save(tmp_path / "a.png", compress_level=1)
    large.save(tmp_path / "b.jpg")
    large.convert("CMYK").save(tmp_path / "c.jpg")
    large.convert("RGBA").save(tmp_path / "d.png", compress_level=1)
    items = read_all(tmp_path, max_pixels=448 * 448)
    assert (len(frames_of(items)), num_bad(items)) == (4, 0), warnings(items)


def test_each_bad_picture_is_named_but_a_log_is_not_filled(tmp_path):
    grey(tmp_path / "0.png")
    for index in range(1, 31):
        (tmp_path / f"{index}.jpg").write_text("no picture")
    items = read_all(tmp_path)
    assert num_bad(items) == 30
    messages = [message for _, message in warnings(items)]
    assert [f" {index}.jpg is no picture" in message for index, message in enumerate(messages[:20], 1)] == [True] * 20
    assert messages[20:] == [f"{tmp_path}: more than 20 pictures can't be read"]


def test_bad_pictures_at_the_beginning_are_named_too(tmp_path):
    (tmp_path / "a.jpg").write_text("no picture")
    grey(tmp_path / "b.png")
    items = read_all(tmp_path)
    assert items[0] == Progress(0, FOREVER_NS)
    assert starts_s(items) == [1.8]
    assert "a.jpg is no picture" in warnings(items)[0][1]


def test_a_folder_of_which_nothing_can_be_read_fails_before_anything_is_said(tmp_path):
    for index in range(3):
        (tmp_path / f"{index}.jpg").write_text("no picture")
    assert read_all(tmp_path) == [
        Failed("unreadable", f"{tmp_path} has no picture which can be read, of 3: 0.jpg is no picture")
    ]


def test_a_folder_of_other_things_says_which(tmp_path):
    (tmp_path / "a.txt").write_text("no picture")
    (tmp_path / "b").mkdir()
    for name in ("1.heic", "2.heic"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (failed,) = read_all(tmp_path)
    assert isinstance(failed, Failed) and failed.kind == "missing"
    assert "has 0 images" in failed.message
    assert "left out: 4 (2 .heic: a HEIC picture, 1 .txt, 1 folder)" in failed.message


def test_a_name_that_is_no_utf_8_is_shown_as_well_as_can_be(tmp_path):
    grey(tmp_path / "a.png")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_text("no picture")
    shutil.copy(tmp_path / "a.png", os.fsdecode(os.fsencode(tmp_path) + b"/d\xe9.png"))
    items = read_all(tmp_path)
    assert len(frames_of(items)) == 2
    assert "caf?.png is no picture" in warnings(items)[0][1]


def test_pictures_end_with_the_duration(tmp_path):
    for index in range(5):
        grey(tmp_path / f"{index}.png")
    items = read_all(tmp_path, duration_ns=2 * NS_PER_S)
    assert starts_s(items) == [0.8, 1.8]
    assert items[-1] == Ended("the duration asked for is over")


def test_a_folder_at_two_pictures_per_second(tmp_path):
    for index in range(4):
        grey(tmp_path / f"{index}.png")
    assert starts_s(read_all(tmp_path, fps=2.0)) == [0.4, 0.9, 1.4, 1.9]


def test_a_picture_may_compute_for_a_while_and_not_for_ever():
    with pytest.raises(OutOfTime), limited_processor_time(0.05):
        while True:
            zlib.compress(bytes(1000))


def test_while_a_picture_is_read_there_is_a_sign_of_life():
    ticks: list[int] = []
    second = threading.Event()

    def tick(number: int) -> None:
        ticks.append(number)
        second.set()

    with ticking(tick):
        assert second.wait(60)
    assert ticks[0] == 1
