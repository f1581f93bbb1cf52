"""stages/media/still.py: a damaged picture is shown as far as viewers show it, in its true shades, the right way up."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from stages.media.reader import Failed
from stages.media.still import BLOCK_ROWS
from tests.stages.test_media_pictures import BLUE, GREEN, RED, WHITE, noise, num_bad, quartered, shades, warnings
from tests.support.reading import first_image, frames_of, quarters, read_all


def jpeg(image: Image.Image) -> bytes:
    image.save(whole := io.BytesIO(), "JPEG", quality=95)
    return whole.getvalue()


@pytest.mark.parametrize("num_lacking", [2, 4])
def test_a_photograph_without_the_mark_of_its_end_is_whole(tmp_path, num_lacking):
    (tmp_path / "whole.jpg").write_bytes(jpeg(noise(1)))
    (tmp_path / "a.jpg").write_bytes(jpeg(noise(1))[:-num_lacking])
    items = read_all(tmp_path / "a.jpg")
    assert not warnings(items) and num_bad(items) == 0
    differs = np.abs(frames_of(items)[0].image.astype(int) - first_image(tmp_path / "whole.jpg"))
    assert differs[:-BLOCK_ROWS].max() == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("is_folder", [True, False])
def test_of_a_picture_that_is_cut_off_the_upper_part_is_shown_and_that_is_told(tmp_path, kind, is_folder):
    noise(1).save(tmp_path / "whole", kind)
    (tmp_path / "folder").mkdir()
    data = (tmp_path / "whole").read_bytes()
    (tmp_path / "folder" / "a.jpg").write_bytes(data[: len(data) // 2])
    items = read_all(tmp_path / "folder" if is_folder else tmp_path / "folder" / "a.jpg")
    (frame,) = frames_of(items)
    assert np.array_equal(frame.image[:200], first_image(tmp_path / "whole")[:200])
    assert len(np.unique(frame.image[300:])) == 1
    assert num_bad(items) == 1
    ((code, message),) = warnings(items)
    assert code == "bad_picture" and message.endswith("; what there is of it is shown")


def png_with(chunk_name: bytes, body: bytes, checksum: int | None = None) -> bytes:
    """Red, green, blue and white, with a note before the pixels."""
    quartered().save(whole := io.BytesIO(), "PNG")
    checksum = zlib.crc32(chunk_name + body) if checksum is None else checksum
    note = struct.pack(">I", len(body)) + chunk_name + body + struct.pack(">I", checksum)
    at = whole.getvalue().index(b"IDAT") - 4
    return whole.getvalue()[:at] + note + whole.getvalue()[at:]


MUCH = zlib.compress(b"x" * 3_000_000)


@pytest.mark.parametrize(
    "data",
    [
        png_with(b"tEXt", b"a\0b", checksum=5),
        png_with(b"zTXt", b"a\0\0" + MUCH),
        png_with(b"iTXt", b"a\0\1\0\0\0" + MUCH),
        png_with(b"iCCP", b"a\0\0" + MUCH),
        png_with(b"gAMA", b"\0", checksum=5),
    ],
)
def test_what_is_wrong_with_a_note_hides_no_picture(tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    items = read_all(tmp_path / "a.png")
    assert quarters(frames_of(items)[0].image) == [RED, GREEN, BLUE, WHITE]
    assert not warnings(items)


def test_a_night_picture_in_16_bits_is_dark(tmp_path):
    for name in ("a.png", "b.tif"):
        Image.fromarray(np.full((48, 64), 255, np.uint16)).save(tmp_path / name)
    Image.fromarray(np.full((48, 64), 0x8000, np.uint16)).save(tmp_path / "c.png")
    assert shades(read_all(tmp_path)) == [1, 1, 128]


def test_a_picture_is_turned_by_its_exif_only(tmp_path):
    turn = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    quartered().save(tmp_path / "a.jpg", xmp=turn, quality=95, subsampling=0)
    image = first_image(tmp_path / "a.jpg")
    assert image.shape == (48, 64, 3)
    assert np.abs(np.array(quarters(image)) - [RED, GREEN, BLUE, WHITE]).max() <= 3


def test_what_is_wrong_is_said_without_the_names_of_classes(tmp_path):
    (tmp_path / "a.gif").write_bytes(b"GIF89a\x40\0\x30\0\xf7")
    (failed,) = read_all(tmp_path / "a.gif")
    assert failed == Failed("unreadable", f"{tmp_path / 'a.gif'} can't be decoded (it is damaged)")
