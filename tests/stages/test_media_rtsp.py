"""Cameras over RTSP: the good one, and those which say nothing, too much, or break off (see rtsp_server.py)."""

import contextlib
import dataclasses
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graph.chunk import NS_PER_MS, NS_PER_S
from stages.media import Ended, Failed, Frame, MediaItem, MediaReader, MediaRequest, Progress, Sound

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
    wanted: dict[str, Any] = {"want_video": True, "want_audio": True, "piece_ns": NS_PER_S // 20}
    reader = MediaReader(MediaRequest(source, 1.0, 448 * 448, duration_ns=duration_ns, **wanted), **timeouts)
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
    wanted = MediaRequest("", 10.0, 448 * 448, True, True, NS_PER_S, None)
    with (
        camera("camera") as url,
        MediaReader(dataclasses.replace(wanted, source=url), silence_timeout_s=0.5) as reader,
    ):
        while not isinstance(reader.read(1.0), Frame):
            pass
        time.sleep(2.0)  # the pipe is full after one frame
        items = [reader.read(1.0) for _ in range(30)]
    assert not [item for item in items if isinstance(item, Failed)]


def test_a_camera_of_few_pictures_and_no_sound_is_not_taken_for_dead():
    wanted = MediaRequest("", 0.1, 448 * 448, True, False, NS_PER_S, None)
    with (
        camera("camera") as url,
        MediaReader(dataclasses.replace(wanted, source=url), silence_timeout_s=0.5) as reader,
    ):
        start = time.monotonic()
        while time.monotonic() - start < 4.0:  # the watchdog barks after 2.5 s
            assert not isinstance(item := reader.read(1.0), (Ended, Failed)), item


def test_a_camera_which_is_switched_off_refuses():
    items, took_s = read_all("rtsp://user:canary@127.0.0.1:9/live")
    assert items[-1].kind == "refused"
    assert "canary" not in items[-1].message
    assert took_s < 3


def test_a_camera_of_gstreamer_is_read_too():
    found = subprocess.run([SYSTEM_PYTHON, "-c", HAS_GSTREAMER], capture_output=True, check=False)
    if found.returncode:
        pytest.skip(f"GStreamer's RTSP server is absent: {found.stderr.decode().strip().splitlines()[-1]}")
    with camera("gst", python=SYSTEM_PYTHON) as url:
        items, _ = read_all(url, 5)
    assert isinstance(items[-1], Ended), items[-1]
    assert seen_in(items) == whole_windows(items, 5)
    sounds = [item for item in items if isinstance(item, Sound)]
    assert sum(item.samples.size for item in sounds) + sounds[0].first_sample == 5 * 16_000
