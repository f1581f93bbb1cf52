"""Opening a camera over RTSP: over TCP, over UDP where it wants that; and why it did not work, where libav can't say.

Rule: a question of our own to a camera (`read_challenges`) sends no login, no path and no query, goes to the host that
was written, and takes a few bytes and little time.
"""

from __future__ import annotations

import errno
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import Final
from urllib.parse import urlsplit

import av
from av.container import InputContainer
from av.error import FFmpegError

from stages.media.health import Warner
from stages.media.wire import MediaError, Order, TrackName

RTSP_PORT: Final = 554
MAX_ANSWER_BYTES: Final = 16_384
ASK_S: Final = 2.0

OpenWith = Callable[[dict[str, str]], InputContainer]

_PROTOCOLS: Final = {"rtsp": "rtsp,rtp,tcp", "rtsps": "rtsps,rtp,tcp,tls"}
_CHALLENGE: Final = re.compile(rb"^www-authenticate:[ \t]*(\w+)([^\r\n]*)", re.IGNORECASE | re.MULTILINE)
_ALGORITHM: Final = re.compile(r'algorithm="?([\w-]{1,32})', re.IGNORECASE)


def open_camera(order: Order, open_with: OpenWith, warner: Warner) -> InputContainer:
    """The open connection. MediaError where more can be said than by libav's error.

    open_with: opens the source with these options.
    """
    start = time.monotonic()
    try:
        return _open_in_time(order, open_with, _options(order))
    except av.error.HTTPUnauthorizedError as error:
        raise _refusal_of_login(order) or error from error
    except (av.error.HTTPNotFoundError, av.error.HTTPClientError) as error:
        return _open_one_track(order, open_with, warner, error, time.monotonic() - start)
    except FFmpegError as error:
        if error.errno != errno.EPROTONOSUPPORT:
            raise
    if _scheme(order) != "rtsp":
        raise MediaError("refused", "refuses RTP over TCP (461): allow RTP over RTSP, also called interleaved, there")
    return _open_over_udp(order, open_with, warner)


def _open_in_time(order: Order, open_with: OpenWith, options: dict[str, str]) -> InputContainer:
    """TimeoutError as such: libav says "invalid data" or "argument" of a server which is silent or leads in circles,
    and calls one open which has sent a byte per second."""
    start = time.monotonic()
    patience_s = order.open_timeout_s
    try:
        container = open_with(options)
    except (av.error.InvalidDataError, av.error.ArgumentError):
        patience_s = min(order.open_timeout_s, order.silence_timeout_s)
        if time.monotonic() - start < patience_s:
            raise
    if time.monotonic() - start >= patience_s:
        raise TimeoutError
    return container


def _open_one_track(
    order: Order, open_with: OpenWith, warner: Warner, refusal: FFmpegError, took_s: float
) -> InputContainer:
    """A camera that announces two tracks may refuse one of them, which libav takes for a refusal of the whole."""
    request = order.request
    if not (request.want_video and request.want_audio) or 3 * took_s > order.open_timeout_s:  # the parent waits
        raise refusal
    tracks: dict[TrackName, TrackName] = {"video": "audio", "audio": "video"}  # what is read, and what is not
    for track, refused in tracks.items():
        try:
            container = _open_in_time(order, open_with, _options(order) | {"allowed_media_types": track})
        except FFmpegError:
            continue
        if container.streams:
            what = f"refuses its {'pictures' if refused == 'video' else 'sound'} ({refusal.strerror}); the rest is read"
            warner.warn(refused, "track_given_up", f"{request.masked} {what}")
            return container
        container.close()
    raise refusal


def _open_over_udp(order: Order, open_with: OpenWith, warner: Warner) -> InputContainer:
    """Packets are taken at the one address that leads to the camera, and from the camera only."""
    host, port = rtsp_address(order)
    options = {
        "rtsp_transport": "udp",
        "protocol_whitelist": "rtsp,rtp,tcp,udp",
        "rtsp_flags": "filter_src",
        "localaddr": local_address(host, port),
    }
    try:
        container = _open_in_time(order, open_with, _options(order) | options)
    except FFmpegError as error:
        if error.errno != errno.EPROTONOSUPPORT:
            raise
        why = "refuses RTP over TCP and over UDP (461): allow one of both there, TCP is also called interleaved"
        raise MediaError("refused", why) from error
    what = "refuses RTP over TCP and is read over UDP, where packets get lost: better allow TCP (interleaved) there"
    warner.warn("", "over_udp", f"{order.request.masked} {what}")
    return container


def _options(order: Order) -> dict[str, str]:
    return {
        "rtsp_transport": "tcp",
        "protocol_whitelist": _PROTOCOLS[_scheme(order)],
        "timeout": str(int(order.silence_timeout_s * 1_000_000)),  # us, of the socket
        "allowed_media_types": "+".join(["video"] * order.request.want_video + ["audio"] * order.request.want_audio),
        # The SDP has told nearly all. Without these two a camera opens in 1.1 s instead of 0.3 s, and what it sends
        # meanwhile comes in a burst.
        "fpsprobesize": "0",
        "analyzeduration": "1000000",  # us
    }


def _scheme(order: Order) -> str:
    return urlsplit(order.request.source).scheme.lower()


def rtsp_address(order: Order) -> tuple[str, int]:
    url = urlsplit(order.request.source)
    return url.hostname or "", url.port or RTSP_PORT


def local_address(host: str, port: int) -> str:
    """Our address on the way to this host; nothing is sent for it."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as asking:
        asking.connect(address)
        return str(asking.getsockname()[0])


# --- why a login was refused --------------------------------------------------------------------------------------


def _refusal_of_login(order: Order) -> MediaError | None:
    """Says so where the camera wants a kind of login that libav does not know."""
    if _scheme(order) != "rtsp":
        return None
    kinds = list(read_challenges(*rtsp_address(order)))
    if not kinds or {"Basic", "Digest MD5"} & set(kinds):
        return None
    names = " or ".join(dict.fromkeys(kinds))
    return MediaError("refused", f"wants a login by {names}, which is not done here: let it take Digest MD5 or Basic")


def read_challenges(host: str, port: int) -> Iterator[str]:
    """The kinds of login a camera offers, like "Basic" or "Digest SHA-256"; none when it does not say."""
    for scheme, rest in _CHALLENGE.findall(_rtsp_answer(host, port)):
        name, algorithm = scheme.decode().capitalize(), _ALGORITHM.search(rest.decode(errors="replace"))
        if name == "Digest":
            yield f"Digest {algorithm[1].upper() if algorithm else 'MD5'}"
        else:
            yield name[:32]


def _rtsp_answer(host: str, port: int) -> bytes:
    try:
        answer = ask(host, port)
    except (OSError, UnicodeError):
        return b""
    return answer if answer.startswith(b"RTSP/") else b""


def ask(host: str, port: int) -> bytes:
    """The head of what a camera answers to who is nobody; b"" when it says nothing. OSError, UnicodeError."""
    where = f"[{host}]" if ":" in host else host
    request = f"DESCRIBE rtsp://{where}:{port}/ RTSP/1.0\r\nCSeq: 1\r\nAccept: application/sdp\r\n\r\n"
    deadline_s, answer = time.monotonic() + ASK_S, b""
    with socket.create_connection((host, port), timeout=ASK_S) as camera:
        camera.sendall(request.encode())
        while b"\r\n\r\n" not in answer and len(answer) < MAX_ANSWER_BYTES:
            camera.settimeout(max(deadline_s - time.monotonic(), 0.001))
            part = camera.recv(4096)
            if not part:
                break
            answer += part
    return answer
