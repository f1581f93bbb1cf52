"""stages/media/why.py: servers that give no media say why, in the owner's words."""

import contextlib
import re
import socket
import threading
from collections.abc import Iterator

import av
import pytest

from stages.media import why
from stages.media.reader import Ended, Failed, MediaReader
from stages.media.wire import Order
from tests.support.reading import request


class Answers:
    """A server that gives every request the same answer, with its CSeq; one that speaks no RTSP hangs up behind it.

    b"": it hangs up as soon as it is called.
    """

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.server.accept()
                with connection, contextlib.suppress(OSError):
                    self._serve_one(connection)

    def _serve_one(self, connection: socket.socket) -> None:
        connection.settimeout(5)
        while self._answer and (heard := connection.recv(65_536)):
            cseq = re.search(rb"CSeq: (\d+)", heard)
            connection.sendall(self._answer.replace(b"%N", cseq[1] if cseq else b"0"))
            if not self._answer.startswith(b"RTSP/"):
                return


@contextlib.contextmanager
def server(answer: bytes) -> Iterator[int]:
    """Its port."""
    answers = Answers(answer)
    thread = threading.Thread(target=answers.serve, daemon=True)
    thread.start()
    try:
        yield answers.port
    finally:
        answers.server.shutdown(socket.SHUT_RDWR)
        answers.server.close()
        thread.join(10)


def rtsp(status: str, *fields: str) -> bytes:
    return "\r\n".join([f"RTSP/1.0 {status}", "CSeq: %N", "Content-Length: 0", *fields, "", ""]).encode()


def failure(source: str) -> Failed:
    with MediaReader(request(source), allow=("http",)) as reader:
        while not isinstance(item := reader.read(10.0), (Ended, Failed)):
            assert item is not None
    assert isinstance(item, Failed)
    assert "canary" not in item.message
    return item


@pytest.mark.parametrize("scheme", ["rtsp", "rtsps", "http"])
def test_a_host_that_nobody_knows_is_named(scheme):
    failed = failure(f"{scheme}://user:canary@nohost.invalid/live")
    assert failed.kind == "missing"
    assert "can't be reached" in failed.message and "nohost.invalid" in failed.message.split("can't be reached")[1]
    assert "Input/output error" not in failed.message


@pytest.mark.parametrize(
    ("answer", "kind", "what"),
    [
        (b"", "closed", "closed the connection at once: check the port, and how many may watch it"),
        (
            b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
            "unreadable",
            "speaks HTTP and not RTSP: check the port",
        ),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "unreadable", "does not speak RTSP: check the port"),
        (rtsp("410 Gone"), "refused", "was refused by the server: 410 Gone"),
        (rtsp("453 Not Enough Bandwidth"), "refused", "was refused by the server: 453 Not Enough Bandwidth"),
        (rtsp("503 Service Unavailable"), "refused", "was refused by the server: 503 Service Unavailable"),
        (
            rtsp("302 Moved", "Location: file:///etc/passwd"),
            "blocked",
            "leads on to a file: address, which is not followed",
        ),
        (
            rtsp("302 Moved", "Location: http://user:canary@127.0.0.1:1/x"),
            "blocked",
            "leads on to a http: address, which is not followed",
        ),
        (
            rtsp("302 Moved", "Location: rtsp://user:canary@127.0.0.1:1/x"),
            "refused",
            "leads on to 127.0.0.1:1, which refused the connection",
        ),
    ],
)
def test_a_server_that_gives_no_camera_says_why(answer, kind, what):
    with server(answer) as port:
        failed = failure(f"rtsp://user:canary@127.0.0.1:{port}/live")
    assert (failed.kind, failed.message.partition("/live ")[2]) == (kind, what)


@pytest.mark.parametrize("error", [TimeoutError(), av.error.ExitError(0, "Immediate exit requested")])
def test_what_libav_makes_of_an_answer_cut_off_by_the_time_out_is_no_reason(error):
    """As libav logged it of a server that redirects in circles: the address is the rest of one."""
    logged = [
        "Status 302: Redirecting to rtsp://127.0.0.1:35145/live\n",
        "Failed reading RTSP data: Immediate exit requested\n",
        "Protocol 's' not on whitelist 'rtsp,rtp,tcp'!\n",
    ]
    order = Order("rtsp", request("rtsp://127.0.0.1:35145/live"), 2.0, 1.5, 0)
    assert why.reason(order, error, logged) is None


def test_a_refusal_over_http_is_named_by_its_status():
    with server(b"HTTP/1.1 410 Gone\r\nContent-Length: 0\r\nConnection: close\r\n\r\n") as port:
        failed = failure(f"http://127.0.0.1:{port}/clip.mp4")
    assert failed.message.endswith("/clip.mp4 was refused by the server: 410 Gone")
