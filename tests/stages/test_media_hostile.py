"""Files which are broken, lie or bite, decoders which die, and bytes which no decoder sends."""

import contextlib
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graph.chunk import NS_PER_S
from stages.media.decoder import explain
from stages.media.reader import (
    Ended,
    Failed,
    Frame,
    MediaError,
    MediaItem,
    MediaReader,
    MediaRequest,
    Progress,
    Sound,
    Warned,
    check_source,
    mask_source,
)
from stages.media.reaper import REAPER
from stages.media.wire import HEADER, MAGIC, ItemParser, Order, WireError, to_bytes
from tests.support.reading import read_to_end

MIB = 1 << 20


def request(source: object, **changes: Any) -> MediaRequest:
    defaults = {"fps": 1.0, "max_pixels": 448 * 448, "want_video": True, "want_audio": True}
    return MediaRequest(str(source), **(defaults | {"piece_ns": NS_PER_S, "duration_ns": None} | changes))


def read_all(source: object, **changes: Any) -> list[MediaItem]:
    return read_to_end(request(source, **changes))


def failure_of(source: object, **changes: Any) -> Failed:
    end = read_all(source, **changes)[-1]
    assert isinstance(end, Failed), end
    return end


def make_video(path: Path, times_s: list[float], **options: Any) -> Path:
    with av.open(str(path), "w", **options) as container:
        stream: Any = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 90_000)
        stream.options = {"preset": "ultrafast", "tune": "zerolatency"}
        for index, time_s in enumerate(times_s):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), index % 256, np.uint8), "rgb24")
            frame.pts, frame.time_base = round(time_s * 90_000), Fraction(1, 90_000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def seconds(count: float) -> list[float]:
    return [index / 30 for index in range(int(30 * count))]


def png(width: int, height: int, rows: bytes) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# --- before anything starts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "concat:/etc/passwd|/etc/hostname",
        "subfile:,start,0,end,9,,:/etc/passwd",
        "crypto:/etc/passwd",
        "pipe:0",
        "fd:3",
        "data:video/mp4;base64,AAAA",
        "file:/etc/passwd",
        "file:///etc/passwd",
        "tcp://127.0.0.1:22",
        "udp://127.0.0.1:22",
        "unix:/run/docker.sock",
        "http://127.0.0.1/clip.mp4",
        "HTTPS://127.0.0.1/clip.mp4",
        "rtmp://127.0.0.1/live",
        "lavfi:testsrc2",
        "exec:id",
        "rtsp:/no-host",
        "rtsp://",
        "rtsp://host:99999/live",
        "",
        "clip.mp4\0.png",
        "clip\n.mp4",
        "/dev/null",
    ],
)
def test_other_protocols_are_refused_before_anything_starts(source):
    with pytest.raises(MediaError) as refusal:
        MediaReader(request(source))
    assert refusal.value.kind == "blocked"


@pytest.mark.parametrize("source", ["test://other", "test://pattern?size=9", "test://pattern?seed=1;movie=/etc/passwd"])
def test_a_test_pattern_takes_numbers_only(source):
    with pytest.raises(MediaError, match="write test://pattern"):
        check_source(source)


@pytest.mark.parametrize(
    "query", ["seed=-1", "seed=1234567890", "events=wild", "voices=/etc/passwd", "picture_delay=10", "size=640x480"]
)
def test_a_synthetic_room_takes_what_it_knows_only(query):
    with pytest.raises(MediaError, match="write synthetic://room") as refusal:
        check_source(f"synthetic://room?{query}")
    assert refusal.value.kind == "missing"


def test_a_missing_file_is_named_with_the_one_which_was_meant(tmp_path):
    (tmp_path / "garage.mp4").write_bytes(b"x")
    with pytest.raises(MediaError, match=r"garag\.mp4: No such file.*Did you mean 'garage\.mp4'\?") as refusal:
        check_source(str(tmp_path / "garag.mp4"))
    assert refusal.value.kind == "missing"


def test_a_link_to_nothing_says_where_it_leads_and_does_not_suggest_itself(tmp_path):
    (tmp_path / "garage.jpg").symlink_to("gone.jpg")
    with pytest.raises(MediaError, match=r"it is a link to 'gone\.jpg', which is not there$") as refusal:
        check_source(str(tmp_path / "garage.jpg"))
    assert refusal.value.kind == "missing"
    with pytest.raises(MediaError, match=r"garag\.jpg: No such file or directory$"):
        check_source(str(tmp_path / "garag.jpg"))


@pytest.mark.parametrize("source", ["rtsp://camera/live", "http://server/film.mp4"])
@pytest.mark.parametrize("error", [PermissionError, FileNotFoundError])
def test_what_a_server_answers_is_not_told_in_the_words_of_a_file_system(source, error):
    media_request = request(source)
    order = Order(check_source(source, ["http"]), media_request, 10.0, 4.0, origin_ns=0)
    explained = explain(error(1, "Operation not permitted"), order)
    assert explained.kind in ("refused", "missing")
    assert "permi" not in explained.message.lower() and explained.message.startswith(source)


def test_an_empty_file_a_pipe_and_a_socket_are_refused(tmp_path):
    (tmp_path / "empty.mp4").touch()
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(MediaError, match="the file is empty"):
        check_source(str(tmp_path / "empty.mp4"))
    with pytest.raises(MediaError, match="pipes and sockets are not read"):
        check_source(str(tmp_path / "pipe.mp4"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_which_may_not_be_read_is_refused(tmp_path):
    (tmp_path / "secret.mp4").write_bytes(b"x")
    (tmp_path / "secret.mp4").chmod(0)
    with pytest.raises(MediaError, match="may not be read") as refusal:
        check_source(str(tmp_path / "secret.mp4"))
    assert refusal.value.kind == "refused"


@pytest.mark.parametrize(
    "wrong",
    [
        {"fps": 0.0},
        {"fps": float("nan")},
        {"fps": 1e9},
        {"max_pixels": 1 << 40},
        {"piece_ns": 0},
        {"duration_ns": 0},
        {"want_video": False, "want_audio": False},
    ],
)
def test_a_request_with_senseless_numbers_is_refused(wrong):
    with pytest.raises(MediaError):
        request("test://pattern", **wrong)


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("rtsp://user:geheim@10.0.0.7/live", "rtsp://***@10.0.0.7/live"),
        ("rtsp://10.0.0.7:554/live", "rtsp://10.0.0.7:554/live"),
        ("rtsp://user:ge@heim@10.0.0.7/live", "rtsp://***@10.0.0.7/live"),
        ("rtsp://user:ge/heim@10.0.0.7/live", "rtsp://***@10.0.0.7/live"),
        ("rtsp://user:ge?heim@10.0.0.7/live", "rtsp://***@10.0.0.7/live"),
        ("rtsp://10.0.0.7/live?user=a&password=geheim", "rtsp://10.0.0.7/live?***"),
        ("rtsp://10.0.0.7/user=a_password=geheim_channel=1", "rtsp://10.0.0.7/user=a_password=***_channel=1"),
        ("rtsp://[fe80::1]:554/live@1", "rtsp://[fe80::1]:554/live@1"),
        ("/home/a@b/clip.mp4", "/home/a@b/clip.mp4"),
    ],
)
def test_sources_are_shown_without_passwords(source, shown):
    assert mask_source(source) == shown


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["noise.mp4", "noise.png", "noise.ts", "noise"])
def test_noise_is_unreadable(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(np.random.default_rng(3).bytes(200_000))
    assert failure_of(path).kind == "unreadable"


def test_text_with_a_videos_name_is_unreadable(tmp_path):
    path = tmp_path / "letter.mp4"
    path.write_text("dear reader, " * 1000)
    failure = failure_of(path)
    assert failure.kind == "unreadable"
    assert str(path) in failure.message


@pytest.mark.parametrize("script", ["hls", "concat", "dash", "sdp", "avs"])
def test_a_playlist_with_a_videos_name_leads_nowhere(tmp_path, script):
    canary = make_video(tmp_path / "canary.ts", seconds(2))
    text = {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{canary}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile '{canary}'\n",
        "dash": f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{canary}</BaseURL></MPD>',
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
        "avs": f'DirectShowSource("{canary}")',
    }[script]
    for name in ("list.mp4", "list.m3u8", "list.ffconcat", "list.sdp"):
        (tmp_path / name).write_text(text)
        items = read_all(tmp_path / name)
        assert isinstance(items[-1], Failed)
        assert not [item for item in items if isinstance(item, Frame)]


def test_a_video_without_its_index_is_unreadable(tmp_path):
    whole = make_video(tmp_path / "whole.mp4", seconds(4)).read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    assert failure_of(tmp_path / "half.mp4").kind == "unreadable"


def test_a_video_which_breaks_off_is_read_as_far_as_it_goes(tmp_path):
    whole = make_video(tmp_path / "whole.mp4", seconds(6), options={"movflags": "faststart"}).read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) * 3 // 4])
    items = read_all(tmp_path / "half.mp4")
    num_frames = len([item for item in items if isinstance(item, Frame)])
    assert 1 <= num_frames < 6
    assert isinstance(items[-1], Ended) or items[-1].kind == "unreadable"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi", "clip.ts"])
def test_damaged_files_end_or_fail_by_name(tmp_path, name, seed):
    damaged = bytearray(make_video(tmp_path / name, seconds(3)).read_bytes())
    rng = np.random.default_rng(seed)
    for at in rng.integers(0, len(damaged), 1 + len(damaged) // 200):
        damaged[at] = rng.integers(256)
    (tmp_path / name).write_bytes(damaged)
    end = read_all(tmp_path / name, duration_ns=60 * NS_PER_S)[-1]  # one damage makes a film of two weeks
    assert isinstance(end, Ended) or end.kind in ("unreadable", "limit"), end


@pytest.mark.parametrize(("width", "height"), [(65_535, 65_535), (65_536, 16), (20_000, 20_000)])
def test_a_picture_which_nobody_took_is_refused_without_memory(tmp_path, width, height):
    (tmp_path / "huge.png").write_bytes(png(width, height, zlib.compress(bytes(10_000_000), 9)))
    before = psutil.Process().memory_info().rss
    start = time.monotonic()
    assert failure_of(tmp_path / "huge.png").kind in ("limit", "unreadable")
    assert failure_of(tmp_path).kind in ("limit", "unreadable")
    assert time.monotonic() - start < 10
    assert psutil.Process().memory_info().rss - before < 64 * MIB


def test_a_video_with_ten_thousand_pictures_per_second_is_refused(tmp_path):
    path = make_video(tmp_path / "flood.mp4", [index / 10_000 for index in range(3000)])
    failure = failure_of(path)
    assert failure.kind == "limit"
    assert "pictures per second" in failure.message


def test_a_video_whose_clock_jumps_ten_days_goes_on_seamlessly(tmp_path):
    jump = 864_000.0
    path = make_video(tmp_path / "jump.mkv", seconds(2) + [jump + s for s in seconds(2)])
    items = read_all(path)
    frames = [item.start_ns // NS_PER_S for item in items if isinstance(item, Frame)]
    assert frames == [0, 1, 2, 3]
    assert isinstance(items[-1], Ended)


def test_a_video_of_a_single_picture_has_no_frame_rate_and_is_seen_once(tmp_path):
    items = read_all(make_video(tmp_path / "one.mp4", [0.0]))
    assert isinstance(items[-1], Ended)
    assert len([item for item in items if isinstance(item, Frame)]) == 1


def test_a_file_with_a_hundred_streams_is_refused(tmp_path):
    path = tmp_path / "many.mkv"
    with av.open(str(path), "w") as container:
        for _ in range(100):
            container.add_stream("pcm_s16le", rate=8000, layout="mono")
        container.start_encoding()
    assert failure_of(path).kind in ("unreadable", "limit")


def test_a_folder_without_images_is_told(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    failure = failure_of(tmp_path)
    assert failure.kind == "missing"
    assert "has 0 images" in failure.message


def test_links_out_of_a_folder_are_left_out(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside.png"
    inside.mkdir()
    av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), "rgb24").save(str(outside))
    (inside / "link.png").symlink_to(outside)
    assert failure_of(inside).kind == "missing"


# --- processes ----------------------------------------------------------------------------------------------------


def first_frame(reader: MediaReader) -> psutil.Process:
    """Read up to the first frame; the decoder's process."""
    while not isinstance(item := reader.read(5.0), Frame):
        assert not isinstance(item, (Ended, Failed)), item
    assert reader.pid is not None
    return psutil.Process(reader.pid)


def test_a_killed_decoder_is_a_failure_within_a_second():
    with MediaReader(request("test://pattern")) as reader:
        first_frame(reader).kill()
        start = time.monotonic()
        while not isinstance(item := reader.read(1.0), Failed):
            assert item is not None
        assert time.monotonic() - start < 1.0
    assert item.kind == "crashed"
    assert "SIGKILL" in item.message


def test_a_decoder_which_hangs_is_stopped_by_the_watchdog():
    with MediaReader(request("test://pattern"), silence_timeout_s=0.5) as reader:
        decoder = first_frame(reader)
        decoder.suspend()
        start = time.monotonic()
        while not isinstance(item := reader.read(0.2), Failed):
            pass
        assert time.monotonic() - start < 4.0
    assert item.kind == "timeout"
    assert REAPER.settle(5.0)
    assert not decoder.is_running()


def test_a_reader_that_was_stopped_itself_takes_nobody_for_dead():
    # Given: the decoder had nothing to give when both were stopped for an hour (Ctrl-Z, a laptop's lid).
    with MediaReader(request("test://pattern"), silence_timeout_s=0.5) as reader:
        decoder = first_frame(reader)
        decoder.suspend()
        while reader.read(0) is not None:
            pass
        reader._looked_s -= 3600.0
        assert reader.read(0) is None
        decoder.resume()
        assert not isinstance(reader.read(20.0), Failed)


def test_an_unread_source_takes_neither_memory_nor_time():
    with MediaReader(request("test://pattern?size=1280x720"), silence_timeout_s=0.5) as reader:
        decoder = first_frame(reader)
        time.sleep(0.5)  # it fills the pipe, and must stop there
        memory, processor = decoder.memory_info().rss, sum(decoder.cpu_times()[:2])
        time.sleep(2.0)
        assert decoder.memory_info().rss - memory < 4 * MIB
        assert sum(decoder.cpu_times()[:2]) - processor < 0.1
        assert isinstance(reader.read(1.0), (Frame, Sound, Progress)), (
            "a pause of the reader is no silence of the source"
        )


def test_a_killed_parent_takes_its_decoder_with_it():
    code = (
        "from stages.media.reader import MediaReader, MediaRequest\n"
        "reader = MediaReader(MediaRequest('test://pattern', 1.0, 200704, True, True, 10**9, None))\n"
        "reader.start(); print(reader.pid, flush=True); import time; time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": "."}
    ) as parent:
        assert parent.stdout is not None
        decoder = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.5)
        parent.send_signal(signal.SIGKILL)
        with contextlib.suppress(psutil.NoSuchProcess):
            decoder.wait(timeout=60)


def test_the_decoder_has_its_limits():
    with MediaReader(request("test://pattern")) as reader:
        decoder = first_frame(reader)
        assert decoder.rlimit(psutil.RLIMIT_CORE) == (0, 0)
        assert decoder.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
        assert decoder.rlimit(psutil.RLIMIT_NOFILE) == (32, 32)
        assert decoder.rlimit(psutil.RLIMIT_AS)[0] <= 2 << 30


# --- bytes of a decoder which was taken over ----------------------------------------------------------------------


def parse(data: bytes, begins_ns: tuple[int, int] = (0, 0)) -> list[MediaItem]:
    parser, items = ItemParser(request("test://pattern"), begins_ns), []
    while data:
        space = parser.space()
        part = data[: len(space)]
        space[: len(part)] = part
        data = data[len(part) :]
        if (item := parser.filled(len(part))) is not None:
            items.append(item)
    return items


def wire(*items: MediaItem) -> bytes:
    return b"".join(bytes(part) for item in items for part in to_bytes(item))


def test_items_survive_the_pipe():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    samples = np.linspace(-1, 1, 16_000, dtype=np.float32)
    progress, warned = Progress(1, 2, 3, 4, 5), Warned("audio", "damaged", "a\nb")
    sent = [progress, warned, Frame(5, image, 7), Sound(0, samples), Failed("refused", "ä\x1b[31m"), Ended("")]
    frame_progress, given, frame, sound, failed, ended = parse(wire(*sent))
    assert frame_progress == progress
    assert given == Warned("audio", "damaged", "a b")
    assert (frame.start_ns, frame.age_ns) == (5, 7) and (frame.image == image).all() and not frame.image.flags.writeable
    assert sound.first_sample == 0 and (sound.samples == samples).all() and not sound.samples.flags.writeable
    assert failed == Failed("refused", "ä [31m"), "a decoder may not steer a terminal"
    assert ended == Ended("")


@pytest.mark.parametrize(("first", "is_right"), [(8, True), (9, False), (16_007, False), (16_008, True), (10**9, True)])
def test_sound_goes_on_where_it_ended_or_after_a_second_without(first, is_right):
    sent = wire(Sound(0, np.zeros(8, np.float32)), Sound(first, np.zeros(8, np.float32)))
    with contextlib.nullcontext() if is_right else pytest.raises(WireError):
        assert len(parse(sent)) == 2


@given(st.binary(max_size=200))
def test_bytes_which_are_no_message_are_refused(data):
    with contextlib.suppress(WireError):
        assert not parse(data), "28 random bytes with the right magic are not drawn"


@given(
    st.integers(0, 9),
    st.integers(0, (1 << 32) - 1),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, (1 << 32) - 1),
)
def test_no_header_makes_the_parent_take_much_memory(kind, length, start, age, height, width):
    parser = ItemParser(request("test://pattern"))
    parser.space()[:] = HEADER.pack(MAGIC, kind, length, start, age, height, width)
    with contextlib.suppress(WireError):
        parser.filled(HEADER.size)
    assert len(parser.space()) <= 3 * 448 * 448


@pytest.mark.parametrize(
    "lie",
    [
        [Frame(9, np.zeros((2, 2, 3), np.uint8)), Frame(8, np.zeros((2, 2, 3), np.uint8))],
        [Frame(-1, np.zeros((2, 2, 3), np.uint8))],
        [Frame(0, np.zeros((2, 2, 3), np.uint8), -1)],
        [Sound(1, np.zeros(9, np.float32))],
        [Sound(0, np.full(9, np.nan, np.float32))],
        [Sound(0, np.zeros(17_000, np.float32))],
        [Frame(0, np.zeros((600, 600, 3), np.uint8))],
        [Progress(9, 9), Progress(8, 9)],
        [Progress(0, 0, -1, 0)],
        [Progress(0, 0, 0, 5), Progress(0, 0, 0, 4)],
        [Warned("smell", "damaged", "")],
        [Warned("", "fire", "")],
        [Warned("", "damaged", "")] * 65,
    ],
)
def test_messages_which_contradict_the_request_or_themselves_are_refused(lie):
    with pytest.raises(WireError):
        parse(wire(*lie))


@pytest.mark.parametrize("first", [16_000, 20_000, 32_000])
def test_a_cameras_sound_begins_while_it_is_opened(first):
    sent = [Sound(at, np.zeros(9, np.float32)) for at in (first, first + 9)]
    assert [sound.first_sample for sound in parse(wire(*sent), (NS_PER_S, 2 * NS_PER_S))] == [first, first + 9]


@pytest.mark.parametrize("first", [0, 15_999, 1 << 60])
def test_a_cameras_sound_of_another_time_is_refused(first):
    with pytest.raises(WireError):
        parse(wire(Sound(first, np.zeros(9, np.float32))), (NS_PER_S, 2 * NS_PER_S))
