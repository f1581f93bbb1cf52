"""Files whose times no film has: the loops over sampling instants end, and what can be seen of the film is seen."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest

from graph.chunk import NS_PER_S
from stages.media.reader import Ended
from stages.media.screen import FrameGrid, Screen
from stages.media.tracks import FileAxis, period_ns
from tests.support.media import Clip, picture, times
from tests.support.reading import frames_of, read_all, starts_s

DAY_S = 86_400


def film_with_scale(path: Path, scale: int) -> Path:
    """150 pictures and 6 s of sound; its header says that each picture stands for scale/30 s."""
    Clip(path).video(times(5), codec="mpeg4").sound(6, codec="libmp3lame").write()
    data = bytearray(path.read_bytes())
    at = data.index(b"strh") + 8 + 20  # the pictures' dwScale
    assert (data[at - 20 : at - 16], int.from_bytes(data[at + 4 : at + 8], "little")) == (b"vids", 30)
    data[at : at + 4] = scale.to_bytes(4, "little")
    path.write_bytes(data)
    return path


def slides(path: Path, period_s: int, number: int) -> Path:
    """A film of this many pictures, each of which stands for its period, by the file's own account too."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=Fraction(1, period_s))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(period_s)
        for index in range(number):
            frame = picture(index * 10, 64, 48)
            frame.pts, frame.time_base = index, Fraction(period_s)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return path


@pytest.mark.parametrize("scale", [0xFF000001, 0x01400000, 0x7FFFFFFF])  # years, days and years for a picture
def test_a_film_whose_header_gives_a_picture_years_is_seen_as_its_sound_is_heard(tmp_path, scale):
    items = read_all(film_with_scale(tmp_path / "film.avi", scale))
    assert isinstance(items[-1], Ended)
    assert len(frames_of(items)) == 6, "150 pictures, 25 in a second where nothing else is known"


def test_a_film_with_a_picture_a_day_is_seen_from_day_to_day(tmp_path):
    film = slides(tmp_path / "days.mkv", DAY_S, 3)
    items = read_all(film, fps=0.01)  # a frame in 100 s
    assert isinstance(items[-1], Ended)
    starts = starts_s(items)
    assert len([start for start in starts if start < DAY_S]) == DAY_S // 100
    assert len([start for start in starts if 2 * DAY_S <= start < 3 * DAY_S]) == DAY_S // 100


def test_of_a_picture_that_stands_for_hours_as_much_is_sent_as_is_asked_for(tmp_path):
    film = slides(tmp_path / "hours.mkv", 3000, 2)
    assert starts_s(read_all(film, duration_ns=3 * NS_PER_S)) == [0.0, 1.8, 2.8]


def test_no_instant_is_sampled_behind_what_is_asked_for():
    subject: Screen[int] = Screen(FrameGrid(1.0), until_ns=3 * NS_PER_S)
    subject.show(0, 1)
    assert len(subject.stand(10**18)) == 3, "until 2.8 s, and not for 31 years"
    assert subject.end(10**18, None) == []


@pytest.mark.parametrize(
    ("rate", "seconds"),
    [
        (Fraction(25), 1 / 25),
        (Fraction(1, DAY_S), DAY_S),
        (Fraction(1, 60 * DAY_S), 1 / 25),
        (Fraction(10**12), 1 / 25),  # of which a picture stands for nothing
        (Fraction(0), 1 / 25),
        (None, 1 / 25),
    ],
)
def test_a_files_account_of_its_rate_is_believed_where_a_film_may_have_it(rate, seconds):
    assert period_ns(rate) == round(seconds * NS_PER_S)


def test_a_picture_behind_a_jump_comes_when_the_one_before_has_been_seen():
    axis = FileAxis(origin_ns=0, step_ns=NS_PER_S // 25)
    placed = [axis.place(k * 10**18, k * NS_PER_S // 25 - (k > 0) * NS_PER_S // 25, 0) for k in range(4)]
    assert placed == [k * NS_PER_S // 25 for k in range(4)]
    assert axis.num_jumps == 3


def test_a_jump_is_none_where_the_files_pictures_are_as_far_apart():
    axis = FileAxis(origin_ns=0, step_ns=DAY_S * NS_PER_S)
    assert [axis.place(k * DAY_S * NS_PER_S, 0, 0) for k in range(2)] == [0, DAY_S * NS_PER_S]
    assert axis.num_jumps == 0
