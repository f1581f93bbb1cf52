"""The metrics of one process over HTTP, for Prometheus and the gateway.

Rule: no client keeps another one out. A thread serves each connection; where there are too many the oldest is cut off.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from threading import Lock, Thread
from typing import Any, Final, NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as ExportedFamily
from prometheus_client.process_collector import ProcessCollector

from graph.host_header import is_own_host

MAX_CONNECTIONS: Final = 32
PATIENCE_S: Final = 5.0  # for the next bytes of a request, and for taking the answer


class Exposition(CollectorRegistry):
    """`registry` and what is registered here, without the `_created` series: more lines, which no dashboard reads."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__()
        self._inner = registry

    def collect(self) -> Iterator[ExportedFamily]:
        for family in chain(super().collect(), self._inner.collect()):
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


class _Handler(BaseHTTPRequestHandler):
    timeout = PATIENCE_S

    def do_GET(self) -> None:
        """The exposition, whatever the path."""
        assert isinstance(self.server, _Server)
        if not is_own_host(self.headers.get("Host"), self.connection.getsockname()[0]):
            self.send_error(421)
            return
        encode, content_type = choose_encoder(self.headers.get("Accept", ""))
        body = encode(self.server.exposition)
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle(self) -> None:
        """One request; who has gone, is too slow or was cut off is left alone with it."""
        try:
            super().handle()
        except OSError:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """A scrape is no event."""


class _Server(ThreadingHTTPServer):
    block_on_close = False  # who is cut off ends by itself
    request_queue_size = 128  # with the library's 5, a crowd at the door costs the next one seconds

    def __init__(self, host: str, port: int, exposition: CollectorRegistry) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.exposition = exposition
        self._lock = Lock()
        self._open: dict[Any, None] = {}  # sockets, the oldest first
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open[request] = None
            surplus = list(self._open)[:-MAX_CONNECTIONS]
        self._cut_off(surplus)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        with self._lock:
            left = list(self._open)
        self._cut_off(left)

    def _cut_off(self, connections: list[Any]) -> None:
        """End their reads and writes; the threads which wait in them close them."""
        for connection in connections:
            with self._lock:
                self._open.pop(connection, None)
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it has ended meanwhile


class MetricsServer(NamedTuple):
    """A running exporter: the port it got, and `stop`, which frees the port and cuts off who is still connected."""

    port: int
    stop: Callable[[], None]


def serve_metrics(registry: CollectorRegistry, host: str = "127.0.0.1", port: int = 0) -> MetricsServer:
    """Serve `registry` at http://host:port/metrics from a daemon thread. Port 0 takes a free one.

    Adds what the process itself uses, as `omni_process_…`. Raises OSError when the port is taken.
    """
    exposition = Exposition(registry)
    ProcessCollector(namespace="omni", registry=exposition)
    server = _Server(host, port, exposition)
    thread = Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return MetricsServer(server.server_port, stop)
