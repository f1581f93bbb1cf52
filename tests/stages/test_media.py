"""Files, folders and the test pattern as they should be; hostile ones are in test_media_hostile.py."""

import contextlib
import gc
import http.server
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graph.chunk import NS_PER_MS, NS_PER_S
from graph.sections import CameraSpec
from stages.media.fork import FORK_SERVER
from stages.media.play import Lane, Teller
from stages.media.reader import (
    FOREVER_NS,
    Ended,
    Failed,
    Frame,
    MediaItem,
    MediaReader,
    MediaRequest,
    Progress,
    Sound,
    check_source,
)
from stages.media.reaper import REAPER
from stages.media.sound import SoundTrack
from stages.media.tracks import LIVE_DRIFT_NS, FileAxis, LiveAxis, VideoTrack
from stages.media.view import scaled_size
from tests.support.media import Clip, picture, recorded_clip, times
from tests.support.reading import read_to_end

RATE_HZ = 16_000


def request(source: object, **changes: Any) -> MediaRequest:
    defaults = {"fps": 1.0, "max_pixels": 448 * 448, "want_video": True, "want_audio": True}
    return MediaRequest(str(source), **(defaults | {"piece_ns": NS_PER_S, "duration_ns": None} | changes))


def read_all(source: object, **changes: Any) -> list[MediaItem]:
    return read_to_end(request(source, **changes))


def frames_of(items: list[MediaItem]) -> list[Frame]:
    return [item for item in items if isinstance(item, Frame)]


def centiseconds(times_ns: Iterable[int]) -> list[int]:
    return [round(time_ns / (10 * NS_PER_MS)) for time_ns in times_ns]


def samples_of(items: list[MediaItem]) -> np.ndarray:
    return np.concatenate([item.samples for item in items if isinstance(item, Sound)])


def last_progress(items: list[MediaItem]) -> Progress:
    return [item for item in items if isinstance(item, Progress)][-1]


# --- what comes out of a file -------------------------------------------------------------------------------------


def test_a_recorded_video_gives_one_frame_per_second_and_gapless_sound():
    items = read_all(recorded_clip())
    assert isinstance(items[-1], Ended)
    frames = frames_of(items)
    assert [frame.start_ns // NS_PER_S for frame in frames] == list(range(20))
    assert all(frame.image.shape == (596, 336, 3) for frame in frames), "960x540, turned upright by its metadata"
    assert abs(samples_of(items).size - 320_000) <= 400
    assert last_progress(items).num_gaps == last_progress(items).num_bad == 0


@pytest.mark.parametrize(
    ("size", "rate_hz", "layout"),
    [((64, 48), 8_000, "mono"), ((320, 240), 44_100, "stereo"), ((1280, 720), 48_000, "5.1")],
)
def test_any_size_rate_and_layout_becomes_small_pictures_and_16_khz_mono(tmp_path, size, rate_hz, layout):
    clip = Clip(tmp_path / "clip.mp4").video(times(3), size).sound(3, rate_hz, layout)
    items = read_all(clip.write(), max_pixels=200 * 200)
    height, width, _ = frames_of(items)[0].image.shape
    assert height * width <= 200 * 200 and height % 2 == width % 2 == 0
    assert width / height == pytest.approx(size[0] / size[1], rel=0.03)
    samples = samples_of(items)
    assert samples.dtype == np.float32 and abs(samples.size - 3 * RATE_HZ) < 0.1 * RATE_HZ
    assert np.abs(samples[RATE_HZ : 2 * RATE_HZ]).max() > 0.1
    spectrum = np.abs(np.fft.rfft(samples[RATE_HZ : 2 * RATE_HZ]))
    assert abs(int(spectrum.argmax()) - 440) <= 2, "the tone keeps its pitch"


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libx264"), ("a.ts", "libx264"), ("a.avi", "mpeg4")])
def test_containers_agree_on_the_times(tmp_path, name, codec):
    items = read_all(Clip(tmp_path / name).video(times(4), codec=codec).write())
    assert [frame.start_ns // (100 * NS_PER_MS) for frame in frames_of(items)] == [8, 18, 28, 38]


def test_pictures_without_any_time_are_25_per_second(tmp_path):
    path = Clip(tmp_path / "raw.h264", format="h264").video(times(4, 25)).write()
    assert [frame.start_ns // (100 * NS_PER_MS) for frame in frames_of(read_all(path))] == [8, 18, 28, 38]


def test_two_runs_give_the_same_bytes_at_any_pace(tmp_path):
    path = Clip(tmp_path / "clip.mp4").video(times(4)).sound(4).write()

    def digest(pause_s: float) -> list[tuple[int, bytes]]:
        pieces = []
        with MediaReader(request(path)) as reader:
            while not isinstance(item := reader.read(5.0), (Ended, Failed)):
                threading.Event().wait(pause_s)
                if isinstance(item, Frame):
                    pieces.append((item.start_ns, item.image.tobytes()))
                if isinstance(item, Sound):
                    pieces.append((item.first_sample, item.samples.tobytes()))
        return pieces

    fast = digest(0.0)
    assert len(fast) >= 7
    assert fast == digest(0.02)


def test_video_without_sound_says_that_no_sound_will_come(tmp_path):
    items = read_all(Clip(tmp_path / "clip.mp4").video(times(2)).write())
    assert items[0] == Progress(video_ns=0, audio_ns=FOREVER_NS)
    assert len(frames_of(items)) == 2
    assert not [item for item in items if isinstance(item, Sound)]


def test_sound_without_video_says_that_no_picture_will_come(tmp_path):
    items = read_all(Clip(tmp_path / "clip.m4a").sound(2.5).write())
    assert items[0] == Progress(video_ns=FOREVER_NS, audio_ns=0)
    assert [item.samples.size for item in items if isinstance(item, Sound)][:2] == [RATE_HZ, RATE_HZ]


def test_a_stream_which_is_not_wanted_is_not_there(tmp_path):
    path = Clip(tmp_path / "clip.mp4").video(times(2)).sound(2).write()
    assert read_all(path, want_audio=False)[0] == Progress(0, FOREVER_NS)
    assert read_all(path, want_video=False)[0] == Progress(FOREVER_NS, 0)


def test_pictures_at_uneven_times_give_every_window_the_one_which_is_on_the_screen(tmp_path):
    uneven = [0.0, 0.1, 0.85, 0.9, 1.2, 1.95, 2.0, 2.7, 7.1, 7.9, 8.5]  # nothing from 2.7 s to 7.1 s
    frames = frames_of(read_all(Clip(tmp_path / "clip.mp4").video(uneven).write()))
    assert centiseconds(frame.start_ns for frame in frames) == [10, 120, 270, 380, 480, 580, 680, 710, 850]
    assert centiseconds(frame.age_ns for frame in frames) == [70, 60, 10, 110, 210, 310, 410, 70, 30]


def test_sound_which_starts_later_is_led_in_by_zeros(tmp_path):
    items = read_all(Clip(tmp_path / "clip.mkv").video(times(3)).sound(2, start_s=0.9).write())
    samples = samples_of(items)
    loud = int(np.flatnonzero(np.abs(samples) > 0.05)[0])
    assert abs(loud - 0.9 * RATE_HZ) < 0.05 * RATE_HZ
    assert not samples[: loud - 2000].any()


def test_a_hole_in_the_sound_is_filled_so_that_the_axis_holds(tmp_path):
    items = read_all(Clip(tmp_path / "clip.mkv").sound(2, hole_s=(1.0, 0.5), codec="pcm_s16le").write())
    samples = samples_of(items)
    assert abs(samples.size - 2.5 * RATE_HZ) < 0.1 * RATE_HZ
    assert not samples[int(1.1 * RATE_HZ) : int(1.4 * RATE_HZ)].any()
    assert np.abs(samples[int(1.6 * RATE_HZ) : int(1.7 * RATE_HZ)]).max() > 0.1
    assert last_progress(items).num_gaps == 1


def test_recordings_joined_without_care_follow_each_other(tmp_path):
    clips = [Clip(tmp_path / f"{hz}.ts").video(times(2)).sound(2, hz).write() for hz in (48_000, 22_050)]
    (tmp_path / "both.ts").write_bytes(b"".join(clip.read_bytes() for clip in clips))
    items = read_all(tmp_path / "both.ts")
    assert [frame.start_ns // NS_PER_S for frame in frames_of(items)] == [0, 1, 2, 3]
    samples = samples_of(items)
    assert abs(samples.size - 4 * RATE_HZ) < 0.3 * RATE_HZ
    spectrum = np.abs(np.fft.rfft(samples[int(2.5 * RATE_HZ) : int(3.5 * RATE_HZ)]))
    assert abs(int(spectrum.argmax()) - 440) <= 2


def test_sound_which_is_no_sound_is_clipped(tmp_path):
    wild = np.array([np.nan, np.inf, -np.inf, 1e30, 0.5], np.float32).tobytes() * 3200
    header = b"RIFF\0\0\0\0WAVEfmt " + struct.pack("<IHHIIHH", 16, 3, 1, RATE_HZ, 4 * RATE_HZ, 4, 32)
    (tmp_path / "wild.wav").write_bytes(header + b"data" + struct.pack("<I", len(wild)) + wild)
    samples = samples_of(read_all(tmp_path / "wild.wav"))
    assert samples.size == RATE_HZ
    assert np.isfinite(samples).all() and np.abs(samples).max() <= 1.0


def test_a_file_with_all_video_first_still_comes_in_the_order_of_time(tmp_path):
    clip = Clip(tmp_path / "clip.mkv").video(times(10)).sound(10)
    items = read_all(clip.write(interleaved=False))
    ahead = video_ns = audio_ns = 0
    for item in items:
        video_ns = item.start_ns if isinstance(item, Frame) else video_ns
        audio_ns = item.start_ns if isinstance(item, Sound) else audio_ns
        ahead = max(ahead, abs(video_ns - audio_ns))
    assert ahead <= 2 * NS_PER_S
    assert len(frames_of(items)) == 10


def test_progress_lets_a_window_close_as_soon_as_it_is_complete(tmp_path):
    video_ns = audio_ns = 0
    for item in read_all(Clip(tmp_path / "clip.mp4").video(times(4)).sound(4).write()):
        if isinstance(item, Progress):
            video_ns, audio_ns = item.video_ns, item.audio_ns
        if isinstance(item, Frame):
            assert item.start_ns >= video_ns
        if isinstance(item, Sound):
            assert item.start_ns >= audio_ns
    assert video_ns == audio_ns == FOREVER_NS


def test_the_duration_cuts_pictures_and_sound_at_the_same_time(tmp_path):
    path = Clip(tmp_path / "clip.mp4").video(times(6)).sound(6).write()
    items = read_all(path, duration_ns=2_500 * NS_PER_MS)
    assert samples_of(items).size == 40_000
    assert [frame.start_ns // NS_PER_S for frame in frames_of(items)] == [0, 1]
    assert items[-1] == Ended("the duration asked for is over")


def test_sound_windows_follow_the_window_even_when_it_is_no_whole_number_of_samples(tmp_path):
    items = read_all(Clip(tmp_path / "clip.m4a").sound(2).write(), piece_ns=333_333_333)
    firsts = [item.first_sample for item in items if isinstance(item, Sound)]
    assert firsts == [k * 333_333_333 * RATE_HZ // NS_PER_S for k in range(len(firsts))]


def test_a_relative_path_is_read_from_here(tmp_path, monkeypatch):
    Clip(tmp_path / "clip.mp4").video(times(2)).write()
    monkeypatch.chdir(tmp_path)
    assert len(frames_of(read_all("clip.mp4"))) == 2


def test_4k_video_fits_into_the_decoders_memory(tmp_path):
    items = read_all(Clip(tmp_path / "clip.mp4").video(times(1, 5), (3840, 2160)).write())
    assert isinstance(items[-1], Ended)
    assert len(frames_of(items)) == 1


# --- folders and the test pattern ---------------------------------------------------------------------------------


def test_images_of_a_folder_come_by_name_one_per_frame_period(tmp_path):
    for index, name in enumerate(["b.png", "a.png", "c.jpg"]):
        picture(20 * index, 64, 48).save(str(tmp_path / name))
    (tmp_path / "c.jpg").rename(tmp_path / "c.JPG")
    (tmp_path / "notes.txt").write_text("no image")
    items = read_all(tmp_path, fps=2.0)
    frames = frames_of(items)
    assert [frame.start_ns for frame in frames] == [400_000_000, 900_000_000, 1_400_000_000]
    assert [round(float(frame.image.mean()) / 80) for frame in frames] == [1, 0, 2]
    assert isinstance(items[-1], Ended)


def test_a_single_image_is_one_frame(tmp_path):
    picture(1, 64, 48).save(str(tmp_path / "a.png"))
    items = read_all(tmp_path / "a.png")
    assert [frame.start_ns for frame in frames_of(items)] == [800_000_000]
    assert isinstance(items[-1], Ended)


def test_a_damaged_image_leaves_its_period_empty_and_is_counted(tmp_path):
    picture(1, 64, 48).save(str(tmp_path / "a.png"))
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    picture(1, 64, 48).save(str(tmp_path / "c.png"))
    items = read_all(tmp_path)
    assert [frame.start_ns for frame in frames_of(items)] == [800_000_000, 2_800_000_000]
    assert last_progress(items).num_bad == 1


def test_the_test_pattern_moves_and_beeps():
    items = read_all("test://pattern?seed=7&size=320x240", duration_ns=3 * NS_PER_S)
    first, second, third = (frame.image for frame in frames_of(items))
    assert (first != second).any() and (second != third).any()
    assert samples_of(items).size == 3 * RATE_HZ
    assert np.abs(samples_of(items)).max() > 0.05


def test_seeds_make_different_patterns_and_the_same_seed_the_same():
    def first(seed: int) -> bytes:
        return frames_of(read_all(f"test://pattern?seed={seed}", duration_ns=NS_PER_S))[0].image.tobytes()

    assert first(1) == first(1) != first(2)


@pytest.mark.parametrize("settings", [{"fps": 0.01}, {"fps": 30}, {"max_pixels": 64 * 64}, {"max_pixels": 1 << 24}])
def test_what_a_description_may_ask_of_a_camera_its_decoder_does(settings):
    spec = CameraSpec(source="test://pattern", **settings)
    assert request("test://pattern", fps=spec.fps, max_pixels=spec.max_pixels)


def test_a_decoder_which_has_nothing_to_send_gives_a_sign_of_life_every_second():
    items = []
    quarters = iter(range(0, 4 * NS_PER_S, NS_PER_S // 4))
    media_request = request("test://pattern", want_video=False)
    lane = Lane(SoundTrack(media_request, FileAxis(None), items.append), deque())
    teller = Teller(media_request, [lane], items.append, lambda: next(quarters))
    for _ in range(13):
        teller.tell()
    assert items == [Progress(FOREVER_NS, 0)] * 4


@pytest.mark.parametrize("fps", [0.5, 1.0, 5.0, 12.0])
def test_the_test_pattern_gives_exactly_the_wanted_rate(fps):
    items = read_all("test://pattern?size=160x120", fps=fps, duration_ns=4 * NS_PER_S, want_audio=False)
    assert len(frames_of(items)) == 4 * fps


def test_the_synthetic_room_is_seen_and_heard():
    items = read_all("synthetic://room?seed=7&events=busy", duration_ns=20 * NS_PER_S)
    frames = frames_of(items)
    assert [frame.start_ns for frame in frames] == [k * NS_PER_S + 800_000_000 for k in range(20)]
    assert {frame.image.shape for frame in frames} == {(224, 224, 3)}
    assert samples_of(items).size == 20 * RATE_HZ
    assert np.abs(samples_of(items)).max() > 0.02
    assert isinstance(items[-1], Ended)


def test_the_same_address_is_the_same_room():
    def read(source: str, **changes: Any) -> tuple[list[bytes], bytes]:
        items = read_all(source, duration_ns=4 * NS_PER_S, **changes)
        return [frame.image.tobytes() for frame in frames_of(items)], samples_of(items).tobytes()

    once = read("synthetic://room?seed=3&events=busy")
    assert read("synthetic://room?seed=3&events=busy") == once
    assert read("synthetic://room?seed=3&events=busy", piece_ns=NS_PER_S // 10) == once
    assert read("synthetic://room?seed=4&events=busy") != once


@pytest.mark.parametrize("settings", [{"want_audio": False}, {"want_video": False}, {"fps": 0.5}, {"fps": 10.0}])
def test_the_synthetic_room_gives_what_is_wanted(settings):
    items = read_all("synthetic://room", duration_ns=4 * NS_PER_S, **settings)
    assert len(frames_of(items)) == 4 * settings.get("fps", 1.0) * settings.get("want_video", True)
    num_samples = sum(item.samples.size for item in items if isinstance(item, Sound))
    assert num_samples == 4 * RATE_HZ * settings.get("want_audio", True)


def test_the_synthetic_room_is_drawn_as_small_as_is_asked():
    (frame,) = frames_of(read_all("synthetic://room", max_pixels=100 * 100, duration_ns=NS_PER_S))
    assert frame.image.shape == (100, 100, 3)


# --- the reader ---------------------------------------------------------------------------------------------------


def test_only_cameras_are_live(tmp_path):
    path = Clip(tmp_path / "clip.mp4").video(times(1)).write()
    assert not MediaReader(request(path)).is_live
    assert not MediaReader(request("test://pattern")).is_live
    assert not MediaReader(request("synthetic://room")).is_live
    assert MediaReader(request("rtsp://127.0.0.1/live")).is_live


def test_read_returns_nothing_when_nothing_has_come_and_the_end_for_ever_after():
    with MediaReader(request("test://pattern", duration_ns=NS_PER_S)) as reader:
        assert reader.read(0.0) is None, "no decoder starts that fast"
        while not isinstance(end := reader.read(5.0), Ended):
            assert not isinstance(end, Failed)
        assert reader.read(0.0) == end
    assert reader.read(0.0) == end


def test_close_frees_the_process_and_all_files_and_may_be_repeated():
    MediaReader(request("test://pattern")).start()  # the fork server stays
    gc.collect()
    assert REAPER.settle(5.0)
    num_fds = psutil.Process().num_fds()
    for _ in range(3):
        reader = MediaReader(request("test://pattern"))
        reader.start()
        while not isinstance(reader.read(5.0), Frame):
            pass
        reader.close()
        reader.close()
        assert isinstance(reader.read(0.0), Ended)
    assert REAPER.settle(5.0)
    assert psutil.Process().num_fds() == num_fds
    assert not psutil.Process(FORK_SERVER.pid).children()


def test_a_decoder_outlives_the_thread_which_started_it():
    reader = MediaReader(request("test://pattern"))
    thread = threading.Thread(target=reader.start)
    thread.start()
    thread.join()
    with contextlib.closing(reader):
        items = [reader.read(5.0) for _ in range(50)]
    assert not [item for item in items if item is None or isinstance(item, Failed)]


def test_what_a_decoder_inherits_is_no_secret(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://proxy")
    monkeypatch.setenv("API_TOKEN", "canary")
    with MediaReader(request("rtsp://user:canary@127.0.0.1:9/live")) as reader:
        assert reader.pid is not None
        process = psutil.Process(reader.pid)
        assert "canary" not in " ".join(process.cmdline())
        assert set(process.environ()) <= {"PATH", "LANG", "PYTHONPATH", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"} | {
            "LD_LIBRARY_PATH",
            "MALLOC_TRIM_THRESHOLD_",
        }


def test_the_parent_loads_no_decoder():
    code = (
        "import sys, stages.media.reader; sys.exit(any(name in sys.modules for name in ('av', 'torch', 'ray', 'zmq')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_a_file_over_http_is_read_where_that_is_allowed(tmp_path):
    Clip(tmp_path / "clip.mp4").video(times(3)).sound(3).write()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        source = f"http://127.0.0.1:{server.server_port}/clip.mp4"
        with MediaReader(request(source), allow=("http",)) as reader:
            items = [reader.read(5.0)]
            while not isinstance(items[-1], (Ended, Failed)):
                items.append(reader.read(5.0))
        server.shutdown()
    assert isinstance(items[-1], Ended)
    assert len(frames_of(items)) == 3


def test_check_source_tells_the_kinds_apart(tmp_path):
    path = Clip(tmp_path / "clip.mp4").video(times(1)).write()
    kinds = [
        check_source(str(source))
        for source in (path, tmp_path, "rtsp://host/live", "RTSPS://host:322/", "test://pattern")
    ]
    assert kinds == ["file", "images", "rtsp", "rtsp", "test"]
    assert check_source("https://host/clip.mp4", allow=("https",)) == "http"


# --- time ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**10), st.integers(1, 33))
def test_a_camera_has_one_frame_in_every_window_whenever_it_is_opened(start_ns, delay_ms):
    # Given: 30 pictures per second, the first so long after the camera was opened, until a window begins.
    codec: Any = SimpleNamespace(sample_aspect_ratio=None)
    fake: Any = SimpleNamespace(average_rate=Fraction(30), sample_aspect_ratio=None, codec_context=codec)
    media_request, frames = request("rtsp://door", duration_ns=20 * NS_PER_S, want_audio=False), []
    track = VideoTrack(fake, media_request, LiveAxis(), frames.append, start_ns, live=True)
    first_ns = start_ns + delay_ms * NS_PER_MS
    num_pictures = (-first_ns % NS_PER_S + 3 * NS_PER_S) * 30 // NS_PER_S
    for index in range(num_pictures):
        picture = av.VideoFrame(32, 32, "rgb24")
        picture.pts, picture.time_base = index, Fraction(1, 30)
        track.add(picture, first_ns + index * NS_PER_S // 30)
    windows = [frame.start_ns // NS_PER_S for frame in frames]
    first_window = -(-first_ns // NS_PER_S)
    assert [window for window in windows if window >= first_window] == [first_window + k for k in range(3)]
    assert windows.count(first_window - 1) <= 1 and min(windows) >= first_window - 1
    assert frames[0].start_ns >= first_ns


def test_a_cameras_sound_is_numbered_from_the_sessions_beginning():
    media_request, sounds = request("rtsp://door", duration_ns=20 * NS_PER_S, piece_ns=NS_PER_S // 20), []
    track = SoundTrack(media_request, LiveAxis(), sounds.append, 5 * NS_PER_S + NS_PER_S // 3)
    first_ns = 5 * NS_PER_S + NS_PER_S // 2
    for index in range(50):
        piece = av.AudioFrame.from_ndarray(np.full((1, 320), 0.5, np.float32), "fltp", "mono")
        piece.rate, piece.pts, piece.time_base = 16_000, index * 320, Fraction(1, 16_000)
        track.add(piece, first_ns + index * 20 * NS_PER_MS)
    track.finish()
    ends = [sound.first_sample + sound.samples.size for sound in sounds]
    assert sounds[0].first_sample == 85_333
    assert [sound.first_sample for sound in sounds[1:]] == ends[:-1]
    assert [end % 800 for end in ends[:-1]] == [0] * (len(ends) - 1), "pieces end where a window may end"
    heard = np.concatenate([sound.samples for sound in sounds])
    assert np.flatnonzero(heard)[0] + 85_333 == 88_000


@given(st.integers(1, 16_384), st.integers(1, 16_384), st.integers(64, 1 << 24))
def test_scaled_pictures_are_even_and_small_enough(width, height, max_pixels):
    scaled = scaled_size(width, height, max_pixels)
    assert min(scaled) >= 2 and scaled[0] % 2 == scaled[1] % 2 == 0
    assert scaled[0] * scaled[1] <= max_pixels
    assert scaled[0] <= max(width, 2) and scaled[1] <= max(height, 2)


def test_a_files_axis_starts_at_its_start_and_outlives_jumps():
    axis = FileAxis(origin_ns=5 * NS_PER_S)
    assert axis.place(5 * NS_PER_S, 0, 0) == 0
    assert axis.place(6 * NS_PER_S, 40, 0) == NS_PER_S
    assert axis.place(None, NS_PER_S + 40, 0) == NS_PER_S + 40
    assert axis.place(-(10**18), 2 * NS_PER_S, 0) == 2 * NS_PER_S, "a clock set back goes on seamlessly"
    assert axis.place(NS_PER_S - 10**18, 2 * NS_PER_S + 40, 0) == 3 * NS_PER_S
    assert axis.num_jumps == 1


def test_a_live_axis_keeps_the_distances_which_jitter_destroys():
    axis = LiveAxis()
    jitter = [0, 80, 10, 120, 0, 60]
    placed = [axis.place(k * 40 * NS_PER_MS, 0, (k * 40 + late) * NS_PER_MS) for k, late in enumerate(jitter)]
    assert placed == [k * 40 * NS_PER_MS for k in range(6)]
    assert axis.num_jumps == 0


def test_a_live_axis_follows_a_camera_whose_clock_drifts():
    axis = LiveAxis()
    for k in range(100_000):  # 1000 s of a camera whose clock is 0.1 % slow
        arrival_ns = k * 10 * NS_PER_MS
        time_ns = axis.place(arrival_ns * 999 // 1000, 0, arrival_ns)
        assert abs(arrival_ns - time_ns) <= LIVE_DRIFT_NS + 10 * NS_PER_MS
    assert 1 <= axis.num_jumps <= 4


def test_a_live_axis_puts_a_backlog_where_it_arrives():
    axis = LiveAxis()
    placed = [axis.place(k * 40 * NS_PER_MS, 0, k) for k in range(50)]  # 2 s of pictures, all at once
    assert max(placed) <= LIVE_DRIFT_NS
    assert axis.num_jumps == 0
