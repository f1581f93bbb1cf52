"""graph/exporter.py and graph/host_header.py: whoever holds connections, the next scrape is answered."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from prometheus_client import CollectorRegistry

from graph.exporter import MAX_CONNECTIONS, serve_metrics
from graph.host_header import is_own_host, is_same_origin
from graph.metrics import Metrics


@pytest.fixture
def port() -> Iterator[int]:
    registry = CollectorRegistry()
    Metrics(registry).stage("llm").passed(3)
    server = serve_metrics(registry)
    yield server.port
    server.stop()


def scraped(port: int, host: str = "127.0.0.1") -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Host": host})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize("said", [b"", b"GET /metrics HTT", b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n"])
def test_no_crowd_keeps_a_scrape_out(port: int, said: bytes) -> None:
    with ExitStack() as crowd:
        connections = [
            crowd.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(3 * MAX_CONNECTIONS)
        ]
        for connection in connections[-MAX_CONNECTIONS // 2 :]:
            connection.sendall(said)
        assert 'omni_units_total{stage="llm"} 3.0' in scraped(port)
        assert connections[0].recv(1) == b""  # the oldest had to go


def test_a_foreign_host_reads_no_metrics(port: int) -> None:
    with pytest.raises(urllib.error.HTTPError, match="421"):
        scraped(port, "evil.example")


@pytest.mark.parametrize(
    ("host", "local_address"),
    [
        (None, "127.0.0.1"),
        ("localhost", "127.0.0.1"),
        ("localhost:9000", "::1"),
        ("LocalHost.", "127.0.0.1"),
        ("127.0.0.2:1", "127.0.0.1"),
        ("[::1]:8600", "::1"),
        ("10.0.0.5:8600", "10.0.0.5"),
        ("10.0.0.5", "::ffff:10.0.0.5"),
        ("[fe80::1]", "fe80::1%eth0"),
    ],
)
def test_the_address_at_which_a_request_came_in_is_our_own(host: str | None, local_address: str) -> None:
    assert is_own_host(host, local_address)


@pytest.mark.parametrize(
    ("host", "local_address"),
    [
        ("evil.example", "127.0.0.1"),
        ("evil.localhost", "127.0.0.1"),
        ("localhost", "10.0.0.5"),
        ("127.0.0.1", "10.0.0.5"),
        ("10.0.0.6", "10.0.0.5"),
        ("10.0.0.5", "127.0.0.1"),
        ("", "127.0.0.1"),
        ("127.0.0.1:80:80", "127.0.0.1"),
        ("127.0.0.1, evil.example", "127.0.0.1"),
        ("127.1", "127.0.0.1"),
        ("localhost", ""),
    ],
)
def test_any_other_name_is_foreign(host: str, local_address: str) -> None:
    assert not is_own_host(host, local_address)


def test_a_page_is_of_the_same_origin_with_host_and_port() -> None:
    assert is_same_origin("http://127.0.0.1:8600", "127.0.0.1:8600")
    assert not is_same_origin("http://127.0.0.1:3000", "127.0.0.1:8600")
    assert not is_same_origin("null", "127.0.0.1:8600")
