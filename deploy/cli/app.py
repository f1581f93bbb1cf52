"""The command line. Data goes to stdout, talk to stderr.

Exit codes: 0 ok · 1 runtime · 2 usage or configuration · 3 what must hold does not · 4 missing dependency ·
130 interrupted.
Rule: nothing heavy is imported at the top; `--help` answers at once.
"""

from __future__ import annotations

# First: whatever comes next is not taken from the user's folder.
import deploy.process.search_path  # noqa: F401

# isort: split
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from deploy.cli.common import (
    EXIT_DEPENDENCY,
    EXIT_USAGE,
    EXIT_VIOLATED,
    File,
    Json,
    Set,
    check_folder,
    clear_errors,
    fail,
    load,
    silent,
    usage,
)
from deploy.cli.graph import graph, stages
from deploy.cli.plan import plan
from deploy.cli.running import camera, down, logs, ps
from deploy.cli.shards import nano, shards
from deploy.process.terminal import flush_standard_output, prepare_standard_files, tell

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Run a full-duplex omni-modal model over many cameras: every component an actor, in order, throttled by the "
    "listener.\n\nExamples:\n\n  pipeline up --camera door=clip.mp4 --for 20s --out run/\n\n  pipeline up -d && "
    "pipeline ps\n\n  pipeline validate -f pipeline.yaml",
)
app.add_typer(shards, name="shards")
app.add_typer(camera, name="camera")
app.add_typer(nano, name="nano")


def main() -> None:
    """Entry point of the `pipeline` command."""
    prepare_standard_files()
    from deploy.process.masked_output import hide_arguments, mask_stderr
    from deploy.process.packages import PackageCollision, check_packages

    mask_stderr(sys.argv[1:])
    hide_arguments()
    try:
        check_packages()
        check_folder()
        app()
    except PackageCollision as error:
        tell(f"pipeline: {error}")
        sys.exit(EXIT_DEPENDENCY)
    finally:
        flush_standard_output()


@app.command()
@clear_errors()
def up(
    file: File = None,
    overrides: Set = None,
    camera: Annotated[
        list[str] | None,
        typer.Option("--camera", metavar="NAME=SOURCE", help="A camera instead of the file's; repeat it."),
    ] = None,
    duration: Annotated[
        str | None, typer.Option("--for", metavar="20s", help="Stop the sources after this time.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Leave transcript, WAV, events, traces.")
    ] = None,
    speed: Annotated[
        str, typer.Option("--speed", metavar="real|max", help="Real time, or as fast as it goes.")
    ] = "real",
    listener: Annotated[
        list[str] | None,
        typer.Option("--listener", metavar="paused@5s:10s", help="The listener pauses from 5 s to 10 s; repeat it."),
    ] = None,
    barge_in: Annotated[
        list[str] | None, typer.Option("--barge-in", metavar="7s", help="The listener interrupts at 7 s; repeat it.")
    ] = None,
    speaker: Annotated[
        str | None, typer.Option("--speaker", metavar="virtual|device", help="Where speech is heard.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", help="Join this Ray cluster (default: RAY_ADDRESS, else a Ray of our own)."),
    ] = None,
    wait_for_cameras: Annotated[
        str | None,
        typer.Option(
            "--wait-for-cameras",
            metavar="30s",
            help="Wait so long for all live cameras, else end; without it start, and look for them later.",
        ),
    ] = None,
    detach: Annotated[
        bool, typer.Option("-d", "--detach", help="Run in the background; see ps, logs and down.")
    ] = False,
    ledger: Annotated[
        bool, typer.Option("--ledger", help="At the end list every edge, not only those that dropped something.")
    ] = False,
) -> None:
    """Start the pipeline, run it until its sources end or Ctrl-C, and stop it cleanly."""
    from deploy.cli.background import run_in_background
    from deploy.cli.up import UpArguments, run_in_foreground

    arguments = UpArguments(
        file=None if file is None else str(file),
        overrides=tuple(overrides or ()),
        cameras=tuple(camera or ()),
        duration=duration,
        out=None if out is None else str(out),
        speed=speed,
        listener=tuple(listener or ()),
        barge_in=tuple(barge_in or ()),
        speaker=speaker,
        address=address,
        wait_for_cameras=wait_for_cameras,
        ledger=ledger,
    )
    if detach:
        run_in_background(arguments)
    else:
        run_in_foreground(arguments)


for command in (down, ps, logs, stages, graph):
    app.command()(command)


@app.command()
def validate(file: File = None, overrides: Set = None) -> None:
    """Check the description and print it as it was understood, secrets masked.

    Not looked at: whether files of cameras are there, cameras answer, and the machine has what stages ask for; up does.
    """
    from graph.spec import render

    with clear_errors(), usage():
        print(render(load(file, overrides or [])), end="")


app.command()(plan)


@app.command()
def simulate(
    scenario: Annotated[str | None, typer.Argument(help="Which one; without it: what there is.")] = None,
    seeds: Annotated[str, typer.Option("--seeds", metavar="0:1000", help="From where to before where.")] = "0:100",
    sessions: Annotated[int | None, typer.Option("--sessions", min=1, max=10_000, help="Instead of its own.")] = None,
    windows: Annotated[int | None, typer.Option("--windows", min=1, max=86_400, help="Of each session.")] = None,
    profile: Annotated[
        Path | None,
        typer.Option("--profile", metavar="FILE", help="What stages cost, as pipeline bench stages measured."),
    ] = None,
    file: File = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Run the pipeline's decisions in virtual time, under faults, and see whether all holds that must hold.

    Exits with 3 when something did not.
    """
    from deploy.simulator.report import Report, parse_seeds, print_scenarios
    from deploy.simulator.scenarios import find_scenario
    from deploy.simulator.shrink import print_report, shrink
    from deploy.simulator.simulate import run_scenario
    from graph.costs import read_profile

    if scenario is None:
        print_scenarios(as_json)
        return
    with clear_errors(), usage():
        spec, numbers = load(file, overrides or []), parse_seeds(seeds)
        selected = find_scenario(scenario).sized(sessions, windows)
        if profile is not None:
            selected = selected.priced(read_profile(profile), spec)
    with clear_errors(), silent():  # what stages warn of is what the scenario does to them
        report: Report = run_scenario(spec, selected, numbers)
    shortest = shrink(spec, selected, report.violations[0]) if report.violations else None
    print_report(report, shortest, as_json)
    if report.violations:
        raise typer.Exit(EXIT_VIOLATED)


@app.command()
def bench(
    name: Annotated[str | None, typer.Argument(help="Which benchmark; without it they are listed.")] = None,
    record: Annotated[Path | None, typer.Argument(help="A file for the JSON.", metavar="FILE")] = None,
    as_json: Json = False,
    minutes: Annotated[float | None, typer.Option("--minutes", help="Of gpu: it takes so long at most.")] = None,
    size: Annotated[str | None, typer.Option("--size", help="Of gpu: full or tiny weights.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="Of gpu: cuda or cpu.")] = None,
) -> None:
    """Run a benchmark beside its rival and print the ratios. --json prints them as JSON: {machine, versions, rows:
    [{name, value, unit, rival, rival_value, ratio, command}]}; --json FILE writes that to the file. Of gpu the file
    has all that is measured, each number as soon as it is there. Other options of a benchmark are variables:
    OMNI_BENCH_…."""
    from deploy.evaluate.bench import BenchUsageError, run_bench

    given = {"MINUTES": minutes, "SIZE": size, "DEVICE": device}
    os.environ |= {f"OMNI_BENCH_{option}": str(value) for option, value in given.items() if value is not None}
    with clear_errors():
        try:
            run_bench(name, as_json, record)
        except BenchUsageError as error:
            fail(str(error), EXIT_USAGE)
