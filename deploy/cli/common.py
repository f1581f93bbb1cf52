"""What the commands share: options, exit codes, and how a mistake is said."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from deploy.process.interrupts import Interrupted
from deploy.process.terminal import tell

if TYPE_CHECKING:
    from graph.spec import PipelineSpec

EXIT_OK, EXIT_RUNTIME, EXIT_USAGE, EXIT_VIOLATED, EXIT_DEPENDENCY, EXIT_INTERRUPTED = 0, 1, 2, 3, 4, 130

File = Annotated[
    Path | None,
    typer.Option(
        "-f",
        "--file",
        help="The pipeline's description (default: pipeline.yaml here, else the shipped one).",
    ),
]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a value of the description.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def load(file: Path | None, overrides: list[str]) -> PipelineSpec:
    from graph.spec import load_spec
    from stages.catalog import StageCatalog

    path = described_in(file)
    with stdout_to_stderr():
        return load_spec(path, StageCatalog(path.parent), overrides)


def described_in(file: Path | None) -> Path:
    """The description's file; that there is none in this folder, and the shipped one is used, is said."""
    from graph.spec import SPEC_FILE, default_spec_path

    path = file or default_spec_path()
    if file is None and path != SPEC_FILE:
        tell(f"there is no {SPEC_FILE} in this folder: the description that is shipped is used")
    return path


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """What the user's modules print while they are imported goes to stderr: stdout is for data."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "wb") as stdout, redirect_stdout(sys.stderr):
        os.dup2(2, 1)
        try:
            yield
        finally:
            os.dup2(stdout.fileno(), 1)


def table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """Aligned columns; plain text, so that it can be piped."""
    cells = [[name.upper() for name in columns]]
    cells += [
        [f"{row[n]:,}" if isinstance(row[n], int) and n in ("parameters", "bytes") else str(row[n]) for n in columns]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print()


def check_folder() -> None:
    """A pipeline belongs to the folder that it is started in: end with exit code 1 where that has been removed."""
    try:
        Path.cwd()
    except FileNotFoundError:
        tell("pipeline: the folder that this was started in has been removed: change to one that is there")
        sys.exit(EXIT_RUNTIME)


@contextmanager
def silent() -> Iterator[None]:
    """No warning is logged in here."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def usage() -> Iterator[None]:
    """What goes wrong in here is the user's command or description."""
    from deploy.run.up import UpError
    from graph.errors import GraphError

    try:
        yield
    except (GraphError, UpError, ValueError) as error:
        fail(_said(error), EXIT_USAGE)


@contextmanager
def clear_errors() -> Iterator[None]:
    """One clear message and an exit code instead of a traceback, for everything that the world may do wrong."""
    try:
        yield
    except Interrupted as error:
        fail("interrupted", EXIT_INTERRUPTED if error.number == signal.SIGINT else EXIT_OK)
    except KeyboardInterrupt:
        fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:  # who reads what we print has read enough
        raise typer.Exit(EXIT_RUNTIME) from None
    except Exception as error:
        if (code := _exit_code(error)) is None:
            raise
        fail(_said(error), code)


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, UnicodeEncodeError):
        return f"this locale can't write {error.object!a}: run with LC_ALL=C.UTF-8, or with PYTHONUTF8=1"
    return str(error)


def _exit_code(error: Exception) -> int | None:
    """None: it is no error of the world, but ours, and its traceback is what we need."""
    from graph.errors import GraphError
    from model_shards.errors import DependencyError, ModelError
    from stages.media.wire import MediaError
    from stages.stage import MissingDependency, StageError

    if isinstance(error, DependencyError | MissingDependency):
        return EXIT_DEPENDENCY
    return EXIT_RUNTIME if isinstance(error, GraphError | ModelError | StageError | MediaError | OSError) else None


def fail(message: str, code: int) -> NoReturn:
    for line in message.splitlines():
        tell(f"pipeline: {line}")
    raise typer.Exit(code)
