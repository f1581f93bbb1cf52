"""The gateway: one HTTP address at which a person, a probe and Prometheus see the whole pipeline.

Every actor process serves its own metrics on a port of its own. Prometheus finds these ports at `/sd/prometheus`;
`/metrics` shows them all at once to whoever has no Prometheus (a laptop, curl, the console). Both give the same series:
each carries `stage_process` and `replica` of its process, always, so that no series changes its name when a second
replica appears.
"""

import asyncio
import hmac
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from deploy.cameras.checks import Refused
from deploy.cameras.live_cameras import LiveCameras
from deploy.gateway.exposition import MergedExposition, Target, scrape
from graph.errors import GraphError
from graph.exporter import Exposition
from graph.host_header import is_own_host, is_same_origin
from graph.metrics import Metrics
from graph.secret import hide

EXPOSITION_TYPE = "text/plain; version=0.0.4; charset=utf-8"
CAMERAS = "/api/v1/cameras"
MAX_BODY_BYTES = 16 << 10  # a camera's description; an address with its credentials has some hundred bytes
BODY_TIMEOUT_S = 5.0


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
        Route(CAMERAS + "/{name:path}", desk.remove, methods=["DELETE"]),
        Route("/metrics", gateway.metrics),
        Route("/healthz", gateway.healthz),
        Route("/readyz", gateway.readyz),
        Route("/sd/prometheus", gateway.prometheus_targets),
        Route("/api/v1/ps", gateway.ps),
    ]
    return Starlette(routes=routes, middleware=[Middleware(_RefuseForeign), Middleware(_RefuseBodies)])


class _Gateway:
    """The endpoints; each is a GET without parameters."""

    def __init__(self, status: StatusSource, scrape_timeout_s: float) -> None:
        self._status = status
        self._scrape_timeout_s = scrape_timeout_s
        self._registry = CollectorRegistry()
        self._own_metrics = Metrics(self._registry)
        self._scrape: asyncio.Task[str] | None = None

    async def metrics(self, _: Request) -> Response:
        """Who asks while a scrape is under way gets its page: a crowd costs no more than one."""
        if self._scrape is None:
            self._scrape = asyncio.create_task(self._merged())
            self._scrape.add_done_callback(self._scraped)
        return Response(await asyncio.shield(self._scrape), media_type=EXPOSITION_TYPE)

    def _scraped(self, _: asyncio.Task[str]) -> None:
        self._scrape = None

    async def _merged(self) -> str:
        targets = _one_per_identity(self._status.targets())
        pages = await asyncio.gather(*(scrape(target, self._scrape_timeout_s) for target in targets))
        merged = MergedExposition()
        for target, page in zip(targets, pages, strict=True):
            failures = self._own_metrics.counter("omni_scrape_failures_total", target.name)
            if page is None or not merged.add(page, target.labels):
                failures.inc()
        merged.add(generate_latest(Exposition(self._registry)).decode(), {"replica": "0", "stage_process": "gateway"})
        return merged.text()

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
        """{"name", "source", …} as in `cameras:` to 201 {"name", "source", "warnings"}.

        {"name": "porch/back", "source"} adds a view to a camera that is watched.
        """
        if (refused := self._refused(request)) is not None:
            return refused
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                config = json.loads(await request.body())
            name = config.pop("name")
            if not isinstance(name, str):
                raise TypeError
        except TimeoutError:
            return _error(408, "the request has no end")
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError, ClientDisconnect):
            return _error(400, 'expected JSON like {"name": "yard", "source": "rtsp://10.0.0.7/live"}')
        return await _answered(201, lambda: asdict(self._there().add(name, config)))

    async def remove(self, request: Request) -> Response:
        """To 202: the session runs to its end by itself, and a view to that of its window."""
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


class _RefuseForeign:
    """Answers 421 to who asks for another host, and 403 to a change that another page's script wants.

    A name which a foreign page lets point here would otherwise read everything through its visitor's browser.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, (address, _) = Headers(scope=scope), scope.get("server") or ("", None)
        host, origin = headers.get("host"), headers.get("origin")
        if not is_own_host(host, address):
            await _error(421, f"this is {address}; ask for it by that address, or as localhost")(scope, receive, send)
        elif scope["method"] not in ("GET", "HEAD") and origin is not None and not is_same_origin(origin, host):
            await _error(403, "a page of another origin changes nothing here")(scope, receive, send)
        else:
            await self._app(scope, receive, send)


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
            problem = f"at most {most} bytes are taken here" if most else "no body is taken here"
            await _error(413, problem)(scope, receive, send)
