from __future__ import annotations

import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path

import msgpack
import numpy as np
import pytest
import zmq

from graph.bus import Bus, BusError
from graph.chunk import NS_PER_S, Chunk, ChunkType, SessionId, Span, Trace, end_of_stream, watermark
from graph.codec import encode
from graph.credit import Limit
from graph.edge import MAX_SESSIONS, Arrival, EdgeRule, Receiver, Sender
from graph.ledger import merge

PORCH, YARD = SessionId("porch"), SessionId("yard")
PATIENCE_S = 120.0  # a loaded machine may take a while; a test that passes takes some ms
WAIT = EdgeRule("vision.tokens -> llm.image", Limit(4))
DROP_OLDEST = EdgeRule("camera.frames -> vision.frames", Limit(2), "drop_oldest")
NARROW = EdgeRule("tts.codes -> vocoder.codes", Limit(1))


class Edge:
    """Two buses and one edge between them, driven by one thread."""

    def __init__(self, directory: Path, rule: EdgeRule, address: str | None) -> None:
        self.invalid: list[str] = []
        self.rule = rule
        self.upstream = Bus("camera-0", directory)
        self.downstream = Bus("llm-0", directory, self.invalid.append)
        self.receiver: Receiver
        self.receiver, self.endpoint = self.downstream.bind(rule, address)
        self.sender: Sender = self.upstream.connect(rule, self.endpoint)
        self.arrived: list[Arrival] = []
        for session in (PORCH, YARD):
            self.open_session(session)

    def open_session(self, session: SessionId) -> None:
        self.receiver.open_session(session)
        self.sender.open_session(session)

    def close(self) -> None:
        self.upstream.close()
        self.downstream.close()

    def pump(self) -> None:
        self.upstream.wait(0.001)
        self.arrived += self.downstream.wait(0.001)

    def until(self, condition: Callable[[], bool]) -> None:
        """Let both ends run until `condition` holds."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"arrived: {[arrival.chunk for arrival in self.arrived]}"
            self.pump()

    def until_arrived(self, count: int) -> list[Chunk]:
        self.until(lambda: len(self.arrived) >= count)
        return self.chunks()

    def settle(self) -> None:
        """Let pass what can pass."""
        for _ in range(30):
            self.pump()

    def chunks(self, session: SessionId | None = None) -> list[Chunk]:
        return [a.chunk for a in self.arrived if session in (None, a.chunk.session)]

    def deliver_all(self, *, until: Callable[[], bool]) -> list[Chunk]:
        """Use up whatever comes until `until` says that it is over; returns all chunks in order of arrival."""
        delivered = 0

        def step() -> bool:
            nonlocal delivered
            for arrival in self.arrived[delivered:]:
                if not arrival.chunk.is_control:
                    self.receiver.deliver(arrival, 0.0)
            delivered = len(self.arrived)
            return until()

        self.until(step)
        return self.chunks()

    @property
    def in_flight(self) -> int:
        return merge([self.sender.account(), self.receiver.account()]).in_flight


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short: the path of a socket has 107 bytes at most."""
    path = Path(tempfile.mkdtemp(prefix="b"))
    yield path / "bus"
    shutil.rmtree(path)


@pytest.fixture(params=[None, "127.0.0.1"], ids=["ipc", "tcp"])
def edge(request: pytest.FixtureRequest, directory: Path) -> Iterator[Edge]:
    with closing(Edge(directory, WAIT, request.param)) as made:
        yield made


@pytest.fixture
def open_edge(directory: Path) -> Iterator[Callable[[EdgeRule], Edge]]:
    with ExitStack() as stack:
        yield lambda rule: stack.enter_context(closing(Edge(directory, rule, None)))


def piece(seq: int, session: SessionId = PORCH, stream: str = "image", **fields: object) -> Chunk:
    return Chunk(session, stream, seq * NS_PER_S, NS_PER_S, seq, **fields)  # type: ignore[arg-type]


def raw_dealer(endpoint: str) -> AbstractContextManager[zmq.Socket[bytes]]:
    context = zmq.Context.instance()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.connect(endpoint)
    return closing(socket)


# ---- what arrives, and in which order ------------------------------------------------------------------------------


def test_each_sessions_chunks_arrive_in_the_order_they_were_sent(edge: Edge) -> None:
    for seq in range(40):
        edge.sender.send(piece(seq, PORCH))
        edge.sender.send(piece(seq, YARD))
        edge.sender.send(watermark(YARD, "image", seq * NS_PER_S))
    edge.deliver_all(until=lambda: edge.sender.num_waiting == 0 and edge.in_flight == 0)
    assert [c.seq for c in edge.chunks(PORCH)] == list(range(40))
    assert [c.seq for c in edge.chunks(YARD) if not c.is_control] == list(range(40))


def test_a_megabyte_arrives_bit_for_bit(edge: Edge) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1024, 1024), dtype=np.uint8)
    samples = np.random.default_rng(1).standard_normal(16000).astype(np.float32)
    edge.sender.send(piece(0, arrays={"image": pixels, "samples": samples}))
    (chunk,) = edge.until_arrived(1)
    assert np.array_equal(chunk.arrays["image"], pixels)
    assert np.array_equal(chunk.arrays["samples"], samples)
    assert not chunk.arrays["image"].flags.writeable


def test_a_chunk_outlives_the_bus_it_came_on(directory: Path) -> None:
    with closing(Edge(directory, WAIT, None)) as edge:
        edge.sender.send(piece(0, arrays={"image": np.full(1 << 20, 7, np.uint8)}))
        (chunk,) = edge.until_arrived(1)
    assert int(chunk.arrays["image"].min()) == 7


def test_a_trace_arrives_with_its_watermark(edge: Edge) -> None:
    trace = Trace("digest", ("camera/door",), (Span("vision", 1, 2, 3),))
    edge.sender.send(watermark(PORCH, "image", NS_PER_S, trace=trace))
    (chunk,) = edge.until_arrived(1)
    assert (chunk.type, chunk.start_ns, chunk.trace) == (ChunkType.WATERMARK, NS_PER_S, trace)


def test_an_arrival_names_its_edge_and_its_peer(edge: Edge) -> None:
    edge.sender.send(piece(0))
    edge.until_arrived(1)
    assert (edge.arrived[0].edge, edge.arrived[0].peer) == (WAIT.id, b"camera-0")


def test_a_wait_ends_when_a_session_that_waited_for_credit_has_room_again(edge: Edge) -> None:
    for seq in range(5):
        edge.sender.send(piece(seq))
    edge.until_arrived(4)
    assert not edge.sender.has_room(PORCH)
    for arrival in edge.arrived:
        edge.receiver.deliver(arrival, 0.0)
    edge.downstream.wait(0.0)  # sends the grants that are due
    begin_s = time.monotonic()
    while not edge.sender.has_room(PORCH):
        edge.upstream.wait(PATIENCE_S)
    assert time.monotonic() - begin_s < PATIENCE_S / 2


# ---- a full edge ---------------------------------------------------------------------------------------------------


def test_a_full_edge_waits_for_what_is_used_up(edge: Edge) -> None:
    for seq in range(6):
        edge.sender.send(piece(seq))
    edge.until_arrived(4)
    edge.settle()
    assert [c.seq for c in edge.chunks()] == [0, 1, 2, 3]
    assert (edge.sender.num_waiting, edge.sender.has_room(PORCH)) == (2, False)
    edge.receiver.deliver(edge.arrived[0], 0.0)
    assert [c.seq for c in edge.until_arrived(5)] == [0, 1, 2, 3, 4]


def test_credit_is_given_back_for_what_is_dropped(edge: Edge) -> None:
    for seq in range(5):
        edge.sender.send(piece(seq))
    edge.until_arrived(4)
    edge.receiver.drop(edge.arrived[0], "stale")
    edge.until_arrived(5)
    assert edge.receiver.account().dropped["stale"] == 1


def test_media_time_bounds_an_edge_too(open_edge: Callable[[EdgeRule], Edge]) -> None:
    edge = open_edge(EdgeRule("audio -> llm", Limit(10, duration_ns=2 * NS_PER_S)))
    for seq in range(4):
        edge.sender.send(piece(seq))
    edge.until_arrived(2)
    edge.settle()
    assert (len(edge.arrived), edge.sender.num_waiting) == (2, 2)


def test_a_full_edge_of_live_video_drops_the_oldest_and_counts_it(open_edge: Callable[[EdgeRule], Edge]) -> None:
    edge = open_edge(DROP_OLDEST)
    for seq in range(10):
        edge.sender.send(piece(seq, stream="camera/door"))
    assert edge.sender.has_room(PORCH)
    assert (edge.sender.num_waiting, edge.sender.account().dropped["overflow"]) == (2, 6)
    seqs = [c.seq for c in edge.deliver_all(until=lambda: edge.in_flight == 0)]
    assert seqs == [0, 1, 8, 9]
    whole = merge([edge.sender.account(), edge.receiver.account()])
    assert (whole.accepted, whole.delivered, whole.dropped["overflow"]) == (10, 4, 6)


def test_in_virtual_time_even_live_video_waits(open_edge: Callable[[EdgeRule], Edge]) -> None:
    edge = open_edge(DROP_OLDEST)
    edge.sender.open_session(PORCH, lossless=True)
    for seq in range(10):
        edge.sender.send(piece(seq, stream="camera/door"))
    assert not edge.sender.has_room(PORCH)
    seqs = [c.seq for c in edge.deliver_all(until=lambda: edge.in_flight == 0)]
    assert seqs == list(range(10))


def test_another_session_on_the_same_edge_feels_nothing_of_a_blocked_one(edge: Edge) -> None:
    for seq in range(10):
        edge.sender.send(piece(seq, PORCH))
    for seq in range(20):
        edge.sender.send(piece(seq, YARD))
        edge.until(lambda seq=seq: len(edge.chunks(YARD)) == seq + 1)  # type: ignore[misc]
        edge.receiver.deliver(edge.arrived[-1], 0.0)
        edge.until(lambda: edge.sender.has_room(YARD))
    assert [c.seq for c in edge.chunks(PORCH)] == [0, 1, 2, 3]
    assert edge.sender.num_waiting == 6


def test_what_waits_when_a_session_closes_is_counted_as_closed(edge: Edge) -> None:
    for seq in range(7):
        edge.sender.send(piece(seq))
    edge.sender.send(watermark(PORCH, "image", 7 * NS_PER_S))
    edge.sender.close_session(PORCH)
    assert (edge.sender.account().dropped["closed"], edge.sender.num_waiting) == (3, 0)


def test_a_session_that_comes_back_begins_with_full_credit(edge: Edge) -> None:
    for seq in range(4):
        edge.sender.send(piece(seq))
    edge.until_arrived(4)
    edge.sender.close_session(PORCH)
    edge.receiver.close_session(PORCH)
    edge.open_session(PORCH)
    for seq in range(6):
        edge.sender.send(piece(seq))
    edge.until_arrived(8)
    edge.settle()
    assert (len(edge.arrived), edge.sender.num_waiting) == (8, 2)


# ---- control -------------------------------------------------------------------------------------------------------


def test_watermarks_and_ends_stay_behind_the_data_of_their_lane(open_edge: Callable[[EdgeRule], Edge]) -> None:
    edge = open_edge(NARROW)
    for seq in range(4):
        edge.sender.send(piece(seq))
        edge.sender.send(watermark(PORCH, "image", (seq + 1) * NS_PER_S))
    edge.sender.send(end_of_stream(PORCH, "image", 4 * NS_PER_S))
    chunks = edge.deliver_all(until=lambda: edge.arrived[-1:] != [] and edge.arrived[-1].chunk.type is ChunkType.END)
    assert [c.type for c in chunks] == [ChunkType.DATA, ChunkType.WATERMARK] * 4 + [ChunkType.END]
    assert [c.start_ns // NS_PER_S for c in chunks] == [0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_playback_and_barge_in_overtake_data_that_waits(open_edge: Callable[[EdgeRule], Edge]) -> None:
    edge = open_edge(NARROW)
    for seq in range(3):
        edge.sender.send(piece(seq))
    edge.sender.send(Chunk(PORCH, "playback", 0, type=ChunkType.PLAYBACK))
    edge.sender.send(Chunk(PORCH, "playback", 0, epoch=1, type=ChunkType.BARGE_IN))
    chunks = edge.until_arrived(3)
    assert [c.type for c in chunks] == [ChunkType.DATA, ChunkType.PLAYBACK, ChunkType.BARGE_IN]


def test_control_takes_no_credit_and_stands_in_no_ledger(edge: Edge) -> None:
    for seq in range(20):
        edge.sender.send(watermark(PORCH, "image", seq * NS_PER_S))
    edge.until_arrived(20)
    edge.sender.send(piece(0))
    edge.until_arrived(21)
    assert edge.sender.account().accepted == 1


def test_watermarks_that_wait_together_travel_as_the_latest(open_edge: Callable[[EdgeRule], Edge]) -> None:
    edge = open_edge(NARROW)
    for seq in range(2):
        edge.sender.send(piece(seq))
    for second in range(2, 50):
        edge.sender.send(watermark(PORCH, "image", second * NS_PER_S))
    chunks = edge.deliver_all(until=lambda: len(edge.arrived) >= 3)
    assert [(c.type, c.start_ns // NS_PER_S) for c in chunks] == [
        (ChunkType.DATA, 0),
        (ChunkType.DATA, 1),
        (ChunkType.WATERMARK, 49),
    ]


def test_a_watermark_speaks_for_its_own_stream_only(open_edge: Callable[[EdgeRule], Edge]) -> None:
    edge = open_edge(NARROW)
    for seq in range(2):
        edge.sender.send(piece(seq, stream="camera/door"))
    for second in (2, 3):
        edge.sender.send(watermark(PORCH, "camera/door", second * NS_PER_S))
        edge.sender.send(watermark(PORCH, "camera/garage", second * NS_PER_S))
    chunks = edge.deliver_all(until=lambda: len(edge.arrived) >= 4)
    assert [(c.stream, c.start_ns // NS_PER_S) for c in chunks[2:]] == [("camera/door", 3), ("camera/garage", 3)]


def test_on_an_edge_that_waits_no_trace_is_lost(open_edge: Callable[[EdgeRule], Edge]) -> None:
    edge = open_edge(NARROW)
    for seq in range(2):
        edge.sender.send(piece(seq))
    for second in (2, 3, 4):
        edge.sender.send(watermark(PORCH, "image", second * NS_PER_S, trace=Trace(str(second))))
    chunks = edge.deliver_all(until=lambda: len(edge.arrived) >= 5)
    assert [c.trace and c.trace.digest for c in chunks] == [None, None, "2", "3", "4"]


def test_an_edge_of_live_video_that_nobody_reads_stays_bounded(open_edge: Callable[[EdgeRule], Edge]) -> None:
    edge = open_edge(DROP_OLDEST)
    streams = ("camera/door", "camera/garage")
    for seq in range(6000):
        edge.sender.send(piece(seq, stream="camera/door"))
        for stream in streams:
            edge.sender.send(watermark(PORCH, stream, (seq + 1) * NS_PER_S, trace=Trace(str(seq))))
    last = watermark(PORCH, "camera/garage", 6000 * NS_PER_S, trace=Trace("5999"))
    chunks = edge.deliver_all(until=lambda: edge.chunks()[-1:] == [last])
    assert [c.seq for c in chunks if not c.is_control] == [0, 1, 5998, 5999]
    assert {c.stream: c.start_ns // NS_PER_S for c in chunks if c.is_control} == dict.fromkeys(streams, 6000)
    assert len(chunks) < 9000


# ---- sockets that are full, gone or foreign ------------------------------------------------------------------------


def fill_socket(edge: Edge) -> int:
    """Send watermarks to a receiver that doesn't read until the socket takes no more; returns how many."""
    count = 0
    while edge.sender.has_room(PORCH):
        count += 1
        edge.sender.send(watermark(PORCH, "image", count))
    return count


def test_a_socket_that_is_full_costs_no_credit_and_no_order(open_edge: Callable[[EdgeRule], Edge]) -> None:
    edge = open_edge(NARROW)
    count = fill_socket(edge)
    assert count >= NARROW.high_water_mark
    for seq in range(3):
        edge.sender.send(piece(seq))
        for _ in range(5):
            edge.sender.flush()
    edge.deliver_all(until=lambda: edge.in_flight == 0)
    assert [c.seq for c in edge.chunks() if not c.is_control] == [0, 1, 2]
    assert max(c.start_ns for c in edge.chunks() if c.is_control) == count
    assert [c.start_ns for c in edge.chunks() if c.is_control] == sorted(
        c.start_ns for c in edge.chunks() if c.is_control
    )


def test_a_barge_in_survives_a_full_socket(open_edge: Callable[[EdgeRule], Edge]) -> None:
    edge = open_edge(NARROW)
    fill_socket(edge)
    edge.sender.send(piece(0))
    edge.sender.send(Chunk(PORCH, "playback", 0, epoch=1, type=ChunkType.BARGE_IN))
    edge.until(lambda: len(edge.chunks()) > 0 and edge.chunks()[-1].type is ChunkType.DATA)
    assert [c.type for c in edge.chunks()[-3:] if c.type is not ChunkType.WATERMARK] == [
        ChunkType.BARGE_IN,
        ChunkType.DATA,
    ]


def test_garbage_is_counted_and_harms_nobody(edge: Edge) -> None:
    with raw_dealer(edge.endpoint) as dealer:
        for frames in ([b""], [b"\xc1"], [b"hello", b"world"], [b"\x00" * 70_000], [b"", b"", b""]):
            dealer.send_multipart(frames)
        dealer.send_multipart([*encode(piece(0))[:1], b"an array that nobody announced"])
        edge.sender.send(piece(0))
        edge.until(lambda: len(edge.arrived) == 1 and len(edge.invalid) == 6)
    assert edge.invalid == ["header"] * 5 + ["arrays"]
    assert [c.seq for c in edge.chunks()] == [0]


def test_a_sender_that_is_gone_gets_no_grant_and_no_error(edge: Edge) -> None:
    with raw_dealer(edge.endpoint) as dealer:
        dealer.send_multipart(encode(piece(0)))
        edge.until_arrived(1)
    edge.settle()
    edge.receiver.deliver(edge.arrived[0], 0.0)
    edge.sender.send(piece(1))
    assert [c.seq for c in edge.until_arrived(2)] == [0, 1]


@pytest.mark.parametrize(
    "grant",
    [
        b"",
        b"\xc1",
        msgpack.packb(7),
        msgpack.packb([PORCH, 0, 9]),
        msgpack.packb([[PORCH], 0, 9, 9]),
        msgpack.packb([{}, 0, 9, 9]),
        msgpack.packb([PORCH, 0, "9", 9]),
        msgpack.packb([PORCH, 0, 9, None]),
        msgpack.packb([PORCH, 0, 9.5, 9]),
        msgpack.packb([PORCH, True, 9, 9]),
    ],
)
def test_a_grant_that_is_none_is_counted_and_changes_nothing(directory: Path, grant: bytes) -> None:
    invalid: list[str] = []
    context = zmq.Context.instance()
    with closing(Bus("camera-0", directory, invalid.append)) as bus, closing(context.socket(zmq.ROUTER)) as router:
        router.setsockopt(zmq.LINGER, 0)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        sender = bus.connect(NARROW, f"tcp://127.0.0.1:{port}")
        sender.open_session(PORCH)
        sender.send(piece(0))
        sender.send(piece(1))
        identity = router.recv_multipart()[0]
        router.send_multipart([identity, grant])
        deadline = time.monotonic() + PATIENCE_S
        while not invalid and time.monotonic() < deadline:
            bus.wait(0.01)
        assert (invalid, sender.num_waiting) == (["grant"], 1)
        router.send_multipart([identity, msgpack.packb([PORCH, 0, 2, 0])])
        while sender.num_waiting and time.monotonic() < deadline:
            bus.wait(0.01)
        assert sender.num_waiting == 0


def test_a_sender_without_receiver_queues_and_does_not_raise(directory: Path) -> None:
    with closing(Bus("camera-0", directory)) as bus:
        sender = bus.connect(DROP_OLDEST, f"ipc://{directory}/nobody-0.ipc")
        sender.open_session(PORCH)
        for seq in range(10):
            sender.send(piece(seq))
            bus.wait(0.0)
        account = sender.account()
    assert (account.accepted, account.dropped["overflow"], account.in_flight) == (10, 6, 4)


def test_a_receiver_that_goes_leaves_the_sender_running(directory: Path) -> None:
    with closing(Edge(directory, WAIT, None)) as edge:
        edge.sender.send(piece(0))
        edge.until_arrived(1)
        edge.downstream.close()
        for seq in range(1, 8):
            edge.sender.send(piece(seq))
            edge.upstream.wait(0.005)
        assert edge.sender.account().accepted == 8
        assert edge.sender.num_waiting == 4


def test_a_receiver_that_comes_late_gets_everything(directory: Path) -> None:
    with closing(Edge(directory, WAIT, None)) as edge:
        later, _ = edge.downstream.bind(WAIT)
        later.open_session(PORCH)
        early = edge.upstream.connect(WAIT, f"ipc://{directory}/llm-0-2.ipc")
        early.open_session(PORCH)
        early.send(piece(0))
        edge.settle()
        latest, endpoint = edge.downstream.bind(WAIT)
        latest.open_session(PORCH)
        assert endpoint.endswith("llm-0-2.ipc")
        assert [c.seq for c in edge.until_arrived(1)] == [0]
        assert later.account().in_flight == 0


# ---- the house -----------------------------------------------------------------------------------------------------


def test_the_directory_of_the_sockets_is_its_owners_alone(directory: Path) -> None:
    with closing(Bus("llm-0", directory)):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_closed_bus_leaves_no_files(directory: Path) -> None:
    with closing(Edge(directory, WAIT, None)):
        assert [path.name for path in directory.iterdir()] == ["llm-0-0.ipc"]
    assert list(directory.iterdir()) == []


def test_a_bus_that_closes_leaves_the_sockets_of_others_alone(directory: Path) -> None:
    with closing(Bus("llm-0", directory)) as other:
        other.bind(WAIT)
        with closing(Bus("llm", directory)) as bus:
            bus.bind(WAIT)
        assert [path.name for path in directory.iterdir()] == ["llm-0-0.ipc"]


def test_two_edges_of_one_bus_have_sockets_of_their_own(directory: Path) -> None:
    with closing(Bus("llm-0", directory)) as bus:
        endpoints = {bus.bind(WAIT)[1], bus.bind(NARROW)[1], bus.bind(NARROW, "127.0.0.1")[1]}
    assert len(endpoints) == 3


def test_a_path_too_long_for_a_socket_is_refused_with_advice(directory: Path) -> None:
    with closing(Bus("llm-0", directory / ("x" * 100))) as bus, pytest.raises(BusError, match="TMPDIR") as caught:
        bus.bind(WAIT)
    assert WAIT.id in str(caught.value)


def test_an_address_of_another_host_is_refused_and_the_bus_still_closes(directory: Path) -> None:
    bus = Bus("llm-0", directory)
    with pytest.raises(BusError, match="can't listen") as caught:
        bus.bind(WAIT, "192.0.2.1")
    bus.close()
    assert WAIT.id in str(caught.value)


def test_an_endpoint_that_is_none_is_refused_and_the_bus_still_closes(directory: Path) -> None:
    bus = Bus("llm-0", directory)
    with pytest.raises(BusError, match="can't connect") as caught:
        bus.connect(WAIT, "nowhere")
    bus.close()
    assert WAIT.id in str(caught.value)


def test_waiting_ends_when_the_time_is_up(directory: Path) -> None:
    with closing(Bus("llm-0", directory)) as bus:
        bus.bind(WAIT)
        begin = time.monotonic()
        assert bus.wait(0.02) == []
        assert time.monotonic() - begin >= 0.015


def test_waiting_ends_when_a_file_can_be_read(directory: Path) -> None:
    with closing(Bus("llm-0", directory)) as bus, tempfile.TemporaryFile() as ready:
        begin = time.monotonic()
        assert bus.wait(PATIENCE_S, files=[ready.fileno()]) == []
        assert time.monotonic() - begin < PATIENCE_S / 2


def test_the_sockets_hold_what_credit_allows_for_every_session() -> None:
    assert WAIT.high_water_mark >= WAIT.limit.chunks * MAX_SESSIONS


class Counting:
    """An EdgeObserver which writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[object, ...]] = []

    def accepted(self) -> None:
        self.heard.append(("accepted",))

    def delivered(self, age_s: float) -> None:
        self.heard.append(("delivered", age_s))

    def dropped(self, reason: str) -> None:
        self.heard.append(("dropped", reason))

    def waited(self, wait_s: float) -> None:
        self.heard.append(("waited", wait_s >= 0))

    def sent(self, num_bytes: int) -> None:
        self.heard.append(("sent", num_bytes))

    def received(self, num_bytes: int) -> None:
        self.heard.append(("received", num_bytes))


def test_an_observer_hears_what_the_ledger_writes(directory: Path) -> None:
    above, below = Counting(), Counting()
    chunk = piece(0, arrays={"samples": np.zeros(1000, np.float32)})
    num_bytes = sum(len(frame) for frame in encode(chunk))
    with closing(Edge(directory, WAIT, None)) as edge:
        receiver, endpoint = edge.downstream.bind(WAIT, observer=below)
        receiver.open_session(PORCH)
        sender = edge.upstream.connect(WAIT, endpoint, above)
        sender.open_session(PORCH)
        sender.send(chunk)
        edge.until_arrived(1)
        receiver.deliver(edge.arrived[0], 0.25)
    assert above.heard == [("accepted",), ("sent", num_bytes), ("waited", True)]
    assert below.heard == [("received", num_bytes), ("delivered", 0.25)]


# ---- a replica that dies -------------------------------------------------------------------------------------------


def with_one_chunk_of_four_used(edge: Edge) -> None:
    """Four are sent, of which one has been used and granted anew; three more wait."""
    for seq in range(7):
        edge.sender.send(piece(seq))
    edge.until_arrived(4)
    edge.receiver.deliver(edge.arrived[0], 0.0)
    edge.until_arrived(5)


def test_what_was_under_way_to_a_replica_that_dies_is_lost_and_what_waits_goes_on_waiting(open_edge) -> None:
    edge = open_edge(WAIT)
    with_one_chunk_of_four_used(edge)
    edge.upstream.bury(edge.sender)
    account = edge.sender.account()
    assert (account.accepted, account.delivered, account.dropped["crash"]) == (7, 1, 4)
    assert edge.sender.num_waiting == account.in_flight == 2
    assert not edge.sender.has_room(PORCH)
    edge.upstream.wait(0.001)  # nobody is there, and nothing is tried


def test_what_waited_goes_to_the_replica_that_takes_the_place_of_a_dead_one(open_edge, directory: Path) -> None:
    edge = open_edge(WAIT)
    with_one_chunk_of_four_used(edge)
    edge.upstream.bury(edge.sender)
    edge.sender.send(end_of_stream(PORCH, "image", 7 * NS_PER_S))
    with closing(Bus("llm-0-1", directory)) as bus:
        receiver, endpoint = bus.bind(WAIT)
        receiver.open_session(PORCH)
        edge.sender.release(PORCH)
        edge.upstream.reconnect(edge.sender, endpoint)
        edge.downstream, edge.receiver, before, edge.arrived = bus, receiver, edge.downstream, []
        before.close()
        assert [chunk.seq for chunk in edge.until_arrived(3)[:2]] == [5, 6]
        assert edge.chunks()[2].type is ChunkType.END
        for seq in range(7, 20):  # its credit is whole
            edge.sender.send(piece(seq))
        edge.deliver_all(until=lambda: edge.in_flight == 0)
        assert merge([edge.sender.account(), receiver.account()]).accepted == 20


def test_a_session_goes_on_at_another_replica_with_what_waited(open_edge, directory: Path) -> None:
    edge = open_edge(WAIT)
    with closing(Bus("llm-1", directory)) as bus:
        receiver, endpoint = bus.bind(WAIT)
        receiver.open_session(PORCH)
        other = edge.upstream.connect(WAIT, endpoint)
        with_one_chunk_of_four_used(edge)
        edge.upstream.bury(edge.sender)
        edge.sender.move(PORCH, other)
        assert (edge.sender.account().accepted, other.account().accepted) == (5, 2)
        assert edge.sender.account().in_flight == edge.sender.num_waiting == 0
        edge.sender, edge.receiver, edge.arrived = other, receiver, []
        edge.downstream, before = bus, edge.downstream
        before.close()
        edge.deliver_all(until=lambda: len(edge.chunks()) == 2 and edge.in_flight == 0)
        assert [chunk.seq for chunk in edge.chunks()] == [5, 6]
        assert receiver.arrived == {b"camera-0": 2}


def test_nobodys_listener_is_told_to_a_dead_replica_and_its_sender_is_not_held_up(open_edge) -> None:
    edge = open_edge(WAIT)
    edge.upstream.bury(edge.sender)
    edge.sender.send(Chunk(PORCH, "playback", 0, type=ChunkType.PLAYBACK))
    edge.sender.send(Chunk(PORCH, "playback", 0, epoch=1, type=ChunkType.BARGE_IN))
    assert edge.sender.has_room(PORCH)


def test_while_a_replica_is_dead_an_edge_for_pictures_drops_the_oldest(open_edge) -> None:
    edge = open_edge(DROP_OLDEST)
    edge.upstream.bury(edge.sender)
    for seq in range(100):
        edge.sender.send(piece(seq, stream="camera/porch"))
        edge.sender.send(watermark(PORCH, "camera/porch", (seq + 1) * NS_PER_S))
    assert edge.sender.num_waiting == DROP_OLDEST.limit.chunks
    assert edge.sender.account().dropped["overflow"] == 100 - DROP_OLDEST.limit.chunks
    assert len(edge.sender._lanes[PORCH].waiting) <= 2 * DROP_OLDEST.limit.chunks + 1
