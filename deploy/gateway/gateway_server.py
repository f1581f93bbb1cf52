"""The gateway's socket: one address, served from a thread of its own.

Rule: no client keeps another one out. Who lets us wait, for the rest of a request or with taking the answer, is cut off
after `PATIENCE_S`; where there are too many connections the one goes that has let us wait longest.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
import time

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from deploy.process.interrupts import signals_blocked
from graph.errors import GraphError

PATIENCE_S = 5.0
LOOK_S = 1.0
MAX_CONNECTIONS = 128  # of the process's descriptors, of which there may be 1024
MAX_HEAD_BYTES = 16 << 10


class GatewayError(GraphError):
    """The gateway cannot serve; the message says what to change."""


class GatewayConnection(H11Protocol):
    """One connection. `waits_since_s`: since when it is the client's turn, on the loop's clock, where it is."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.waits_since_s = self.loop.time()
        self._make_room()
        self.loop.call_later(LOOK_S, self._look)

    def data_received(self, data: bytes) -> None:
        request = self.cycle
        super().data_received(data)
        if self.cycle is not request:
            self.waits_since_s = self.loop.time()

    def on_response_complete(self) -> None:
        self.waits_since_s = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        self.waits_since_s = self.loop.time()
        super().pause_writing()

    @property
    def is_between_requests(self) -> bool:
        """A request is not whole yet, or its answer is on its way."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def is_clients_turn(self) -> bool:
        return self.is_between_requests or self.flow.write_paused

    def _look(self) -> None:
        if self not in self.connections:
            return
        if self.is_clients_turn and self.loop.time() - self.waits_since_s > PATIENCE_S:
            self._cut_off()
        else:
            self.loop.call_later(LOOK_S, self._look)

    def _make_room(self) -> None:
        others = [other for other in self.connections if other is not self and isinstance(other, GatewayConnection)]
        if len(others) >= MAX_CONNECTIONS:
            min(others, key=lambda other: (not other.is_clients_turn, other.waits_since_s))._cut_off()

    def _cut_off(self) -> None:
        self.connections.discard(self)
        self.transport.abort()


class GatewayServer:
    """Serves an ASGI application on one address, from a thread of its own, from `start` until `stop`, once."""

    def __init__(self, app: ASGIApp, host: str = "127.0.0.1", port: int = 8600) -> None:
        self.host = host
        self.port = port
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,  # logging belongs to the program, not to its server
                log_level="error",  # what strangers send is no news to the user
                access_log=False,
                http=GatewayConnection,
                ws="none",
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                timeout_keep_alive=round(PATIENCE_S),
                timeout_graceful_shutdown=2,
            )
        )
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    def start(self) -> None:
        """Listen; port 0 becomes the one it got. Raises GatewayError when the address can't be had."""
        listener = self._listen()
        self.port = listener.getsockname()[1]
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="gateway", daemon=True)
        with signals_blocked():
            self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise GatewayError(f"the gateway on {self.url} ended while it started; its log says why")
            time.sleep(0.01)

    def stop(self) -> None:
        """Close the address and end the thread; requests under way get 2 s."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()

    def _listen(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            return socket.create_server((self.host, self.port), family=family)
        except OSError as error:
            where = f"port {self.port} on {self.host}"
            if error.errno == errno.EADDRINUSE:
                raise GatewayError(f"{where} is busy; set console.listen to another address") from error
            raise GatewayError(f"{where} can't be had ({error.strerror}); set console.listen to another") from error
