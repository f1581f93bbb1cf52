"""stages/media/play.py: which tracks of a live source have stopped, or never come."""

import pytest

from graph.chunk import NS_PER_MS, NS_PER_S
from stages.media.health import Warner
from stages.media.play import FIRST_PATIENCE_NS, Decoding, Lane, Pulse, PulseWatch
from stages.media.reader import MediaItem, MediaRequest, Warned
from stages.media.sound import SoundTrack
from stages.media.tracks import LiveAxis
from stages.media.wire import Order

REQUEST = MediaRequest("rtsp://door", 1.0, 448 * 448, True, True, NS_PER_S // 20, None)


def audio(sent: list[MediaItem]) -> Decoding:
    return Decoding(Lane(SoundTrack(REQUEST, LiveAxis(), sent.append)), "rtsp://door", Warner(sent.append))


def warnings(items: list[MediaItem]) -> list[tuple[str, str]]:
    return [(item.track, item.code) for item in items if isinstance(item, Warned)]


# --- whether a live track goes on ---------------------------------------------------------------------------------


def still_after_s(pulse: Pulse, last_s: float) -> float:
    """For how long after its last beat a pulse is taken to go on."""
    steps = (tenth / 10 for tenth in range(2000))
    return next(step for step in steps if pulse.is_still(round((last_s + step) * NS_PER_S)))


@pytest.mark.parametrize(("fps", "at_most_s"), [(25, 4.2), (1, 4.2), (0.5, 6.2), (0.1, 30.2)])
def test_a_track_is_frozen_after_a_few_of_its_own_periods(fps, at_most_s):
    pulse = Pulse(4 * NS_PER_S)
    beats_s = [index / fps for index in range(40)]
    was_still = []
    for beat_s in beats_s:
        was_still.append(pulse.is_still(round(beat_s * NS_PER_S)))
        pulse.beat(round(beat_s * NS_PER_S))
    assert not any(was_still[2:]), "its pace is known"
    assert 4 <= still_after_s(pulse, beats_s[-1]) <= at_most_s


def test_a_track_which_was_announced_and_never_comes_is_frozen_within_ten_seconds():
    assert FIRST_PATIENCE_NS / NS_PER_S <= still_after_s(Pulse(4 * NS_PER_S), 0.0) <= 10


def test_a_single_hiccup_is_forgotten():
    pulse = Pulse(4 * NS_PER_S)
    for beat_ms in [*range(0, 1000, 40), *range(21_000, 23_000, 40)]:
        pulse.beat(beat_ms * NS_PER_MS)
    assert still_after_s(pulse, 22.96) <= 4.2


# --- a live track which has never been there ----------------------------------------------------------------------


def test_a_live_track_which_never_came_is_told_as_such_and_taken_when_it_comes():
    sent: list[MediaItem] = []
    sound, goes_on = audio(sent), audio([])
    watch = PulseWatch(Order("rtsp", REQUEST, 10, 4, 0), [sound, goes_on])
    for tenth in range(100):
        goes_on.num_alive += 1
        watch.look(tenth * NS_PER_S // 10)
    sound.num_alive += 1
    watch.look(10 * NS_PER_S)
    assert warnings(sent) == [("audio", "track_late"), ("audio", "track_back")]
    assert [item.message for item in sent if isinstance(item, Warned)] == [
        "rtsp://door announces sound and has sent none yet; the rest goes on without until then",
        "rtsp://door gives sound now",
    ]


def test_a_live_track_which_came_late_and_stops_is_frozen():
    sent: list[MediaItem] = []
    sound = audio(sent)
    watch = PulseWatch(Order("rtsp", REQUEST, 10, 4, 0), [sound])
    for at_s in range(60):
        sound.num_alive += 10 <= at_s < 20
        watch.look(at_s * NS_PER_S)
    assert [code for _, code in warnings(sent)] == ["track_late", "track_back", "track_frozen"]
