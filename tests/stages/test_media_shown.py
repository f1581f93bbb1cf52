"""Films as a player shows them: in their true shape, the right way up, in their colours; what stands still stands."""

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from graph.chunk import NS_PER_S
from stages.media.reader import Ended, Failed, Frame, MediaItem, Sound
from stages.media.tracks import LiveAxis, VideoTrack
from stages.media.view import PixelAspect
from tests.support.media import Clip, damaged, times
from tests.support.reading import first_image, frames_of, quarters, read_all, request, starts_s

RED, GREEN, BLUE, WHITE = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]
TURN = 65_536  # display matrices are 16.16 fixed point


def quartered(width: int = 64, height: int = 48) -> np.ndarray:
    """Red, green, blue and white in its quarters."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2], image[: height // 2, width // 2 :] = RED, GREEN
    image[height // 2 :, : width // 2], image[height // 2 :, width // 2 :] = BLUE, WHITE
    return image


def film(path: Path, image: np.ndarray, *, codec: str = "libx264rgb", pix_fmt: str = "rgb24", **how: Any) -> Path:
    """Two seconds of one picture. how: matrix, aspect, and what the codec context and the reformatter are to know."""
    height, width, channels = image.shape
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.sample_aspect_ratio = how.get("aspect", Fraction(1))
        for name in ("colorspace", "color_range"):
            setattr(stream.codec_context, name, how.get(name, getattr(stream.codec_context, name)))
        stream.set_display_matrix(how.get("matrix"))
        picture = av.VideoFrame.from_ndarray(image, "rgb24" if channels == 3 else "rgba")
        picture = VideoReformatter().reformat(picture, format=pix_fmt, **how.get("as_", {}))
        for index in range(20):
            picture.pts, picture.time_base = index, Fraction(1, 10)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


# --- shape --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("matrix", "size", "shown"),
    [
        ((1, 0, 0, 1), (64, 48), [RED, GREEN, BLUE, WHITE]),
        ((0, 1, -1, 0), (48, 64), [BLUE, RED, WHITE, GREEN]),
        ((-1, 0, 0, -1), (64, 48), [WHITE, BLUE, GREEN, RED]),
        ((0, -1, 1, 0), (48, 64), [GREEN, WHITE, RED, BLUE]),
        ((-1, 0, 0, 1), (64, 48), [GREEN, RED, WHITE, BLUE]),
        ((1, 0, 0, -1), (64, 48), [BLUE, WHITE, RED, GREEN]),
        ((0, 1, 1, 0), (48, 64), [RED, BLUE, GREEN, WHITE]),
        ((0, -1, -1, 0), (48, 64), [WHITE, GREEN, BLUE, RED]),
    ],
)
def test_a_film_is_turned_and_mirrored_as_its_matrix_says(tmp_path, matrix, size, shown):
    a, b, c, d = (TURN * entry for entry in matrix)
    image = first_image(film(tmp_path / "phone.mp4", quartered(), matrix=[a, b, 0, c, d, 0, 0, 0, 1 << 30]))
    assert image.shape == (size[1], size[0], 3)
    assert quarters(image) == shown


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize(
    ("stored", "aspect", "shown"),
    [
        ((720, 576), Fraction(64, 45), (1024, 576)),
        ((720, 576), Fraction(16, 15), (768, 576)),
        ((1440, 1080), Fraction(4, 3), (1920, 1080)),
        ((704, 480), Fraction(10, 11), (704, 528)),
        ((640, 480), Fraction(1, 100), (640, 480)),
    ],
)
def test_an_anamorphic_film_is_shown_in_its_true_shape(tmp_path, name, stored, aspect, shown):
    image = first_image(film(tmp_path / name, quartered(*stored), aspect=aspect), duration_ns=NS_PER_S)
    assert image.shape == (shown[1], shown[0], 3)
    assert quarters(image) == [RED, GREEN, BLUE, WHITE]


def test_an_anamorphic_film_that_lies_on_its_side_is_stretched_before_it_is_turned(tmp_path):
    matrix = [0, TURN, 0, -TURN, 0, 0, 0, 0, 1 << 30]
    path = film(tmp_path / "a.mp4", quartered(720, 576), aspect=Fraction(64, 45), matrix=matrix)
    assert first_image(path).shape == (1024, 576, 3)


# --- colour -------------------------------------------------------------------------------------------------------

COLOURS = [[200, 60, 40], [30, 160, 70], [40, 50, 190], [128, 128, 128]]


def colours(width: int, height: int) -> np.ndarray:
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2], image[: height // 2, width // 2 :] = COLOURS[0], COLOURS[1]
    image[height // 2 :, : width // 2], image[height // 2 :, width // 2 :] = COLOURS[2], COLOURS[3]
    return image


@pytest.mark.parametrize(("size", "said"), [((1280, 720), False), ((640, 480), False), ((640, 480), True)])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le"])
def test_colours_are_those_that_were_filmed(tmp_path, size, said, pix_fmt):
    is_709 = said or size[0] >= 1280
    how: dict[str, Any] = {"as_": {"dst_colorspace": Colorspace.ITU709 if is_709 else Colorspace.ITU601}}
    how |= {"colorspace": 1} if said else {}
    image = first_image(film(tmp_path / "a.mp4", colours(*size), codec="libx264", pix_fmt=pix_fmt, **how))
    assert np.abs(np.array(quarters(image)) - COLOURS).max() <= 5


@pytest.mark.parametrize("color_range", [ColorRange.MPEG, ColorRange.JPEG])
def test_black_and_white_are_black_and_white_in_every_range(tmp_path, color_range):
    shades = np.repeat(np.array([[0, 85], [170, 255]], np.uint8), 120, 0).repeat(160, 1)
    image = np.stack([shades] * 3, -1)
    how: dict[str, Any] = {"color_range": int(color_range), "as_": {"dst_color_range": color_range}}
    path = film(tmp_path / "a.mp4", image, codec="libx264", pix_fmt="yuv420p", **how)
    seen = [quarter[1] for quarter in quarters(first_image(path))]
    assert np.abs(np.array(seen) - [0, 85, 170, 255]).max() <= 3


def test_a_see_through_film_is_shown_over_black(tmp_path):
    image = np.dstack([quartered(), np.full((48, 64), 255, np.uint8)])
    image[:24, 32:, 3], image[24:, 32:, 3] = 128, 0
    path = film(tmp_path / "a.mov", image, codec="png", pix_fmt="rgba")
    assert quarters(first_image(path)) == [RED, [0, 128, 0], BLUE, [0, 0, 0]]


# --- time ---------------------------------------------------------------------------------------------------------

UNEVEN_S = [0, 0.73, 1.13, 1.6, 2.07, 2.47, 2.87, 3.4, 4.07, 4.8, 5.33, 5.93, 6.6, 7.0, 7.8]


@pytest.mark.parametrize("name", ["sparse.mkv", "sparse.mp4", "sparse.mov"])
def test_a_film_of_uneven_times_has_one_picture_per_window(tmp_path, name):
    items = read_all(Clip(tmp_path / name).video(UNEVEN_S).write())
    assert starts_s(items) == [0.73, 1.6, 2.47, 3.4, 4.8, 5.33, 6.6, 7.8]
    assert [round(frame.age_ns / NS_PER_S, 2) for frame in frames_of(items)] == [
        0.07, 0.2, 0.33, 0.4, 0.0, 0.47, 0.2, 0.0,
    ]  # fmt: skip


def test_a_still_screen_is_in_every_window_beside_its_sound(tmp_path):
    path = Clip(tmp_path / "still.mkv").video([0, 0.5, 20, 20.5, 39]).sound(40).write()
    items = read_all(path)
    assert starts_s(items) == [0.5, *(k + 0.8 for k in range(1, 20)), 20.5, *(k + 0.8 for k in range(21, 39)), 39.0]
    assert furthest_behind_s(items) <= 1.0


def furthest_behind_s(items: list[MediaItem]) -> float:
    """How much earlier an item is, at most, than one which came before it."""
    behind = latest_ns = 0
    for item in items:
        if isinstance(item, (Frame, Sound)):
            behind = max(behind, latest_ns - item.start_ns)
            latest_ns = max(latest_ns, item.start_ns)
    return behind / NS_PER_S


@pytest.mark.parametrize("sound", [{"start_s": 15}, {"hole_s": (5, 15)}])
def test_sound_with_nothing_for_long_comes_beside_the_pictures(tmp_path, sound):
    items = read_all(Clip(tmp_path / "clip.mkv").video(times(30, 5)).sound(15, **sound).write())
    assert [int(start) for start in starts_s(items)] == list(range(30))
    assert furthest_behind_s(items) <= 1.0


def test_a_slide_show_of_one_picture_per_ten_seconds_is_on_time_in_every_window(tmp_path):
    items = read_all(Clip(tmp_path / "slides.mp4").video([0, 10, 20]).sound(30).write())
    assert [int(start) for start in starts_s(items)] == list(range(30))
    assert isinstance(items[-1], Ended)


@pytest.mark.parametrize("fps", [0.9, 1.0, 1.1, 25, 29.97])
def test_films_near_the_sampling_rate_have_one_picture_per_window(tmp_path, fps):
    items = read_all(Clip(tmp_path / "clip.mkv").video(times(12, fps)).write())
    windows = [int(start) for start in starts_s(items)]
    assert windows == list(range(len(windows)))
    assert len(windows) >= 10


def test_an_aspect_that_changes_in_mid_stream_is_shown_from_there_on(tmp_path):
    parts = [
        film(tmp_path / f"{number}.ts", quartered(64, 48), codec="mpeg2video", pix_fmt="yuv420p", aspect=aspect)
        for number, aspect in enumerate((Fraction(1), Fraction(4, 3)))
    ]
    (tmp_path / "both.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    shapes = [frame.image.shape for frame in frames_of(read_all(tmp_path / "both.ts", fps=5.0))]
    assert (shapes[0], shapes[-1]) == ((48, 64, 3), (48, 84, 3))


@pytest.mark.parametrize(
    ("container", "coded", "shown"),
    [
        (Fraction(4, 3), [Fraction(1), Fraction(1)], [Fraction(4, 3), Fraction(4, 3)]),  # the container's word is first
        (Fraction(4, 3), [Fraction(1), None, Fraction(1)], [Fraction(4, 3)] * 3),  # silence is no change
        (Fraction(1), [Fraction(1), Fraction(4, 3), Fraction(1)], [Fraction(1), Fraction(4, 3), Fraction(1)]),
        (None, [None, Fraction(4, 3)], [None, Fraction(4, 3)]),
    ],
)
def test_the_pixels_aspect_is_the_containers_until_the_codec_changes_its_own(container, coded, shown):
    codec: Any = SimpleNamespace(sample_aspect_ratio=None)
    stream: Any = SimpleNamespace(sample_aspect_ratio=container, codec_context=codec)
    aspect, seen = PixelAspect(stream), []
    for codec.sample_aspect_ratio in coded:
        seen.append(aspect.now())
    assert seen == shown


def live_track(frames: list[MediaItem], **changes: Any) -> VideoTrack:
    codec: Any = SimpleNamespace(sample_aspect_ratio=None)
    fake: Any = SimpleNamespace(average_rate=None, sample_aspect_ratio=None, codec_context=codec)
    return VideoTrack(
        fake, request("rtsp://door", want_audio=False, **changes), LiveAxis(), frames.append, 0, live=True
    )


def show(track: VideoTrack, time_s: float, stamp_s: float | None = None) -> None:
    picture = av.VideoFrame(32, 32, "rgb24")
    picture.pts, picture.time_base = round((time_s if stamp_s is None else stamp_s) * 1000), Fraction(1, 1000)
    track.add(picture, round(time_s * NS_PER_S))


def test_a_slow_cameras_picture_is_sent_again_when_its_instant_has_passed():
    frames: list[MediaItem] = []
    track = live_track(frames)
    show(track, 0.5)
    assert not track.hold(round(0.85 * NS_PER_S)), "one that is late may still come"
    assert track.due_ns == round(0.9 * NS_PER_S)
    assert track.hold(track.due_ns)
    assert starts_s(frames) == [0.5]
    assert track.hold(track.due_ns)
    assert (starts_s(frames), frames_of(frames)[1].age_ns) == ([0.5, 1.8], round(1.3 * NS_PER_S))
    assert frames_of(frames)[1].image is frames_of(frames)[0].image, "converted once"
    assert track.position_ns == 2 * NS_PER_S


def test_a_frozen_camera_gives_no_more_pictures_after_two_seconds():
    frames: list[MediaItem] = []
    track = live_track(frames)
    for time_s in times(1.1, 25):
        show(track, time_s)
    sent = [track.hold(now * NS_PER_S) for now in range(2, 30)]
    assert sent == [True, True] + [False] * 26, "so that the parent's watchdog hears when nothing comes"


# --- films that are shorter than a frame period -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["short.mp4", "short.mkv", "short.avi", "short.ts"])
@pytest.mark.parametrize("with_sound", [False, True])
def test_a_film_of_half_a_second_is_seen_once_with_its_last_picture(tmp_path, name, with_sound):
    clip = Clip(tmp_path / name).video(times(0.5), codec="mpeg4")
    clip = clip.sound(0.5) if with_sound else clip
    items = read_all(clip.write())
    assert isinstance(items[-1], Ended), items[-1]
    (frame,) = frames_of(items)
    assert 0.4 <= frame.start_ns / NS_PER_S < 0.6
    assert frame.image.mean() == pytest.approx(4 * 14, abs=6)


def test_a_film_of_one_picture_is_seen(tmp_path):
    items = read_all(Clip(tmp_path / "one.mp4").video([0]).write())
    assert isinstance(items[-1], Ended), items[-1]
    assert starts_s(items) == [0]


def test_a_film_that_is_shorter_than_a_rare_frames_period_is_seen_once(tmp_path):
    items = read_all(Clip(tmp_path / "short.mp4").video(times(2.6)).write(), fps=0.3)
    assert starts_s(items) == [2.57]


def test_a_film_of_which_nothing_can_be_shown_before_its_end_says_so(tmp_path):
    # Given: 3 s whose last pictures are damaged: nobody knows what would stand at the first instant, 8 s.
    film = Clip(tmp_path / "whole.mkv").video(times(3), codec="mpeg4").write()
    broken = damaged(film, tmp_path / "broken.mkv", lambda kind, number: number > 80)
    items = read_all(broken, fps=0.1)
    what = "is at its end before there was a picture to take, or any sound"
    assert items[-1] == Failed("unreadable", f"{broken} {what}")


@pytest.mark.parametrize("back_s", [0.5, 4, 60])
def test_live_pictures_whose_stamps_go_back_are_shown_when_they_arrive(back_s):
    frames: list[MediaItem] = []
    track = live_track(frames)
    for time_s in times(20, 25):
        show(track, time_s, 100 + time_s - back_s * (time_s >= 8))
    assert [int(start) for start in starts_s(frames)] == list(range(20))
    assert max(frame.age_ns for frame in frames_of(frames)) <= NS_PER_S // 25
    assert track.num_gaps == 1


def test_live_pictures_whose_stamps_stand_still_are_shown_when_they_arrive():
    frames: list[MediaItem] = []
    track = live_track(frames)
    for time_s in times(20, 25):
        show(track, time_s, 0)
    assert [int(start) for start in starts_s(frames)] == list(range(20))
    assert track.num_gaps == 1


def test_pictures_which_come_late_and_all_at_once_keep_their_times():
    # Given: the network stands for 3 s, and gives what it has held.
    frames: list[MediaItem] = []
    track = live_track(frames)
    for index, time_s in enumerate(times(12, 25)):
        late_s = 9 + index / 10_000 if 6 <= time_s < 9 else time_s
        picture = av.VideoFrame(32, 32, "rgb24")
        picture.pts, picture.time_base = round(time_s * 1000), Fraction(1, 1000)
        track.add(picture, round(late_s * NS_PER_S))
    assert [int(start) for start in starts_s(frames)] == list(range(12))
    assert track.num_gaps == 0
