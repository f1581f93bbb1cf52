"""stages/media/thinning.py: of a live video no more is decoded than what is seen takes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.frame import PictureType

from graph.chunk import NS_PER_MS, NS_PER_S
from stages.media.thinning import MAX_REORDER_NS, MAX_REST_NS, Keyframes, LiveDecoder
from stages.media.tracks import LiveAxis, VideoTrack
from stages.media.wire import Frame, MediaItem
from tests.support.media import picture
from tests.support.reading import request

FPS = 15
OPENED_NS = 0


def suffice_after(distances_s: Iterable[float], period_s: float = 1.0) -> bool:
    """Whether keyframes of these distances suffice, each followed by a picture half-way to the next."""
    keyframes, time_s = Keyframes(round(period_s * NS_PER_S)), 0.0
    keyframes.see(0, is_keyframe=True)
    for distance_s in distances_s:
        keyframes.see(round((time_s + distance_s / 2) * NS_PER_S), is_keyframe=False)
        time_s += distance_s
        keyframes.see(round(time_s * NS_PER_S), is_keyframe=True)
    return keyframes.suffice


# --- when keyframes are enough ------------------------------------------------------------------------------------


def test_keyframes_are_relied_on_after_three_regular_distances():
    assert not suffice_after([1.0, 1.0])
    assert suffice_after([1.0, 1.0, 1.0])
    assert suffice_after([0.5, 0.5, 0.5])


def test_stamps_may_jitter_by_a_tenth_of_a_period():
    assert suffice_after([1.08, 0.95, 1.05])
    assert not suffice_after([1.0, 1.2, 1.0])
    assert not suffice_after([4.0] * 9)


def test_the_period_is_that_of_the_frames_that_are_wanted():
    assert suffice_after([4.0] * 3, period_s=5.0)
    assert not suffice_after([1.0] * 9, period_s=0.5)


def test_a_keyframe_that_is_overdue_ends_it_with_the_first_picture_that_shows_it():
    keyframes = Keyframes(NS_PER_S)
    for second in range(4):
        keyframes.see(second * NS_PER_S, is_keyframe=True)
    keyframes.see(4 * NS_PER_S, is_keyframe=False)
    assert keyframes.suffice
    keyframes.see(4_200 * NS_PER_MS, is_keyframe=False)
    assert not keyframes.suffice


def test_whoever_was_wrong_needs_twice_as_many_the_next_time():
    wrong_once = [1.0, 1.0, 1.0, 4.0]
    assert not suffice_after([*wrong_once, *[1.0] * 5])
    assert suffice_after([*wrong_once, *[1.0] * 6])


def test_nothing_is_known_of_pictures_without_times_or_of_a_clock_that_was_set_back():
    keyframes = Keyframes(NS_PER_S)
    for second in range(5):
        keyframes.see(second * NS_PER_S, is_keyframe=True)
    keyframes.see(4 * NS_PER_S - MAX_REORDER_NS, is_keyframe=False)
    assert keyframes.suffice, "a picture that comes after one which is shown later"
    keyframes.see(NS_PER_S, is_keyframe=True)
    assert not keyframes.suffice
    for _ in range(9):
        keyframes.see(None, is_keyframe=True)
    assert not keyframes.suffice


# --- what is decoded ----------------------------------------------------------------------------------------------


def film(path: Path, seconds: int, is_key: Callable[[int], bool], codec: str = "libx264", num_b: int = 0) -> Path:
    """Pictures that get brighter, with keyframes where they are wanted."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=FPS)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, FPS)
        stream.options = {"preset": "veryfast", "g": "1000", "bf": str(num_b), "sc_threshold": "0"}
        for index in range(seconds * FPS):
            frame = picture(index, 64, 48)
            frame.pts, frame.time_base = index, Fraction(1, FPS)
            frame.pict_type = PictureType.I if is_key(index) else PictureType.NONE
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


class Viewer:
    """A live camera that plays a film, watched at 1 fps."""

    def __init__(self, path: Path) -> None:
        self.items: deque[MediaItem] = deque()
        self._container = av.open(str(path))
        self._stream = self._container.streams.video[0]
        media_request = request("rtsp://camera/live", want_audio=False)
        self.track = VideoTrack(self._stream, media_request, LiveAxis(), self.items.append, live=True)
        self.decoder = LiveDecoder(self._stream, self.track, media_request.fps)
        self.num_decoded = 0

    def packets(self) -> Iterator[av.Packet]:
        for packet in self._container.demux(self._stream):
            if packet.size:
                yield packet

    def watch(self) -> list[Frame]:
        """All that is seen; each packet arrives when it is shown, or right behind the one before."""
        arrival_ns = OPENED_NS
        for packet in self.packets():
            assert packet.pts is not None and packet.time_base is not None
            arrival_ns = max(arrival_ns, int(packet.pts * packet.time_base * NS_PER_S))
            self.take(packet, arrival_ns)
        return self.frames()

    def frames(self) -> list[Frame]:
        return [item for item in self.items if isinstance(item, Frame)]

    def take(self, packet: av.Packet, arrival_ns: int) -> None:
        for frame in self.decoder.decode(packet, arrival_ns) or []:
            self.num_decoded += 1
            self.track.add(frame, arrival_ns)


def noise_like(packet: av.Packet) -> av.Packet:
    spoiled = av.Packet(np.random.default_rng(1).bytes(packet.size))
    spoiled.pts, spoiled.dts, spoiled.time_base = packet.pts, packet.dts, packet.time_base
    spoiled.stream, spoiled.is_keyframe = packet.stream, packet.is_keyframe
    return spoiled


def seconds_of(frames: Iterable[Frame]) -> list[int]:
    return [frame.start_ns // NS_PER_S for frame in frames]


def shown_s(frame: Frame) -> float:
    """When the picture came on the screen, by its age at the sampling instant."""
    instant_s = frame.start_ns // NS_PER_S + 0.8
    return round(instant_s - frame.age_ns / NS_PER_S, 2)


def brightness(second: float) -> float:
    return min(4 * second * FPS, 252)


def test_with_a_keyframe_each_second_nothing_else_is_decoded_and_its_age_is_told(tmp_path):
    viewer = Viewer(film(tmp_path / "film.mp4", 10, lambda index: index % FPS == 0))
    frames = viewer.watch()
    assert seconds_of(frames) == list(range(10))
    assert [shown_s(frame) for frame in frames[3:]] == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    assert viewer.num_decoded == 3 * FPS, "until the third distance was known"
    assert frames[4].image.mean() == pytest.approx(brightness(4.0), abs=3)


def test_where_keyframes_are_rare_every_instant_has_its_own_picture(tmp_path):
    viewer = Viewer(film(tmp_path / "film.mp4", 9, lambda index: index % (4 * FPS) == 0))
    frames = viewer.watch()
    assert seconds_of(frames) == list(range(9))
    assert all(frame.age_ns < NS_PER_S // FPS + 1 for frame in frames)


def test_what_was_kept_is_decoded_when_the_next_keyframe_is_overdue(tmp_path):
    path = film(tmp_path / "film.mp4", 12, lambda index: index % FPS == 0 and index <= 5 * FPS)
    frames = Viewer(path).watch()
    assert seconds_of(frames) == list(range(12))
    assert [shown_s(frame) for frame in frames[3:6]] == [3.0, 4.0, 5.0]
    assert all(frame.age_ns < NS_PER_S // FPS + 1 for frame in frames[6:])
    assert [frame.image.mean() for frame in frames[6:8]] == [
        pytest.approx(brightness(second + 0.8), abs=6) for second in (6, 7)
    ]


def test_a_keyframe_is_seen_at_once_also_where_pictures_are_put_in_order(tmp_path):
    viewer = Viewer(film(tmp_path / "film.mp4", 10, lambda index: index % FPS == 0, num_b=2))
    frames = viewer.watch()
    assert seconds_of(frames) == list(range(10))
    assert [frame.image.mean() for frame in frames[3:4]] == [pytest.approx(brightness(3.0), abs=6)]
    # On the session's axis a picture is shown when the decoder gives it, which puts it in order first.
    assert all(0.0 <= shown_s(frame) - second <= 0.25 for second, frame in enumerate(frames[3:], 3))
    assert viewer.track.num_gaps == 0


def test_where_every_picture_is_a_keyframe_the_sampled_ones_are_decoded_and_no_other(tmp_path):
    viewer = Viewer(film(tmp_path / "film.avi", 6, lambda index: True, codec="mjpeg"))
    frames = viewer.watch()
    assert seconds_of(frames) == list(range(6))
    assert all(frame.age_ns < NS_PER_S // FPS + 1 for frame in frames)
    assert viewer.num_decoded == 3
    assert frames[3].image.mean() == pytest.approx(brightness(3.8), abs=6)


def test_a_keyframe_that_can_not_be_decoded_is_the_last_that_was_relied_on(tmp_path):
    viewer = Viewer(film(tmp_path / "film.mp4", 9, lambda index: index % FPS == 0))
    num_bad, arrival_ns = 0, 0
    for packet in viewer.packets():
        arrival_ns = int(packet.pts * packet.time_base * NS_PER_S)
        is_bad = packet.pts * packet.time_base == 5
        try:
            viewer.take(noise_like(packet) if is_bad else packet, arrival_ns)
        except (av.error.FFmpegError, ValueError):
            num_bad += 1
    frames = viewer.frames()
    assert num_bad > 0
    assert [second for second in seconds_of(frames) if second >= 6] == [6, 7, 8]
    assert all(frame.age_ns < NS_PER_S // FPS + 1 for frame in frames[-3:])


def test_pictures_on_which_no_other_builds_are_left_out_where_there_are_many(tmp_path):
    viewer = Viewer(film(tmp_path / "film.mp4", 9, lambda index: index % (3 * FPS) == 0, num_b=3))
    frames = viewer.watch()
    assert seconds_of(frames) == list(range(9))
    assert viewer.num_decoded < 7 * FPS
    assert all(frame.age_ns < 300 * NS_PER_MS for frame in frames)


# --- when packets are read ----------------------------------------------------------------------------------------


def test_packets_are_left_in_their_socket_until_the_next_instant_where_keyframes_are_relied_on(tmp_path):
    viewer = Viewer(film(tmp_path / "film.mp4", 6, lambda index: index % FPS == 0))
    step_ns, rests_ns = NS_PER_S // FPS, []
    for index, packet in enumerate(viewer.packets()):
        now_ns = index * step_ns
        viewer.take(packet, now_ns)
        rests_ns.append(viewer.decoder.rest_ns(now_ns))
        assert viewer.decoder.rest_ns(now_ns + 2 * step_ns) == 0, "more has come"
    assert set(rests_ns[: 4 * FPS]) == {0}, "everything is decoded, then it is not known yet how much comes"
    assert rests_ns[4 * FPS + 1] == MAX_REST_NS
    assert rests_ns[4 * FPS + 11] == pytest.approx(800 * NS_PER_MS - 11 * step_ns, abs=100)
