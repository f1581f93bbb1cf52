"""stages/media_play.py: what is damaged costs itself, and tracks live and die apart."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import pytest

from graph.chunk import NS_PER_MS, NS_PER_S
from stages.media import Ended, Failed, Frame, MediaItem, MediaReader, MediaRequest, Progress, Sound, Warned
from stages.media_health import Warner
from stages.media_play import FIRST_PATIENCE_NS, MAX_NO_KEYFRAME, Decoding, Lane, Pulse
from stages.media_sound import SoundTrack
from stages.media_tracks import FileAxis, VideoTrack
from tests.support.media import Clip, damaged, times

RATE_HZ = 16_000
Hit = Callable[[str, int], bool]


def request(source: object, **changes: Any) -> MediaRequest:
    wanted = {"fps": 1.0, "max_pixels": 448 * 448, "want_video": True, "want_audio": True}
    return MediaRequest(str(source), **(wanted | {"piece_ns": NS_PER_S // 20, "duration_ns": None} | changes))


def read_all(source: object, **changes: Any) -> list[MediaItem]:
    items: list[MediaItem] = []
    with MediaReader(request(source, **changes)) as reader:
        while not items or not isinstance(items[-1], (Ended, Failed)):
            item = reader.read(10.0)
            assert item is not None, "the decoder neither works nor fails"
            items.append(item)
    return items


def seen(items: list[MediaItem]) -> list[int]:
    return [item.start_ns // NS_PER_S for item in items if isinstance(item, Frame)]


def heard(items: list[MediaItem]) -> set[int]:
    """The seconds of which there is sound."""
    return {item.first_sample // RATE_HZ for item in items if isinstance(item, Sound)}


def warnings(items: list[MediaItem]) -> list[tuple[str, str]]:
    return [(item.track, item.code) for item in items if isinstance(item, Warned)]


def last_progress(items: list[MediaItem]) -> Progress:
    return [item for item in items if isinstance(item, Progress)][-1]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 s with whole pictures and sound."""
    return Clip(tmp_path_factory.mktemp("whole") / "ok.mp4").video(times(10, 10)).sound(10).write()


# --- a damaged packet ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_packet_of_sound_costs_itself(tmp_path, clip, seed):
    items = read_all(damaged(clip, tmp_path / "a.mp4", lambda kind, n: kind == "audio" and n % 5 == 0, seed))
    assert isinstance(items[-1], Ended), items[-1]
    assert seen(items) == list(range(10))
    assert heard(items) == set(range(10))
    assert last_progress(items).num_bad_audio > 50 and last_progress(items).num_bad_video == 0
    assert warnings(items) == [("audio", "damaged")]


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_packet_of_video_costs_itself(tmp_path, clip, seed):
    items = read_all(damaged(clip, tmp_path / "c.mp4", lambda kind, n: kind == "video" and n % 5 == 0, seed))
    assert isinstance(items[-1], Ended), items[-1]
    assert seen(items) == list(range(10))
    assert last_progress(items).num_bad_video > 5 and last_progress(items).num_bad_audio == 0
    assert warnings(items) == [("video", "damaged")]


def test_sound_which_never_decodes_leaves_the_pictures_whole(tmp_path, clip):
    items = read_all(damaged(clip, tmp_path / "b.mp4", lambda kind, _: kind == "audio"))
    assert isinstance(items[-1], Ended), items[-1]
    assert seen(items) == list(range(10))
    assert warnings(items) == [("audio", "damaged"), ("audio", "track_given_up")]
    assert "sound" in next(item.message for item in items if isinstance(item, Warned) and item.code == "track_given_up")


def test_pictures_which_never_decode_leave_the_sound_whole(tmp_path):
    whole = Clip(tmp_path / "ok.mp4").video(times(14, 30), codec="mpeg4").sound(14).write()
    items = read_all(damaged(whole, tmp_path / "v.mp4", lambda kind, _: kind == "video"))
    assert isinstance(items[-1], Ended), items[-1]
    assert heard(items) == set(range(14))
    assert seen(items) == []


def test_a_file_of_which_nothing_decodes_is_unreadable(tmp_path, clip):
    whole = Clip(tmp_path / "sound.m4a").sound(10).write()
    failed = read_all(damaged(whole, tmp_path / "b.m4a", lambda *_: True))[-1]
    assert isinstance(failed, Failed) and failed.kind == "unreadable", failed
    assert "permission" not in failed.message and "nothing can be decoded" in failed.message


def test_sound_of_an_unknown_codec_is_told_and_the_pictures_are_read(tmp_path):
    data = Clip(tmp_path / "ok.mkv").video(times(3, 10)).sound(3, codec="pcm_s16le").write().read_bytes()
    assert data.count(b"A_PCM/INT/LIT") == 1
    (tmp_path / "odd.mkv").write_bytes(data.replace(b"A_PCM/INT/LIT", b"A_NOBODY/KNOW"))
    items = read_all(tmp_path / "odd.mkv")
    assert isinstance(items[-1], Ended), items[-1]
    assert seen(items) == [0, 1, 2]
    assert warnings(items) == [("audio", "track_given_up")]


def test_sound_which_changes_its_rate_and_layout_on_the_way_is_heard_to_the_end(tmp_path):
    parts = [
        Clip(tmp_path / f"{n}.ts").sound(2, *how).write()
        for n, how in enumerate([(48_000, "stereo"), (8_000, "mono"), (44_100, "5.1")])
    ]
    (tmp_path / "all.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    items = read_all(tmp_path / "all.ts")
    assert isinstance(items[-1], Ended), items[-1]
    assert heard(items) >= set(range(5))


def test_pictures_which_change_their_size_on_the_way_are_seen_to_the_end(tmp_path):
    parts = [
        Clip(tmp_path / f"{n}.ts").video(times(2, 30), size).write()
        for n, size in enumerate([(320, 240), (64, 48), (640, 480)])
    ]
    (tmp_path / "all.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    items = read_all(tmp_path / "all.ts")
    assert isinstance(items[-1], Ended), items[-1]
    assert [item.image.shape[:2] for item in items if isinstance(item, Frame)][::2] == [
        (240, 320),
        (48, 64),
        (386, 516),
    ]


# --- one packet after the other, without a file -------------------------------------------------------------------


class FakePacket:
    """A packet which decodes to some frames, or raises."""

    def __init__(self, result: list[Any] | Exception = (), *, key: bool = False, size: int = 100) -> None:  # type: ignore[assignment]
        self.size, self.pts, self.dts, self.duration = size, 0, 0, 20
        self.time_base, self.is_keyframe = Fraction(1, 1000), key
        self._result = result

    def decode(self) -> list[Any]:
        if isinstance(self._result, Exception):
            raise self._result
        return list(self._result)

    def has_sidedata(self, name: str) -> bool:
        return False


def video(sent: list[MediaItem]) -> Decoding:
    codec: Any = SimpleNamespace(sample_aspect_ratio=None)
    stream: Any = SimpleNamespace(average_rate=Fraction(25), sample_aspect_ratio=None, codec_context=codec)
    asked = request("rtsp://user:canary@door/live")
    return Decoding(Lane(VideoTrack(stream, asked, FileAxis(0), sent.append)), asked.masked, Warner(sent.append))


def audio(sent: list[MediaItem]) -> Decoding:
    return Decoding(Lane(SoundTrack(request("clip.mp4"), FileAxis(0), sent.append)), "clip.mp4", Warner(sent.append))


ERRORS = [
    av.error.PermissionError(1, "Operation not permitted"),
    av.error.InvalidDataError(1094995529, "Invalid data"),
    av.error.MemoryError(12, "Cannot allocate memory"),
    av.error.FileNotFoundError(2, "No such file or directory"),
    ValueError("odd format"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__module__}.{type(error).__name__}")
def test_whatever_a_decoder_raises_costs_its_packet(error):
    sent: list[MediaItem] = []
    decoding = audio(sent)
    for _ in range(299):
        decoding.decode(FakePacket(error), 0)  # type: ignore[arg-type]
    assert (decoding.track.num_bad, decoding.track.done) == (299, False)
    decoding.decode(FakePacket(error), 0)  # type: ignore[arg-type]
    assert decoding.track.done and decoding.given_up is not None
    assert decoding.given_up.kind == ("limit" if isinstance(error, MemoryError) else "unreadable")
    assert warnings(sent) == [("audio", "damaged"), ("audio", "track_given_up")]


def test_a_warning_shows_no_password():
    sent: list[MediaItem] = []
    decoding = video(sent)
    decoding.decode(FakePacket([], key=True), 0)  # type: ignore[arg-type]
    decoding.decode(FakePacket(ValueError("odd")), 0)  # type: ignore[arg-type]
    (warned,) = [item for item in sent if isinstance(item, Warned)]
    assert "canary" not in warned.message and "door/live" in warned.message


def test_waiting_for_a_keyframe_is_no_damage_and_is_told_once():
    # Given: a camera which was joined 40 s before its next keyframe.
    sent: list[MediaItem] = []
    decoding = video(sent)
    for _ in range(1000):
        decoding.decode(FakePacket(av.error.InvalidDataError(1, "no reference")), 0)  # type: ignore[arg-type]
    assert (decoding.track.num_bad, decoding.track.done, decoding.num_alive) == (0, False, 1000)
    decoding.decode(FakePacket([], key=True), 0)  # type: ignore[arg-type]
    decoding.decode(FakePacket(av.error.InvalidDataError(1, "damaged")), 0)  # type: ignore[arg-type]
    assert decoding.track.num_bad == 1
    assert warnings(sent) == [("video", "no_keyframe"), ("video", "damaged")]


def test_nobody_waits_for_a_keyframe_for_ever():
    decoding = video([])
    for _ in range(MAX_NO_KEYFRAME + 300):
        decoding.decode(FakePacket(av.error.InvalidDataError(1, "noise")), 0)  # type: ignore[arg-type]
    assert decoding.given_up is not None


def test_an_empty_packet_in_the_middle_is_a_dropped_picture_and_no_end():
    decoding = video([])
    decoding.decode(FakePacket(av.error.EOFError(1, "would flush"), size=0), 0)  # type: ignore[arg-type]
    assert (decoding.track.num_bad, decoding.track.done) == (0, False)


# --- tracks that have nothing for long ----------------------------------------------------------------------------


def furthest_apart_s(items: list[MediaItem]) -> float:
    """How far pictures and sound are ever apart in the order in which they come."""
    video_ns = audio_ns = apart_ns = 0
    for item in items:
        if isinstance(item, Progress):
            video_ns, audio_ns = min(item.video_ns, 10**12), min(item.audio_ns, 10**12)
        if isinstance(item, Frame):
            apart_ns = max(apart_ns, item.start_ns - audio_ns)
        if isinstance(item, Sound):
            apart_ns = max(apart_ns, item.start_ns - video_ns)
    return apart_ns / NS_PER_S


def test_late_sound_is_missing_until_it_comes(tmp_path):
    items = read_all(Clip(tmp_path / "a.mkv").video(times(30, 5)).sound(5, start_s=25).write())
    assert (seen(items), heard(items)) == (list(range(30)), set(range(25, 30)))
    assert furthest_apart_s(items) <= 1.2


def test_a_hole_in_the_sound_is_missing(tmp_path):
    items = read_all(Clip(tmp_path / "b.mkv").video(times(30, 5)).sound(8, hole_s=(4, 22)).write())
    assert (seen(items), heard(items) & set(range(5, 25))) == (list(range(30)), set())
    assert heard(items) >= {0, 1, 2, 3, 27, 28}
    assert furthest_apart_s(items) <= 1.2


def test_sound_which_is_two_days_late_is_heard_beside_the_pictures_and_told(tmp_path):
    items = read_all(Clip(tmp_path / "d.mkv").video(times(10, 5)).sound(10, start_s=180_678).write())
    assert (seen(items), heard(items)) == (list(range(10)), set(range(10)))
    assert warnings(items) == [("audio", "clock_jump")]
    assert furthest_apart_s(items) <= 1.2


def test_pictures_which_come_a_minute_late_are_missing_until_then(tmp_path):
    items = read_all(Clip(tmp_path / "late.mkv").video([60 + at for at in times(5, 5)]).sound(65).write())
    assert seen(items) == [60, 61, 62, 63, 64]
    assert heard(items) == set(range(65))
    assert furthest_apart_s(items) <= 1.2


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
