"""Why a server's source could not be opened, where libav's error does not say it.

Rule: nothing that libav logs is shown, which may hold a password; only a status, a scheme and a host are taken from it.
A question of our own is asked as in stages/media/rtsp.py.
"""

from __future__ import annotations

import contextlib
import errno
import re
import socket
from collections.abc import Iterator, Sequence
from typing import Final
from urllib.parse import urlsplit

import av
from av.error import FFmpegError

from stages.media.rtsp import ask, rtsp_address
from stages.media.wire import MediaError, Order

_STATUS: Final = re.compile(r"(?:failed: |HTTP error )([3-6]\d\d)(?: \(?([A-Za-z][A-Za-z ,'-]{0,60}))?")
_BLOCKED: Final = re.compile(r"Protocol '([\w.+-]{1,20})' not on whitelist")
_REDIRECT: Final = re.compile(
    r"Redirecting to \w+://(?:[^/\s]*@)?([\w.-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(:\d{1,5})?(?:[/?\s]|$)"
)
_TIMED_OUT: Final = (TimeoutError, av.error.ExitError)
_HAVE_WORDS: Final = (
    av.error.HTTPUnauthorizedError,
    av.error.HTTPForbiddenError,
    av.error.HTTPNotFoundError,
)


@contextlib.contextmanager
def explaining(order: Order) -> Iterator[None]:
    """While a server's source is opened: a MediaError in place of an error that would say less, or mislead."""
    av.logging.set_level(av.logging.INFO)
    try:
        with av.logging.Capture() as logged:
            yield
    except (FFmpegError, OSError) as error:
        if why := reason(order, error, [text for _, _, text in logged]):
            raise why from error
        raise
    finally:
        av.logging.set_level(None)


def reason(order: Order, error: FFmpegError | OSError, logged: Sequence[str]) -> MediaError | None:
    """What can be said better than by the error itself. logged: libav's own messages."""
    if isinstance(error, _TIMED_OUT):
        return None  # an answer was cut off in its middle, and libav follows what is left of its address
    text = "\n".join(logged)
    if blocked := _BLOCKED.search(text):
        return MediaError("blocked", f"leads on to a {blocked[1]}: address, which is not followed")
    if isinstance(error, (av.error.HTTPError, av.error.HTTPClientError)) and not isinstance(error, _HAVE_WORDS):
        status = next(reversed(_STATUS.findall(text)), None)
        return MediaError("refused", f"was refused by the server: {' '.join(status).strip()}") if status else None
    url = urlsplit(order.request.source)
    onward = next(reversed(_REDIRECT.findall(text)), None)
    if error.errno == errno.EIO:
        return _unknown_host(onward[0].strip("[]") if onward else url.hostname or "")
    if isinstance(error, ConnectionRefusedError) and onward:
        return MediaError("refused", f"leads on to {''.join(onward)}, which refused the connection")
    if isinstance(error, av.error.InvalidDataError) and url.scheme.lower() == "rtsp":
        return _no_rtsp(order)
    return None


def _unknown_host(host: str) -> MediaError | None:
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            return MediaError(
                "missing", f"can't be reached: {host} could not be looked up; check the network and its DNS"
            )
        return MediaError("missing", f"can't be reached: no host of the name {host} is known; check how it is written")
    except (OSError, UnicodeError):
        return MediaError("missing", f"can't be reached: {host} is no host's name")
    return None


def _no_rtsp(order: Order) -> MediaError | None:
    try:
        answer = ask(*rtsp_address(order))
    except ConnectionResetError:
        answer = b""
    except (OSError, UnicodeError):
        return None
    if answer.startswith(b"RTSP/"):
        return MediaError("unreadable", "answers over RTSP, but with nothing that can be played: check the path")
    if answer:
        speaks = "speaks HTTP and not RTSP" if answer.startswith(b"HTTP/") else "does not speak RTSP"
        return MediaError("unreadable", f"{speaks}: check the port")
    return MediaError("closed", "closed the connection at once: check the port, and how many may watch it")
