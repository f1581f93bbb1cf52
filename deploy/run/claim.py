"""A project is one pipeline's: known by sockets that live as long as its process does, and not a moment longer.

An abstract socket has a name and no file. No cleaner of /tmp removes it, no other TMPDIR or clock hides it, two can't
have it, it is gone with its process however that ends, and the kernel says whose it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deploy.process.interrupts import signals_blocked

ANSWER_S: Final = 10.0  # a busy machine takes its time; a process that is stopped never answers
MAX_ANSWER_BYTES: Final = 64 << 10
LISTENING_S: Final = 1.0  # from the binding of a name to the listening pass two system calls


class Claimed(Exception):
    """Another process has the project. pid: which; 0: it can't be seen from here. uid: whose it is."""

    def __init__(self, pid: int, uid: int) -> None:
        super().__init__(pid, uid)
        self.pid, self.uid = pid, uid


@dataclass(frozen=True, slots=True)
class Answer:
    """What the process that has a project says of itself. None: it has not answered, since it is stopped, say."""

    pid: int
    text: bytes | None


class Claim:
    """Holds a project from `claim` until `release`, and tells its user's processes what `says` is then."""

    def __init__(self, project: Path) -> None:
        """Raises Claimed."""
        self.says = b""
        self._listeners: list[socket.socket] = []
        self._ending, self._ended = socket.socketpair()
        try:
            for name in _names(project):
                self._listeners.append(_listen(name))
        except BaseException:
            self._close()
            raise
        self._thread = threading.Thread(target=self._serve, name="claim", daemon=True)
        with signals_blocked():
            self._thread.start()

    def release(self) -> None:
        self._ending.close()
        self._thread.join()
        self._close()

    def _close(self) -> None:
        for listener in (*self._listeners, self._ending, self._ended):
            listener.close()

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            for listener in (*self._listeners, self._ended):
                selector.register(listener, selectors.EVENT_READ)
            while True:
                ready = {key.fd for key, _ in selector.select()}
                if self._ended.fileno() in ready:
                    return
                for listener in [listener for listener in self._listeners if listener.fileno() in ready]:
                    with contextlib.suppress(OSError):  # who has asked is gone: that is his
                        self._answer(listener)

    def _answer(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(LISTENING_S)
            if _owner(connection)[1] == os.getuid():
                connection.sendall(self.says)


def ask(project: Path) -> Answer | None:
    """What runs in a project; None where nothing does. What another user's process says there is not believed."""
    for name in _names(project):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_S)
            try:
                connection.connect(name)
            except ConnectionRefusedError:
                continue
            except TimeoutError:  # so many have asked before that no more may: nobody takes their questions
                return Answer(0, None)
            pid, uid = _owner(connection)
            if uid == os.getuid():
                return Answer(pid, _read(connection))
    return None


def _read(connection: socket.socket) -> bytes | None:
    text = b""
    try:
        while (more := connection.recv(MAX_ANSWER_BYTES)) and len(text) <= MAX_ANSWER_BYTES:
            text += more
    except OSError:
        return None
    return text


def _names(project: Path) -> Iterator[bytes]:
    """By its path, and by what the path leads to: it may be renamed, made anew, or be mounted twice. Each with the file
    system it is on: containers that share a network each have an /app."""
    path = project.resolve()
    try:
        folder = path.stat()
    except OSError:
        yield _name(str(path))
    else:
        yield _name(folder.st_dev, path)
        yield _name(folder.st_dev, folder.st_ino)


def _name(*of: object) -> bytes:
    digest = hashlib.sha256(os.fsencode("\n".join(map(str, (os.getuid(), *of)))))
    return b"\0omni-pipeline-" + digest.hexdigest()[:32].encode()


def _listen(name: bytes) -> socket.socket:
    """Raises Claimed."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(name)
        listener.listen()
    except OSError:
        listener.close()
        raise Claimed(*_owner_of(name)) from None
    return listener


def _owner_of(name: bytes) -> tuple[int, int]:
    """(pid, uid) of the process that listens there; (0, our uid) when it is gone again, or nobody can ask it."""
    deadline_s = time.monotonic() + LISTENING_S
    while time.monotonic() < deadline_s:
        with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
            connection.settimeout(LISTENING_S)
            connection.connect(name)
            return _owner(connection)
        time.sleep(0.01)
    return 0, os.getuid()


def _owner(connection: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the other end, as the kernel says: of who listens, or of who has connected."""
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid), int(uid)
