"""stages/camera.py, and with it both sources of a session on one feed: what they say, and when they end."""

import pytest

from graph.chunk import NS_PER_S, ChunkType
from graph.window import WindowJoin
from stages.media.reader import Ended, Failed
from tests.support.media_script import (
    DOOR,
    GONE,
    Door,
    FakeMedia,
    FakeReader,
    data,
    ends,
    events,
    frame,
    progress,
    seconds,
    source,
    watermarks,
)
from tests.support.streams import inputs

CAMERA = "frames"


def windows(chunks) -> list[tuple[int, list[str]]]:
    """The windows a stage that sees and hears would get: index, and what is missing."""
    join = WindowJoin(DOOR, inputs(CAMERA, "sound"), window_ns=NS_PER_S, lateness_ns=None)
    units = []
    for chunk in (chunk for chunk in chunks if chunk.stream in (CAMERA, "sound")):
        if chunk.type is ChunkType.DATA:
            assert join.add(chunk).late == ()
        elif chunk.type is ChunkType.END:
            units += join.end(chunk.stream, chunk.start_ns).units
        else:
            units += join.advance(chunk.stream, chunk.start_ns).units
    assert join.finished
    return [(unit.index, sorted(unit.missing)) for unit in units]


@pytest.mark.parametrize("paced", [True, False])
def test_a_source_of_20_s_gives_exactly_20_windows(paced: bool):
    door = Door(FakeMedia(source(20)), paced=paced)
    said = door.until(21)
    assert windows(said) == [(index, []) for index in range(20)]
    assert [chunk.start_ns for chunk in data(said, CAMERA)] == [index * NS_PER_S for index in range(20)]
    assert ends(said) == {CAMERA: [19 * NS_PER_S + 1], "sound": [20 * NS_PER_S]}
    assert door.finished == (True, True)


def test_a_source_without_sound_gives_as_many_windows():
    said = Door(FakeMedia(source(20, sounds=False))).until(21)
    assert windows(said) == [(index, ["sound"]) for index in range(20)]


def test_a_source_without_pictures_gives_as_many_windows():
    said = Door(FakeMedia(source(20, pictures=False))).until(21)
    assert windows(said) == [(index, [CAMERA]) for index in range(20)]
    assert ends(said)[CAMERA] == [0]


def test_in_real_time_nothing_is_said_before_its_time():
    door = Door(FakeMedia(source(20)))
    said = door.until(3.5)
    assert [chunk.start_ns for chunk in data(said, CAMERA)] == [0, NS_PER_S, 2 * NS_PER_S, 3 * NS_PER_S]
    assert max(watermarks(said, CAMERA)) == 4 * NS_PER_S


def test_in_virtual_time_a_source_waits_for_nobody():
    door = Door(FakeMedia(source(20)), paced=False)
    said = door.at(*[0.0] * 12)
    assert len(data(said, CAMERA)) == 20
    assert door.finished == (True, True)


def test_after_a_picture_the_watermark_stands_at_the_next_sampling_instant():
    door = Door(FakeMedia(FakeReader(progress(0, None), frame(0.0), progress(0.5, None))), fps=2)
    said = door.at(0.0)
    assert watermarks(said, CAMERA)[-1] == NS_PER_S // 2


def test_watermarks_never_go_back():
    said = Door(FakeMedia(source(5)), fps=1).until(6)
    marks = watermarks(said, CAMERA)
    assert marks == sorted(set(marks))


def test_a_camera_that_is_behind_holds_a_window_open_for_its_lateness_only():
    door = Door(FakeMedia(FakeReader(*seconds(0, 1), live=True)), lateness_ns=NS_PER_S // 5)
    assert max(watermarks(door.until(2.1), CAMERA)) == NS_PER_S
    assert max(watermarks(door.at(2.2), CAMERA)) == 2 * NS_PER_S


def test_pictures_that_end_before_the_sound_are_all_seen():
    # Given: the decoder has read the last pictures ahead and said that there are no more.
    items = [progress(0, 0), *seconds(0, 2), progress(None, 2), *seconds(2, 6, pictures=False)]
    door = Door(FakeMedia(FakeReader(*items, progress(None, None), Ended("over"))))
    said = door.until(7)
    assert [chunk.start_ns for chunk in data(said, CAMERA)] == [0, NS_PER_S]
    assert windows(said) == [(index, [CAMERA] if index > 1 else []) for index in range(6)]
    order = [chunk.type for chunk in said if chunk.stream == CAMERA]
    assert order.index(ChunkType.END) == len(order) - 1


def test_a_live_camera_that_dies_costs_its_windows_and_comes_back():
    # Given: a camera that dies at 2 s, is not there at 3 s, and is found again at 5 s.
    first = FakeReader(live=True)
    door = Door(FakeMedia(first, FakeReader(GONE, live=True), again := FakeReader(live=True)), duration_ns=8 * NS_PER_S)
    said = []
    for at in range(2):
        first.give(*seconds(at, at + 1))
        said += door.until(at + 1, start_s=at)
    first.give(frame(2.0), GONE)
    said += door.until(5, start_s=2)
    for at in range(5, 8):
        again.give(*seconds(at, at + 1))
        said += door.until(at + 1, start_s=at)
    again.give(Ended("the duration is over"))
    said += door.until(9, start_s=8)
    # Then: every window has left, and only those are missing something in which it was away.
    assert windows(said) == [
        *((index, []) for index in (0, 1)),
        (2, ["sound"]),
        *((index, [CAMERA, "sound"]) for index in (3, 4)),
        *((index, []) for index in (5, 6, 7)),
    ]
    assert events(said) == ["camera_up", "camera_lost", "camera_lost", "camera_up", "camera_ended"]
    assert ends(said) == {CAMERA: [8 * NS_PER_S], "sound": [8 * NS_PER_S]}


@pytest.mark.parametrize("paced", [True, False])
def test_a_file_that_breaks_owes_its_windows_until_the_duration(paced: bool):
    reader = FakeReader(*seconds(0, 2), Failed("unreadable", "clip.mp4 is damaged"))
    door = Door(FakeMedia(reader), paced=paced, duration_ns=6 * NS_PER_S)
    said = door.until(7)
    assert windows(said) == [(index, [CAMERA, "sound"] if index > 1 else []) for index in range(6)]
    assert ends(said) == {CAMERA: [6 * NS_PER_S], "sound": [6 * NS_PER_S]}
    assert door.finished == (True, True)


def test_end_stops_both_sources_with_the_window_of_now():
    door = Door(FakeMedia(FakeReader(*seconds(0, 20))))
    said = door.until(3.4)
    for stage in (door.camera, door.microphone):
        stage.end(DOOR, round(3.4 * NS_PER_S))
    said += door.until(6, start_s=3.5)
    assert ends(said) == {CAMERA: [4 * NS_PER_S], "sound": [4 * NS_PER_S]}
    assert door.finished == (True, True)


def stopped_live_camera(*late_items, late_s: float):
    """What both sources of a live camera say that is stopped at 1.4 s, and whose last second comes at `late_s`."""
    reader = FakeReader(*seconds(0, 1), live=True)
    door = Door(FakeMedia(reader))
    said = door.until(1.4)
    for stage in (door.camera, door.microphone):
        stage.end(DOOR, round(1.4 * NS_PER_S))
    said += door.until(late_s - 0.1, start_s=1.5)
    reader.give(*late_items)
    said += door.until(4, start_s=late_s)
    assert door.finished == (True, True)
    assert ends(said) == {CAMERA: [2 * NS_PER_S], "sound": [2 * NS_PER_S]}
    return windows(said)


def test_of_a_stopped_live_camera_the_last_window_waits_for_what_is_under_way():
    assert stopped_live_camera(*seconds(1, 4), late_s=2.2) == [(0, []), (1, [])]


def test_a_stopped_live_camera_that_gives_nothing_more_ends_when_its_last_window_is_given_up():
    assert stopped_live_camera(late_s=2.2) == [(0, []), (1, [CAMERA, "sound"])]


def end_notices(chunks) -> list[tuple[float, str]]:
    """When it is said that the camera has ended, and why."""
    of_end = [chunk for chunk in chunks if chunk.attrs.get("type") == "camera_ended"]
    return [(chunk.start_ns / NS_PER_S, str(chunk.attrs["reason"])) for chunk in of_end]


@pytest.mark.parametrize("paced", [True, False])
def test_a_session_does_not_end_before_it_is_said_that_its_camera_has(paced: bool):
    reader = FakeReader(*seconds(0, 2), progress(None, None))
    door = Door(FakeMedia(reader), paced=paced)
    said = door.until(2.5)
    assert sorted(ends(said)) == [CAMERA, "sound"]
    assert (end_notices(said), door.finished[0]) == ([], False), "its decoder has not yet said why"
    reader.give(Ended("it is at its end"))
    assert end_notices(door.until(2.7, start_s=2.6)) == [(2, "it is at its end")]
    assert door.finished == (True, True)


def stopped(reader: FakeReader, at_s: float, until_s: float, **session: object) -> list[tuple[float, str]]:
    """What is said of the end of a camera that is stopped."""
    door = Door(FakeMedia(reader), **session)
    said = door.until(at_s)
    for stage in (door.camera, door.microphone):
        stage.end(DOOR, round(at_s * NS_PER_S))
    said += door.until(until_s, start_s=at_s + 0.1)
    assert (door.finished, reader.closed) == ((True, True), True)
    return end_notices(said)


@pytest.mark.parametrize("paced", [True, False])
def test_a_film_that_is_stopped_has_been_stopped_and_its_rest_is_not_read(paced: bool):
    reader = FakeReader(*seconds(0, 200), Ended("it is at its end"))
    (notice,) = stopped(reader, 5.5, 7, paced=paced)
    assert notice[1] == "it was stopped"
    assert len(reader.items) > 100


def test_a_live_camera_that_is_stopped_has_been_stopped():
    assert stopped(FakeReader(*seconds(0, 2), live=True), 1.4, 3) == [(2, "it was stopped")]


def test_a_film_that_is_stopped_short_of_its_end_has_been_stopped_though_that_was_read_ahead():
    assert stopped(source(4), 2.5, 4) == [(3, "it was stopped")]


def test_a_film_that_is_stopped_behind_its_end_was_at_its_end():
    assert stopped(source(4), 5.5, 7) == [(4, "it is at its end")]


def test_a_film_that_is_stopped_in_its_last_window_was_at_its_end():
    assert stopped(FakeReader(*source(4).items), 3.5, 5) == [(4, "it is at its end")]


def test_a_live_camera_whose_time_is_over_says_so_once():
    reader = FakeReader(*seconds(0, 2), live=True)
    door = Door(FakeMedia(reader), duration_ns=3 * NS_PER_S)
    said = door.until(2)
    said += door.until(5, start_s=2.1)
    assert end_notices(said) == [(3, "the duration asked for is over")]


def test_that_a_film_has_ended_is_said_when_its_time_has_come_and_not_when_it_is_read():
    door = Door(FakeMedia(source(2)))
    assert end_notices(door.until(1.9)) == []
    assert end_notices(door.until(2.0, start_s=2.0)) == [(2, "it is at its end")]


def test_a_stopped_live_camera_that_is_lost_is_not_waited_for():
    door = Door(FakeMedia(*(FakeReader(GONE, live=True) for _ in range(9))), lateness_ns=20 * NS_PER_S)
    door.until(1.4)
    for stage in (door.camera, door.microphone):
        stage.end(DOOR, round(1.4 * NS_PER_S))
    said = door.until(2.2, start_s=1.5)
    assert ends(said) == {CAMERA: [2 * NS_PER_S], "sound": [2 * NS_PER_S]}
    assert door.finished == (True, True)


def test_a_closed_session_leaves_no_reader_behind():
    reader = FakeReader(*seconds(0, 1))
    door = Door(FakeMedia(reader))
    door.at(0.0)
    door.camera.close_session(DOOR)
    assert door.microphone.wakes() == {reader.fileno(): DOOR}
    door.microphone.close_session(DOOR)
    door.microphone.close_session(DOOR)
    assert reader.closed


def test_the_reason_of_a_loss_is_told():
    door = Door(FakeMedia(FakeReader(GONE, live=True)))
    lost = data(door.at(0.5), "events")[0]
    assert (lost.start_ns, lost.attrs["reason"], lost.attrs["message"]) == (NS_PER_S // 2, "closed", GONE.message)


def test_a_picture_that_came_late_does_not_close_the_window_of_the_next_one():
    # Given: after a hole in the stream a picture at 1.15 s; the decoder samples again at 1.8 s.
    door = Door(FakeMedia(FakeReader(frame(1.15), progress(1.8, None))))
    assert max(watermarks(door.at(1.2), CAMERA)) == round(1.8 * NS_PER_S)


def test_the_watermark_does_not_run_beyond_the_duration():
    # Given: the decoder's next sampling instant lies a window behind the end.
    door = Door(FakeMedia(FakeReader(frame(0.9), progress(2.9, None))), duration_ns=2 * NS_PER_S)
    assert max(watermarks(door.at(1.0), CAMERA)) == 2 * NS_PER_S
