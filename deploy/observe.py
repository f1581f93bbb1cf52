"""The gateway: one HTTP address at which a person, a probe and Prometheus see the whole pipeline.

Every actor process serves its own metrics on a port of its own. Prometheus finds these ports at `/sd/prometheus`;
`/metrics` shows them all at once to whoever has no Prometheus (a laptop, curl, the console). Both give the same series:
each carries `stage_process` and `replica` of its process, always, so that no series changes its name when a second
replica appears.
"""

import asyncio
import errno
import hmac
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from http.client import HTTPException, parse_headers
from io import BytesIO
from typing import Protocol

import uvicorn
from prometheus_client import CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from deploy.live_cameras import LiveCameras, Refused
from graph.errors import GraphError
from graph.metrics import Exposition, Metrics
from graph.secret import hide

EXPOSITION_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# 16 cameras and 10 edges in one process export 70 kB; whoever sends this much is none of our exporters.
MAX_EXPOSITION_BYTES = 8 << 20
# Prometheus, a console and some probes: each waits for at most one scrape. More get 503 at once.
MAX_CONNECTIONS = 64
CAMERAS = "/api/v1/cameras"
MAX_BODY_BYTES = 16 << 10  # a camera's description; an address with its credentials has some hundred bytes
BODY_TIMEOUT_S = 5.0


class GatewayError(GraphError):
    """The gateway cannot serve; the message says what to change."""


class ScrapeError(Exception):
    """What an actor answered is no exposition."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a process exports its metrics. `process` and `replica` together name it, also after a restart."""

    host: str
    port: int
    stage: str
    replica: int
    process: str

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def name(self) -> str:
        return f"{self.process}/{self.replica}"

    @property
    def labels(self) -> dict[str, str]:
        """What tells the series of this process from those of its neighbours."""
        return {"replica": str(self.replica), "stage_process": self.process}


class StatusSource(Protocol):
    """What the gateway shows. It asks from its own thread; every answer comes from memory, without waiting."""

    def targets(self) -> Sequence[Target]:
        """The processes that export metrics now."""

    def alive(self) -> bool:
        """False when only a restart helps."""

    def ready(self) -> tuple[bool, list[str]]:
        """Whether chunks flow through every stage; if not, why."""

    def snapshot(self) -> Mapping[str, object]:
        """What `pipeline ps` prints: JSON values only."""


def build_gateway(
    status: StatusSource, cameras: LiveCameras | None = None, token: str = "", scrape_timeout_s: float = 0.5
) -> Starlette:
    """The gateway as an ASGI application. No process delays `/metrics` by more than scrape_timeout_s.

    cameras: None: none can be added or removed. token: who changes something has to send it; `pipeline` reads it in
    the state folder, which is its user's alone.
    """
    gateway = _Gateway(status, scrape_timeout_s)
    desk = _CameraDesk(cameras, token)
    routes = [
        Route(CAMERAS, desk.add, methods=["POST"]),
        Route(CAMERAS + "/{name}", desk.remove, methods=["DELETE"]),
        Route("/metrics", gateway.metrics),
        Route("/healthz", gateway.healthz),
        Route("/readyz", gateway.readyz),
        Route("/sd/prometheus", gateway.prometheus_targets),
        Route("/api/v1/ps", gateway.ps),
    ]
    return Starlette(routes=routes, middleware=[Middleware(_RefuseBodies)])


class _Gateway:
    """The endpoints; each is a GET without parameters."""

    def __init__(self, status: StatusSource, scrape_timeout_s: float) -> None:
        self._status = status
        self._scrape_timeout_s = scrape_timeout_s
        self._registry = CollectorRegistry()
        self._own_metrics = Metrics(self._registry)

    async def metrics(self, _: Request) -> Response:
        targets = _one_per_identity(self._status.targets())
        pages = await asyncio.gather(*(_scrape(target, self._scrape_timeout_s) for target in targets))
        merged = MergedExposition()
        for target, page in zip(targets, pages, strict=True):
            failures = self._own_metrics.counter("omni_scrape_failures_total", target.name)
            if page is None or not merged.add(page, target.labels):
                failures.inc()
        merged.add(generate_latest(Exposition(self._registry)).decode(), {"replica": "0", "stage_process": "gateway"})
        return Response(merged.text(), media_type=EXPOSITION_TYPE)

    async def healthz(self, _: Request) -> Response:
        alive = self._status.alive()
        return JSONResponse({"alive": alive}, 200 if alive else 503)

    async def readyz(self, _: Request) -> Response:
        ready, reasons = self._status.ready()
        return JSONResponse({"ready": ready, "reasons": reasons}, 200 if ready else 503)

    async def prometheus_targets(self, _: Request) -> Response:
        targets = _one_per_identity(self._status.targets())
        return JSONResponse([_discovered(target) for target in targets])

    async def ps(self, _: Request) -> Response:
        return JSONResponse(_without_secrets(self._status.snapshot()))


class _CameraDesk:
    """POST and DELETE of cameras. Errors are {"error": …}, with Retry-After where it helps to come again."""

    def __init__(self, cameras: LiveCameras | None, token: str) -> None:
        self._cameras = cameras
        self._token = token

    async def add(self, request: Request) -> Response:
        """{"name", "source", …} as in `cameras:` to 201 {"name", "source", "warnings"}."""
        if (refused := self._refused(request)) is not None:
            return refused
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                wanted = json.loads(await request.body())
            name = wanted.pop("name")
            if not isinstance(name, str):
                raise TypeError
        except TimeoutError:
            return _error(408, "the request has no end")
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError, ClientDisconnect):
            return _error(400, 'expected JSON like {"name": "yard", "source": "rtsp://10.0.0.7/live"}')
        return await _answered(201, lambda: asdict(self._there().add(name, wanted)))

    async def remove(self, request: Request) -> Response:
        """To 202: the session runs to its end by itself."""
        name = request.path_params["name"]

        def remove() -> dict[str, object]:
            self._there().remove(name)
            return {"name": name}

        return self._refused(request) or await _answered(202, remove)

    def _there(self) -> LiveCameras:
        assert self._cameras is not None, "refused before"
        return self._cameras

    def _refused(self, request: Request) -> Response | None:
        if self._cameras is None:
            return _error(404, "no cameras can be added here")
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        is_known = bool(self._token) and hmac.compare_digest(token.encode(), self._token.encode())
        if scheme.lower() != "bearer" or not is_known:
            answer = _error(401, "send the token of the state folder's running.json: Authorization: Bearer …")
            answer.headers["WWW-Authenticate"] = "Bearer"
            return answer
        return None


async def _answered(status: int, do: Callable[[], dict[str, object]]) -> Response:
    try:
        return _json(await run_in_threadpool(do), status)
    except Refused as error:
        answer = _error(error.status, str(error))
        if error.retry_after_s is not None:
            answer.headers["Retry-After"] = str(error.retry_after_s)
        return answer
    except GraphError as error:
        return _error(500, str(error))


def _error(status: int, message: str) -> Response:
    return _json({"error": hide(message)}, status)


def _without_secrets(value: object) -> object:
    """JSON values, the texts among them without the secrets that this process knows."""
    if isinstance(value, Mapping):
        return {key: _without_secrets(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_secrets(part) for part in value]
    return hide(value) if isinstance(value, str) else value


def _json(value: object, status: int) -> Response:
    """In ASCII: a name may hold what UTF-8 can't."""
    return Response(json.dumps(value), status, media_type="application/json")


def _one_per_identity(targets: Sequence[Target]) -> list[Target]:
    """The newest of each name: while a process is replaced, the table may show the old one, too."""
    return list({target.name: target for target in targets}.values())


def _discovered(target: Target) -> dict[str, object]:
    # `stage` is a label of our metrics; as a target's label it would rename theirs, so that it goes as meta data.
    return {"targets": [target.address], "labels": {**target.labels, "__meta_omni_stage": target.stage}}


class _RefuseBodies:
    """Answers 413 to a request that announces a body, before a byte of it is read; a camera may be described in one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        length, most = headers.get("content-length", "0"), MAX_BODY_BYTES if scope.get("path") == CAMERAS else 0
        if length.isdecimal() and int(length) <= most and "transfer-encoding" not in headers:
            await self._app(scope, receive, send)
        else:
            told = f"at most {most} bytes are taken here" if most else "no body is taken here"
            await _error(413, told)(scope, receive, send)


async def _scrape(target: Target, timeout_s: float) -> str | None:
    """The exposition of one process, or None when it doesn't give a whole one within timeout_s."""
    try:
        async with asyncio.timeout(timeout_s):
            return await _fetch(target)
    except (OSError, ScrapeError):  # TimeoutError is an OSError
        return None


async def _fetch(target: Target) -> str:
    reader, writer = await asyncio.open_connection(target.host, target.port)
    try:
        writer.write(f"GET /metrics HTTP/1.0\r\nHost: {target.address}\r\n\r\n".encode())
        answer = bytearray()
        while block := await reader.read(1 << 16):
            answer += block
            if len(answer) > MAX_EXPOSITION_BYTES:
                raise ScrapeError(f"{target.address} sends more than {MAX_EXPOSITION_BYTES} bytes")
    finally:
        writer.close()
    return _body(bytes(answer), target)


def _body(answer: bytes, target: Target) -> str:
    """The text of a complete HTTP/1.0 answer. A truncated one is refused: its last number may lack digits."""
    status, _, rest = answer.partition(b"\r\n")
    head, _, body = rest.partition(b"\r\n\r\n")
    if not re.fullmatch(rb"HTTP/1\.[01] 200 .*", status):
        raise ScrapeError(f"{target.address} answers {status[:80]!r}")
    try:
        declared = parse_headers(BytesIO(head + b"\r\n\r\n")).get("Content-Length")
        text = body.decode()
    except (HTTPException, UnicodeDecodeError) as error:
        raise ScrapeError(f"{target.address} sends no text: {error}") from error
    if declared != str(len(body)):
        raise ScrapeError(f"{target.address} promised {declared} bytes and sent {len(body)}")
    return text


_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
_SAMPLE = re.compile(rf"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{{({_LABEL}(?:,{_LABEL})*),?\}})? (\S+)")
_VALUE = re.compile(r"[-+]?(?:Inf|NaN|(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")
_COMMENT = re.compile(r"# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*) (.*)")
_SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("", "_sum", "_count")}


@dataclass(slots=True)
class _Family:
    kind: str
    help: str
    lines: list[str] = field(default_factory=list)


class MergedExposition:
    """The expositions of many processes as one: each family once, each series with the labels of its process.

    Works on lines: the series of 16 cameras and 10 edges (1 270) cost 14 ms as the client's objects, 2.4 ms here.
    """

    def __init__(self) -> None:
        self._families: dict[str, _Family] = {}

    def add(self, page: str, labels: Mapping[str, str]) -> bool:
        """Take over the series of one process. False, and nothing taken, when `page` is no exposition.

        labels must not occur in the page.
        """
        try:
            families = _parse(page, labels)
        except ScrapeError:
            return False
        if any(name in self._families and self._families[name].kind != new.kind for name, new in families.items()):
            return False
        for name, family in families.items():
            self._families.setdefault(name, _Family(family.kind, family.help)).lines.extend(family.lines)
        return True

    def text(self) -> str:
        """The merged exposition, families in order of name."""
        blocks = []
        for name, family in sorted(self._families.items()):
            blocks += [f"# HELP {name} {family.help}", f"# TYPE {name} {family.kind}", *family.lines]
        return "".join(f"{line}\n" for line in blocks)


def _parse(page: str, labels: Mapping[str, str]) -> dict[str, _Family]:
    """The families of an exposition, `labels` in front of each series' own. ScrapeError for any other line."""
    families: dict[str, _Family] = {}
    help_of: dict[str, str] = {}
    extra = ",".join(f'{name}="{_escape(value)}"' for name, value in labels.items())
    names: tuple[str, ...] = ()  # what a sample of the current family may be called
    lines: list[str] = []
    for line in page.split("\n"):
        if sample := _SAMPLE.fullmatch(line):
            name, own, value = sample.groups()
            if name not in names or not _VALUE.fullmatch(value):
                raise ScrapeError(f"no sample of {names}: {line[:200]}")
            lines.append(f"{name}{{{extra},{own}}} {value}" if own else f"{name}{{{extra}}} {value}")
        elif comment := _COMMENT.fullmatch(line):
            keyword, name, text = comment.groups()
            if keyword == "HELP":
                help_of[name] = text
                continue
            family = families.setdefault(name, _Family(text, help_of.get(name, "")))
            names, lines = tuple(name + suffix for suffix in _SUFFIXES.get(text, ("",))), family.lines
        elif line:
            raise ScrapeError(f"no line of an exposition: {line[:200]}")
    return families


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class GatewayServer:
    """Serves an ASGI application on one address, from a thread of its own, from `start` until `stop`, once."""

    def __init__(self, app: ASGIApp, host: str = "127.0.0.1", port: int = 8600) -> None:
        self.host = host
        self.port = port
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,  # logging belongs to the program, not to its server
                access_log=False,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_keep_alive=5,
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
