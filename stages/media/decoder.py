"""What touches foreign bytes: one source is opened, decoded and sent, in a process of its own, stages/media/process.py.

This file opens sources; stages/media/play.py reads them, and stages/media/tracks.py decides what is sent, and with
which times.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast
from urllib.parse import parse_qs, urlsplit

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Discard, Disposition, Stream
from av.video.stream import VideoStream

from graph.chunk import NS_PER_S
from stages.media.health import Warner
from stages.media.play import Decoding, Feed, Lane, Teller, play, session_ns
from stages.media.rtsp import open_camera
from stages.media.screen import FrameGrid
from stages.media.sound import SoundTrack
from stages.media.thinning import Decoder, LiveDecoder
from stages.media.tracks import FileAxis, LiveAxis, Put, VideoTrack, period_ns, to_ns
from stages.media.types import foreign_type, is_jpeg_film, read_head, unreadable_type
from stages.media.view import MAX_PICTURE_PIXELS, check_size
from stages.media.why import explaining
from stages.media.wire import (
    DURATION_OVER,
    FOREVER_NS,
    LIVE_KINDS,
    Ended,
    Failed,
    FailKind,
    Frame,
    MediaError,
    MediaItem,
    MediaRequest,
    Order,
    Progress,
    Sound,
    SourceKind,
    TrackName,
    to_bytes,
)
from stages.rates import SOUND_RATE_HZ

if TYPE_CHECKING:
    from model_shards.nano.clips import Cast
    from model_shards.nano.synthetic import SyntheticRoom
    from model_shards.nano.world import Activity

MAX_MEMORY_BYTES: Final = 3 << 29  # address space. H.264 with 4 reference pictures takes 0.36 GiB in 4K, 0.62 in 8K
MAX_STREAMS: Final = 64
COUNTED_STREAMS: Final = 4096  # libav calls more a lack of memory
ROOM_SIDE: Final = 224

# Containers only: no playlist (hls, dash, concat, sdp), no device, no script (lavfi), no pattern (image2).
_FILE_FORMATS: Final = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,ogg,wav,w64,aiff,au,mp3,flac,aac,ac3,eac3,caf,amr,"
    "h264,hevc,vvc,m4v,mpegvideo,mjpeg,ivf,obu,asf,nut,mxf,dv,gif,yuv4mpegpipe,"
    "dhav,wv,tta,ape,mpc,mpc8,dsf,voc,dts,truehd,wtv"
)
# What is made for some listeners, or is heard and seen beside the film.
_BESIDE: Final = (
    Disposition.comment
    | Disposition.karaoke
    | Disposition.hearing_impaired
    | Disposition.visual_impaired
    | Disposition.clean_effects
    | Disposition.timed_thumbnails
    | Disposition.non_diegetic
    | Disposition.descriptions
    | Disposition.dependent
)
SEEKABLE_KINDS: Final[frozenset[SourceKind]] = frozenset(("file", "http"))
_PROTOCOLS: Final = {
    "http": "http,tcp",
    "https": "https,tcp,tls",
}


class ParentGone(Exception):
    """Nobody reads any more."""


class Outlet:
    """The pipe to the parent. A full pipe blocks: it is the only buffer between decoding and playing.

    start_ns: pictures and sound before this are not sent.
    """

    def __init__(self, fd: int, start_ns: int = 0) -> None:
        self._fd = fd
        self._start_ns = start_ns
        self.has_media = False  # there was a picture or sound

    def put(self, item: MediaItem) -> None:
        is_media = isinstance(item, (Frame, Sound))
        self.has_media |= is_media
        if is_media and self._start_ns and end_ns(item) <= self._start_ns:
            return
        for part in to_bytes(item):
            view = memoryview(part)
            while view:
                try:
                    view = view[os.write(self._fd, view) :]
                except BrokenPipeError as error:
                    raise ParentGone from error


def end_ns(item: MediaItem) -> int:
    """When a picture or a piece of sound is over; a picture just after it was sampled."""
    if isinstance(item, Sound):
        return (item.first_sample + len(item.samples)) * NS_PER_S // SOUND_RATE_HZ
    return item.start_ns + 1 if isinstance(item, Frame) else 0


# --- sources ------------------------------------------------------------------------------------------------------


def open_container(order: Order, source: str, format_name: str | None, options: dict[str, str]) -> InputContainer:
    limits = {"max_streams": str(COUNTED_STREAMS), "max_pixels": str(MAX_PICTURE_PIXELS), "threads": "1"}
    container = av.open(
        source,
        "r",
        format=format_name,
        options=limits | options,
        metadata_errors="replace",
        timeout=(order.open_timeout_s, order.silence_timeout_s),
    )
    num_tracks = len(container.streams.video) + len(container.streams.audio)  # subtitles and fonts cost nothing
    if num_tracks > MAX_STREAMS:
        container.close()
        raise MediaError("limit", f"has {num_tracks} tracks of pictures and sound; at most {MAX_STREAMS} are read")
    return container


def open_all(order: Order, warner: Warner) -> list[InputContainer]:
    """One connection for live sources. Files are opened once per stream: so each is read as far as the other one,
    however badly they are interleaved, at the cost of a second index and not of the memory of a whole video."""
    source = order.request.source
    num_streams = order.request.want_video + order.request.want_audio
    match order.kind:
        case "file":
            return open_file(order, num_streams)
        case "http":
            options = _file_options(_PROTOCOLS[urlsplit(source).scheme.lower()])
            with explaining(order):
                return [open_container(order, source, None, options) for _ in range(num_streams)]
        case "rtsp":
            with explaining(order):
                return [open_camera(order, partial(open_container, order, source, "rtsp"), warner)]
        case "webcam":
            return [open_container(order, source, "v4l2", {"protocol_whitelist": "file"})]
        case "test":
            return [open_container(order, graph, "lavfi", {}) for graph in pattern_graphs(source, order.request.fps)]
        case _:
            raise AssertionError(f"a {order.kind} has no container")


def open_file(order: Order, num_streams: int) -> list[InputContainer]:
    """A file, once per stream; MediaError "unreadable" for what is no film and has a name."""
    source = order.request.source
    head = read_head(Path(source))
    if foreign := foreign_type(head):
        raise MediaError("unreadable", foreign)
    format_name = "mjpeg" if is_jpeg_film(head) else None  # libav takes it for one JPEG
    try:
        return [open_container(order, source, format_name, _file_options("file")) for _ in range(num_streams)]
    except (av.error.InvalidDataError, av.error.ArgumentError, BlockingIOError):
        if named := unreadable_type(Path(source)):
            raise MediaError("unreadable", named) from None
        raise


def _file_options(protocols: str) -> dict[str, str]:
    return {"protocol_whitelist": protocols, "format_whitelist": _FILE_FORMATS}


def pattern_graphs(source: str, fps: float) -> list[str]:
    """libavfilter's description of test://pattern: a moving picture, and a tone which beeps every second."""
    query = parse_qs(urlsplit(source).query)
    seed = int(query.get("seed", ["0"])[0])
    size = query.get("size", ["640x480"])[0]
    if not re.fullmatch(r"\d{2,5}x\d{2,5}", size):
        raise MediaError("blocked", f"size={size}: write it like 640x480")
    check_size(*map(int, size.split("x")))
    rate_hz = max(10, min(60, 5 * math.ceil(fps)))  # so that the grid's instants, at 4/5 of a period, have a picture
    turn = f",hue=h={seed * 47 % 360}" if seed else ""
    return [
        f"testsrc2=size={size}:rate={rate_hz}{turn}",
        f"sine=frequency={220 + seed * 110 % 660}:beep_factor=4:sample_rate=48000",
    ]


def make_feeds(order: Order, containers: list[InputContainer], outlet: Outlet, warner: Warner) -> list[Feed]:
    """The video and audio stream which a player takes, if wanted; sound from the second connection of two."""
    request = order.request
    video = [s for c in containers for s in c.streams.video if not s.disposition & Disposition.attached_pic]
    audio = [s for c in containers[::-1] for s in c.streams.audio]
    streams: list[VideoStream | AudioStream] = [
        *sorted(filter(_is_known, video), key=_is_second_choice)[: request.want_video],
        *sorted(filter(_is_known, audio), key=_is_second_choice)[: request.want_audio],
    ]
    starts = [start for s in streams if (start := to_ns(s.start_time, s.time_base)) is not None]
    origin_ns = min(starts, default=None)
    if request.start_ns and origin_ns is not None and order.kind in SEEKABLE_KINDS:
        seek(containers, origin_ns + request.start_ns)
    feeds: list[Feed] = [(container, {}) for container in containers]
    put = None if len({id(stream.container) for stream in streams}) > 1 else outlet.put
    for stream in streams:
        tracks = next(tracks for container, tracks in feeds if container is stream.container)
        stream.codec_context.thread_count = 1  # 30 cameras share a core; more threads buy delay and memory only
        lane = make_lane(order, stream, origin_ns, put)
        tracks[stream.index] = Decoding(lane, request.masked, warner, decoder_for(order, stream, lane))
    for container, tracks in feeds:
        for other in container.streams:
            other.discard = Discard.default if other.index in tracks else Discard.all
    return [feed for feed in feeds if feed[1]]


def seek(containers: Iterable[InputContainer], pts_ns: int) -> None:
    """Go to the last place before this from which everything can be decoded. Where that can't be done it is read from
    its beginning, and what comes too early is not sent."""
    for container in containers:
        with contextlib.suppress(FFmpegError, OverflowError):
            container.seek(pts_ns // 1000)  # microseconds


def make_lane(order: Order, stream: VideoStream | AudioStream, origin_ns: int | None, put: Put | None) -> Lane:
    """origin_ns: PTS of the file's beginning. put: where items go; None: they wait in the lane."""
    items: deque[MediaItem] = deque()
    put = items.append if put is None else put
    is_live = order.kind in LIVE_KINDS
    start_ns = max(session_ns(order), 0) if is_live else 0
    if isinstance(stream, AudioStream):
        axis = LiveAxis() if is_live else FileAxis(origin_ns, begins_ns=order.request.start_ns)
        return Lane(SoundTrack(order.request, axis, put, start_ns), items)
    step_ns = period_ns(stream.average_rate)
    axis = LiveAxis() if is_live else FileAxis(origin_ns, step_ns, begins_ns=order.request.start_ns)
    stream.codec_context.options = {"max_pixels": str(MAX_PICTURE_PIXELS)}
    end_ns = None if is_live else media_end_ns(stream, origin_ns)
    return Lane(VideoTrack(stream, order.request, axis, put, start_ns, live=is_live, media_end_ns=end_ns), items)


def decoder_for(order: Order, stream: VideoStream | AudioStream, lane: Lane) -> Decoder | None:
    """What decodes fewer packets than come; None: each is decoded."""
    if order.kind in LIVE_KINDS and isinstance(stream, VideoStream) and isinstance(lane.track, VideoTrack):
        return LiveDecoder(stream, lane.track, order.request.fps)
    return None


def media_end_ns(stream: VideoStream, origin_ns: int | None) -> int | None:
    """When the file ends by its own account, in event time."""
    container = stream.container
    assert isinstance(container, InputContainer)
    if container.duration is None:
        return None
    start_ns = 0 if container.start_time is None or origin_ns is None else 1000 * container.start_time - origin_ns
    return start_ns + 1000 * container.duration  # both in microseconds


def _is_second_choice(stream: Stream) -> tuple[bool, bool]:
    """Sorts tracks as players choose: those made for everybody, of them the one marked as default, then the first."""
    return bool(stream.disposition & _BESIDE), not stream.disposition & Disposition.default


def _is_known(stream: Stream) -> bool:
    """Whether there is a decoder for it. PyAV's stubs don't know of None."""
    return stream.codec_context is not None


def warn_of_unknown(order: Order, containers: list[InputContainer], feeds: list[Feed], warner: Warner) -> None:
    """Tell of a track which is there and can't be decoded, while the other one can."""
    request = order.request
    read = {decoding.name for _, tracks in feeds for decoding in tracks.values()}
    streams = [stream for c in containers for stream in (*c.streams.video, *c.streams.audio)]
    unknown = {cast(TrackName, stream.type) for stream in streams if not _is_known(stream)}
    for name in sorted(unknown - read):
        if request.want_video if name == "video" else request.want_audio:
            what = f"has {name} of a type which can't be decoded here; the rest is read"
            warner.warn(name, "track_given_up", f"{request.masked} {what}")


# --- running ------------------------------------------------------------------------------------------------------


def run_streams(order: Order, outlet: Outlet) -> MediaItem:
    """Decode to the end; the last item to send."""
    with contextlib.ExitStack() as stack:
        warner = Warner(outlet.put)
        containers = [stack.enter_context(container) for container in open_all(order, warner)]
        feeds = make_feeds(order, containers, outlet, warner)
        decodings = [decoding for _, by_index in feeds for decoding in by_index.values()]
        tracks = [decoding.track for decoding in decodings]
        if not tracks:
            raise MediaError("unreadable", f"has no {_streams_of(order.request)} stream")
        if not any(isinstance(track, SoundTrack) for track in tracks):
            check_duration(order.request)
        teller = Teller(order.request, [decoding.lane for decoding in decodings], outlet.put)
        teller.tell()
        warn_of_unknown(order, containers, feeds, warner)
        if all(track.done for track in tracks):  # a camera that was found again when its time is over
            return Ended(DURATION_OVER)
        finished = play(order, feeds, outlet.put, teller)
    reasons = [decoding.given_up for decoding in decodings if decoding.given_up is not None]
    if len(reasons) == len(decodings):
        raise reasons[0]
    if not any(track.num_decoded for track in tracks) and not order.request.start_ns:
        raise MediaError("unreadable", "holds nothing which could be decoded")
    if (
        not outlet.has_media and order.kind not in LIVE_KINDS and not order.request.start_ns
    ):  # an end like this would not be heard of
        raise MediaError("unreadable", "is at its end before there was a picture to take, or any sound")
    if finished:
        return Ended(DURATION_OVER)
    if order.kind in LIVE_KINDS:
        return Failed("closed", f"{order.request.masked} closed the connection; it may be opened again")
    return Ended("the source is at its end")


def check_duration(request: MediaRequest) -> None:
    """MediaError "limit" when the duration which is asked for ends before the first picture."""
    first_ns = FrameGrid(request.fps).instant_ns(0)
    if request.duration_ns is not None and request.duration_ns <= first_ns:
        raise MediaError(
            "limit",
            f"is to run for {request.duration_ns / NS_PER_S:g} s, but its first picture is taken at "
            f"{first_ns / NS_PER_S:g} s (fps {request.fps:g}): let it run longer, or raise its fps",
        )


def run_images(order: Order, outlet: Outlet) -> MediaItem:
    """A picture, or the pictures of a folder."""
    from stages.media.pictures import run_pictures  # here, so that other sources don't wait for Pillow

    check_duration(order.request)
    return run_pictures(order, outlet.put)


def run_room(order: Order, outlet: Outlet) -> MediaItem:
    """Pictures and sound of synthetic://room, as fast as the parent takes them."""
    request = order.request
    room = open_room(request)
    grid, until_ns = FrameGrid(request.fps), FOREVER_NS if request.duration_ns is None else request.duration_ns
    outlet.put(Progress(0 if request.want_video else FOREVER_NS, 0 if request.want_audio else FOREVER_NS))
    start_ns = request.start_ns
    num_pictures, num_sent = grid.first_index(start_ns), start_ns * SOUND_RATE_HZ // NS_PER_S
    while start_ns < until_ns:
        start_ns = min(start_ns + request.piece_ns, until_ns)
        while request.want_video and (instant_ns := grid.instant_ns(num_pictures)) < start_ns:
            outlet.put(Frame(instant_ns, room.picture(instant_ns)))
            num_pictures += 1
        if request.want_audio:
            num_samples = start_ns * SOUND_RATE_HZ // NS_PER_S
            outlet.put(Sound(num_sent, room.samples(sample_ns(num_sent), sample_ns(num_samples))))
            num_sent = num_samples
        video_ns = max(start_ns, grid.instant_ns(num_pictures)) if request.want_video else FOREVER_NS
        outlet.put(Progress(video_ns, sample_ns(num_sent) if request.want_audio else FOREVER_NS))
    return Ended(DURATION_OVER)


def open_room(request: MediaRequest) -> SyntheticRoom:
    """The room of a source which check_source has let through; its pictures are as large as may be, up to 224."""
    from model_shards.nano.synthetic import SyntheticRoom  # here, so that other sources don't wait for Pillow

    query = {key: values[-1] for key, values in parse_qs(urlsplit(request.source).query).items()}
    return SyntheticRoom(
        seed=int(query.get("seed", "0")),
        activity=cast("Activity", query.get("events", "calm")),
        cast=cast("Cast", query.get("voices", "room")),
        side=min(ROOM_SIDE, math.isqrt(request.max_pixels) // 2 * 2),
        picture_delay=int(query.get("picture_delay", "0")),
        sound_delay=int(query.get("sound_delay", "0")),
    )


def sample_ns(index: int) -> int:
    """When a sample begins, rounded up, so that it is found again from its time."""
    return -(-index * NS_PER_S // SOUND_RATE_HZ)


def _streams_of(request: MediaRequest) -> str:
    return " or ".join(["video"] * request.want_video + ["audio"] * request.want_audio)


_REASONS: Final[tuple[tuple[type[BaseException], FailKind, str], ...]] = (
    (av.error.HTTPUnauthorizedError, "refused", "refused the login: check user name and password"),
    (av.error.HTTPForbiddenError, "refused", "forbids it: check what this user may see"),
    (av.error.HTTPNotFoundError, "missing", "does not exist on this server: check the path"),
    (av.error.HTTPError, "refused", "was refused by the server"),
    (av.error.HTTPClientError, "refused", "was refused by the server"),
    (FileNotFoundError, "missing", "does not exist"),
    (PermissionError, "refused", "may not be read by this user: check its permissions"),
    (ConnectionRefusedError, "refused", "refused the connection: check host and port, and that it is switched on"),
    (TimeoutError, "timeout", "said nothing in time: check that it is switched on and not overloaded"),
    (av.error.ExitError, "timeout", "said nothing in time: check that it is switched on and not overloaded"),
    (ConnectionError, "closed", "broke the connection"),
    (EOFError, "closed", "broke off while it was read"),
    (MemoryError, "limit", f"needs more than {MAX_MEMORY_BYTES >> 20} MiB of memory to decode"),
    (av.error.ProtocolNotFoundError, "blocked", "leads to a protocol which is not allowed here"),
    (av.error.InvalidDataError, "unreadable", "is not a media file which can be read: damaged, or of another type"),
    (av.error.LookupError, "unreadable", "is of a type which can't be decoded here"),
    (FFmpegError, "unreadable", "can't be read"),
    (OSError, "unreadable", "can't be read"),
)


# What libav's own word would mislead about.
_OF_FILES: Final[tuple[tuple[type[BaseException], str], ...]] = (
    (av.error.ArgumentError, "is of a type which is not read here; save it as MP4 or WAV"),
    (BlockingIOError, "is not a media file which can be read: damaged, or of another type"),
    (EOFError, "is cut off: it ends before its first picture or sound"),
)
# The system's words for files are none for what a server or a camera answers: libav has EPERM for a late 401.
_OF_NETWORK: Final[tuple[tuple[type[BaseException], str], ...]] = (
    (PermissionError, "refused to play: check user name and password, and what they may see"),
    (FileNotFoundError, "does not exist on this server: check the path"),
)
_PLAIN: Final = {"file": _OF_FILES, "http": (*_OF_NETWORK, *_OF_FILES), "rtsp": _OF_NETWORK}


def explain(error: FFmpegError | OSError | MemoryError, order: Order) -> Failed:
    """The failure in the owner's words; libav's own text would show the URL with its password."""
    kind, what = next((kind, what) for of_type, kind, what in _REASONS if isinstance(error, of_type))
    detail = f" ({error.strerror})" if isinstance(error, (FFmpegError, OSError)) and error.strerror else ""
    detail = "" if "XX" in detail else detail  # "4XX Client Error, but not one of 40{0,1,3,4}"
    if order.kind not in LIVE_KINDS:
        kind = "unreadable" if kind == "closed" else kind
    plain = next((plain for of_type, plain in _PLAIN.get(order.kind, ()) if isinstance(error, of_type)), "")
    what, detail = (plain, "") if plain else (what, detail)
    return Failed(kind, f"{order.request.masked} {what}{detail}")


_RUNS: Final[Mapping[SourceKind, Callable[[Order, Outlet], MediaItem]]] = {"images": run_images, "synthetic": run_room}


def decode_order(order: Order, outlet: Outlet) -> MediaItem:
    """Do what was ordered; the last item to send, whatever happened."""
    try:
        return _RUNS.get(order.kind, run_streams)(order, outlet)
    except MediaError as error:
        return Failed(error.kind, f"{order.request.masked} {error.message}")
    except (FFmpegError, OSError, MemoryError) as error:
        return explain(error, order)
    except ParentGone:
        raise
    except Exception as error:  # the process's last words: the parent sees no traceback
        frames = traceback.extract_tb(error.__traceback__)
        where = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-3:])
        return Failed("crashed", f"{order.request.masked} met a bug of ours: {type(error).__name__} in {where}")
