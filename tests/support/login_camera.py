"""A camera that asks for a login and keeps what it was given; nobody gets in."""

from __future__ import annotations

import base64
import socket
import threading
from types import TracebackType
from typing import Self


class LoginCamera:
    """RTSP on a free port of the loopback, with Basic authentication. logins: `user:password`, as they arrived."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.port: int = self._server.getsockname()[1]
        self.logins: list[str] = []
        self.urls: list[str] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, of_type: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._server.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:  # closed
                return
            with connection, connection.makefile("rb") as lines:
                while head := self._read_head(lines.readline):
                    self._answer(connection, head)

    def _read_head(self, readline: object) -> dict[str, str]:
        assert callable(readline)
        fields: dict[str, str] = {}
        while (line := readline().decode().rstrip("\r\n")) or not fields:
            if not line:
                return {}
            key, _, value = line.partition(": ") if fields else ("request", "", line)
            fields[key.lower()] = value
        return fields

    def _answer(self, connection: socket.socket, head: dict[str, str]) -> None:
        url = head["request"].split(" ")[1]
        if url != f"rtsp://127.0.0.1:{self.port}/":  # that asks, without any login, which kinds there are
            self.urls.append(url)
        if "authorization" in head:
            self.logins.append(base64.b64decode(head["authorization"].removeprefix("Basic ")).decode())
        lines = ["RTSP/1.0 401 Unauthorized", f"CSeq: {head['cseq']}", 'WWW-Authenticate: Basic realm="camera"']
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
