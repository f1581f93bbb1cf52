"""Commands for the pipeline that runs in this folder: down, ps, logs, camera add and remove."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.cli.common import EXIT_RUNTIME, EXIT_USAGE, Json, clear_errors, fail, table, usage
from deploy.process.terminal import tell

if TYPE_CHECKING:
    from deploy.run.state import Running

NOTHING_RUNS = "no pipeline of this folder is running; `pipeline up -d` starts one"

camera = typer.Typer(no_args_is_help=True, help="Add cameras to the running pipeline, and remove them.")


@clear_errors()
def down(timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for the end.")] = 20.0) -> None:
    """Stop the pipeline of this folder, running or starting, and wait until everything of it is gone; of one that was
    killed, end what it has left."""
    import contextlib
    import os
    import signal
    import time

    from deploy.run.leftovers import end_left
    from deploy.run.state import StateFolder

    state = StateFolder(Path.cwd())
    if (pid := state.holder()) is None:
        if num_left := end_left(state):
            tell(f"ended what a killed pipeline of this folder had left (processes of Ray: {num_left})")
            return
        fail(NOTHING_RUNS, EXIT_RUNTIME)
    if pid == 0:
        fail("the pipeline of this folder runs in another container; stop it there", EXIT_RUNTIME)
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, signal.SIGTERM)
    deadline_s = time.monotonic() + timeout
    while state.holder() == pid:
        if not time.monotonic() <= deadline_s:
            fail(f"pid {pid} has not ended within {timeout:g} s; `pipeline logs` may say why", EXIT_RUNTIME)
        time.sleep(0.1)
    tell("stopped")


@clear_errors()
def ps(as_json: Json = False) -> None:
    """Show stages, sessions and edges of the running pipeline. Control chunks are not counted: an edge of playback
    stands at 0 though its acks flow.

    --json: {model, ready, uptime_s, stages, sessions, edges}.
    """
    import json
    from http.client import HTTPException

    running = _running()
    try:
        with _directly(f"{running.url}/api/v1/ps", timeout_s=5) as answer:
            status = json.load(answer)
    except (OSError, HTTPException, ValueError) as error:
        fail(f"{running.url} does not answer: {error}", EXIT_RUNTIME)
    if as_json:
        print(json.dumps(status, indent=2))
        return
    trained = "" if status["trained"] else "  (UNTRAINED)"
    print(f"model {status['model']}{trained}  up {status['uptime_s']:.0f} s  {status['problem'] or 'ready'}")
    table(
        status["stages"],
        ("stage", "replica", "state", "process", "pid", "node", "sessions", "units", "waiting", "runs_with"),
    )
    for busy in dict.fromkeys(row["busy"] for row in status["stages"] if row["busy"]):
        print(busy)
    table(status["sessions"], ("session", "state", "windows", "late", "source"))
    views = [
        {**view, "view": f"{row['session']}/{view['view']}"} for row in status["sessions"] for view in row["views"]
    ]
    if views:
        table(views, ("view", "state", "lost", "source"))
    table(
        [{"edge": edge, **row, "dropped": sum(row["dropped"].values())} for edge, row in status["edges"].items()],
        ("edge", "accepted", "delivered", "dropped", "in_flight"),
    )


@camera.command("add")
@clear_errors()
def camera_add(
    what: Annotated[str, typer.Argument(metavar="NAME=SOURCE", help="Like yard=rtsp://10.0.0.7/live.")],
    fps: Annotated[float | None, typer.Option("--fps", help="Pictures per second (default: 1).")] = None,
    microphone: Annotated[
        str | None, typer.Option("--microphone", metavar="embedded|none", help="The sound in the source, or none.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Watch another camera; the others are not disturbed. Refused at once where there is no room for it.

    porch/back=… adds a view to camera porch, from the next window on.

    --json: {name, source, warnings}.
    """
    import json
    import os

    from deploy.cameras.sources import parse_cameras
    from graph.reference import resolve
    from graph.secret import Secret

    with usage():
        ((name, written),) = parse_cameras([what], option="").items()
        resolved = resolve(written, os.environ)
    source = resolved if isinstance(resolved, Secret) else Secret(resolved)
    given = {"source": source.reveal(), "masked_source": source.masked, "fps": fps, "microphone": microphone}
    fields = {"name": name, **given}
    body = {key: value for key, value in fields.items() if value is not None}
    added = _ask_gateway("POST", "/api/v1/cameras", body)
    if as_json:
        print(json.dumps(added, indent=2))
        return
    for warning in added["warnings"]:
        tell(warning)
    tell(f"camera {name}: added")


@camera.command("remove")
@clear_errors()
def camera_remove(name: Annotated[str, typer.Argument(help="As `pipeline ps` shows it.")]) -> None:
    """End a camera's session: what it saw and heard is gone through to the end, and said.

    porch/back takes that view from camera porch, and no more.
    """
    from urllib.parse import quote

    _ask_gateway("DELETE", f"/api/v1/cameras/{quote(name, safe='', errors='surrogateescape')}")
    tell(f"camera {name}: removed")


def _ask_gateway(method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Ask the pipeline of this folder to change something; what it refuses is the end."""
    import json
    import urllib.error
    import urllib.request

    running = _running()
    request = urllib.request.Request(
        running.url + path,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {running.token}", "Content-Type": "application/json"},
        method=method,
    )
    try:
        with _directly(request, timeout_s=180) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        message = _error_in(error.read()) or f"{running.url} answers {error.code} to {method} {path}"
        if (retry_after_s := error.headers.get("Retry-After")) is not None:
            message += f"; try again in {retry_after_s} s"
        return fail(message, EXIT_USAGE if error.code in (400, 404, 409, 422) else EXIT_RUNTIME)
    except OSError as error:
        return fail(f"{running.url} does not answer: {error}", EXIT_RUNTIME)


def _error_in(answer: bytes) -> str:
    """What an answer says of its error; "" when it is none of ours."""
    import json

    try:
        return str(json.loads(answer)["error"])
    except (ValueError, KeyError, TypeError):
        return ""


def _directly(request: Any, timeout_s: float) -> Any:
    """Ask our own gateway, through no proxy: it may not know the address, and shall know no token."""
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(request, timeout=timeout_s)


@clear_errors()
def logs(
    process: Annotated[str | None, typer.Argument(help="Only this process, like llm.0 or up.")] = None,
    tail: Annotated[int, typer.Option("--tail", min=0, help="Lines per process.")] = 50,
) -> None:
    """Print the logs of this folder's pipeline, running or not."""
    from collections import deque

    from deploy.run.state import StateFolder

    paths = {path.stem: path for path in sorted(StateFolder(Path.cwd()).logs_of_last_run.glob("*.log"))}
    if not paths:
        fail("no logs here; `pipeline up` makes them", EXIT_RUNTIME)
    if process is not None and process not in paths:
        fail(f"no logs here of {process!r}; there are: {', '.join(paths)}", EXIT_RUNTIME)
    for name in paths if process is None else [process]:
        with paths[name].open(encoding="utf-8", errors="replace") as file:
            for line in deque(file, maxlen=tail):
                print(f"{name:<18} {line.rstrip()}")


def is_ready(url: str) -> bool:
    from http.client import HTTPException

    try:
        with _directly(f"{url}/readyz", timeout_s=2) as answer:
            return bool(answer.status == 200)
    except (OSError, HTTPException):
        return False


def _running() -> Running:
    """What runs in this folder, or the end."""
    from deploy.run.leftovers import left_running
    from deploy.run.state import StateFolder

    state = StateFolder(Path.cwd())
    running = state.read()
    if running is None:
        left = "; a killed one has left processes of Ray, which `pipeline down` ends" if left_running(state) else ""
        fail(NOTHING_RUNS + left, EXIT_RUNTIME)
    return running
