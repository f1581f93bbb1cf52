"""The bus: chunks between actors over ZeroMQ, one socket pair per edge and peer, bounded by credit.

Rule: `import zmq` stands here and nowhere else. A socket belongs to the thread that made it: an actor's loop waits,
receives, works and sends in one thread, while libzmq's own thread moves the bytes.

    Sender   (DEALER, connects)  one edge, one receiving replica; per session a lane with its credit
    Receiver (ROUTER, binds)     one edge, all its senders; sends grants back on the same socket

Data waits in its lane for credit (`wait`), or pushes the oldest waiting one out (`drop_oldest`). Watermarks and ends
keep their place behind the data of their lane; barge-in and playback overtake everything.
`ipc://` on one host, in a directory of mode 0700; `tcp://` between hosts.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import msgpack
import zmq

from graph.chunk import Chunk, Kind, SessionId
from graph.codec import MAX_ARRAY_BYTES, CodecError, decode, encode
from graph.credit import Grant, Limit, ReceiveCredit, SendCredit
from graph.errors import GraphError
from graph.ledger import Account, Ledger, Reason

MAX_SESSIONS = 256  # sizes the sockets' high-water marks, together with the edge's limit
CONTROL_PER_CHUNK = 2  # watermarks that may stand beside a data chunk
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


class EdgeObserver(Protocol):
    """What the metrics of an edge want to hear (graph/metrics.py: EdgeMetrics)."""

    def accepted(self) -> None: ...
    def delivered(self, age_s: float) -> None: ...
    def dropped(self, reason: Reason) -> None: ...
    def waited(self, wait_s: float) -> None: ...
    def sent(self, num_bytes: int) -> None: ...
    def received(self, num_bytes: int) -> None: ...


class SilentObserver:
    """For those who count nothing."""

    def accepted(self) -> None: ...
    def delivered(self, age_s: float) -> None: ...
    def dropped(self, reason: Reason) -> None: ...
    def waited(self, wait_s: float) -> None: ...
    def sent(self, num_bytes: int) -> None: ...
    def received(self, num_bytes: int) -> None: ...


@dataclass(frozen=True, slots=True)
class EdgeRule:
    """What both ends of an edge agree on."""

    id: str
    limit: Limit
    when_full: Literal["wait", "drop_oldest"] = "wait"

    @property
    def high_water_mark(self) -> int:
        """Messages a socket may hold: what credit allows, and the control beside it."""
        return self.limit.chunks * (1 + CONTROL_PER_CHUNK) * MAX_SESSIONS


@dataclass(slots=True)
class _Lane:
    """One session on one edge, at the sender."""

    credit: SendCredit
    waits: bool
    waiting: deque[tuple[Chunk, int]] = field(default_factory=deque)  # (chunk, queued at, monotonic ns)
    num_data: int = 0

    def queue(self, chunk: Chunk, queued_ns: int) -> None:
        """Append. Of the watermarks at the tail, the latest of each stream says it all, but for their traces: only an
        edge that drops data may lose those."""
        for index in reversed(range(len(self.waiting))):
            earlier = self.waiting[index][0]
            if not chunk.kind is earlier.kind is Kind.WATERMARK:
                break
            if earlier.stream == chunk.stream and not (self.waits and earlier.trace):
                del self.waiting[index]
                break
        self.waiting.append((chunk, queued_ns))


class Sender:
    """The sending end of an edge to one replica."""

    def __init__(
        self, rule: EdgeRule, socket: zmq.Socket[bytes], observer: EdgeObserver, on_invalid: OnInvalid
    ) -> None:
        self.rule = rule
        self.socket = socket
        self._observer = observer
        self._on_invalid = on_invalid
        self._ledger = Ledger()
        self._lanes: dict[SessionId, _Lane] = {}
        self.is_blocked = False  # the socket was full; nobody tells when it no longer is

    def open_session(self, session: SessionId, *, lossless: bool = False) -> None:
        """lossless: in virtual time a full edge waits, whatever its rule says."""
        self._lanes[session] = _Lane(SendCredit(self.rule.limit), waits=lossless or self.rule.when_full == "wait")

    def close_session(self, session: SessionId) -> None:
        """Forget a session. What still waits is dropped as `shed`."""
        lane = self._lanes.pop(session, None)
        for chunk, _ in lane.waiting if lane else ():
            if not chunk.is_control:
                self._drop("shed")

    def has_room(self, session: SessionId) -> bool:
        """False while this session waits for credit, or for a socket that is full: its stage shall not make more."""
        lane = self._lanes[session]
        return not lane.waits or not lane.waiting

    def is_drained(self, session: SessionId) -> bool:
        """True when nothing of this session waits any more, control included: it may be closed without loss."""
        return not self._lanes[session].waiting

    @property
    def num_waiting(self) -> int:
        """Data chunks that wait for credit."""
        return sum(lane.num_data for lane in self._lanes.values())

    @property
    def num_in_flight(self) -> int:
        """Data chunks sent and not yet released by the receiver."""
        return sum(lane.credit.in_flight for lane in self._lanes.values())

    def account(self) -> Account:
        return self._ledger.account()

    def send(self, chunk: Chunk) -> None:
        """Send now, or queue for credit. Never blocks."""
        lane = self._lanes[chunk.session]
        if chunk.kind in (Kind.PLAYBACK, Kind.BARGE_IN):
            if not self._transmit(chunk) and chunk.kind is Kind.BARGE_IN:  # the next playback says more than a lost one
                lane.waiting.appendleft((chunk, time.monotonic_ns()))
                self.is_blocked = True
            return
        if not chunk.is_control:
            self._ledger.accept()
            self._observer.accepted()
            lane.num_data += 1
        lane.queue(chunk, time.monotonic_ns())
        self.is_blocked = not self._flush_lane(lane) or self.is_blocked
        if not lane.waits and lane.num_data > self.rule.limit.chunks:
            self._drop_oldest(lane)

    def flush(self) -> bool:
        """Take the grants that came and send what they allow. False when the socket would not take it all."""
        while _has_more(self.socket):
            try:
                session, grant = _unpack_grant(self.socket.recv(zmq.NOBLOCK))
            except CodecError as error:
                self._on_invalid(error.reason)
                continue
            if session in self._lanes:
                self._lanes[session].credit.grant(grant)
        self.is_blocked = False
        for lane in self._lanes.values():
            self.is_blocked = not self._flush_lane(lane) or self.is_blocked
        return not self.is_blocked

    def _flush_lane(self, lane: _Lane) -> bool:
        while lane.waiting:
            chunk, queued_ns = lane.waiting[0]
            if not chunk.is_control and not lane.credit.fits(chunk.duration_ns):
                return True
            if not self._transmit(chunk):
                return False
            lane.waiting.popleft()
            if not chunk.is_control:
                lane.credit.take(chunk.duration_ns)
                lane.num_data -= 1
                self._observer.waited((time.monotonic_ns() - queued_ns) * 1e-9)
        return True

    def _transmit(self, chunk: Chunk) -> bool:
        frames = encode(chunk)
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        self._observer.sent(sum(len(frame) for frame in frames))
        return True

    def _drop_oldest(self, lane: _Lane) -> None:
        entries = list(lane.waiting)
        del entries[next(index for index, (chunk, _) in enumerate(entries) if not chunk.is_control)]
        lane.waiting.clear()
        for chunk, queued_ns in entries:  # watermarks that the dropped chunk held apart stand together now
            lane.queue(chunk, queued_ns)
        lane.num_data -= 1
        self._drop("overflow")

    def _drop(self, reason: Reason) -> None:
        self._ledger.drop(reason)
        self._observer.dropped(reason)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A chunk that came in on an edge, and from which sender. Data must be settled by `Receiver.deliver` or `drop`."""

    chunk: Chunk
    edge: str
    sender: bytes
    received_ns: int  # monotonic


class Receiver:
    """The receiving end of an edge."""

    def __init__(
        self, rule: EdgeRule, socket: zmq.Socket[bytes], observer: EdgeObserver, on_invalid: OnInvalid
    ) -> None:
        self.rule = rule
        self.socket = socket
        self._observer = observer
        self._on_invalid = on_invalid
        self._ledger = Ledger()
        self._credits: dict[tuple[bytes, SessionId], ReceiveCredit] = {}
        self._unsent: dict[tuple[bytes, SessionId], int] = {}  # grants that are due, with the chunks they are for

    def account(self) -> Account:
        return self._ledger.account()

    def close_session(self, session: SessionId) -> None:
        for key in [key for key in self._credits if key[1] == session]:
            del self._credits[key]
            self._unsent.pop(key, None)

    def receive(self) -> list[Arrival]:
        """What has come in; at most RECEIVE_BATCH messages. Anything that is no chunk is counted and forgotten."""
        arrivals: list[Arrival] = []
        for _ in range(RECEIVE_BATCH):
            try:
                sender, *frames = _receive_frames(self.socket)
            except zmq.Again:
                break
            parts = [frame.buffer for frame in frames]
            self._observer.received(sum(map(len, parts)))
            try:
                arrivals.append(Arrival(decode(parts), self.rule.id, sender.bytes, time.monotonic_ns()))
            except CodecError as error:
                self._on_invalid(error.reason)
            if not _has_more(self.socket):
                break
        return arrivals

    def deliver(self, arrival: Arrival, age_s: float) -> None:
        """The chunk has been used, `age_s` after its end in event time: its credit goes back."""
        self._ledger.deliver()
        self._observer.delivered(age_s)
        self._release(arrival)

    def drop(self, arrival: Arrival, reason: Reason) -> None:
        """The chunk will not be used: counted under its reason, its credit goes back."""
        self._ledger.drop(reason)
        self._observer.dropped(reason)
        self._release(arrival)

    @property
    def owes_grants(self) -> bool:
        return bool(self._unsent)

    def flush(self) -> bool:
        """Send the grants that are due. False while some are left."""
        for key in list(self._unsent):
            self._send_grant(key)
        return not self._unsent

    def _release(self, arrival: Arrival) -> None:
        """Grants are totals, so one may stand for many: it is sent when nothing else came for a while (Bus.wait), and
        at the latest when half the limit has been used up."""
        key = (arrival.sender, arrival.chunk.session)
        credit = self._credits.setdefault(key, ReceiveCredit(self.rule.limit))
        credit.release(arrival.chunk.duration_ns)
        self._unsent[key] = self._unsent.get(key, 0) + 1
        if 2 * self._unsent[key] >= self.rule.limit.chunks:
            self._send_grant(key)

    def _send_grant(self, key: tuple[bytes, SessionId]) -> None:
        sender, session = key
        message = _pack_grant(session, self._credits[key].grant())
        try:
            self.socket.send_multipart([sender, message], zmq.NOBLOCK)
        except zmq.Again:
            return
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:  # the sender is gone; nobody waits for this grant
                raise
        self._unsent.pop(key, None)


def _receive_frames(socket: zmq.Socket[bytes]) -> list[zmq.Frame]:
    """One message. Asks each frame whether more come; `recv_multipart` asks the socket, which takes twice as long."""
    frames = [socket.recv(zmq.NOBLOCK, copy=False)]
    while frames[-1].more:
        frames.append(socket.recv(copy=False))
    return frames


def _has_more(socket: zmq.Socket[bytes]) -> bool:
    """Whether a message waits. To ask costs half of what it takes to be refused one (zmq.Again)."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)


def _pack_grant(session: SessionId, grant: Grant) -> bytes:
    return bytes(msgpack.packb([session, grant.chunks, grant.duration_ns]))


def _unpack_grant(message: bytes) -> tuple[SessionId, Grant]:
    """Raises CodecError when the message is no grant."""
    try:
        session, chunks, duration_ns = msgpack.unpackb(message)
    except (ValueError, TypeError) as error:
        raise CodecError("grant", f"a grant that is none: {error}") from error
    if not (isinstance(session, str) and isinstance(chunks, int) and isinstance(duration_ns, int)):
        raise CodecError("grant", f"a grant of {session!r}, {chunks!r}, {duration_ns!r}")
    return SessionId(session), Grant(chunks, duration_ns)


class Bus:
    """All sockets of one actor process. Not thread-safe: it belongs to the actor's loop."""

    def __init__(self, name: str, directory: Path, on_invalid: OnInvalid | None = None) -> None:
        """name: unique among the actors. directory: where the ipc sockets lie; made with mode 0700."""
        self._name = name.encode()
        self._on_invalid = on_invalid or (lambda reason: None)
        self._directory = directory
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._senders: list[Sender] = []
        self._receivers: list[Receiver] = []
        self._grant_sockets: set[zmq.Socket[bytes]] = set()
        self._watched: frozenset[int] = frozenset()
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
        receiver = Receiver(rule, socket, observer or SilentObserver(), self._on_invalid)
        self._receivers.append(receiver)
        self._poller.register(socket, zmq.POLLIN)
        return receiver, socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def connect(self, rule: EdgeRule, endpoint: str, observer: EdgeObserver | None = None) -> Sender:
        """Open the sending end of an edge to one replica."""
        socket = self._socket(zmq.DEALER, rule)
        socket.setsockopt(zmq.IDENTITY, self._name)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            socket.close()
            raise BusError(f"edge {rule.id}: can't connect to {endpoint}: {error}") from error
        sender = Sender(rule, socket, observer or SilentObserver(), self._on_invalid)
        self._senders.append(sender)
        self._grant_sockets.add(socket)
        self._poller.register(socket, zmq.POLLIN)
        return sender

    def wait(self, timeout_s: float, files: Iterable[int] = ()) -> list[Arrival]:
        """Wait until something comes, or a file descriptor is readable, or the time is up; returns what came.

        Grants are taken and spent on the way, so a loop that calls this keeps its lanes moving.
        """
        self._watch(frozenset(files))
        timeout_s = timeout_s if self._flush_senders() else min(timeout_s, RETRY_S)
        owes = any(receiver.owes_grants for receiver in self._receivers)
        ready = self._poll(min(timeout_s, GRANT_DELAY_S) if owes else timeout_s)
        if owes and self._only_grants(ready):
            ready = self._poll(timeout_s if self._flush_receivers() else min(timeout_s, RETRY_S))
        elif ready and self._only_grants(ready):
            ready = self._poll(timeout_s)
        return [arrival for receiver in self._receivers if receiver.socket in ready for arrival in receiver.receive()]

    def close(self) -> None:
        """Close every socket; what has not left yet is given 100 ms."""
        for socket in [sender.socket for sender in self._senders] + [receiver.socket for receiver in self._receivers]:
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
        return ready.keys() <= self._grant_sockets

    def _flush_senders(self) -> bool:
        """Try again what did not leave before. False when some of it is left."""
        drained = True
        for sender in self._senders:
            if sender.is_blocked:
                drained = sender.flush() and drained
        return drained

    def _flush_receivers(self) -> bool:
        """Send the grants that are due. False when some are left."""
        drained = True
        for receiver in self._receivers:
            drained = receiver.flush() and drained
        return drained

    def _poll(self, timeout_s: float) -> dict[Any, int]:
        """The sockets and descriptors that are readable; the grants among it are taken."""
        ready = dict(self._poller.poll(max(round(timeout_s * 1000), 0)))
        for sender in self._senders:
            if sender.socket in ready:
                sender.flush()
        return ready

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
