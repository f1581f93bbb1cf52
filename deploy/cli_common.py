"""What the commands share: options, exit codes, and how a mistake is said."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.interrupts import Interrupted
from deploy.terminal import tell

if TYPE_CHECKING:
    from graph.spec import PipelineSpec

EXIT_OK, EXIT_RUNTIME, EXIT_USAGE, EXIT_VIOLATED, EXIT_DEPENDENCY, EXIT_INTERRUPTED = 0, 1, 2, 3, 4, 130

File = Annotated[Path | None, typer.Option("-f", "--file", help="The pipeline's description (default: pipeline.yaml).")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a value of the description.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def load(file: Path | None, overrides: list[str]) -> PipelineSpec:
    from graph.spec import default_spec_path, load_spec

    return load_spec(file or default_spec_path(), overrides)


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


@contextmanager
def usage() -> Iterator[None]:
    """What goes wrong in here is the user's command or description."""
    from deploy.up import UpError
    from graph.errors import GraphError

    try:
        yield
    except (GraphError, UpError, ValueError) as error:
        fail(str(error), EXIT_USAGE)


@contextmanager
def clear_errors() -> Iterator[None]:
    """One clear message and an exit code instead of a traceback, for everything that the world may do wrong."""
    from graph.errors import GraphError
    from model_shards.errors import DependencyError, ModelError
    from stages.media_wire import MediaError
    from stages.stage import MissingDependency, StageError

    try:
        yield
    except Interrupted as error:
        fail("interrupted", EXIT_INTERRUPTED if error.number == signal.SIGINT else EXIT_OK)
    except KeyboardInterrupt:
        fail("interrupted", EXIT_INTERRUPTED)
    except (DependencyError, MissingDependency) as error:
        fail(str(error), EXIT_DEPENDENCY)
    except (GraphError, ModelError, StageError, MediaError, OSError) as error:
        fail(str(error), EXIT_RUNTIME)


def fail(message: str, code: int) -> Any:
    for line in message.splitlines():
        tell(f"pipeline: {line}")
    raise typer.Exit(code)
