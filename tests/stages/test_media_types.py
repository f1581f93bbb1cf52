"""stages/media/types.py: files are what their bytes say; what is not read is named. And which names are read."""

import errno
import gzip
import io
import struct
import wave
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from stages.media.decoder import explain
from stages.media.reader import Ended, Failed, MediaError, Sound, Warned, check_source
from stages.media.types import foreign_type, picture_type
from stages.media.wire import Order
from tests.support.media import Clip, times
from tests.support.reading import first_image, frames_of, read_all, request, starts_s


def ftyp(*brands: str) -> bytes:
    body = brands[0].encode() + bytes(4) + "".join(brands[1:]).encode()
    return (len(body) + 8).to_bytes(4) + b"ftyp" + body


def tiff(byte_order: str, tags: dict[int, int]) -> bytes:
    entries = b"".join(struct.pack(byte_order + "HHII", tag, 4, 1, value) for tag, value in tags.items())
    magic = b"II*\0" if byte_order == "<" else b"MM\0*"
    return magic + struct.pack(byte_order + "IH", 8, len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\xff\xd8\xff\xe0", "JPEG"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "WEBP"),
        (b"RIFF\0\0\0\0WAVEfmt ", None),
        (b"GIF89a", "GIF"),
        (b"BM" + bytes(12) + b"\x28\0\0\0", "BMP"),
        (b"BM, an old firm", None),
        (b"II*\0", "TIFF"),
        (b"MM\0*", "TIFF"),
        (tiff("<", {254: 0, 256: 640}), "TIFF"),
        (tiff(">", {254: 1, 256: 160}), "TIFF"),  # whose first page is a small one
        (tiff("<", {256: 640, 330: 900}), "TIFF"),
        (b"II*\0\xff\xff\xff\xff", "TIFF"),
        (ftyp("avif", "mif1", "miaf"), "AVIF"),
        (ftyp("mif1", "avif"), "AVIF"),
        (ftyp("heic", "mif1"), None),
        (ftyp("isom", "mp42"), None),
        (b"", None),
    ],
)
def test_pictures_are_known_by_their_first_bytes(head, kind):
    assert picture_type(head) == kind


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (ftyp("heic", "mif1"), "a HEIC picture"),
        (ftyp("mif1", "heic"), "a HEIC picture"),
        (b"II*\0\x10\0\0\0CR\x02\0", "a camera's raw picture"),  # CR2
        (tiff("<", {254: 1, 256: 160, 330: 900}), "a camera's raw picture"),  # ARW
        (tiff(">", {254: 1, 256: 160, 330: 900}), "a camera's raw picture"),  # NEF
        (tiff("<", {254: 0, 256: 4000, 50_706: 0x0401}), "a camera's raw picture"),  # DNG
        (b"IIRO\x08\0\0\0", "a camera's raw picture"),
        (b"\0\0\x02" + bytes(9) + b"\x40\0\x40\0\x18\0", "a Targa picture"),
        (b"\xff\x0a\xfa", "a JPEG XL picture"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture"),
        (b"8BPS\0\x01", "a Photoshop picture"),
        (b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg xmlns="http://www.w3.org/2000/svg">', "an SVG drawing"),
        (b"%PDF-1.7", "a PDF document"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n", "an HLS playlist"),
        (b"#EXTM3U\n#EXTINF:2,\na.mp3\n", "an M3U playlist"),
        (b'<?xml version="1.0"?><MPD xmlns="urn">', "a DASH playlist"),
        (b"ffconcat version 1.0\n", "a concat script"),
        (b"[playlist]\nFile1=a.mp3", "a PLS playlist"),
        (b"v=0\r\no=- 0 0 IN IP4 127.0.0.1", "an SDP description"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (gzip.compress(b"a film"), "an archive"),
        (b"PK\x03\x04", "an archive"),
        (b"MThd\0\0\0\x06", "a MIDI file"),
        (b".RMF\0\0\0\x12", "a RealMedia file"),
        (b"FWS\x06", "a Flash film"),
        (b"#!/bin/sh\n", "a program"),
        (b"#! /usr/bin/env python\n", "a program"),
        (b"\xef\xbb\xbf#EXTM3U\n#EXT-X-TARGETDURATION:2\n", "an HLS playlist"),
        ("\ufeff#EXTM3U\na.mp3\n".encode("utf-16-le"), "an M3U playlist"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- made by hand -->\n<MPD xmlns="urn">', "a DASH playlist"),
        (b"s=Door\r\nv=0\r\no=- 0 0 IN IP4 127.0.0.1", "an SDP description"),
        (b"file 'a.mp4'\nfile 'b.mp4'\n", "a concat script"),
        (b"# my holiday\nfile a.mp4", "a concat script"),
        (b"<!-- saved from url=(0014)about:internet -->\n<html lang=en>", "a web page"),
        (b"film.mp4".ljust(257, b"\0") + b"ustar\x0000", "an archive"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an office document"),
        (b"PK\x03\x04" + bytes(26) + b"[Content_Types].xml", "an office document"),
        (b"PK\x03\x04" + bytes(26) + b"mimetypeapplication/vnd.oasis.opendocument.text", "an office document"),
    ],
)
def test_what_is_not_read_is_named_with_what_to_do(head, name):
    assert foreign_type(head).startswith(f"is {name}, which is not read here; ")


@pytest.mark.parametrize(
    "head",
    [b"", ftyp("isom"), b"\x1aE\xdf\xa3", b"ID3\x04", b"dear reader", b"\0" * 100, b"#!AMR\n", b"#!AMR-WB\n"],
)
def test_nothing_else_is_named(head):
    assert foreign_type(head) == ""


@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4", "list"])
def test_a_playlist_is_called_a_playlist_whatever_its_name(tmp_path, name):
    (tmp_path / name).write_text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\na.ts\n#EXT-X-ENDLIST\n")
    (failed,) = read_all(tmp_path / name)
    assert isinstance(failed, Failed) and failed.kind == "unreadable"
    assert failed.message == f"{tmp_path / name} is an HLS playlist, which is not read here; give the film itself"


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"1\n00:00:01,000 --> 00:00:02,000\nhello\n\n", "a file of subtitles, which is not read here; give the film"),
        (b"WEBVTT\n\n00:01.000 --> 00:02.000\nhello\n", "a file of subtitles, which is not read here; give the film"),
        (b"Dear reader,\nthe film is elsewhere.\n", "a text file, which is not read here; give a film, a picture"),
        (b'\xef\xbb\xbf{"camera": "door"}', "a JSON file, which is not read here; give a film, a picture"),
        (b'<?xml version="1.0"?>\n<camera name="door"/>', "an XML or HTML file, which is not read here; give a film"),
        (bytes(32_768) + b"\x01CD001\x01" + bytes(9000), "a disc image, which is not read here; give the film"),
        (b"OggS", "cut off: it ends before its first picture or sound"),
        (b"\x07" * 3000, "not a media file which can be read: damaged, or of another type"),
    ],
)
def test_what_holds_no_film_is_named(tmp_path, data, named):
    (tmp_path / "a").write_bytes(data)
    (failed,) = read_all(tmp_path / "a")
    assert isinstance(failed, Failed) and failed.kind == "unreadable"
    assert failed.message.startswith(f"{tmp_path / 'a'} is {named}")


def test_a_demuxer_that_has_nothing_yet_is_not_called_a_busy_resource():
    order = Order("file", request("a.ts"), 1.0, 1.0, origin_ns=0)
    failed = explain(BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), order)
    assert failed.message == "a.ts is not a media file which can be read: damaged, or of another type"


@pytest.mark.parametrize("name", ["clip.gif", "clip.jpg", "clip.mjpg", "clip"])
@pytest.mark.parametrize("format_", ["mp4", "avi", "matroska", "mpegts"])
def test_a_film_is_a_film_whatever_its_name(tmp_path, name, format_):
    path = Clip(tmp_path / name, format=format_).video(times(2, 5)).write()
    assert check_source(str(path)) == "file"
    items = read_all(path)
    assert isinstance(items[-1], Ended) and len(frames_of(items)) == 2


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_a_picture_is_a_picture_though_its_name_is_a_films(tmp_path, kind):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.mjpg", kind)
    assert check_source(str(tmp_path / "a.mjpg")) == "images"


@pytest.mark.parametrize("name", ["cam.mjpg", "cam"])
def test_a_film_of_jpegs_as_servers_send_it_is_read(tmp_path, name):
    Image.new("RGB", (64, 48), "red").save(jpeg := io.BytesIO(), "JPEG")
    head = b"--next\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(jpeg.getvalue())
    (tmp_path / name).write_bytes((head + jpeg.getvalue() + b"\r\n") * 50)  # 2 s at 25 per second
    assert len(frames_of(read_all(tmp_path / name))) == 2


@pytest.mark.parametrize(
    ("head", "frame"),  # of 20 ms in the best quality
    [(b"#!AMR\n", b"\x3c" + bytes(31)), (b"#!AMR-WB\n", b"\x44" + bytes(60))],
)
def test_sound_of_phones_is_no_program(tmp_path, head, frame):
    (tmp_path / "a.amr").write_bytes(head + frame * 50)
    items = read_all(tmp_path / "a.amr")
    assert isinstance(items[-1], Ended)
    assert sum(item.samples.size for item in items if isinstance(item, Sound)) == 16_000


@pytest.mark.parametrize(("name", "codec", "format_"), [("a.wv", "wavpack", "wv"), ("a.tta", "tta", "tta")])
def test_sound_files_of_less_known_types_are_read(tmp_path, name, codec, format_):
    with av.open(str(tmp_path / name), "w", format=format_) as container:
        stream = container.add_stream(codec, rate=16_000, layout="mono")
        for at in range(0, 32_000, 800):
            wave = np.sin(np.arange(at, at + 800) / 5)[None] * 12_000
            kind = stream.codec_context.format.name
            frame = av.AudioFrame.from_ndarray(wave.astype(np.int16), "s16p" if kind.endswith("p") else "s16", "mono")
            frame.rate, frame.pts = 16_000, at
            for resampled in av.AudioResampler(kind, "mono", 16_000).resample(frame):
                container.mux(stream.encode(resampled))
        container.mux(stream.encode(None))
    items = read_all(tmp_path / name)
    assert isinstance(items[-1], Ended)
    assert sum(item.samples.size for item in items if hasattr(item, "samples")) == 32_000


def dav(path: Path) -> Path:
    """Four seconds as recorders write them: a picture per chunk, with the time of day."""
    encoder: Any = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = 64, 48, "yuv420p"
    encoder.time_base, encoder.framerate = Fraction(1, 10), Fraction(10)
    encoder.options = {"tune": "zerolatency", "x264-params": "keyint=10:annexb=1:repeat-headers=1"}
    pictures = [av.VideoFrame.from_ndarray(np.full((48, 64, 3), 5 * k, np.uint8), "rgb24") for k in range(40)]
    packets = [packet for picture in pictures for packet in encoder.encode(picture)] + encoder.encode(None)
    ext = bytes([0x80, 0, 64 // 8, 48 // 8, 0x81, 0, 2, 10])  # size; H.264, 10 per second
    chunks = []
    for number, packet in enumerate(packets):
        size, date = 24 + len(ext) + packet.size + 8, 20 << 26 | 1 << 22 | 1 << 17 | number // 10
        head = struct.pack("<IIIHBB", number, size, date, 100 * number, len(ext), 0)
        kind = bytes([0xFD if packet.is_keyframe else 0xFC, 0, 0, 0])
        chunks.append(b"DHAV" + kind + head + ext + bytes(packet) + b"dhav" + struct.pack("<I", size))
    path.write_bytes(b"".join(chunks))
    return path


@pytest.mark.parametrize("name", ["clip.dav", "clip"])
def test_films_of_common_recorders_are_read(tmp_path, name):
    items = read_all(dav(tmp_path / name))
    assert isinstance(items[-1], Ended)
    assert starts_s(items) == [0.8, 1.8, 2.8, 3.8]


# --- tracks -------------------------------------------------------------------------------------------------------


def film_with_tracks(path: Path, num_sounds: int) -> Path:
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sounds = [
            container.add_stream("pcm_s16le" if path.suffix == ".mkv" else "aac", rate=16_000, layout="mono")
            for _ in range(num_sounds)
        ]
        for _ in range(20):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 120, np.uint8), "rgb24")))
        container.mux(video.encode(None))
        for sound in sounds:
            kind = sound.codec_context.format.name
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), "s16", "mono")
            frame.rate, frame.pts = 16_000, 0
            for resampled in av.AudioResampler(kind, "mono", 16_000).resample(frame):
                container.mux(sound.encode(resampled))
            container.mux(sound.encode(None))
    return path


@pytest.mark.parametrize("name", ["many.mkv", "many.mp4"])
@pytest.mark.parametrize("num_sounds", [1, 31, 32, 35, 63])
def test_a_film_with_many_tracks_is_read(tmp_path, name, num_sounds):
    items = read_all(film_with_tracks(tmp_path / name, num_sounds))
    assert isinstance(items[-1], Ended)
    assert len(frames_of(items)) == 2


@pytest.mark.parametrize("name", ["many.mkv", "many.mp4"])
def test_with_more_tracks_than_are_read_the_true_limit_is_named(tmp_path, name):
    (failed,) = read_all(film_with_tracks(tmp_path / name, 64))
    assert failed == Failed("limit", f"{tmp_path / name} has 65 tracks of pictures and sound; at most 64 are read")


BLACK, WHITE = [0, 0, 0], [255, 255, 255]


def film_in_two_colours(path: Path, *dispositions: Disposition) -> Path:
    """Two tracks of pictures: black, then white."""
    with av.open(str(path), "w", format="matroska") as container:
        streams: list[Any] = [container.add_stream("libx264rgb", rate=10) for _ in dispositions]
        for stream, disposition in zip(streams, dispositions, strict=True):
            stream.width, stream.height, stream.pix_fmt, stream.disposition = 64, 48, "rgb24", disposition
        for number in range(10):
            for stream, shade in zip(streams, (0, 255), strict=True):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), shade, np.uint8), "rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 10)
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    return path


NONE, DEFAULT, COMMENT = Disposition(0), Disposition.default, Disposition.comment


@pytest.mark.parametrize(
    ("dispositions", "colour"),
    [
        ((NONE, NONE), BLACK),
        ((DEFAULT, NONE), BLACK),
        ((NONE, DEFAULT), WHITE),
        ((DEFAULT, DEFAULT), BLACK),
        ((COMMENT, NONE), WHITE),
        ((DEFAULT | COMMENT, NONE), WHITE),
    ],
)
def test_of_two_tracks_the_one_is_seen_that_players_show(tmp_path, dispositions, colour):
    image = first_image(film_in_two_colours(tmp_path / "a.mkv", *dispositions))
    assert image[24, 32].tolist() == colour


IMPAIRED = Disposition.visual_impaired


def two_sounds(path: Path, *dispositions: Disposition) -> Path:
    """Two tracks of sound of half a second: silence, then a tone."""
    with av.open(str(path), "w", format="matroska") as container:
        streams: list[Any] = [container.add_stream("pcm_s16le", rate=16_000, layout="mono") for _ in dispositions]
        for stream, disposition in zip(streams, dispositions, strict=True):
            stream.disposition = disposition
        for stream, loudness in zip(streams, (0, 9000), strict=True):
            wave = (np.sin(np.arange(8000) / 5)[None] * loudness).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(wave, "s16", "mono")
            frame.rate, frame.pts = 16_000, 0
            container.mux(stream.encode(frame))
    return path


@pytest.mark.parametrize(
    ("dispositions", "is_loud"),
    [((NONE, NONE), False), ((NONE, DEFAULT), True), ((IMPAIRED, NONE), True), ((DEFAULT | IMPAIRED, NONE), True)],
)
def test_of_two_tracks_the_one_is_heard_that_players_play(tmp_path, dispositions, is_loud):
    items = read_all(two_sounds(tmp_path / "a.mka", *dispositions), want_video=False)
    samples = np.concatenate([item.samples for item in items if isinstance(item, Sound)])
    assert (np.abs(samples).max() > 0.1) == is_loud


@pytest.mark.parametrize("num_fonts", [63, 70, 200])
def test_a_film_with_many_fonts_beside_its_tracks_is_read(tmp_path, num_fonts):
    with av.open(str(tmp_path / "fonts.mkv"), "w") as container:
        video = container.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for number in range(num_fonts):
            container.add_attachment(f"{number}.ttf", "font/ttf", b"font")
        for _ in range(20):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 120, np.uint8), "rgb24")))
        container.mux(video.encode(None))
    items = read_all(tmp_path / "fonts.mkv")
    assert isinstance(items[-1], Ended), items[-1]
    assert len(frames_of(items)) == 2


# --- what can't be decoded, in the owner's words ----------------------------------------------------------------


@pytest.mark.parametrize("rate_hz", [1, 900, 4_000_000])
def test_a_rate_that_no_sound_has_is_named(tmp_path, rate_hz):
    with wave.open(str(tmp_path / "odd.wav"), "wb") as file:
        file.setparams((1, 2, rate_hz, 0, "NONE", ""))
        file.writeframes(b"\x00\x10" * 40_000)
    messages = [item.message for item in read_all(tmp_path / "odd.wav") if isinstance(item, (Warned, Failed))]
    named = [message for message in messages if f"{rate_hz} Hz; 1000 to 768000 Hz are read" in message]
    assert named
    assert not [message for message in messages if "Error" in message]


@pytest.mark.parametrize("with_sound", [False, True])
def test_an_encrypted_film_is_named_so_and_not_shown_as_grey_pictures(tmp_path, with_sound):
    key = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "76" * 16, "encryption_kid": "a7" * 16}
    clip = Clip(tmp_path / "film.mp4", options=key).video(times(3, 10))
    items = read_all((clip.sound(3) if with_sound else clip).write())
    assert frames_of(items) == []
    assert isinstance(items[-1], Failed) and items[-1].kind == "unreadable"
    assert "encrypted" in items[-1].message


# --- names --------------------------------------------------------------------------------------------------------

ODD_NAMES = [
    "Screen Recording at 3.45.12\u202fPM.mov",
    "a\u00a0b.mp4",
    "会議\u3000室.mp4",
    "👨\u200d👩\u200d👧.mp4",
    "soft\u00adhyphen.mp4",
    "100%done %03d {front} what?* [1].mp4",
    "plain ä é 室.mp4",
    " .mp4",
    "'\"$(id)`;&|.mp4",
    "\ufeffmarked.mp4",
    "\u0627\u0644\u0643\u0627\u0645\u064a\u0631\u0627\u200f.mp4",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_files_with_odd_names_are_read(tmp_path, name):
    items = read_all(Clip(tmp_path / "clip.mp4").video(times(2, 5)).write().rename(tmp_path / name))
    assert isinstance(items[-1], Ended)
    assert len(frames_of(items)) == 2


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_failure_names_the_file_as_it_is_called(tmp_path, name):
    (tmp_path / name).write_bytes(b"dear reader, " * 100)
    (failed,) = read_all(tmp_path / name)
    assert isinstance(failed, Failed)
    assert failed.message.startswith(f"{tmp_path / name} is ")


@pytest.mark.parametrize("char", ["\n", "\r", "\t", "\0", "\x1b", "\x7f", "\x85", "\u2028", "\u2029", "\udce9"])
def test_names_which_would_break_a_line_or_a_terminal_are_refused(char):
    with pytest.raises(MediaError, match="control characters") as refusal:
        check_source(f"caf{char}.mp4")
    assert refusal.value.kind == "blocked"
    assert refusal.value.message.isprintable()
