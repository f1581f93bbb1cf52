"""`pipeline up -d`: the same run in a process of its own. `python -P -m deploy.cli.background` is that process.

Rule: what the command line says is taken apart once. Its values travel, over stdin: they may look like options, and a
process's arguments are everybody's to read.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from deploy.cli.common import EXIT_RUNTIME, clear_errors, described_in, fail
from deploy.process.children import environment_for_children, python
from deploy.process.interrupts import Interrupted, Interrupts
from deploy.process.masked_output import mask_stderr
from deploy.process.terminal import prepare_standard_files, tell

if TYPE_CHECKING:
    from deploy.cli.up import UpArguments

POLL_S = 0.2
ENDED_S = 15.0  # from SIGTERM on it takes 10 s at most


def run_in_background(arguments: UpArguments) -> None:
    """Start it, and wait until it runs or has failed; then what it said is said here, too. Raises typer.Exit."""
    from deploy.run.state import StateFolder

    state = StateFolder(Path.cwd())
    if (other := state.read()) is not None:
        fail(f"a pipeline of this folder is running already (pid {other.pid}); `pipeline down` stops it", EXIT_RUNTIME)
    with clear_errors():
        with state.hold():
            state.create()
        with (state.logs / "up.log").open("w+b") as log, Interrupts():
            process = _start(arguments, log)
            try:
                is_ready = _wait_until_ready(process, state)
            except Interrupted:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(ENDED_S)
                raise
            if is_ready:
                described_in(None if arguments.file is None else Path(arguments.file))  # for what it says
            else:
                log.seek(0)
                sys.stderr.write(log.read().decode(errors="replace"))
                _exit_as(process)


def _start(arguments: UpArguments, log: Any) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        python("deploy.cli.background"),
        env=environment_for_children(os.environ),
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        process.stdin.write(encode(arguments))
        process.stdin.close()
    except BrokenPipeError:
        pass  # it died at birth, and its log says why
    return process


def _wait_until_ready(process: subprocess.Popen[bytes], state: Any) -> bool:
    """False when it has ended instead."""
    from deploy.cli.running import is_ready
    from deploy.run.state import StateError

    while process.poll() is None:
        running = None
        with contextlib.suppress(StateError):  # it is busy
            running = state.read()
        if running is not None and running.pid == process.pid and is_ready(running.url):
            tell(f"running in the background (pid {running.pid}), {running.url}; pipeline ps | logs | down")
            return True
        time.sleep(POLL_S)
    return False


def _exit_as(process: subprocess.Popen[bytes]) -> None:
    if process.returncode < 0:
        fail(f"the pipeline was killed by signal {-process.returncode} while it started", EXIT_RUNTIME)
    raise typer.Exit(process.returncode)


def encode(arguments: UpArguments) -> bytes:
    """In ASCII: a path may hold what UTF-8 can't."""
    return json.dumps(asdict(arguments)).encode()


def decode(text: bytes) -> UpArguments:
    from deploy.cli.up import UpArguments

    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(text).items()
    }
    return UpArguments(**values)


def main() -> None:
    """The process in the background: what to run comes over stdin, which nobody needs after that."""
    from deploy.cli.up import run_in_foreground

    prepare_standard_files()
    text = sys.stdin.buffer.read()
    mask_stderr([text.decode()])
    arguments = decode(text)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        run_in_foreground(arguments)
    except typer.Exit as end:
        sys.exit(end.exit_code)


if __name__ == "__main__":
    main()
