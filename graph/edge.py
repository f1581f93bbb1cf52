"""The two ends of an edge: what may leave now, what waits, what is dropped and why. A link moves the chunks.

Rule: credit, order and the ledger of an edge are kept in this file and nowhere else.

    Sender    one edge, one receiving replica; per session a lane with its credit
    Receiver  one edge, all its senders; gives credit back by grants

Data waits in its lane for credit (`wait`), or pushes the oldest waiting one out (`drop_oldest`). Watermarks and ends
keep their place behind the data of their lane; barge-in and playback overtake everything.

A session that is closed and opened again under its name is another session: it has another incarnation, and what of the
one before it is still under way (chunks, grants) is none of its own. Such a chunk is dropped and counted, and takes no
credit back, for who had sent it has forgotten the session or begun it anew.

When the replica at the receiving end dies (`bury`), what was under way to it is lost and counted `crash`, and what
waited goes on waiting: a lane is held until its session is open again, at the replica that takes the dead one's place
(`release`, and `meet` for all), or at another one (`move`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from time import monotonic_ns
from typing import Literal, Protocol

from graph.chunk import Chunk, ChunkType, SessionId
from graph.codec import check
from graph.credit import Grant, Limit, ReceiveCredit, SendCredit
from graph.ledger import Account, Ledger, Reason
from graph.value import value

MAX_SESSIONS = 256  # sizes the sockets' high-water marks, together with the edge's limit
ALL = Grant(1 << 48, 1 << 48)  # for all that was ever sent: the session is closed at the receiver, which keeps nothing
MAX_LEFT = 256  # closed sessions whose chunks in flight a sender remembers; those of older ones count as delivered
CONTROL_PER_CHUNK = 2  # watermarks that may stand beside a data chunk

NowNs = Callable[[], int]


class SendLink(Protocol):
    """The way to one receiving replica."""

    def send(self, chunk: Chunk) -> bool:
        """Never blocks. False: the link is full, and nothing has been sent."""

    def grants(self) -> Iterable[tuple[SessionId, int, Grant]]:
        """The grants that have come back since: of which session and which incarnation of it."""


class ReceiveLink(Protocol):
    """The way from all senders of an edge. A peer is known by a name of its own."""

    def receive(self) -> list[tuple[bytes, Chunk]]:
        """What has come in, a bounded number: who sent it, and what."""

    def refused(self) -> list[tuple[bytes, Chunk]]:
        """Data that came in since and could not be used: who sent it, and whose it is, without its contents."""

    def grant(self, peer: bytes, session: SessionId, incarnation: int, grant: Grant) -> bool:
        """Never blocks. False: try again. True also for a peer that is gone."""


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
class Lane:
    """One session on one edge, at the sender."""

    credit: SendCredit
    waits: bool
    incarnation: int
    is_held: bool = False  # at the other end the session is not open yet: nothing is sent
    is_over: bool = False  # at the other end the session is closed already: what comes there is dropped, and done with
    waiting: deque[tuple[Chunk, int]] = field(default_factory=deque)  # (chunk, queued at, monotonic ns)
    num_data: int = 0

    @property
    def has_room(self) -> bool:
        """False while it waits for credit, or for a link that is full: its stage shall not make more."""
        return not self.waits or not self.waiting

    def queue(self, chunk: Chunk, queued_ns: int) -> None:
        """Append. Of the watermarks at the tail, the latest of each stream says it all, but for their traces: only an
        edge that drops data may lose those."""
        for index in reversed(range(len(self.waiting))):
            earlier = self.waiting[index][0]
            if not chunk.type is earlier.type is ChunkType.WATERMARK:
                break
            if earlier.stream == chunk.stream and not (self.waits and earlier.trace):
                del self.waiting[index]
                break
        self.waiting.append((chunk, queued_ns))


class Sender:
    """The sending end of an edge to one replica."""

    def __init__(self, rule: EdgeRule, link: SendLink, observer: EdgeObserver, now_ns: NowNs = monotonic_ns) -> None:
        self.rule = rule
        self._link = link
        self._observer = observer
        self._now_ns = now_ns
        self._ledger = Ledger()
        self._lanes: dict[SessionId, Lane] = {}
        self._left: dict[tuple[SessionId, int], SendCredit] = {}  # of closed sessions, what the other end still has
        self.is_blocked = False  # the link was full; nobody tells when it no longer is
        self._is_down = False  # there is nobody at the other end
        self._has_eased = False

    def open_session(
        self, session: SessionId, incarnation: int = 0, *, lossless: bool = False, held: bool = False
    ) -> Lane:
        """incarnation: as the receiver has it. lossless: in virtual time a full edge waits, whatever its rule says.
        held: it is not open there; nothing is sent before `release` or `move`. Returns what waits of it here."""
        waits = lossless or self.rule.when_full == "wait"
        self._lanes[session] = lane = Lane(SendCredit(self.rule.limit), waits, incarnation, held)
        return lane

    def close_session(self, session: SessionId) -> None:
        """Forget a session. What still waits is dropped as `closed`."""
        lane = self._lanes.pop(session, None)
        if lane is None:
            return
        for chunk, _ in lane.waiting:
            if not chunk.is_control:
                self._drop("closed")
        if lane.credit.in_flight and not (lane.is_over or self._is_down):
            self._left[session, lane.incarnation] = lane.credit
            for oldest in list(self._left)[:-MAX_LEFT]:
                del self._left[oldest]

    def bury(self) -> None:
        """The replica at the other end has died.

        What it had told that it was done with counts as delivered; what it held, of closed sessions too, is lost.
        """
        if self._is_down:
            return
        self._take_grants()
        self._is_down = True
        self._drop("crash", self.num_in_flight + sum(credit.in_flight for credit in self._left.values()))
        self._left.clear()
        account = self._ledger.account()
        self._ledger.deliver(account.in_flight - self.num_waiting)
        for lane in self._lanes.values():
            lane.credit = SendCredit(self.rule.limit)
            lane.is_held = True

    def meet(self, link: SendLink) -> None:
        """Another replica has taken the place of the one that has died."""
        self._link = link
        self._is_down = False
        self.is_blocked = True
        self.flush()

    def release(self, session: SessionId) -> None:
        """A session is open again at the other end, where that has been replaced."""
        lane = self._lanes[session]
        lane.is_held = False
        self._flush_lane(lane)

    def move(self, session: SessionId, other: Sender) -> None:
        """Let a session whose replica has died go on at another one, which has it open: what waits goes there."""
        lane = self._lanes.pop(session)
        self._ledger.accept(-lane.num_data)
        other._ledger.accept(lane.num_data)
        other._lanes[session] = lane
        other.release(session)

    def has_room(self, session: SessionId) -> bool:
        """False while this session waits for credit, or for a link that is full: its stage shall not make more."""
        return self._lanes[session].has_room

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
        """Send now, or queue for credit. Never blocks.

        Raises CodecError for a chunk that the receiver would refuse; then nothing has changed.
        """
        lane = self._lanes[chunk.session]
        if chunk.incarnation != lane.incarnation:
            chunk = chunk.of_incarnation(lane.incarnation)
        check(chunk)
        if chunk.type >= ChunkType.PLAYBACK:
            self._overtake(lane, chunk)
            return
        is_data = not chunk.is_control
        if is_data:
            self._ledger.accept()
            self._observer.accepted()
        if not lane.waiting and self._leaves(lane, chunk):
            if is_data:
                self._observer.waited(0.0)
            return
        is_first = not lane.waiting
        lane.num_data += is_data
        lane.queue(chunk, self._now_ns())
        if not is_first:
            self._flush_lane(lane)
        if not lane.waits and lane.num_data > self.rule.limit.chunks:
            self._drop_oldest(lane)
            self._flush_lane(lane)  # a watermark may stand first now

    def shed(self, chunk: Chunk) -> None:
        """Account for a chunk of data that is made and not sent."""
        self._ledger.accept()
        self._observer.accepted()
        self._drop("shed")

    def flush(self) -> bool:
        """Take the grants that came and send what they allow. False when the link would not take it all."""
        granted = self._take_grants()
        lanes = self._lanes.values() if self.is_blocked else granted
        self.is_blocked = False
        for lane in lanes:
            if lane.waiting:
                self._flush_lane(lane)
                self._has_eased = self._has_eased or not lane.waiting
        return not self.is_blocked

    def has_eased(self) -> bool:
        """Whether a session that waited has room again, since this was last asked."""
        eased, self._has_eased = self._has_eased, False
        return eased

    def _take_grants(self) -> list[Lane]:
        granted: list[Lane] = []
        for session, incarnation, grant in () if self._is_down else self._link.grants():
            lane = self._lanes.get(session)
            if lane is not None and lane.incarnation == incarnation:
                if grant == ALL:
                    lane.is_over = True
                    continue
                lane.credit.grant(grant)
                granted.append(lane)
            elif (left := self._left.get((session, incarnation))) is not None:
                left.grant(grant)
                if left.in_flight <= 0:
                    del self._left[session, incarnation]
        return granted

    def _overtake(self, lane: Lane, chunk: Chunk) -> None:
        """News of the listener, and what interrupts."""
        if self._is_down or lane.is_held:  # whoever comes is told of the listener when it is opened
            return
        was_sent = self._link.send(chunk)
        if not was_sent and chunk.type is ChunkType.BARGE_IN:  # of a lost playback the next one tells
            lane.waiting.appendleft((chunk, self._now_ns()))
            self.is_blocked = True

    def _flush_lane(self, lane: Lane) -> None:
        while lane.waiting:
            chunk, queued_ns = lane.waiting[0]
            if not self._leaves(lane, chunk):
                return
            lane.waiting.popleft()
            if not chunk.is_control:
                lane.num_data -= 1
                self._observer.waited((self._now_ns() - queued_ns) * 1e-9)

    def _leaves(self, lane: Lane, chunk: Chunk) -> bool:
        """Send the lane's first chunk, if there is credit for it and the link takes it."""
        if self._is_down or lane.is_held:
            return False
        is_data = not chunk.is_control
        if is_data and not lane.credit.fits(chunk.duration_ns):
            return False
        if not self._link.send(chunk):
            self.is_blocked = True
            return False
        if is_data:
            lane.credit.take(chunk.duration_ns)
        return True

    def _drop_oldest(self, lane: Lane) -> None:
        entries = list(lane.waiting)
        del entries[next(index for index, (chunk, _) in enumerate(entries) if not chunk.is_control)]
        lane.waiting.clear()
        for chunk, queued_ns in entries:  # watermarks that the dropped chunk held apart stand together now
            lane.queue(chunk, queued_ns)
        lane.num_data -= 1
        self._drop("overflow")

    def _drop(self, reason: Reason, number: int = 1) -> None:
        self._ledger.drop(reason, number)
        for _ in range(number):
            self._observer.dropped(reason)


@value
class Arrival:
    """A chunk that came in on an edge, and from whom. Data must be settled by `Receiver.deliver` or `drop`."""

    chunk: Chunk
    edge: str
    peer: bytes


class Receiver:
    """The receiving end of an edge."""

    def __init__(self, rule: EdgeRule, link: ReceiveLink, observer: EdgeObserver, now_ns: NowNs = monotonic_ns) -> None:
        self.rule = rule
        self._link = link
        self._observer = observer
        self._ledger = Ledger()
        self._incarnations: dict[SessionId, int] = {}  # of the sessions that are open
        self._credits: dict[tuple[bytes, SessionId], ReceiveCredit] = {}
        self._unsent: dict[tuple[bytes, SessionId], int] = {}  # grants that are due, with the chunks they are for
        self._arrived: Counter[bytes] = Counter()

    def account(self) -> Account:
        return self._ledger.account()

    @property
    def arrived(self) -> Mapping[bytes, int]:
        """Data chunks that have come in, by the peer that sent them."""
        return self._arrived

    def open_session(self, session: SessionId, incarnation: int = 0) -> None:
        """From now on what comes of this incarnation is taken, and of no other one."""
        self._incarnations[session] = incarnation

    def close_session(self, session: SessionId) -> None:
        """Forget a session. What of it is not settled is to be dropped before; what comes yet, `receive` drops."""
        for key in [key for key in self._credits if key[1] == session]:
            if key in self._unsent:
                self._send_grant(key)
                self._unsent.pop(key, None)
            del self._credits[key]
        self._incarnations.pop(session, None)

    def receive(self) -> list[Arrival]:
        """What has come in, a bounded number; what is of no session that is open here is dropped as `closed`."""
        edge, arrivals = self.rule.id, list[Arrival]()
        for peer, chunk in self._link.receive():
            arrival = Arrival(chunk, edge, peer)
            is_open = self._incarnations.get(chunk.session) == chunk.incarnation
            if is_open:
                arrivals.append(arrival)
            if not chunk.is_control:
                self._arrived[peer] += 1
                if not is_open:
                    self.drop(arrival, "closed")
                    self._link.grant(peer, chunk.session, chunk.incarnation, ALL)
        for peer, chunk in self._link.refused():
            self._arrived[peer] += 1
            self.drop(Arrival(chunk, edge, peer), "invalid")
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
        chunk = arrival.chunk
        if self._incarnations.get(chunk.session) != chunk.incarnation:  # it is not open any more
            return
        key = (arrival.peer, chunk.session)
        if (credit := self._credits.get(key)) is None:
            credit = self._credits[key] = ReceiveCredit(self.rule.limit)
        credit.release(chunk.duration_ns)
        self._unsent[key] = self._unsent.get(key, 0) + 1
        if 2 * self._unsent[key] >= self.rule.limit.chunks:
            self._send_grant(key)

    def _send_grant(self, key: tuple[bytes, SessionId]) -> None:
        peer, session = key
        if self._link.grant(peer, session, self._incarnations[session], self._credits[key].grant()):
            self._unsent.pop(key, None)
