"""Cameras over RTSP: the good one, and those which say nothing, too much, or break off (see rtsp_server.py)."""

import contextlib
import dataclasses
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from graph.chunk import NS_PER_MS, NS_PER_S
from stages.media.reader import Ended, Failed, Frame, MediaItem, MediaReader, MediaRequest, Progress, Sound, Warned
from stages.media.rtsp import read_challenges

SERVER = Path(__file__).with_name("rtsp_server.py")
SYSTEM_PYTHON = "/usr/bin/python3"  # Debian's gi is not in the virtual environment
HAS_GSTREAMER = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"


@contextlib.contextmanager
def camera(*mode: str, python: str = sys.executable) -> Iterator[str]:
    """A camera's URL, with a password which nobody may see."""
    with subprocess.Popen([python, str(SERVER), *mode], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        assert server.stdout is not None
        try:
            assert select.select([server.stdout], [], [], 60)[0], "the test's camera does not start"
            yield f"rtsp://user:canary@127.0.0.1:{int(server.stdout.readline())}/live"
        finally:
            server.kill()


def read_all(
    source: str, seconds: float | None = None, now_ns: int = 0, **timeouts: float
) -> tuple[list[MediaItem], float]:
    """All items, and the seconds they took."""
    duration_ns = None if seconds is None else int(seconds * NS_PER_S)
    items: list[MediaItem] = []
    start = time.monotonic()
    fields: dict[str, Any] = {"want_video": True, "want_audio": True, "piece_ns": NS_PER_S // 20}
    reader = MediaReader(MediaRequest(source, 1.0, 448 * 448, duration_ns=duration_ns, **fields), **timeouts)
    assert reader.is_live
    with contextlib.closing(reader):
        reader.start(now_ns)
        while not items or not isinstance(items[-1], (Ended, Failed)):
            items += [item] if (item := reader.read(1.0)) is not None else []
            assert time.monotonic() - start < 60
    return items, time.monotonic() - start


def begins_ns(items: list[MediaItem]) -> int:
    """When the camera was opened."""
    assert isinstance(items[0], Progress)
    return items[0].audio_ns


def whole_windows(items: list[MediaItem], seconds: int) -> list[int]:
    """The windows before the end in which the camera was there from the beginning."""
    return list(range(-(-begins_ns(items) // NS_PER_S), seconds))


def seen_in(items: list[MediaItem]) -> list[int]:
    """The windows of the frames, without the one in which the camera was opened, which may have one or none."""
    windows = [ms // 1000 for ms in frame_times_ms(items)]
    opened_in = begins_ns(items) // NS_PER_S
    assert windows.count(opened_in) <= 1
    return [window for window in windows if window != opened_in]


def frame_times_ms(items: list[MediaItem]) -> list[int]:
    return [item.start_ns // NS_PER_MS for item in items if isinstance(item, Frame)]


def test_a_camera_gives_a_frame_and_its_sound_in_every_window():
    with camera("camera") as url:
        items, took_s = read_all(url, 5)
    assert isinstance(items[-1], Ended), items[-1]
    assert seen_in(items) == whole_windows(items, 5)
    sounds = [item for item in items if isinstance(item, Sound)]
    assert sounds[0].start_ns == begins_ns(items)
    assert sum(item.samples.size for item in sounds) + sounds[0].first_sample == 5 * 16_000
    assert np.abs(sounds[-1].samples).max() > 0.1
    assert 4.5 < took_s < 8, "a live source sets the pace"


def test_whenever_a_camera_is_opened_every_window_has_one_frame():
    phases_ns = [7 * NS_PER_S + eighth * NS_PER_S // 8 for eighth in range(8)]
    with camera("camera") as url, ThreadPoolExecutor(len(phases_ns)) as pool:
        runs = list(pool.map(lambda now_ns: read_all(url, 13, now_ns), phases_ns))
    for items, _ in runs:
        assert isinstance(items[-1], Ended), items[-1]
        assert begins_ns(items) > 7 * NS_PER_S
        assert seen_in(items) == whole_windows(items, 13)
        first, second, *_ = (item.image for item in items if isinstance(item, Frame))
        assert (first != second).any(), "its pictures move"


@pytest.mark.parametrize("every_s", [1.0, 1.6])
def test_a_slow_camera_is_seen_in_every_window_too(every_s):
    with camera("slow", str(every_s)) as url:
        items, _ = read_all(url, 8)
    assert isinstance(items[-1], Ended), items[-1]
    frames = [item for item in items if isinstance(item, Frame)]
    first = frames[0].start_ns // NS_PER_S
    assert first <= whole_windows(items, 8)[0] + every_s
    assert seen_in(items) == list(range(max(first, whole_windows(items, 8)[0]), 8))
    assert max(frame.age_ns for frame in frames) < 3 * NS_PER_S


def test_a_camera_of_which_keyframes_are_enough_is_seen_in_every_window():
    with camera("gop", "1.0") as url:
        items, _ = read_all(url, 8)
    assert isinstance(items[-1], Ended), items[-1]
    assert set(whole_windows(items, 8)[1:]) <= set(seen_in(items)), "its first keyframe comes after a second"
    frames = [item for item in items if isinstance(item, Frame)]
    assert all(frame.age_ns <= 1.2 * NS_PER_S for frame in frames)


def test_what_a_camera_has_saved_up_does_not_run_ahead_of_the_clock():
    with camera("burst", "2") as url:
        items, took_s = read_all(url, 5)
    assert isinstance(items[-1], Ended)
    assert seen_in(items) == whole_windows(items, 5)
    assert took_s > 4.5
    assert [item for item in items if isinstance(item, Progress)][-1].num_gaps <= 2


def test_a_camera_which_closes_the_connection_is_a_failure():
    with camera("cut", "1.5") as url:
        items, _ = read_all(url)
    assert items[-1].kind == "closed"
    assert 1 <= len(frame_times_ms(items)) <= 2
    sound = sum(item.samples.size for item in items if isinstance(item, Sound))
    assert sound > 16_000, "the begun window is not lost"


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("silent", "timeout"),
        ("redirect", "timeout"),
        ("drip", "timeout"),
        ("login", "refused"),
        ("garbage", "unreadable"),
    ],
)
def test_servers_which_are_no_camera_are_left_soon_and_told_by_name(mode, kind):
    with camera(mode) as url:
        items, took_s = read_all(url, open_timeout_s=2.0, silence_timeout_s=1.5)
    assert items[-1].kind == kind, items
    assert took_s < 2.0 + 2.5
    assert "canary" not in items[-1].message
    assert "***@127.0.0.1" in items[-1].message


def test_a_camera_which_freezes_is_noticed():
    with camera("stall", "1") as url:
        items, took_s = read_all(url, silence_timeout_s=1.0)
    assert items[-1].kind == "timeout"
    assert took_s < 1.0 + 1.0 + 2.5


def test_a_pause_of_the_reader_is_no_silence_of_the_camera():
    template = MediaRequest("", 10.0, 448 * 448, True, True, NS_PER_S, None)
    with (
        camera("camera") as url,
        MediaReader(dataclasses.replace(template, source=url), silence_timeout_s=0.5) as reader,
    ):
        while not isinstance(reader.read(1.0), Frame):
            pass
        time.sleep(2.0)  # the pipe is full after one frame
        items = [reader.read(1.0) for _ in range(30)]
    assert not [item for item in items if isinstance(item, Failed)]


def test_a_camera_of_few_pictures_and_no_sound_is_not_taken_for_dead():
    template = MediaRequest("", 0.1, 448 * 448, True, False, NS_PER_S, None)
    with (
        camera("camera") as url,
        MediaReader(dataclasses.replace(template, source=url), silence_timeout_s=0.5) as reader,
    ):
        start = time.monotonic()
        while time.monotonic() - start < 4.0:  # the watchdog barks after 2.5 s
            assert not isinstance(item := reader.read(1.0), (Ended, Failed)), item


def test_a_camera_which_is_switched_off_refuses():
    items, took_s = read_all("rtsp://user:canary@127.0.0.1:9/live")
    assert items[-1].kind == "refused"
    assert "canary" not in items[-1].message
    assert took_s < 3


# --- a track that stops, keyframes that are far apart -------------------------------------------------------------


def read_until(url: str, code: str, **timeouts: float) -> list[MediaItem]:
    """Everything a camera gives until it is warned of this, or ends."""
    items: list[MediaItem] = []
    fields: dict[str, Any] = {"want_video": True, "want_audio": True, "piece_ns": NS_PER_S // 20}
    with MediaReader(MediaRequest(url, 1.0, 448 * 448, duration_ns=60 * NS_PER_S, **fields), **timeouts) as reader:
        while not items or not (isinstance(items[-1], (Ended, Failed)) or is_warning(items[-1], code)):
            items += [item] if (item := reader.read(1.0)) is not None else []
    return items


def is_warning(item: MediaItem, code: str) -> bool:
    return isinstance(item, Warned) and item.code == code


@pytest.mark.parametrize(("mode", "track"), [("novideo", "video"), ("nosound", "audio")])
def test_a_track_which_stops_while_the_other_goes_on_is_told_by_name(mode, track):
    with camera(mode, "3") as url:
        items = read_until(url, "track_frozen", silence_timeout_s=2.0)
    last = items[-1]
    assert isinstance(last, Warned) and (last.track, last.code) == (track, "track_frozen"), last
    assert "canary" not in last.message
    goes_on = Sound if track == "video" else Frame
    later = [item for item in items if isinstance(item, goes_on)][-1]
    assert later.start_ns > begins_ns(items) + 4 * NS_PER_S, "the other one went on"


@pytest.mark.parametrize(("number", "track", "other"), [("1", "video", Sound), ("2", "audio", Frame)])
def test_a_camera_which_refuses_one_of_its_tracks_is_read_without_it(number, track, other):
    with camera("refuses", number) as url:
        items, _ = read_all(url, 4)
    assert isinstance(items[-1], Ended), items[-1]
    (warned,) = [item for item in items if isinstance(item, Warned)]
    assert (warned.track, warned.code) == (track, "track_given_up")
    assert "404" in warned.message and "canary" not in warned.message
    assert {type(item) for item in items if isinstance(item, (Frame, Sound))} == {other}


def test_a_camera_whose_keyframes_are_far_apart_is_no_damaged_one():
    # Given: the next keyframe comes 6 s after the client, which a decoder can't do anything before.
    with camera("gop", "6") as url:
        items, _ = read_all(url, 10)
    assert isinstance(items[-1], Ended), items[-1]
    assert [item for item in items if isinstance(item, Progress)][-1].num_bad == 0
    first_ms, *_ = frame_times_ms(items)
    assert first_ms * NS_PER_MS > begins_ns(items) + 4 * NS_PER_S
    assert len(frame_times_ms(items)) >= 2
    assert [item.code for item in items if isinstance(item, Warned)] in ([], ["no_keyframe"])


# --- why it can't be read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("sha256", "wants a login by Digest SHA-256, which is not done here: let it take Digest MD5 or Basic"),
        ("no_tcp", "refuses RTP over TCP and over UDP (461): allow one of both there"),
        ("login", "refused the login: check user name and password"),
        ("late_login", "refused to play: check user name and password, and what they may see"),
    ],
)
def test_a_camera_that_refuses_is_told_with_the_way_out(mode, message):
    with camera(mode) as url:
        items, _ = read_all(url)
    last = items[-1]
    assert isinstance(last, Failed) and last.kind == "refused"
    assert message in last.message
    assert "canary" not in last.message and "user" not in last.message.replace("user name", "")


class LoginDesk:
    """A camera which is asked for its kinds of login: one answer, and what it was asked."""

    def __init__(self, answer: bytes) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.heard = b""
        self._answer = answer
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with self._server, self._server.accept()[0] as connection:
            self.heard = connection.recv(65_536)
            with contextlib.suppress(OSError):
                connection.sendall(self._answer)

    def challenges(self) -> list[str]:
        received = list(read_challenges("127.0.0.1", self.port))
        self._thread.join(10)
        return received


@pytest.mark.parametrize(
    ("answer", "kinds"),
    [
        (b'RTSP/1.0 401 No\r\nWWW-Authenticate: Digest realm="a", algorithm=SHA-256\r\n\r\n', ["Digest SHA-256"]),
        (b'RTSP/1.0 401 No\r\nwww-authenticate: digest realm="a"\r\n\r\n', ["Digest MD5"]),
        (
            b"RTSP/1.0 401 No\r\nWWW-Authenticate: Basic x\r\nWWW-Authenticate: Digest a\r\n\r\n",
            ["Basic", "Digest MD5"],
        ),
        (b"RTSP/1.0 200 OK\r\n\r\n", []),
        (b"HTTP/1.1 401 No\r\nWWW-Authenticate: Basic x\r\n\r\n", []),
        (b"\xff" * 100_000, []),
        (b"", []),
    ],
)
def test_what_kinds_of_login_a_camera_takes_is_asked_without_one(answer, kinds):
    counter = LoginDesk(answer)
    assert counter.challenges() == kinds
    assert counter.heard.startswith(f"DESCRIBE rtsp://127.0.0.1:{counter.port}/ RTSP/1.0\r\n".encode())
    assert b"Authorization" not in counter.heard


def test_a_camera_that_can_not_be_asked_offers_nothing():
    assert list(read_challenges("127.0.0.1", 9)) == []


# --- GStreamer's server: the table of the README ------------------------------------------------------------------


@pytest.fixture(scope="module")
def gstreamer() -> None:
    probe = subprocess.run([SYSTEM_PYTHON, "-c", HAS_GSTREAMER], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip(f"GStreamer's RTSP server is absent: {probe.stderr.decode().strip().splitlines()[-1]}")


def read_gst(*arguments: str, path: str = "/live") -> list[MediaItem]:
    """Six seconds of a camera of GStreamer, of which one is loud and seen in any case."""
    with camera("gst", *arguments, python=SYSTEM_PYTHON) as url:
        items, _ = read_all(url.replace("/live", path), 6, open_timeout_s=25.0, silence_timeout_s=20.0)
    assert isinstance(items[-1], Ended), items[-1]
    assert frame_times_ms(items), "no picture"
    assert max(np.abs(item.samples).max() for item in items if isinstance(item, Sound)) > 0.1, "no sound"
    return items


@pytest.mark.usefixtures("gstreamer")
def test_a_camera_of_gstreamer_gives_every_window_whole():
    with camera("gst", python=SYSTEM_PYTHON) as url:
        items, _ = read_all(url, 5)
    assert isinstance(items[-1], Ended), items[-1]
    assert seen_in(items) == whole_windows(items, 5)
    sounds = [item for item in items if isinstance(item, Sound)]
    assert sum(item.samples.size for item in sounds) + sounds[0].first_sample == 5 * 16_000


@pytest.mark.usefixtures("gstreamer")
@pytest.mark.parametrize(
    ("video", "audio"),
    [("h264", "aac"), ("h265", "pcmu"), ("mjpeg", "pcma"), ("h264", "g726"), ("h264", "l16"), ("h264", "opus")],
)
def test_a_camera_of_any_common_codec_is_seen_and_heard(video, audio):
    items = read_gst(video, audio, path="/sub")  # the smaller one: a loaded machine encodes H.265 slowly
    assert [item.code for item in items if isinstance(item, Warned)] == []
    assert [item for item in items if isinstance(item, Progress)][-1].num_bad == 0


@pytest.mark.usefixtures("gstreamer")
@pytest.mark.parametrize("login", ["basic", "digest"])
def test_a_camera_is_logged_in_to(login):
    read_gst("h264", "pcmu", "tcp", login)


@pytest.mark.usefixtures("gstreamer")
def test_the_second_stream_of_a_camera_is_read_by_its_path():
    (height, width, _), *_ = (i.image.shape for i in read_gst("h264", "pcmu", path="/sub") if isinstance(i, Frame))
    assert (width, height) == (320, 240)


@pytest.mark.usefixtures("gstreamer")
def test_a_camera_that_takes_no_tcp_is_read_over_udp_which_is_told():
    items = read_gst("h264", "aac", "udp")
    assert [item.code for item in items if isinstance(item, Warned)] == ["over_udp"]


@pytest.mark.usefixtures("gstreamer")
def test_packets_over_udp_are_taken_at_the_address_that_leads_to_the_camera():
    template = MediaRequest("", 1.0, 448 * 448, True, True, NS_PER_S, None)
    with (
        camera("gst", "h264", "aac", "udp", python=SYSTEM_PYTHON) as url,
        MediaReader(dataclasses.replace(template, source=url)) as reader,
    ):
        while not isinstance(item := reader.read(5.0), Frame):
            assert not isinstance(item, (Ended, Failed)), item
        assert reader.pid is not None
        sockets = psutil.Process(reader.pid).net_connections("udp")
    assert {at.laddr.ip for at in sockets} == {"127.0.0.1"}
