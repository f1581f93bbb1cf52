"""Pictures and sound of one source, decoded in a process of its own which can be killed.

    with MediaReader(MediaRequest("rtsp://…", fps=1, …)) as reader:
        while not isinstance(item := reader.read(1.0), (Ended, Failed)):
            ...

Rule: nothing which a file or a server does reaches the caller as anything but a Failed. FFmpeg's CVEs are loops and
overruns in C (PyAV 18.1 bundles 8.1.2, see reference/product-anchors.md §0.4), so the process, not the call, is what
we give up on.

The pipe is the only buffer. Files and test patterns are decoded ahead until it is full, and whoever reads sets the
pace by the items' times. A live source must be read as fast as it comes; what waits too long in its socket is lost.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import select
import signal
import stat
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import parse_qs, urlsplit

from graph.chunk import NS_PER_S
from graph.secret import mask_source, split_login
from stages.media.fork import FORK_SERVER, DecoderProcess, ForkServer
from stages.media.reaper import REAPER
from stages.media.types import FILM_SUFFIXES, picture_type, read_head
from stages.media.wire import (
    FOREVER_NS,
    LIVE_KINDS,
    Ended,
    Failed,
    FailKind,
    Frame,
    ItemParser,
    MediaError,
    MediaItem,
    MediaRequest,
    Order,
    Progress,
    Sound,
    SourceKind,
    Warned,
    WireError,
    is_control,
)

__all__ = [
    "FOREVER_NS",
    "Ended",
    "Failed",
    "Frame",
    "MediaError",
    "MediaItem",
    "MediaReader",
    "MediaRequest",
    "Progress",
    "Sound",
    "Warned",
    "check_source",
    "mask_source",
    "url_problem",
]

# The decoder gives up by itself after the time-outs it is told; so much later it is taken to hang.
WATCHDOG_GRACE_S: Final = 2.0
MAX_LOGIN_BYTES: Final = 127  # libav's RTSP client cuts off the rest without a word
_ENCODE_IT: Final = (
    "percent-encode what a user name or password holds of / ? # @ [ ] % (%2F %3F %23 %40 %5B %5D %25), or give it as "
    "${env:NAME}, which is encoded for you"
)
DEATH_LOOK_S: Final = 0.005
GOODBYE_S: Final = 0.3  # for telling a camera that we go
MAX_LOOK_S: Final = 1.0  # between two looks at the pipe; more was not the source's silence, but we who were stopped

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_KINDS: Final[dict[str, SourceKind]] = {
    "rtsp": "rtsp",
    "rtsps": "rtsp",
    "http": "http",
    "https": "http",
    "test": "test",
    "synthetic": "synthetic",
}
_NEEDS_CONSENT: Final = ("http", "https")
_PATTERN_QUERY: Final = {"seed": re.compile(r"\d{1,9}"), "size": re.compile(r"\d{2,5}x\d{2,5}")}
_ROOM_QUERY: Final = {
    "seed": re.compile(r"\d{1,9}"),
    "events": re.compile("quiet|calm|busy"),
    "voices": re.compile("room|evaluation"),
    "picture_delay": re.compile(r"\d"),
    "sound_delay": re.compile(r"\d"),
}


def check_source(source: str, allow: Collection[str] = ()) -> SourceKind:
    """What kind of source this is, without opening it; MediaError when it can't or may not be read.

    allow: schemes which are read only on request: "http", "https".
    """
    if not source or any(map(is_control, source)):
        what = "a source is empty, holds control characters, or is no UTF-8; give a URL, a file or a folder"
        raise MediaError("blocked", what)
    match = _SCHEME.match(source)
    if match is None:
        return _check_path(source)
    scheme = match[1].lower()
    kind = _KINDS.get(scheme)
    if kind is None or (scheme in _NEEDS_CONSENT and scheme not in allow):
        readable = ", ".join(f"{s}://" for s in _KINDS if s not in _NEEDS_CONSENT or s in allow)
        raise MediaError(
            "blocked",
            f"{mask_source(source)}: '{scheme}:' sources are not read here; use {readable}, a file, a folder or "
            f"/dev/video0. A file whose name has a colon is written with its folder: ./name",
        )
    if kind == "test":
        _check_made(source, "pattern", _PATTERN_QUERY, "test://pattern?seed=1&size=640x480")
    elif kind == "synthetic":
        _check_made(source, "room", _ROOM_QUERY, "synthetic://room?seed=7&events=busy")
    else:
        _check_url(source)
    return kind


def url_problem(source: str) -> str:
    """Why this is read nowhere: a scheme that nothing reads, a URL that is none. "" where the machine decides."""
    is_text = bool(source) and not any(map(is_control, source))
    if is_text and _SCHEME.match(source) is None:
        return ""  # a path
    try:
        check_source(source)
    except MediaError as error:
        return str(error)
    return ""


def _check_url(source: str) -> None:
    shown, (_, login, after) = mask_source(source), split_login(source)
    if login and not after:  # no "@" follows
        raise MediaError(
            "blocked", f"{shown}: what follows the ':' is no port, and a login needs its '@'; {_ENCODE_IT}"
        )
    # What a URL parser takes for the login's end; before a "/" there may be a host, which has no name before a ":".
    cut = re.search(r"[/?#]", login) if ":" in login else re.search(r"[\[\]\\]", login)
    if cut:
        what = f"a {cut[0]!r} stands before its last '@', which may end a login or belong to the path"
        raise MediaError("blocked", f"{shown}: {what}: write an '@' of the path as %40; {_ENCODE_IT}")
    if len(login.encode()) > MAX_LOGIN_BYTES:
        raise MediaError("blocked", f"{shown}: its login takes more than {MAX_LOGIN_BYTES} bytes, percent-encoded")
    try:
        url = urlsplit(source)
        host, _ = url.hostname, url.port
    except ValueError:  # whose text holds what may be a password
        raise MediaError("blocked", f"{shown}: not a URL: the host or its port can't be read; {_ENCODE_IT}") from None
    if not host or not url.netloc:
        raise MediaError("blocked", f"{shown}: has no host; write {url.scheme}://host/path")


def _check_made(source: str, name: str, allowed: Mapping[str, re.Pattern[str]], example: str) -> None:
    """A source which we make ourselves: its name, and what may be asked of it."""
    url = urlsplit(source)
    query = parse_qs(url.query, keep_blank_values=True)
    is_known = (
        url.netloc == name
        and url.path in ("", "/")
        and query.keys() <= allowed.keys()
        and all(allowed[key].fullmatch(value) for key, values in query.items() for value in values)
    )
    if not is_known:
        raise MediaError("missing", f"{mask_source(source)}: no such {url.scheme} source; write {example}")


def _check_path(source: str) -> SourceKind:
    path = Path(source)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if isinstance(error, PermissionError):
            raise MediaError("refused", f"{source}: may not be read by this user") from error
        raise MediaError("missing", f"{source}: {error.strerror}{_suggestion(path)}") from error
    if not os.access(path, os.R_OK):
        raise MediaError("refused", f"{source}: may not be read by this user; check its permissions")
    if stat.S_ISDIR(mode):
        return "images"
    if stat.S_ISCHR(mode) and path.resolve().name.startswith("video"):
        return "webcam"
    if not stat.S_ISREG(mode):
        raise MediaError("blocked", f"{source}: is no file, folder or camera; pipes and sockets are not read")
    if path.stat().st_size == 0:
        raise MediaError("unreadable", f"{source}: the file is empty")
    return _kind_of_file(path)


def _kind_of_file(path: Path) -> SourceKind:
    try:
        picture = picture_type(read_head(path))
    except OSError as error:
        raise MediaError("unreadable", f"{path}: {error.strerror}") from error
    is_film = picture is None or (picture == "JPEG" and path.suffix.lower() in FILM_SUFFIXES)
    return "file" if is_film else "images"


def _suggestion(path: Path) -> str:
    """What may have been meant, of what is there: the rest of a sentence which says that the path is not."""
    if path.is_symlink():
        return f"; it is a link to '{path.readlink()}', which is not there"
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.exists()]
    except OSError:
        return f"; the folder {path.parent} can't be read either"
    close = difflib.get_close_matches(path.name, names, n=1)
    return f". Did you mean '{close[0]}'?" if close else ""


class MediaReader:
    """One source, read. `start()` it, `read()` until Ended or Failed, `close()` it; or use `with`. One task owns it.

    allow: see check_source. open_timeout_s: until the source must be open. silence_timeout_s: how long it may give
    nothing (measured while somebody waits in `read()`, or looks in again within MAX_LOOK_S and finds nothing).
    """

    def __init__(
        self,
        request: MediaRequest,
        *,
        allow: Collection[str] = (),
        open_timeout_s: float = 10.0,
        silence_timeout_s: float = 4.0,
        fork_server: ForkServer = FORK_SERVER,
    ) -> None:
        """MediaError as by check_source: a source is judged before anything starts."""
        kind = check_source(request.source, allow)
        self._order = Order(kind, _with_absolute_path(request, kind), open_timeout_s, silence_timeout_s, origin_ns=0)
        self._parser = ItemParser(request)
        self._fork_server = fork_server
        self._process: DecoderProcess | None = None
        self._poll = select.poll()
        self._quiet_s = 0.0  # for so long the pipe has been looked at in vain
        self._looked_s = 0.0
        self._closed_s: float | None = None  # when the pipe was found closed, while its decoder had not ended
        self._opened = False
        self._last: Ended | Failed | None = None

    @property
    def is_live(self) -> bool:
        """Whether the source sets the pace; files and test patterns wait for their reader."""
        return self._order.kind in LIVE_KINDS

    @property
    def pid(self) -> int | None:
        """The decoder's process, while it runs."""
        return self._process.pid if self._process is not None else None

    def fileno(self) -> int:
        """The pipe's descriptor: readable when `read(0)` has something to give. Only between start() and close()."""
        assert self._process is not None
        return self._process.stdout.fileno()

    def start(self, now_ns: int = 0, at_ns: int | None = None) -> None:
        """Start the decoder, at this event time: what a live source gives next happens from then on.

        at_ns: when it was now_ns, on the monotonic clock; None: now.
        MediaError "limit" when the system gives no process or pipe.
        """
        assert self._process is None, "a MediaReader is started once"
        origin_ns = (time.monotonic_ns() if at_ns is None else at_ns) - now_ns
        self._order = dataclasses.replace(self._order, origin_ns=origin_ns)
        if self.is_live:
            start_ns = max(now_ns, 0)
            last_ns = max(time.monotonic_ns() - origin_ns, 0) + round(self._patience_s * NS_PER_S)
            self._parser = ItemParser(self._order.request, (start_ns, last_ns))
        try:
            self._process = self._fork_server.fork(self._order.open_timeout_s)
        except OSError as error:
            raise MediaError("limit", f"{self._name}: no decoder could be started: {error.strerror}") from error
        os.set_blocking(self._process.stdout.fileno(), False)
        self._poll.register(self._process.stdout.fileno(), select.POLLIN)
        self._looked_s = time.monotonic()
        try:
            self._process.stdin.write(self._order.to_line())
        except BrokenPipeError:
            return  # it died at birth: read() finds the end of the pipe and says so

    def read(self, timeout_s: float) -> MediaItem | None:
        """The next item; None when none came within timeout_s (0 just looks). Ended or Failed stay the answer."""
        deadline = time.monotonic() + timeout_s
        while self._last is None:
            if (item := self._pump()) is not None:
                return self._settle(item)
            if self._last is None and not self._wait(deadline):
                return None
        return self._last

    def _wait(self, deadline: float) -> bool:
        """Wait for bytes until the deadline; False when it has passed. Fails a source which has been quiet too long."""
        now = time.monotonic()
        self._quiet_s += min(now - self._looked_s, MAX_LOOK_S)
        self._looked_s = now
        patience_s = self._patience_s - self._quiet_s
        if patience_s <= 0:
            self._fail("timeout", "gave nothing for too long; its decoder was stopped")
        elif now >= deadline:
            return False
        elif self._closed_s is not None:
            time.sleep(DEATH_LOOK_S)
        else:
            self._poll.poll(1000 * max(0.001, min(deadline - now, patience_s, MAX_LOOK_S)))
        return True

    @property
    def _patience_s(self) -> float:
        limit_s = self._order.silence_timeout_s if self._opened else self._order.open_timeout_s
        return limit_s + WATCHDOG_GRACE_S

    @property
    def _name(self) -> str:
        return self._order.request.masked

    def _pump(self) -> MediaItem | None:
        """Take bytes out of the pipe until an item is complete or the pipe is empty."""
        assert self._process is not None, "start() comes before read()"
        fd = self._process.stdout.fileno()
        try:
            while num_bytes := os.readv(fd, [self._parser.space()]):
                self._quiet_s, self._looked_s = 0.0, time.monotonic()
                if (item := self._parser.filled(num_bytes)) is not None:
                    return item
        except BlockingIOError:
            return None
        except WireError as error:
            self._fail("crashed", f"made its decoder talk nonsense, which was stopped: {error}")
            return None
        self._look_at_death()
        return None

    def _settle(self, item: MediaItem) -> MediaItem:
        self._opened = True
        if isinstance(item, (Ended, Failed)):
            self._last = item
            self.close()
        return item

    def _fail(self, kind: FailKind, what: str) -> None:
        self._last = Failed(kind, f"{self._name} {what}")
        self._stop(goodbye_s=0.0)

    def _look_at_death(self) -> None:
        """The pipe has closed: fail as soon as it is known how the decoder ended, which is a moment later."""
        assert self._process is not None
        now = time.monotonic()
        self._closed_s = now if self._closed_s is None else self._closed_s
        status = self._process.poll()
        if status is None and now < self._closed_s + GOODBYE_S:
            return
        how = "its output" if status is None else f"with exit status {status}"
        if status is not None and status < 0:
            how = f"with {signal.Signals(-status).name}"
        self._fail("crashed", f"made its decoder end {how}; it may be opened again")

    def close(self) -> None:
        """Have the decoder stopped, without waiting for it, and free everything; harmless when repeated."""
        self._stop(goodbye_s=GOODBYE_S)

    def _stop(self, goodbye_s: float) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        self._poll.unregister(process.stdout.fileno())
        process.stdout.close()
        REAPER.end(process, goodbye_s)
        self._last = self._last or Ended("it was closed")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, of_type: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _with_absolute_path(request: MediaRequest, kind: SourceKind) -> MediaRequest:
    if kind not in ("file", "images", "webcam"):
        return request
    source = str(Path(request.source).absolute())
    as_written = request.masked == mask_source(request.source)
    return dataclasses.replace(request, source=source, masked="" if as_written else request.masked)
