"""The bus: the links of an actor's edges over ZeroMQ, one socket pair per edge and peer.

Rule: `import zmq` stands here and nowhere else. A socket belongs to the thread that made it: an actor's loop waits,
receives, works and sends in one thread, while libzmq's own thread moves the bytes.

    DEALER, connects  the link of a Sender (graph/edge.py)
    ROUTER, binds     the link of a Receiver; sends grants back on the same socket

`ipc://` on one host, in a directory of mode 0700; `tcp://` between hosts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from time import monotonic
from typing import Any

import msgpack
import zmq

from graph.chunk import Chunk, SessionId
from graph.codec import MAX_ARRAY_BYTES, CodecError, decode, encode
from graph.credit import Grant
from graph.edge import Arrival, EdgeObserver, EdgeRule, Receiver, Sender, SilentObserver
from graph.errors import GraphError

MAX_IPC_PATH = 100  # bytes; Linux takes 107
RETRY_S = 0.005  # how soon a socket that was full is tried again
GRANT_DELAY_S = 0.001  # a grant waits so long for company; who waits for it has half the limit under way
RECEIVE_BATCH = 64  # messages taken from one socket before the others have their turn
# An array under this is copied once; over it, libzmq reads it where it lies and a thread of pyzmq's, which needs the
# GIL, gives it free. Sent and received in one thread: 100 KB 37 us copied, 87 us not; 1 MB 430 us copied, 230 not.
COPY_BELOW_BYTES = 256 * 1024


OnInvalid = Callable[[str], None]  # told the reason of each message that was refused


class BusError(GraphError):
    """An endpoint can't be bound or connected."""


class _SendLink:
    """Sends on a DEALER socket, and takes its grants."""

    def __init__(self, socket: zmq.Socket[bytes], observer: EdgeObserver, on_invalid: OnInvalid) -> None:
        self._socket = socket
        self._observer = observer
        self._on_invalid = on_invalid

    def send(self, chunk: Chunk) -> bool:
        frames = encode(chunk)
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        self._observer.sent(sum(len(frame) for frame in frames))
        return True

    def grants(self) -> list[tuple[SessionId, int, Grant]]:
        grants = []
        while _has_more(self._socket):
            try:
                grants.append(_unpack_grant(self._socket.recv(zmq.NOBLOCK)))
            except CodecError as error:
                self._on_invalid(error.reason)
        return grants


class _ReceiveLink:
    """Receives on a ROUTER socket. Anything that is no chunk is counted and forgotten."""

    def __init__(self, socket: zmq.Socket[bytes], observer: EdgeObserver, on_invalid: OnInvalid) -> None:
        self._socket = socket
        self._observer = observer
        self._on_invalid = on_invalid
        self._refused: list[tuple[bytes, Chunk]] = []

    def receive(self) -> list[tuple[bytes, Chunk]]:
        chunks: list[tuple[bytes, Chunk]] = []
        for _ in range(RECEIVE_BATCH):
            try:
                peer, *frames = _receive_frames(self._socket)
            except zmq.Again:
                break
            parts = [frame.buffer for frame in frames]
            self._observer.received(sum(map(len, parts)))
            try:
                chunks.append((peer.bytes, decode(parts)))
            except CodecError as error:
                self._on_invalid(error.reason)
                if error.refused is not None and not error.refused.is_control:
                    self._refused.append((peer.bytes, error.refused))
            if not _has_more(self._socket):
                break
        return chunks

    def refused(self) -> list[tuple[bytes, Chunk]]:
        refused, self._refused = self._refused, []
        return refused

    def grant(self, peer: bytes, session: SessionId, incarnation: int, grant: Grant) -> bool:
        try:
            self._socket.send_multipart([peer, _pack_grant(session, incarnation, grant)], zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:  # the peer is gone; nobody waits for this grant
                raise
        return True


def _receive_frames(socket: zmq.Socket[bytes]) -> list[zmq.Frame]:
    """One message. Asks each frame whether more come; `recv_multipart` asks the socket, which takes twice as long."""
    frames = [socket.recv(zmq.NOBLOCK, copy=False)]
    while frames[-1].more:
        frames.append(socket.recv(copy=False))
    return frames


def _has_more(socket: zmq.Socket[bytes]) -> bool:
    """Whether a message waits. To ask costs half of what it takes to be refused one (zmq.Again)."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)


def _pack_grant(session: SessionId, incarnation: int, grant: Grant) -> bytes:
    return bytes(msgpack.packb([session, incarnation, grant.chunks, grant.duration_ns]))


def _unpack_grant(message: bytes) -> tuple[SessionId, int, Grant]:
    """Raises CodecError when the message is no grant."""
    try:
        session, *numbers = msgpack.unpackb(message)
        incarnation, chunks, duration_ns = numbers
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise CodecError("grant", f"a grant that is none: {error}") from error
    if not (isinstance(session, str) and all(type(number) is int for number in numbers)):
        raise CodecError("grant", f"a grant of {session!r}, {numbers!r}")
    return SessionId(session), incarnation, Grant(chunks, duration_ns)


class Bus:
    """All sockets of one actor process. Not thread-safe: it belongs to the actor's loop."""

    def __init__(self, name: str, directory: Path, on_invalid: OnInvalid | None = None) -> None:
        """name: unique among the actors. directory: where the ipc sockets lie; made with mode 0700."""
        self._name = name.encode()
        self._on_invalid = on_invalid or (lambda reason: None)
        self._directory = directory
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._senders: dict[zmq.Socket[bytes], Sender] = {}
        self._receivers: dict[zmq.Socket[bytes], Receiver] = {}
        self._watched: frozenset[int] = frozenset()
        self.woken: frozenset[int] = frozenset()  # the descriptors that were readable in the last `wait`
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)  # it may have been there

    def bind(
        self, rule: EdgeRule, address: str | None = None, observer: EdgeObserver | None = None
    ) -> tuple[Receiver, str]:
        """Open the receiving end of an edge. Returns it and the endpoint for its senders.

        address: an IP of this host for senders elsewhere (tcp, any free port); None for ipc.
        Raises BusError when it can't be bound.
        """
        endpoint = f"tcp://{address}:*" if address else self._ipc_endpoint(rule)
        socket = self._socket(zmq.ROUTER, rule)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a sender that was started anew comes with its old name
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            socket.close()
            raise BusError(f"edge {rule.id}: can't listen on {endpoint}: {error}") from error
        observer = observer or SilentObserver()
        receiver = Receiver(rule, _ReceiveLink(socket, observer, self._on_invalid), observer)
        self._receivers[socket] = receiver
        self._poller.register(socket, zmq.POLLIN)
        return receiver, socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def connect(self, rule: EdgeRule, endpoint: str, observer: EdgeObserver | None = None) -> Sender:
        """Open the sending end of an edge to one replica."""
        observer = observer or SilentObserver()
        socket = self._connected(rule, endpoint)
        sender = Sender(rule, _SendLink(socket, observer, self._on_invalid), observer)
        self._watch_sender(socket, sender)
        return sender

    def bury(self, sender: Sender) -> None:
        """The replica at the other end has died."""
        sender.bury()
        self._close_sender(sender)

    def reconnect(self, sender: Sender, endpoint: str, observer: EdgeObserver | None = None) -> None:
        """Another replica has taken the place of the one that was buried. Raises BusError as `connect` does."""
        self._close_sender(sender)
        socket = self._connected(sender.rule, endpoint)
        self._watch_sender(socket, sender)
        sender.meet(_SendLink(socket, observer or SilentObserver(), self._on_invalid))

    def wait(self, timeout_s: float, files: Iterable[int] = ()) -> list[Arrival]:
        """Wait until something comes, a session that waited for credit has room again, a file descriptor is readable,
        or the time is up; returns what came.

        Grants are taken and spent on the way, so a loop that calls this keeps its lanes moving.
        """
        self._watch(frozenset(files))
        timeout_s = timeout_s if self._flush_senders() else min(timeout_s, RETRY_S)
        until_s = monotonic() + (0 if self._have_eased() else timeout_s)
        owes = any(receiver.owes_grants for receiver in self._receivers.values())
        left_s = until_s - monotonic()
        ready = self._poll(min(left_s, GRANT_DELAY_S) if owes else left_s)
        if self._only_grants(ready) and not self._have_eased() and (ready or owes):
            left_s = until_s - monotonic()
            ready = self._poll(left_s if self._flush_receivers() else min(left_s, RETRY_S))
        self.woken = self._watched & ready.keys() if self._watched else self._watched
        return [
            arrival for socket, receiver in self._receivers.items() if socket in ready for arrival in receiver.receive()
        ]

    def close(self) -> None:
        """Close every socket; what has not left yet is given 100 ms."""
        for socket in (*self._senders, *self._receivers):
            socket.close(linger=100)
        self._context.term()
        for index in range(len(self._receivers)):
            self._ipc_path(index).unlink(missing_ok=True)

    def _watch(self, files: frozenset[int]) -> None:
        for descriptor in self._watched - files:
            self._poller.unregister(descriptor)
        for descriptor in files - self._watched:
            self._poller.register(descriptor, zmq.POLLIN)
        self._watched = files

    def _only_grants(self, ready: dict[Any, int]) -> bool:
        """Nothing that the caller waits for."""
        return ready.keys() <= self._senders.keys()

    def _flush_senders(self) -> bool:
        """Try again what did not leave before. False when some of it is left."""
        drained = True
        for sender in self._senders.values():
            if sender.is_blocked:
                drained = sender.flush() and drained
        return drained

    def _have_eased(self) -> bool:
        eased = [sender.has_eased() for sender in self._senders.values()]
        return any(eased)

    def _flush_receivers(self) -> bool:
        """Send the grants that are due. False when some are left."""
        drained = True
        for receiver in self._receivers.values():
            drained = receiver.flush() and drained
        return drained

    def _poll(self, timeout_s: float) -> dict[Any, int]:
        """The sockets and descriptors that are readable; the grants among it are taken."""
        ready = dict(self._poller.poll(max(round(timeout_s * 1000), 0)))
        for socket, sender in self._senders.items():
            if socket in ready:
                sender.flush()
        return ready

    def _connected(self, rule: EdgeRule, endpoint: str) -> zmq.Socket[bytes]:
        socket = self._socket(zmq.DEALER, rule)
        socket.setsockopt(zmq.IDENTITY, self._name)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            socket.close()
            raise BusError(f"edge {rule.id}: can't connect to {endpoint}: {error}") from error
        return socket

    def _close_sender(self, sender: Sender) -> None:
        for socket in [socket for socket, other in self._senders.items() if other is sender]:
            del self._senders[socket]
            self._poller.unregister(socket)
            socket.close(linger=0)

    def _watch_sender(self, socket: zmq.Socket[bytes], sender: Sender) -> None:
        self._senders[socket] = sender
        self._poller.register(socket, zmq.POLLIN)

    def _socket(self, kind: int, rule: EdgeRule) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.SNDHWM, rule.high_water_mark)
        socket.setsockopt(zmq.RCVHWM, rule.high_water_mark)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_ARRAY_BYTES)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        socket.copy_threshold = COPY_BELOW_BYTES
        return socket

    def _ipc_endpoint(self, rule: EdgeRule) -> str:
        path = self._ipc_path(len(self._receivers))
        if len(str(path)) > MAX_IPC_PATH:
            raise BusError(f"edge {rule.id}: the path {path} is too long for a socket; set TMPDIR to a shorter one")
        return f"ipc://{path}"

    def _ipc_path(self, index: int) -> Path:
        return self._directory / f"{self._name.decode()}-{index}.ipc"
