"""Cameras for benchmarks: `python -m deploy.evaluate.rtsp_cameras FILM` prints its port, and plays it to whoever comes.

RTSP over TCP on 127.0.0.1, H.264 without sound, each connection from the film's beginning and in real time, until the
film is over. The path says how well: /good, /noise (from the second second on its pictures are noise), /hang (nothing
comes after PLAY), /cut (closed after a second).
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import av

MAX_RTP_PAYLOAD: Final = 1200
CLOCK_HZ: Final = 90_000
TURN_S: Final = 0.01  # between two looks at who is to be sent something
MAX_UNREAD_BYTES: Final = 4 << 20  # of a client that does not read
WELL_S: Final = 1.0  # so long a camera does well before it cuts off or gives noise
SDP: Final = (
    "v=0\r\no=- 1 1 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\nm=video 0 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\n"
    "a=fmtp:96 packetization-mode=1\r\na=control:track1\r\n"
)


@dataclass(frozen=True, slots=True)
class Picture:
    """When it is sent, in seconds after the film's beginning, and its RTP packets with their interleaved headers."""

    at_s: float
    data: bytes
    noise: bytes


def pictures_of(film: Path) -> list[Picture]:
    """The film as it goes over the wire."""
    pictures, sequence = [], 0
    with av.open(str(film)) as container:
        stream = container.streams.video[0]
        annex_b: Any = av.BitStreamFilterContext("h264_mp4toannexb", stream)
        for packet in container.demux(stream):
            for filtered in annex_b.filter(packet if packet.size else None):
                at = Fraction(filtered.pts) * filtered.time_base
                payloads = list(_payloads(bytes(filtered)))
                data = b"".join(_rtp(sequence, at, payloads))
                pictures.append(Picture(float(at), data, b"".join(_rtp(sequence, at, list(_spoiled(payloads))))))
                sequence += len(payloads)
    return pictures


def _payloads(annex_b: bytes) -> Iterator[bytes]:
    """RTP payloads of one picture: single NAL units, or FU-A fragments of large ones (RFC 6184)."""
    for nal in (nal.rstrip(b"\0") for nal in annex_b.replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1") if nal):
        if len(nal) <= MAX_RTP_PAYLOAD:
            yield nal
            continue
        indicator, header, body = nal[0] & 0xE0 | 28, nal[0] & 0x1F, nal[1:]
        for at in range(0, len(body), MAX_RTP_PAYLOAD):
            part = body[at : at + MAX_RTP_PAYLOAD]
            first, last = 0x80 * (at == 0), 0x40 * (at + len(part) == len(body))
            yield bytes([indicator, header | first | last]) + part


def _spoiled(payloads: list[bytes]) -> Iterator[bytes]:
    for payload in payloads:
        yield payload[:2] + os.urandom(max(len(payload) - 2, 0))


def _rtp(sequence: int, at: Fraction, payloads: list[bytes]) -> Iterator[bytes]:
    stamp = int(at * CLOCK_HZ) & 0xFFFFFFFF
    for number, payload in enumerate(payloads):
        marker = 0x80 * (number == len(payloads) - 1)
        header = bytes([0x80, 96 | marker]) + ((sequence + number) & 0xFFFF).to_bytes(2)
        packet = header + stamp.to_bytes(4) + (1).to_bytes(4) + payload
        yield b"$\0" + len(packet).to_bytes(2) + packet


@dataclass(slots=True, eq=False)
class Client:
    """Somebody who watches. path: how well it is served."""

    path: str
    writer: asyncio.StreamWriter
    since_s: float = field(default_factory=time.monotonic)
    num_sent: int = 0

    def send_due(self, pictures: list[Picture], now_s: float) -> bool:
        """What is due by now; False when the connection is over."""
        elapsed_s = now_s - self.since_s
        is_over = self.num_sent == len(pictures) or (self.path == "/cut" and elapsed_s > WELL_S)
        unread = self.writer.transport.get_write_buffer_size()
        if is_over or self.writer.is_closing() or unread > MAX_UNREAD_BYTES:
            self.writer.close()
            return False
        while self.path != "/hang" and self.num_sent < len(pictures) and pictures[self.num_sent].at_s <= elapsed_s:
            picture = pictures[self.num_sent]
            self.writer.write(picture.noise if self.path == "/noise" and picture.at_s > WELL_S else picture.data)
            self.num_sent += 1
        return True


class Server:
    """All cameras."""

    def __init__(self, film: Path) -> None:
        self._pictures = pictures_of(film)
        self._clients: set[Client] = set()

    async def run(self) -> None:
        server = await asyncio.start_server(self._meet, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        while True:
            now_s = time.monotonic()
            self._clients = {client for client in self._clients if client.send_due(self._pictures, now_s)}
            await asyncio.sleep(TURN_S)

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer until PLAY."""
        path = ""
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                method, url, _ = head.split("\r\n")[0].split(" ")
                path = path or "/" + url.split("/")[3]
                cseq = next(line for line in head.split("\r\n") if line.lower().startswith("cseq:"))
                writer.write(_answer(method, url, cseq))
                if method == "PLAY":
                    self._clients.add(Client(path, writer))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


def _answer(method: str, url: str, cseq: str) -> bytes:
    fields = {
        "OPTIONS": "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n",
        "DESCRIBE": f"Content-Type: application/sdp\r\nContent-Base: {url}/\r\n",
        "SETUP": "Session: 1\r\nTransport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n",
    }
    body, session = SDP if method == "DESCRIBE" else "", "Session: 1\r\n"
    head = f"RTSP/1.0 200 OK\r\n{cseq}\r\nContent-Length: {len(body)}\r\n{fields.get(method, session)}\r\n"
    return (head + body).encode()


if __name__ == "__main__":
    asyncio.run(Server(Path(sys.argv[1])).run())
