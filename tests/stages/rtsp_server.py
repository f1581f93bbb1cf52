"""Cameras for the tests, each a process: `python rtsp_server.py MODE [SECONDS [PORT]]` prints its port and serves.

camera    moving picture (H.264, 320x240, 25 fps) and a tone (L16, 16 kHz) over RTSP/TCP, sent in real time
cut       the same, but the connection is closed after SECONDS
stall     the same, but nothing more is sent after SECONDS; the connection stays open
burst     the same, but the first SECONDS come at once, as from a camera which sends its last group of pictures
drip      answers, then sends one byte per second
silent    accepts and says nothing
redirect  answers every request with 302 to itself
login     answers every request with 401
sha256    the same, and wants a Digest with SHA-256
no_tcp    refuses RTP over TCP with 461, and RTP over UDP too
garbage   answers with bytes which are no RTSP
novideo   the camera, but no pictures are sent after SECONDS of each connection
nosound   the same with the sound
refuses   the camera, but SETUP of its track number SECONDS is answered with 404
noise     the same, but what is sent as pictures then is noise
slow      the camera, with a picture every SECONDS only, each a keyframe, and its sound
gop       the camera, with a keyframe every SECONDS, the first one so long after the client has come
gst       GStreamer's server; needs gi, run it with /usr/bin/python3. Its arguments: see serve_with_gstreamer
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

FPS = 25
SOUND_RATE_HZ = 16_000
MAX_RTP_PAYLOAD = 1200
NUM_FRAMES = 50  # 2 s, repeated


def main() -> None:
    mode = sys.argv[1]
    if mode == "gst":
        serve_with_gstreamer(*sys.argv[2:])
        return
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 1e9
    is_camera = mode in ("camera", "cut", "stall", "burst", "novideo", "nosound", "noise", "slow", "gop", "refuses")
    num_frames = int(seconds * FPS) if mode == "gop" else NUM_FRAMES
    pictures = encode_pictures(num_frames) if is_camera else []
    if mode == "gop":
        pictures = pictures[1:] + pictures[:1]
    port = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    with socket.create_server(("127.0.0.1", port)) as server:
        print(server.getsockname()[1], flush=True)
        while True:
            connection, _ = server.accept()
            threading.Thread(target=serve, args=(connection, mode, seconds, pictures), daemon=True).start()


def serve(connection: socket.socket, mode: str, seconds: float, pictures: list[list[bytes]]) -> None:
    port = connection.getsockname()[1]
    with connection:
        try:
            for method, url, cseq in requests(connection):
                is_refused = mode == "refuses" and method == "SETUP" and url.endswith(f"track{seconds:.0f}")
                reply_to = reply(cseq, "", "404 Not Found") if is_refused else answer(mode, method, url, cseq, port)
                connection.sendall(reply_to)
                if method == "PLAY":
                    stream(connection, mode, seconds, pictures)
                    return
        except OSError:
            return  # the client has gone


def requests(connection: socket.socket) -> Iterator[tuple[str, str, str]]:
    """Method, URL and CSeq of each request, until the client closes."""
    pending = b""
    while part := connection.recv(65_536):
        pending += part
        while b"\r\n\r\n" in pending:
            head, _, pending = pending.partition(b"\r\n\r\n")
            first, *rest = head.decode().split("\r\n")
            fields = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in rest)}
            method, url, _ = first.split(" ", 2)
            yield method, url, fields.get("cseq", "0")


def answer(mode: str, method: str, url: str, cseq: str, port: int) -> bytes:
    if mode == "silent":
        time.sleep(1e6)
    if mode == "garbage":
        return b"\x00\xff" * 5000 + b"\r\n\r\n"
    if mode == "redirect":
        return reply(cseq, "", "302 Found", Location=f"rtsp://127.0.0.1:{port}/live")
    if mode == "login":
        return reply(cseq, "", "401 Unauthorized", WWW_Authenticate='Basic realm="camera"')
    if mode == "late_login" and method == "PLAY":
        return reply(cseq, "", "401 Unauthorized", WWW_Authenticate='Basic realm="camera"')
    if mode == "sha256":
        wants = 'Digest realm="camera", nonce="f00d", algorithm=SHA-256, qop="auth"'
        return reply(cseq, "", "401 Unauthorized", WWW_Authenticate=wants)
    if mode == "no_tcp" and method == "SETUP":
        return reply(cseq, "", "461 Unsupported Transport")
    if method == "OPTIONS":
        return reply(cseq, Public="OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN")
    if method == "DESCRIBE":
        return reply(cseq, sdp(), Content_Type="application/sdp", Content_Base=url + "/")
    if method == "SETUP":
        channel = 2 if url.endswith("track2") else 0
        return reply(cseq, Session="1", Transport=f"RTP/AVP/TCP;unicast;interleaved={channel}-{channel + 1}")
    return reply(cseq, Session="1")


def reply(cseq: str, body: str = "", status: str = "200 OK", **fields: str) -> bytes:
    lines = [f"RTSP/1.0 {status}", f"CSeq: {cseq}", f"Content-Length: {len(body)}"]
    lines += [f"{key.replace('_', '-')}: {value}" for key, value in fields.items()]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


def sdp() -> str:
    lines = ["v=0", "o=- 1 1 IN IP4 127.0.0.1", "s=camera", "t=0 0"]
    lines += ["m=video 0 RTP/AVP 96", "a=rtpmap:96 H264/90000", "a=fmtp:96 packetization-mode=1", "a=control:track1"]
    lines += ["m=audio 0 RTP/AVP 97", f"a=rtpmap:97 L16/{SOUND_RATE_HZ}/1", "a=control:track2"]
    return "\r\n".join(lines) + "\r\n"


def encode_pictures(num_frames: int) -> list[list[bytes]]:
    """A group of pictures, each a list of NAL units without start codes; the first one holds SPS and PPS."""
    import av
    import numpy as np

    encoder: Any = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = 320, 240, "yuv420p"
    encoder.time_base, encoder.framerate = Fraction(1, FPS), Fraction(FPS)
    group = f"keyint={num_frames}:min-keyint={num_frames}:scenecut=0:annexb=1:repeat-headers=1"
    encoder.options = {"tune": "zerolatency", "preset": "ultrafast", "g": str(num_frames), "x264-params": group}
    rows, columns = np.indices((240, 320))
    packets = []
    for index in range(num_frames):
        image = np.stack([rows % 256, (columns + 5 * index) % 256, np.full_like(rows, 4 * index % 250)], -1)
        packets += encoder.encode(av.VideoFrame.from_ndarray(image.astype(np.uint8), "rgb24"))
    packets += encoder.encode(None)
    return [split_nals(bytes(packet)) for packet in packets]


def split_nals(annex_b: bytes) -> list[bytes]:
    return [nal.rstrip(b"\0") for nal in annex_b.replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1") if nal]


def stream(connection: socket.socket, mode: str, seconds: float, pictures: list[list[bytes]]) -> None:
    """Send pictures and sound at the pace of FPS, from one thread."""
    if mode == "drip":
        while True:
            connection.sendall(b"$")
            time.sleep(1)
    start, sequence = time.monotonic(), [0, 0]
    ahead_s = seconds if mode == "burst" else 0.0
    for index in range(10**9):
        now_s = index / FPS
        if now_s >= seconds and mode == "cut":
            return
        if now_s >= seconds and mode == "stall":
            time.sleep(1e6)
        time.sleep(max(0.0, start + now_s - ahead_s - time.monotonic()))
        payloads = list(fragments(pictures[index % len(pictures)]))
        if mode == "slow":
            payloads = [] if index % int(seconds * FPS) else list(fragments(pictures[0]))
        is_over = now_s >= seconds
        for number, payload in enumerate([] if is_over and mode == "novideo" else payloads):
            last = number == len(payloads) - 1
            if is_over and mode == "noise":
                payload = payload[:1] + os.urandom(max(len(payload) - 1, 0))
            send_rtp(connection, 0, 96, sequence, index * 90_000 // FPS, payload, marker=last)
        if is_over and mode == "nosound":
            continue
        send_rtp(connection, 2, 97, sequence, index * SOUND_RATE_HZ // FPS, tone(index), marker=False)


def fragments(nals: list[bytes]) -> Iterator[bytes]:
    """RTP payloads of one picture: single NAL units, or FU-A fragments of large ones (RFC 6184)."""
    for nal in nals:
        if len(nal) <= MAX_RTP_PAYLOAD:
            yield nal
            continue
        indicator, header, body = nal[0] & 0xE0 | 28, nal[0] & 0x1F, nal[1:]
        for at in range(0, len(body), MAX_RTP_PAYLOAD):
            part = body[at : at + MAX_RTP_PAYLOAD]
            first, last = 0x80 * (at == 0), 0x40 * (at + len(part) == len(body))
            yield bytes([indicator, header | first | last]) + part


def tone(index: int) -> bytes:
    """The sound of one picture's time: a square wave of 500 Hz."""
    num_samples = SOUND_RATE_HZ // FPS
    return struct.pack(f">{num_samples}h", *(8000 if n // 16 % 2 else -8000 for n in range(num_samples)))


def send_rtp(
    connection: socket.socket, channel: int, kind: int, sequence: list[int], time: int, payload: bytes, *, marker: bool
) -> None:
    header = struct.pack(
        ">BBHII", 0x80, kind | 0x80 * marker, sequence[channel // 2] & 0xFFFF, time & 0xFFFFFFFF, channel
    )
    sequence[channel // 2] += 1
    connection.sendall(struct.pack(">cBH", b"$", channel, len(header) + len(payload)) + header + payload)


VIDEO = {
    "h264": "x264enc tune=zerolatency speed-preset=ultrafast key-int-max=25 ! rtph264pay name=pay0 pt=96",
    "h265": "x265enc tune=zerolatency speed-preset=ultrafast key-int-max=25 ! rtph265pay name=pay0 pt=96",
    "mjpeg": "jpegenc ! rtpjpegpay name=pay0 pt=26",
}
AUDIO = {
    "opus": "audio/x-raw,rate=48000 ! opusenc ! rtpopuspay name=pay1 pt=97",
    "aac": "audio/x-raw,rate=48000,channels=1 ! voaacenc ! aacparse ! rtpmp4gpay name=pay1 pt=97",
    "pcmu": "audio/x-raw,rate=8000,channels=1 ! mulawenc ! rtppcmupay name=pay1 pt=0",
    "pcma": "audio/x-raw,rate=8000,channels=1 ! alawenc ! rtppcmapay name=pay1 pt=8",
    "g726": "audio/x-raw,rate=8000,channels=1 ! avenc_g726 bitrate=32000 ! rtpg726pay name=pay1 pt=97",
    "l16": "audio/x-raw,rate=16000,channels=1 ! audioconvert ! rtpL16pay name=pay1 pt=97",
}


def serve_with_gstreamer(video: str = "h264", audio: str = "opus", transport: str = "any", login: str = "none") -> None:
    """/live in 640x480 and /sub in 320x240. transport: any, tcp, udp. login: none, basic, digest (user, canary)."""
    import gi  # type: ignore[import-not-found]

    gi.require_version("Gst", "1.0")
    gi.require_version("GstRtsp", "1.0")
    gi.require_version("GstRtspServer", "1.0")
    from gi.repository import GLib, Gst, GstRtsp, GstRtspServer  # type: ignore[import-not-found]

    Gst.init(None)
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service("0")
    for path, size in (("/live", "width=640,height=480"), ("/sub", "width=320,height=240")):
        factory = GstRtspServer.RTSPMediaFactory()
        factory.set_launch(
            f"( videotestsrc is-live=true ! video/x-raw,format=I420,{size},framerate=25/1 ! {VIDEO[video]} "
            f"audiotestsrc is-live=true ! audioconvert ! audioresample ! {AUDIO[audio]} )"
        )
        if transport != "any":
            lower = GstRtsp.RTSPLowerTrans
            factory.set_protocols(lower.UDP if transport == "udp" else lower.TCP)
        if login != "none":
            permissions = GstRtspServer.RTSPPermissions()
            permissions.add_permission_for_role("user", GstRtspServer.RTSP_PERM_MEDIA_FACTORY_ACCESS, True)
            permissions.add_permission_for_role("user", GstRtspServer.RTSP_PERM_MEDIA_FACTORY_CONSTRUCT, True)
            factory.set_permissions(permissions)
        server.get_mount_points().add_factory(path, factory)
    if login != "none":
        auth, token = GstRtspServer.RTSPAuth(), GstRtspServer.RTSPToken()
        token.set_string(GstRtspServer.RTSP_TOKEN_MEDIA_FACTORY_ROLE, "user")
        if login == "basic":
            auth.add_basic(GstRtspServer.RTSPAuth.make_basic("user", "canary"), token)
        else:
            auth.set_supported_methods(GstRtsp.RTSPAuthMethod.DIGEST)
            auth.add_digest("user", "canary", token)
        server.set_auth(auth)
    server.attach(None)
    print(server.get_bound_port(), flush=True)
    GLib.MainLoop().run()


if __name__ == "__main__":
    main()
