"""gateway/gateway_server.py on a clock of the test's own: who lets the gateway wait is cut off, and nobody else."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from deploy.gateway.gateway_server import LOOK_S, MAX_CONNECTIONS, PATIENCE_S, GatewayConnection

REQUEST = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


class FakeTask:
    """A request that is being answered, for as long as the test lasts."""

    def add_done_callback(self, callback: Callable[[object], object]) -> None:
        """It is never done."""


class FakeLoop:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.calls: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        self.calls.append((self.now_s + delay_s, call))

    def create_task(self, work: Coroutine[Any, Any, None]) -> FakeTask:
        work.close()
        return FakeTask()

    def advance(self, by_s: float) -> None:
        """Run what is due in between, each at its time."""
        end_s = self.now_s + by_s
        while due := [call for call in self.calls if call[0] <= end_s]:
            first = min(due, key=lambda call: call[0])
            self.calls.remove(first)
            self.now_s = first[0]
            first[1]()
        self.now_s = end_s


class FakeTransport:
    def __init__(self) -> None:
        self.is_aborted = False

    def get_extra_info(self, name: str) -> None:
        """Nothing is known of the other end."""

    def abort(self) -> None:
        self.is_aborted = True

    def is_closing(self) -> bool:
        return self.is_aborted


class House:
    """Connections to one server."""

    def __init__(self) -> None:
        async def app(scope: object, receive: object, send: object) -> None:
            """Never called: the loop runs nothing."""

        self.loop = FakeLoop()
        self.state = ServerState()
        self.config = uvicorn.Config(app, log_config=None)

    def connect(self) -> tuple[GatewayConnection, FakeTransport]:
        transport = FakeTransport()
        connection = GatewayConnection(self.config, self.state, {}, self.loop)  # type: ignore[arg-type]
        connection.connection_made(transport)  # type: ignore[arg-type]
        return connection, transport


def test_who_says_nothing_is_cut_off() -> None:
    house = House()
    _, transport = house.connect()
    house.loop.advance(PATIENCE_S - LOOK_S)
    assert not transport.is_aborted
    house.loop.advance(3 * LOOK_S)
    assert transport.is_aborted


def test_who_says_a_byte_now_and_then_is_cut_off_as_well() -> None:
    house = House()
    connection, transport = house.connect()
    for byte in REQUEST[:7]:
        connection.data_received(bytes([byte]))
        house.loop.advance(LOOK_S)
    assert transport.is_aborted


def test_who_waits_for_an_answer_is_not_cut_off() -> None:
    house = House()
    connection, transport = house.connect()
    connection.data_received(REQUEST)
    house.loop.advance(100 * PATIENCE_S)
    assert not transport.is_aborted


def test_who_does_not_take_the_answer_is_cut_off() -> None:
    house = House()
    connection, transport = house.connect()
    connection.data_received(REQUEST)
    house.loop.advance(10 * PATIENCE_S)
    connection.pause_writing()
    house.loop.advance(PATIENCE_S - LOOK_S)
    assert not transport.is_aborted
    house.loop.advance(3 * LOOK_S)
    assert transport.is_aborted


def test_who_takes_the_answer_after_all_is_not() -> None:
    house = House()
    connection, transport = house.connect()
    connection.data_received(REQUEST)
    connection.pause_writing()
    house.loop.advance(PATIENCE_S - LOOK_S)
    connection.resume_writing()
    house.loop.advance(10 * PATIENCE_S)
    assert not transport.is_aborted


def test_where_all_places_are_taken_the_longest_idle_goes_and_no_request() -> None:
    house = House()
    busy, busy_transport = house.connect()
    busy.data_received(REQUEST)
    house.loop.advance(0.1)
    _, first_transport = house.connect()
    house.loop.advance(0.1)
    transports = [house.connect()[1] for _ in range(MAX_CONNECTIONS - 1)]
    assert first_transport.is_aborted
    assert not busy_transport.is_aborted
    assert not any(transport.is_aborted for transport in transports)
    assert len(house.state.connections) == MAX_CONNECTIONS
