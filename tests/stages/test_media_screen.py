"""stages/media/screen.py: the picture on the screen at each sampling instant, whatever the rate of the source."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graph.chunk import NS_PER_MS, NS_PER_S
from stages.media.screen import FrameGrid, Screen, Shot

Shots = list[Shot[int]]


def ns(seconds: float) -> int:
    return round(seconds * NS_PER_S)


def screen(fps: float = 1.0, window_s: float = 1.0, **how: object) -> Screen[int]:
    return Screen(FrameGrid(fps, ns(window_s)), **how)


def shown(subject: Screen[int], times_s: list[float]) -> Shots:
    """Pictures at these times, each of them its own number."""
    return [shot for number, time_s in enumerate(times_s) for shot in subject.show(ns(time_s), number)]


def starts_s(shots: Shots) -> list[float]:
    return [shot.start_ns / NS_PER_S for shot in shots]


# --- what is on the screen ----------------------------------------------------------------------------------------


def test_a_frame_is_the_last_picture_before_its_instant():
    uneven = [0, 0.73, 1.13, 1.6, 2.07, 2.47, 2.87, 3.4, 4.07, 4.8, 5.33, 5.93, 6.6, 7.0, 7.8]
    shots = shown(screen(), uneven)
    assert starts_s(shots) == [0.73, 1.6, 2.47, 3.4, 4.8, 5.33, 6.6, 7.8]
    assert [shot.age_ns for shot in shots] == [ns(age) for age in (0.07, 0.2, 0.33, 0.4, 0, 0.47, 0.2, 0)]


def test_a_picture_at_the_very_instant_is_a_frame_at_once():
    assert starts_s(screen().show(ns(0.8), 1)) == [0.8]


def test_a_picture_that_stands_for_a_minute_is_in_every_window_with_its_age():
    shots = shown(screen(), [0.5, 60.5])
    assert starts_s(shots) == [0.5, *(k + 0.8 for k in range(1, 60))]
    assert [shot.age_ns for shot in shots] == [ns(k + 0.3) for k in range(60)]
    assert {shot.picture for shot in shots} == {0}


def test_before_the_first_picture_nothing_is_shown():
    assert starts_s(shown(screen(), [5.9, 6.7, 7.9])) == [6.7, 7.8], "and 5.8 had no picture"


@given(
    st.sampled_from(
        [Fraction(9, 10), Fraction(1), Fraction(11, 10), Fraction(25), Fraction(30_000, 1001), Fraction(50)]
    ),
    st.integers(0, NS_PER_S - 1),
)
def test_any_steady_rate_gives_one_picture_per_window(rate, phase_ns):
    subject = screen()
    times_ns = [phase_ns + int(k * NS_PER_S / rate) for k in range(int(20 * rate) + 2)]
    shots = [shot for number, time_ns in enumerate(times_ns) for shot in subject.show(time_ns, number)]
    windows = [shot.start_ns // NS_PER_S for shot in shots]
    assert windows == list(range(windows[0], windows[0] + len(windows)))
    assert windows[0] <= 1 and len(windows) >= 19


@given(
    st.floats(0.01, 60),
    st.integers(10, 60_000),
    st.booleans(),
    st.lists(st.integers(0, 10**9), min_size=1, max_size=200),
)
def test_frames_are_in_order_one_per_instant_and_in_its_window(fps, window_ms, live, steps):
    window_ns, now_ns, shots = window_ms * NS_PER_MS, 0, []
    grid = FrameGrid(fps, window_ns)
    subject: Screen[int] = Screen(grid, live=live)
    for step in steps:
        now_ns += step
        position_ns = subject.position_ns
        new = subject.show(now_ns, now_ns)
        assert all(shot.start_ns >= position_ns for shot in new), "what was said to be over is over"
        assert subject.position_ns >= position_ns
        shots += new
    assert [shot.start_ns for shot in shots] == sorted({shot.start_ns for shot in shots})
    assert len({shot.instant_ns for shot in shots}) == len(shots)
    for shot in shots:
        assert shot.shown_ns <= shot.instant_ns
        assert shot.shown_ns == shot.picture
        assert shot.start_ns // window_ns == shot.instant_ns // window_ns
        assert shot.start_ns in (shot.shown_ns, shot.instant_ns)


@given(st.floats(0.01, 60), st.integers(0, 10**6))
def test_instants_lie_in_their_periods(fps, index):
    grid = FrameGrid(fps)
    assert grid.index_at(grid.instant_ns(index)) == index
    assert grid.first_ns(index) <= grid.instant_ns(index) < grid.instant_ns(index + 1)


def test_with_a_picture_every_five_windows_none_waits_for_a_frame_of_another():
    subject = screen(fps=0.2)  # the first instant is 4.0 s
    assert subject.position_ns == 4 * NS_PER_S
    assert [(shot.start_ns, shot.age_ns) for shot in shown(subject, [0.5, 6.0])] == [(ns(4.0), ns(3.5))]
    assert subject.position_ns == 9 * NS_PER_S


# --- how long a picture stands ------------------------------------------------------------------------------------


def test_a_cameras_picture_is_shown_again_when_its_instant_has_passed_by_the_clock():
    subject = screen(live=True)
    assert shown(subject, [0.5]) == []
    assert subject.stand(ns(0.79)) == []
    assert starts_s(subject.stand(ns(0.9))) == [0.5]
    assert subject.stand(ns(1.7)) == []
    assert [(shot.start_ns, shot.age_ns) for shot in subject.stand(ns(1.8))] == [(ns(1.8), ns(1.3))]


def test_a_frozen_camera_is_no_still_film():
    subject = screen(live=True)
    shown(subject, [k / 25 for k in range(26)])
    assert starts_s(subject.stand(ns(60))) == [1.0, 2.8], "two seconds, then the windows have no picture"
    assert starts_s(subject.show(ns(60.5), 0) + subject.stand(ns(61))) == [60.5]


def test_a_camera_of_a_picture_every_three_seconds_is_on_time_in_every_window():
    subject, starts = screen(live=True), []
    for k in range(60):  # a look every half second, and a picture every 3.33 s
        time_s = k / 2
        starts += starts_s(subject.show(ns(time_s), k) if k % 7 == 0 else [])
        starts += starts_s(subject.stand(ns(time_s)))
    windows = [int(start) for start in starts]
    assert windows == [0, 1, *range(3, 29)], "when there was one picture only, nothing was known of its rate"


def test_a_camera_that_says_its_rate_is_believed_from_the_first_picture_on():
    subject = screen(live=True, usual_ns=ns(3.5))
    subject.show(0, 0)
    assert starts_s(subject.stand(ns(60))) == [0, *(k + 0.8 for k in range(1, 10))]


def test_behind_a_lost_picture_the_one_before_stands_for_two_seconds():
    subject = screen()
    shown(subject, [0.0, 0.1, 0.2])
    subject.doubt()
    assert starts_s(subject.show(ns(9.9), 3)) == [0.2, 1.8]
    assert starts_s(subject.show(ns(20.5), 4)) == [k + 0.8 for k in range(10, 20)], "a whole picture heals it"


def test_the_last_picture_stands_as_long_as_the_others_but_not_beyond_the_media():
    slides = [0.0, 60.0, 120.0]
    assert len(shown(first := screen(), slides) + first.end(ns(60), None)) == 180
    assert len(shown(second := screen(), slides) + second.end(ns(0.03), ns(150))) == 150
    assert len(shown(third := screen(), slides) + third.end(ns(60), ns(150))) == 180, "its own duration is known best"


def test_the_last_picture_of_a_film_stands_for_one_period():
    subject = screen()
    assert starts_s(shown(subject, [k / 25 for k in range(50)]) + subject.end(ns(0.04), ns(2))) == [0.8, 1.8]
    subject = screen()
    assert starts_s(shown(subject, [k / 25 for k in range(45)]) + subject.end(ns(0.04), ns(1.8))) == [0.8]


@pytest.mark.parametrize(("fps", "grace_s"), [(0.1, 0.1), (1, 0.1), (5, 0.02), (50, 0.002)])
def test_a_late_picture_is_waited_for_no_longer_than_a_tenth_of_its_period(fps, grace_s):
    assert FrameGrid(fps).grace_ns == ns(grace_s)


# --- films that are over before the first instant -------------------------------------------------------------------


@pytest.mark.parametrize("times_s", [[0], [0, 0.04, 0.08], [0, 0.25, 0.5, 0.75]])
@pytest.mark.parametrize("media_end_s", [None, 0.79])
def test_a_film_that_is_over_before_the_first_instant_shows_its_last_picture(times_s, media_end_s):
    subject = screen()
    assert shown(subject, times_s) == []
    (shot,) = subject.end(ns(0.04), None if media_end_s is None else ns(media_end_s))
    assert shot == Shot(ns(times_s[-1]), ns(0.8), ns(times_s[-1]), len(times_s) - 1)


def test_a_film_that_is_over_before_a_rare_first_instant_shows_its_last_picture_in_that_windows_time():
    subject = screen(fps=0.3)
    shown(subject, [0, 1.5, 2.5])
    assert starts_s(subject.end(ns(0.04), ns(2.6))) == [2.5]


def test_pictures_that_come_and_go_between_two_instants_late_in_a_film_are_shown_once():
    subject = screen()
    assert shown(subject, [3.85, 4.0, 4.2]) == []
    assert starts_s(subject.end(ns(0.04), None)) == [4.2]


def test_what_was_sampled_is_not_shown_beyond_the_end():
    subject = screen()
    assert starts_s(shown(subject, [0.5, 0.9, 1.1])) == [0.5]
    assert subject.end(ns(0.04), None) == []


def test_a_live_camera_that_goes_before_an_instant_leaves_no_picture_behind():
    subject = screen(live=True)
    shown(subject, [0.1, 0.2])
    assert subject.end(ns(0.04), None) == []
