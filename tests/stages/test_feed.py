"""stages/media/feed.py: one camera's media on the session's axis, whatever its connection does."""

import itertools
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest

from graph.chunk import NS_PER_S, SessionId
from stages.media.feed import Feed
from stages.media.feed_opening import in_thread
from stages.media.feed_retries import Retries
from stages.media.feeds import MAX_CLOSED, Feeds
from stages.media.health import Totals
from stages.media.reader import Ended, Failed, MediaError, MediaItem, MediaReader, Progress, Warned
from stages.rates import SOUND_RATE_HZ
from stages.session import Session
from stages.stage import SourceId, SourceReport
from tests.support.media_script import (
    DOOR,
    GONE,
    Door,
    FakeMedia,
    FakeReader,
    data,
    ends,
    frame,
    progress,
    seconds,
    sound,
    source,
    watermarks,
)
from tests.support.sessions import make_session

MISSING = MediaError("missing", "/dev/video0: no such device")


def session(**fields: object) -> Session:
    return make_session("door", "rtsp://door", **fields)


def feed(*script: FakeReader | MediaError, **fields: object) -> Feed:
    return Feed(session(**fields), FakeMedia(*script))


def notices_of(subject: Feed) -> list[str]:
    return [notice.type for notice in subject.take_notices()]


def test_a_feed_reads_two_seconds_ahead_and_no_more():
    reader = FakeReader(*seconds(0, 10))
    subject = feed(reader)
    subject.pump(0)
    assert subject.wakes() == []
    assert [f.start_ns for f in subject.take_frames(10 * NS_PER_S)] == [0, NS_PER_S]


def test_a_feed_with_room_waits_for_its_decoder():
    reader = FakeReader(*seconds(0, 1))
    subject = feed(reader)
    subject.pump(0)
    assert subject.wakes() == [reader.fileno()]


def test_a_file_with_windows_of_five_seconds_is_read_a_window_ahead():
    subject = feed(FakeReader(*seconds(0, 20)), window_ns=5 * NS_PER_S)
    subject.pump(0)
    assert len(subject.take_sound(5 * NS_PER_S)[1]) == 5 * SOUND_RATE_HZ


def test_sound_that_nobody_takes_does_not_stop_a_live_cameras_pictures():
    reader, shown = FakeReader(live=True), []
    subject = feed(reader)
    for at in range(9):
        reader.give(*seconds(at, at + 1))
        subject.pump(at * NS_PER_S), subject.pump(at * NS_PER_S)
        shown += subject.take_frames(at * NS_PER_S)
    assert [f.start_ns for f in shown] == [at * NS_PER_S for at in range(9)]
    first, samples = subject.take_sound(9 * NS_PER_S)
    assert (first % SOUND_RATE_HZ, first + len(samples)) == (0, 9 * SOUND_RATE_HZ), "whole windows are forgotten"
    assert len(samples) <= 3 * SOUND_RATE_HZ


def test_pictures_that_nobody_takes_do_not_stop_a_live_cameras_sound():
    reader, heard = FakeReader(live=True), []
    subject = feed(reader)
    for at in range(9):
        reader.give(*seconds(at, at + 1))
        subject.pump(at * NS_PER_S), subject.pump(at * NS_PER_S)
        heard.append(subject.take_sound((at + 1) * NS_PER_S))
    assert [first for first, _ in heard] == [at * SOUND_RATE_HZ for at in range(9)]
    assert {len(samples) for _, samples in heard} == {SOUND_RATE_HZ}
    assert 1 <= len(subject.take_frames(9 * NS_PER_S)) <= 3


def test_pictures_are_handed_out_when_their_time_has_come():
    subject = feed(FakeReader(*seconds(0, 2)))
    subject.pump(0)
    assert [f.start_ns for f in subject.take_frames(NS_PER_S - 1)] == [0]
    assert subject.next_frame_ns == NS_PER_S


def test_sound_is_taken_gapless_by_running_sample_counts():
    subject = feed(FakeReader(progress(0, 0), sound(0, 10_000), sound(10_000, 22_000)))
    subject.pump(0)
    taken = [subject.take_sound(end_ns) for end_ns in (NS_PER_S, 2 * NS_PER_S)]
    assert [first for first, _ in taken] == [0, SOUND_RATE_HZ]
    assert np.array_equal(np.concatenate([samples for _, samples in taken]), np.arange(32_000, dtype=np.float32))


def test_the_decoder_starts_when_the_clock_does_and_is_told_the_time():
    reader = FakeReader()
    subject = feed(reader)
    assert reader.started_at_ns == []
    for now_ns in (-200_000_000, -190_000_000):
        subject.pump(now_ns)
    assert reader.started_at_ns == [-200_000_000]


def test_a_request_that_no_decoder_takes_is_a_lost_camera():
    subject = feed(FakeReader(), fps=0.001)
    subject.pump(0)
    (notice,) = subject.take_notices()
    assert (notice.type, notice.reason) == ("camera_lost", "limit")


def test_a_hole_in_the_sound_is_silence():
    subject = feed(FakeReader(progress(0, 0), sound(0, 8_000), sound(12_000, 4_000)))
    subject.pump(0)
    _, samples = subject.take_sound(NS_PER_S)
    assert not samples[8_000:12_000].any()
    assert samples[12_000] == 12_000


def test_a_source_ends_where_its_last_picture_or_sample_was():
    subject = feed(source(2))
    subject.pump(0)
    subject.take_frames(9 * NS_PER_S), subject.take_sound(9 * NS_PER_S)
    subject.pump(0)
    assert (subject.times.are_over, subject.times.end_ns) == (True, 2 * NS_PER_S)
    assert notices_of(subject) == ["camera_up", "camera_ended"]


def test_a_live_camera_that_breaks_off_is_looked_for_ever_less_often():
    media = FakeMedia(*(FakeReader(GONE, live=True) for _ in range(4)))
    subject = Feed(session(), media)
    tried_s = []
    for tenth in range(100):
        before = len(media.requests)
        subject.pump(tenth * NS_PER_S // 10)
        tried_s += [tenth / 10] * (len(media.requests) - before)
    assert tried_s == [0.0, 1.0, 3.0, 7.0]
    assert notices_of(subject) == ["camera_lost"] * 4


def test_a_camera_that_delivers_again_is_tried_at_once_when_it_is_lost_next():
    again = FakeReader(live=True)
    media = FakeMedia(FakeReader(GONE, live=True), FakeReader(GONE, live=True), again, FakeReader(live=True))
    subject = Feed(session(), media)
    for now_ns in (0, NS_PER_S, 3 * NS_PER_S):
        subject.pump(now_ns)
    again.give(*seconds(4, 5), GONE)
    subject.pump(4 * NS_PER_S)
    subject.pump(5 * NS_PER_S)
    assert len(media.requests) == 4
    assert notices_of(subject) == ["camera_lost", "camera_lost", "camera_up", "camera_lost"]


def test_a_camera_that_came_back_is_told_the_time_and_goes_on_from_there():
    again = FakeReader(*seconds(3, 4), live=True)
    subject = feed(FakeReader(*seconds(0, 1), GONE, live=True), again)
    for now_ns in (NS_PER_S, NS_PER_S * 26 // 10):
        subject.pump(now_ns)
    assert again.started_at_ns == [NS_PER_S * 26 // 10]
    assert [f.start_ns for f in subject.take_frames(9 * NS_PER_S)] == [0, 3 * NS_PER_S]


def test_a_second_picture_of_one_period_is_left_out():
    # Given: one picture per 10 s, taken before the camera was lost and found.
    again = FakeReader(progress(8, None), frame(9.5), progress(18, None), frame(18), live=True)
    subject = feed(FakeReader(frame(8), progress(18, None), GONE, live=True), again, fps=0.1)
    shown = []
    for now_s in (8, 9, 19):
        subject.pump(now_s * NS_PER_S)
        shown += subject.take_frames(now_s * NS_PER_S)
    assert [f.start_ns for f in shown] == [8 * NS_PER_S, 18 * NS_PER_S]


def test_a_live_stream_that_ends_is_a_connection_that_breaks():
    # Given: libav flushes its tracks before the decoder says that the camera closed the connection.
    subject = feed(FakeReader(*seconds(0, 1), progress(None, None), GONE, live=True))
    subject.pump(0)
    assert (subject.times.video_end_ns, subject.times.audio_end_ns, subject.times.are_over) == (None, None, False)


def test_a_camera_that_never_comes_back_ends_with_the_duration():
    media = FakeMedia(FakeReader(GONE, live=True), FakeReader(GONE, live=True))
    subject = Feed(session(duration_ns=2 * NS_PER_S), media)
    for tenth in range(23):
        subject.pump(tenth * NS_PER_S // 10)
    assert (subject.times.are_over, subject.times.end_ns) == (True, 2 * NS_PER_S)


def test_a_device_that_was_pulled_out_is_a_lost_camera_and_no_error():
    subject = feed(FakeReader(GONE, live=True), MISSING, FakeReader(*seconds(0, 1), live=True))
    for now_s in (0, 1, 3):
        subject.pump(now_s * NS_PER_S)
    assert [(n.type, n.reason) for n in subject.take_notices()] == [
        ("camera_lost", "closed"),
        ("camera_lost", "missing"),
        ("camera_up", ""),
    ]


def test_a_file_that_can_not_be_opened_is_a_lost_camera():
    subject = feed(MediaError("missing", "clip.mp4: not there"), duration_ns=5 * NS_PER_S)
    subject.pump(0)
    assert (subject.times.end_ns, notices_of(subject)) == (5 * NS_PER_S, ["camera_lost"])


def test_a_file_that_breaks_is_not_opened_again_and_owes_its_windows():
    media = FakeMedia(FakeReader(*seconds(0, 2), Failed("unreadable", "clip.mp4 is damaged")))
    subject = Feed(session(duration_ns=20 * NS_PER_S), media)
    subject.pump(0)
    subject.take_frames(NS_PER_S * 9), subject.take_sound(NS_PER_S * 9)
    subject.pump(10 * NS_PER_S)
    assert (len(media.requests), subject.times.end_ns) == (1, 20 * NS_PER_S)


def test_a_warning_is_an_event_once_per_track_and_code_over_all_connections():
    noisy = [Warned("audio", "damaged", "some of the sound"), Warned("video", "damaged", "some pictures")]
    again = FakeReader(progress(2, 2), *noisy, Warned("audio", "track_given_up", "no sound"), live=True)
    subject = feed(FakeReader(progress(0, 0), *noisy, *noisy, GONE, live=True), again)
    for now_s in (0, 2):
        subject.pump(now_s * NS_PER_S)
    warnings = [(n.at_ns, n.track, n.reason) for n in subject.take_notices() if n.type == "camera_warning"]
    assert warnings == [(0, "audio", "damaged"), (0, "video", "damaged"), (2 * NS_PER_S, "audio", "track_given_up")]


def test_a_track_that_freezes_again_is_told_again():
    changes = [Warned("audio", code, "") for code in ("track_frozen", "track_back", "track_frozen", "track_frozen")]
    subject = feed(FakeReader(*changes))
    subject.pump(0)
    assert [notice.reason for notice in subject.take_notices()] == ["track_frozen", "track_back", "track_frozen"]


def test_what_is_damaged_is_counted_over_all_connections():
    again = FakeReader(Progress(0, 0, 1, 0, 5), live=True)
    subject = feed(FakeReader(Progress(0, 0, 1, 2, 3), Progress(0, 0, 2, 2, 4), GONE, live=True), again)
    for now_s in (0, 2):
        subject.pump(now_s * NS_PER_S)
    assert subject.totals == Totals(3, 2, 9)


# --- tracks of one connection, and of the next --------------------------------------------------------------------


class Timed(FakeReader):
    """A live camera that gives its seconds when their time has come, by the clock of who asks."""

    def __init__(self, clock: list[float], first: int, last: int, *end: Failed, **tracks: bool) -> None:
        super().__init__(live=True)
        self._clock = clock
        opened, *_ = seconds(first, first, **tracks)
        self._timed = deque([(first, opened)])
        for second in range(first, last):
            self._timed += [(second + 1, item) for item in seconds(second, second + 1, **tracks)[1:]]
        self._timed += [(last, item) for item in end]

    def read(self, timeout_s: float) -> MediaItem | None:
        return self._timed.popleft()[1] if self._timed and self._timed[0][0] <= self._clock[0] else None


def windows_of(door: Door, clock: list[float], end_s: int) -> dict[str, list[int]]:
    """The seconds of which there were pictures and sound."""
    said = []
    for step in range(10 * end_s + 6):
        clock[0] = step / 10
        said += door.at(clock[0])
    assert not ends(said), "a live camera has not ended"
    return {stream: [chunk.start_ns // NS_PER_S for chunk in data(said, stream)] for stream in ("frames", "sound")}


@pytest.mark.parametrize("tracks", [{}, {"pictures": False}, {"sounds": False}])
def test_a_track_that_one_connection_lacks_comes_with_the_next(tracks):
    clock = [0.0]
    media = FakeMedia(Timed(clock, 0, 3, GONE), Timed(clock, 4, 6, GONE, **tracks), Timed(clock, 8, 15))
    seen = windows_of(Door(media), clock, 15)
    between = [4, 5]
    assert seen["frames"] == [0, 1, 2, *(between if tracks.get("pictures", True) else []), *range(8, 15)]
    assert seen["sound"] == [0, 1, 2, *(between if tracks.get("sounds", True) else []), *range(8, 15)]


def test_a_camera_that_got_its_microphone_later_is_heard_from_then_on():
    clock = [0.0]
    media = FakeMedia(Timed(clock, 0, 3, GONE, sounds=False), Timed(clock, 4, 8))
    seen = windows_of(Door(media), clock, 8)
    assert (seen["frames"], seen["sound"]) == ([0, 1, 2, 4, 5, 6, 7], [4, 5, 6, 7])


def test_nobody_waits_for_a_track_that_this_connection_lacks():
    # Given: a live camera without sound.
    clock = [0.0]
    door = Door(FakeMedia(Timed(clock, 0, 5, sounds=False)), lateness_ns=NS_PER_S // 2)
    clock[0] = 2.0
    assert max(watermarks(door.at(1.0, 2.0), "sound")) == 2 * NS_PER_S, "and not half a second later"


# --- a track that stops while the other one goes on ---------------------------------------------------------------


FROZEN = Warned("audio", "track_frozen", "rtsp://door gives no sound any more, while the rest goes on")


def test_a_frozen_track_costs_the_connection_and_a_new_one_is_made():
    media = FakeMedia(FakeReader(*seconds(0, 2), FROZEN, live=True), FakeReader(*seconds(3, 5), live=True))
    subject = Feed(session(), media)
    for now_s in (0, 1, 2, 3, 4):
        subject.pump(now_s * NS_PER_S)
        subject.take_frames(now_s * NS_PER_S), subject.take_sound((now_s + 1) * NS_PER_S)
    notices = subject.take_notices()
    assert [(n.type, n.reason, n.track) for n in notices] == [
        ("camera_up", "", ""),
        ("camera_warning", "track_frozen", "audio"),
        ("camera_lost", "timeout", ""),
        ("camera_up", "", ""),
        ("camera_warning", "track_back", "audio"),
    ]
    assert len(media.requests) == 2
    assert subject.delivers == {"video", "audio"}


def test_a_camera_that_came_back_without_its_track_goes_on_with_what_there_is():
    # Given: every connection has pictures, and its sound stops.
    script = [FakeReader(*seconds(10 * n, 10 * n + 1, sounds=False), FROZEN, live=True) for n in range(9)]
    media = FakeMedia(*script)
    subject = Feed(session(), media)
    for now_s in range(50):
        subject.pump(now_s * NS_PER_S)
        subject.take_frames(now_s * NS_PER_S)
    assert len(media.requests) == 2
    assert subject.delivers == {"video"}


def test_a_track_that_has_not_come_yet_costs_no_connection():
    late = Warned("audio", "track_late", "rtsp://door announces sound and has sent none yet")
    media = FakeMedia(FakeReader(*seconds(0, 2, sounds=False), late, *seconds(2, 4), live=True))
    subject = Feed(session(), media)
    for now_s in range(5):
        subject.pump(now_s * NS_PER_S)
        subject.take_frames(now_s * NS_PER_S), subject.take_sound((now_s + 1) * NS_PER_S)
    assert [(n.type, n.reason) for n in subject.take_notices()] == [("camera_up", ""), ("camera_warning", "track_late")]
    assert (len(media.requests), subject.delivers) == (1, {"video", "audio"})


def test_every_freeze_is_told_also_one_that_costs_no_connection():
    again = FakeReader(*seconds(3, 5), FROZEN, live=True)
    subject = Feed(session(), FakeMedia(FakeReader(*seconds(0, 2), FROZEN, live=True), again))
    for now_s in range(9):
        subject.pump(now_s * NS_PER_S)
        subject.take_frames(now_s * NS_PER_S), subject.take_sound((now_s + 1) * NS_PER_S)
    changes = [notice.reason for notice in subject.take_notices() if notice.track == "audio"]
    assert changes == ["track_frozen", "track_back", "track_frozen"]


def test_connections_are_given_up_for_a_track_ever_less_often():
    retries, renewed_s = Retries(), []
    for now_s in range(0, 8 * 3600, 10):  # it stops again and again
        renewed_s += [now_s] * retries.may_renew(now_s * NS_PER_S)
    waits = [later - sooner for sooner, later in itertools.pairwise(renewed_s)]
    assert waits[:4] == [60, 120, 240, 480]
    assert waits[-1] == 3600


def test_a_track_that_is_frozen_no_longer_delivers():
    subject = feed(FakeReader(*seconds(0, 1), FROZEN))
    subject.pump(0)
    assert subject.delivers == {"video"}


# --- what is said of a source ---


def test_a_source_that_gave_nothing_is_reported_with_its_reason_also_when_it_is_gone():
    feeds = Feeds(FakeMedia(FakeReader(progress(0, None), Failed("unreadable", "junk/ has no image, of 2"))))
    subject = feeds.open(session(), *session().media.views)
    subject.pump(0)
    expected = SourceReport(num_lost=1, problem="junk/ has no image, of 2")
    assert feeds.reports() == {SourceId(DOOR): expected}
    feeds.close(SourceId(DOOR))
    assert feeds.reports() == {SourceId(DOOR): expected}


def test_a_source_that_ends_without_anything_is_reported():
    subject = feed(FakeReader(progress(None, None), Ended("the source is at its end")))
    subject.pump(0)
    assert not subject.report.has_delivered
    assert subject.report.problem == "gave neither picture nor sound: the source is at its end"


def test_a_source_that_delivers_is_up_until_it_is_lost():
    subject = feed(FakeReader(*seconds(0, 1), GONE, live=True))
    subject.pump(0)
    assert subject.report == SourceReport(has_delivered=True, num_lost=1, problem=GONE.message)


def test_only_the_latest_of_the_sources_that_are_gone_are_remembered():
    feeds = Feeds(FakeMedia())
    for number in range(MAX_CLOSED + 5):
        name = SessionId(f"camera-{number}")
        feeds.open(replace(session(), id=name), *session().media.views)
        feeds.close(SourceId(name))
    assert [source.session for source in feeds.reports()] == [f"camera-{number}" for number in range(5, MAX_CLOSED + 5)]


# --- we were stopped ----------------------------------------------------------------------------------------------


def test_a_file_goes_on_where_it_was_when_all_of_us_were_stopped_for_an_hour():
    door = Door(FakeMedia(FakeReader(*seconds(0, 30))))
    before, after = door.until(4.9), []
    for step in range(100):
        after += door.at(3600 + 4.9 + step / 10)
    assert [chunk.start_ns // NS_PER_S for chunk in data(before, "frames")] == [0, 1, 2, 3, 4]
    late = [chunk for chunk in after if chunk.end_ns < 3600 * NS_PER_S and not chunk.is_control]
    assert len(late) <= 1, "the window that was open"
    # Then: second 5 of the file is second 3605 of the session.
    assert [chunk.start_ns // NS_PER_S for chunk in data(after, "frames")] == list(range(3605, 3615))
    assert [chunk.start_ns // NS_PER_S for chunk in data(after, "sound")][-9:] == list(range(3605, 3614))
    assert len(after) < 100
    assert [str(chunk.attrs["reason"]) for chunk in data(after, "events")] == ["stopped"]


def test_a_live_camera_forgets_what_has_piled_up_when_all_of_us_were_stopped():
    reader = FakeReader(*seconds(0, 2), live=True)
    door = Door(FakeMedia(reader))
    door.until(1.5)
    reader.give(*seconds(2, 5), *seconds(3600, 3601))
    after = door.until(3601, start_s=3600)
    reader.give(*seconds(3601, 3602))
    after += door.until(3603, start_s=3601.1)
    assert [chunk.start_ns // NS_PER_S for chunk in data(after, "frames")] == [3600, 3601]
    assert [chunk.start_ns // NS_PER_S for chunk in data(after, "sound")] == [3600, 3601]
    assert len([chunk for chunk in after if chunk.is_control]) < 20


def test_in_virtual_time_nobody_is_ever_stopped():
    door = Door(FakeMedia(FakeReader(*seconds(0, 6), Ended("over"))), paced=False)
    said = door.at(0.0, 3600.0, 7200.0, 7200.1)
    assert [chunk.start_ns // NS_PER_S for chunk in data(said, "frames")] == list(range(6))


# --- a source that takes long to open -----------------------------------------------------------------------------


class Openings:
    """Opens when a test lets it."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Future[object], Callable[[], object]]] = []

    def __call__(self, job: Callable[[], object]) -> Future[object]:
        future: Future[object] = Future()
        self.jobs.append((future, job))
        return future

    def let(self) -> None:
        future, job = self.jobs.pop()
        future.set_result(job())


def test_a_source_on_a_dead_disk_costs_nobody_else_anything_and_is_told():
    openings, reader = Openings(), FakeReader(*seconds(0, 3))
    subject = Feed(session(duration_ns=60 * NS_PER_S), FakeMedia(reader), openings)
    for now_s in range(20):
        subject.pump(now_s * NS_PER_S)
    assert (len(openings.jobs), subject.wakes()) == (1, [])
    assert [(n.type, n.reason) for n in subject.take_notices()] == [("camera_lost", "timeout")]
    openings.let()
    subject.pump(20 * NS_PER_S)
    assert notices_of(subject) == ["camera_up"]


def test_a_source_that_is_closed_while_it_opens_leaves_no_reader_behind():
    openings, reader = Openings(), FakeReader(*seconds(0, 3))
    subject = Feed(session(), FakeMedia(reader), openings)
    subject.pump(0)
    subject.close()
    openings.let()
    assert reader.closed


def refuse() -> MediaReader:
    raise MISSING


def test_opening_in_a_thread_gives_the_reader_or_its_error():
    assert in_thread(lambda: "reader").result(10) == "reader"  # type: ignore[arg-type, return-value]
    with pytest.raises(MediaError, match="no such device"):
        in_thread(refuse).result(10)


@pytest.mark.parametrize("now_s", [2.01, 2.4, 3.0])
def test_stop_ends_with_the_window_of_now(now_s: float):
    subject = feed(FakeReader(*seconds(0, 20)))
    for taken_ns in (NS_PER_S, 2 * NS_PER_S):
        subject.pump(0)
        subject.take_frames(taken_ns - 1), subject.take_sound(taken_ns)
    subject.pump(0)
    subject.stop(round(now_s * NS_PER_S))
    assert subject.times.end_ns == 3 * NS_PER_S
    assert [f.start_ns for f in subject.take_frames(99 * NS_PER_S)] == [2 * NS_PER_S]
    assert len(subject.take_sound(99 * NS_PER_S)[1]) == SOUND_RATE_HZ


def test_what_comes_after_a_stop_still_fills_the_last_window_and_no_other():
    reader = FakeReader()
    subject = feed(reader)
    subject.pump(0)
    subject.stop(NS_PER_S // 2)
    reader.give(*seconds(0, 3))
    subject.pump(NS_PER_S)
    assert [f.start_ns for f in subject.take_frames(99 * NS_PER_S)] == [0]
    assert len(subject.take_sound(99 * NS_PER_S)[1]) == SOUND_RATE_HZ


def test_stop_also_ends_a_lost_file_that_owes_windows():
    subject = feed(FakeReader(Failed("unreadable", "clip.mp4 is damaged")), duration_ns=3600 * NS_PER_S)
    subject.pump(0)
    subject.stop(5 * NS_PER_S)
    assert subject.times.end_ns == 5 * NS_PER_S


def test_in_virtual_time_stop_ends_with_what_was_read():
    subject = feed(FakeReader(*seconds(0, 20)), paced=False)
    subject.pump(0)
    subject.stop(3600 * NS_PER_S)
    assert subject.times.end_ns == NS_PER_S  # and of the second that follows, the picture only


def test_the_last_of_its_users_closes_a_feed():
    reader = FakeReader(*seconds(0, 1))
    feeds = Feeds(FakeMedia(reader))
    one, other = feeds.open(session(), *session().media.views), feeds.open(session(), *session().media.views)
    one.pump(0), other.pump(0)
    feeds.close(SourceId(DOOR))
    assert (reader.started_at_ns, reader.closed) == ([0], False)
    feeds.close(SourceId(DOOR))
    assert (reader.closed, feeds.wakes()) == (True, {})
    feeds.close(SourceId(DOOR))


def test_a_reader_is_closed_when_its_source_has_ended():
    reader = FakeReader(*seconds(0, 1), Ended("it is at its end"))
    subject = feed(reader)
    subject.pump(0)
    assert (reader.closed, subject.wakes()) == (True, [])


def test_a_live_camera_gives_nothing_beyond_the_duration():
    half = SOUND_RATE_HZ // 2
    subject = feed(FakeReader(frame(0.8), sound(half, 2 * half), frame(1.3), live=True), duration_ns=NS_PER_S)
    subject.pump(NS_PER_S * 8 // 10)
    assert [f.start_ns for f in subject.take_frames(9 * NS_PER_S)] == [NS_PER_S * 8 // 10]
    first, samples = subject.take_sound(9 * NS_PER_S)
    assert first + len(samples) == SOUND_RATE_HZ
