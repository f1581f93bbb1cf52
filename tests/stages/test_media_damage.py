"""stages/media/play.py: what is damaged costs itself, and tracks live and die apart."""

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

from graph.chunk import NS_PER_S
from stages.media.decoder import explain
from stages.media.health import Warner
from stages.media.play import (
    MAX_HOLE_READS,
    MAX_NO_KEYFRAME,
    Decoding,
    Lane,
    packets,
)
from stages.media.reader import Ended, Failed, Frame, MediaItem, MediaRequest, Progress, Sound, Warned
from stages.media.sound import SoundTrack
from stages.media.tracks import FileAxis, VideoTrack
from stages.media.wire import Order
from tests.support.media import Clip, damaged, picture, times
from tests.support.reading import read_to_end

RATE_HZ = 16_000
Hit = Callable[[str, int], bool]


def request(source: object, **changes: Any) -> MediaRequest:
    defaults = {"fps": 1.0, "max_pixels": 448 * 448, "want_video": True, "want_audio": True}
    return MediaRequest(str(source), **(defaults | {"piece_ns": NS_PER_S // 20, "duration_ns": None} | changes))


def read_all(source: object, **changes: Any) -> list[MediaItem]:
    return read_to_end(request(source, **changes))


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


def with_many_channels(path: Path, num_channels: int, *, pictures: bool) -> Path:
    """3 s; in each channel but the first there is silence."""
    with av.open(str(path), "w") as container:
        sound: Any = container.add_stream("pcm_s16le", rate=RATE_HZ, layout=f"{num_channels} channels")
        video: Any = container.add_stream("mpeg4", rate=10) if pictures else None
        for index in range(30):
            samples = np.zeros((RATE_HZ // 10, num_channels), np.int16)
            samples[:, 0] = 32_000
            frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), "s16", f"{num_channels} channels")
            frame.rate, frame.pts, frame.time_base = RATE_HZ, index * RATE_HZ // 10, Fraction(1, RATE_HZ)
            container.mux(sound.encode(frame))
            if pictures:
                container.mux(video.encode(picture(index, 640, 480)))
        container.mux(sound.encode(None) + (video.encode(None) if pictures else []))
    return path


@pytest.mark.parametrize("num_channels", [13, 64])
def test_sound_of_many_channels_is_heard_as_their_mean(tmp_path, num_channels):
    items = read_all(with_many_channels(tmp_path / "many.wav", num_channels, pictures=False))
    assert isinstance(items[-1], Ended), items[-1]
    samples = np.concatenate([item.samples for item in items if isinstance(item, Sound)])
    assert (samples.size, warnings(items)) == (3 * RATE_HZ, [])
    assert np.allclose(samples, 32_000 / 32_768 / num_channels, atol=1 / 16_384)


def test_pictures_beside_sound_of_many_channels_are_seen(tmp_path):
    items = read_all(with_many_channels(tmp_path / "many.mov", 64, pictures=True))
    assert isinstance(items[-1], Ended), items[-1]
    assert (seen(items), heard(items), warnings(items)) == ([0, 1, 2], {0, 1, 2}, [])


def test_pictures_without_a_keyframe_are_told_and_counted_at_the_end(tmp_path):
    # Given: a recording which begins behind its only keyframe.
    whole = Clip(tmp_path / "whole.ts").video(times(4, 25)).sound(4).write().read_bytes()
    (tmp_path / "nokey.ts").write_bytes(whole[len(whole) // 4 // 188 * 188 :])
    items = read_all(tmp_path / "nokey.ts")
    assert isinstance(items[-1], Ended), items[-1]
    assert (seen(items), warnings(items)) == ([], [("video", "track_given_up")])
    assert heard(items) >= {1, 2}
    assert last_progress(items).num_bad_video > 50
    assert "no keyframe" in next(item.message for item in items if isinstance(item, Warned))


def test_a_transport_stream_which_lost_packets_is_told_and_its_pictures_are_shown(tmp_path):
    # Given: one of 50 packets is lost, as over a bad antenna; libav conceals what it can.
    whole = Clip(tmp_path / "whole.ts").video(times(6, 25)).sound(6).write().read_bytes()
    kept = [whole[at : at + 188] for at in range(0, len(whole), 188) if at // 188 % 50 != 49]
    (tmp_path / "lossy.ts").write_bytes(b"".join(kept))
    items = read_all(tmp_path / "lossy.ts")
    assert isinstance(items[-1], Ended), items[-1]
    assert sorted(warnings(items)) == [("audio", "damaged"), ("video", "damaged")]
    assert last_progress(items).num_bad_video > 0
    assert len(seen(items)) >= 5


@pytest.mark.parametrize(("suffix", "begin"), [("ts", b"G"), ("ogg", b"OggS")])
def test_what_stands_behind_a_hole_in_a_file_is_read(tmp_path, suffix, begin):
    # Given: 300 kB of zeros in the middle, as a recorder leaves them which had reserved them.
    clip = Clip(tmp_path / f"whole.{suffix}")
    clip = clip.video(times(10, 10)) if suffix == "ts" else clip
    whole = clip.sound(10, codec="aac" if suffix == "ts" else "flac").write().read_bytes()
    middle = whole.index(begin, len(whole) // 2 // 188 * 188)
    (tmp_path / f"hole.{suffix}").write_bytes(whole[:middle] + bytes(300_000) + whole[middle:])
    items = read_all(tmp_path / f"hole.{suffix}")
    assert isinstance(items[-1], Ended), items[-1]
    assert heard(items) >= set(range(10))
    assert ("audio", "damaged") in warnings(items)
    assert last_progress(items).num_bad_audio >= 1
    assert "temporarily" not in "".join(item.message for item in items if isinstance(item, Warned))


# --- one packet after the other, without a file -------------------------------------------------------------------


class FakePacket:
    """A packet which decodes to some frames, or raises."""

    def __init__(self, result: list[Any] | Exception = (), *, key: bool = False, size: int = 100) -> None:  # type: ignore[assignment]
        self.size, self.pts, self.dts, self.duration = size, 0, 0, 20
        self.time_base, self.is_keyframe, self.is_corrupt = Fraction(1, 1000), key, False
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
    media_request = request("rtsp://user:canary@door/live")
    return Decoding(
        Lane(VideoTrack(stream, media_request, FileAxis(0), sent.append)), media_request.masked, Warner(sent.append)
    )


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


# --- errors beside the packets ------------------------------------------------------------------------------------


class BrokenTrack(VideoTrack):
    """Fails whatever it is given to do."""

    def hold(self, now_ns: int) -> bool:
        raise av.error.ArgumentError(22, "Invalid argument")

    def finish(self) -> None:
        self.ended = True
        raise av.error.ArgumentError(22, "Invalid argument")


class BrokenSound(SoundTrack):
    """Can't give what it still has."""

    def finish(self) -> None:
        self.ended = True
        raise av.error.ArgumentError(22, "Invalid argument")


def test_an_error_of_the_last_sound_is_the_sounds_own():
    sent: list[MediaItem] = []
    track = BrokenSound(request("clip.mp4"), FileAxis(0), sent.append)
    decoding = Decoding(Lane(track), "clip.mp4", Warner(sent.append))
    decoding.decode(last_packet(), 0)
    assert (track.done, track.num_bad, warnings(sent)) == (True, 1, [("audio", "damaged")])


def test_a_picture_which_can_not_be_held_costs_itself():
    sent: list[MediaItem] = []
    codec: Any = SimpleNamespace(sample_aspect_ratio=None)
    stream: Any = SimpleNamespace(average_rate=Fraction(25), sample_aspect_ratio=None, codec_context=codec)
    track = BrokenTrack(stream, request("rtsp://door"), FileAxis(0), sent.append)
    decoding = Decoding(Lane(track), "rtsp://door", Warner(sent.append))
    decoding.decode(FakePacket([], key=True), 0)  # type: ignore[arg-type]
    assert [decoding.hold(NS_PER_S), decoding.hold(2 * NS_PER_S)] == [False, False]
    decoding.finish()
    assert (track.done, warnings(sent)) == (True, [("video", "damaged"), ("video", "track_given_up")])


def last_packet() -> Any:
    packet = FakePacket([], size=0)
    packet.pts = packet.dts = None  # type: ignore[assignment]
    return packet


def test_what_is_marked_as_corrupt_is_heard_counted_and_told_once():
    sent: list[MediaItem] = []
    decoding = audio(sent)
    for index in range(50):
        frame = av.AudioFrame.from_ndarray(np.full((1, 320), 0.5, np.float32), "flt", "mono")
        frame.rate, frame.pts, frame.time_base = RATE_HZ, 320 * index, Fraction(1, RATE_HZ)
        packet = FakePacket([frame])
        packet.is_corrupt = index in (20, 30)
        decoding.decode(packet, 0)  # type: ignore[arg-type]
    decoding.decode(last_packet(), 0)
    assert sum(item.samples.size for item in sent if isinstance(item, Sound)) == RATE_HZ
    assert (decoding.track.num_bad, warnings(sent)) == (2, [("audio", "damaged")])


class FailingContainer:
    """Gives no packet, and the same error whenever it is read."""

    def __init__(self, error: Exception) -> None:
        self.streams = [None]
        self.num_reads = 0
        self._error = error

    def demux(self, _streams: object) -> Iterator[Any]:
        self.num_reads += 1
        raise self._error
        yield


@pytest.mark.parametrize(
    ("error", "over_holes", "num_reads"),
    [
        (av.error.InvalidDataError(1, "Invalid data"), True, MAX_HOLE_READS + 1),
        (av.error.BlockingIOError(11, "Resource temporarily unavailable"), True, MAX_HOLE_READS + 1),
        (av.error.InvalidDataError(1, "Invalid data"), False, 1),
        (av.error.OSError(5, "Input/output error"), True, 1),
        (av.error.TimeoutError(110, "Timed out"), True, 1),
    ],
)
def test_a_file_which_fails_for_ever_ends(error, over_holes, num_reads):
    sent: list[MediaItem] = []
    container: Any = FailingContainer(error)
    with pytest.raises(type(error)):
        list(packets((container, {0: audio(sent)}), over_holes=over_holes))
    assert container.num_reads == num_reads
    assert len(warnings(sent)) == (num_reads > 1)


def test_a_demuxers_want_of_data_is_not_told_as_a_want_of_resources():
    order = Order("file", request("clip.ts"), 10, 4, 0)
    failed = explain(av.error.BlockingIOError(11, "Resource temporarily unavailable"), order)
    assert failed == Failed("unreadable", "clip.ts is not a media file which can be read: damaged, or of another type")
