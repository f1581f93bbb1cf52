"""The command line. Data goes to stdout, talk to stderr.

Exit codes: 0 ok · 1 runtime · 2 usage or configuration · 3 what must hold does not · 4 missing dependency ·
130 interrupted.
Rule: nothing heavy is imported at the top; `--help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.cli_common import (
    EXIT_DEPENDENCY,
    EXIT_INTERRUPTED,
    EXIT_RUNTIME,
    EXIT_VIOLATED,
    File,
    Json,
    Set,
    clear_errors,
    fail,
    load,
    tell,
    usage,
)
from deploy.cli_running import camera, down, is_ready, logs, ps
from deploy.cli_shards import nano, shards

if TYPE_CHECKING:
    from graph.spec import PipelineSpec
    from stages.stage import ListenerAction

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
    from deploy.masked_output import mask_stderr
    from deploy.packages import PackageCollision, check_packages

    mask_stderr()
    try:
        check_packages()
    except PackageCollision as error:
        fail(str(error), EXIT_DEPENDENCY)
    app()


@app.command()
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
    detach: Annotated[
        bool, typer.Option("-d", "--detach", help="Run in the background; see ps, logs and down.")
    ] = False,
) -> None:
    """Start the pipeline, run it until its sources end or Ctrl-C, and stop it cleanly."""
    from deploy.sources import check_sources, parse_cameras
    from deploy.up import UpError, UpOptions, run_up

    if detach:
        _detach()
        return
    with clear_errors():
        with usage():
            sets = [*(overrides or []), *([f"stages.speaker.sink={speaker}"] if speaker else [])]
            if speed not in ("real", "max"):
                raise UpError(f"--speed {speed}: expected real or max")
            actions = parse_listener(listener or [], barge_in or [])
            duration_ns = _duration("--for", duration) if duration is not None else None
            spec = _with_cameras(load(file, sets), parse_cameras(camera or []))
            check_sources(spec, paced=speed == "real")
        options = UpOptions(duration_ns, out, speed == "real", actions, address)
        outcome = run_up(spec, options, tell)
    for line in _summary(outcome.ledger):
        tell(line)
    if outcome.out is not None:
        tell(f"left in {outcome.out}: transcript.txt, events.jsonl, windows.jsonl, ledger.json, one WAV per session")
    if outcome.interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)


for command in (down, ps, logs):
    app.command()(command)


@app.command()
def validate(file: File = None, overrides: Set = None) -> None:
    """Check the description and print it as it was understood, secrets masked."""
    from graph.spec import render

    with clear_errors(), usage():
        print(render(load(file, overrides or [])), end="")


@app.command()
def plan(
    profile: Annotated[Path, typer.Option("--profile", metavar="FILE", help="What pipeline bench stages measured.")],
    cameras: Annotated[
        int | None, typer.Option("--cameras", help="How many to serve; without it: as many as fit.")
    ] = None,
    file: File = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """How many replicas of each stage so many cameras need; or how many cameras the described ones serve on time."""
    from deploy.capacity import most_cameras, plan_for, print_plan, reckon
    from graph.costs import read_profile

    with clear_errors(), usage():
        spec, measured = load(file, overrides or []), read_profile(profile)
    with clear_errors():
        if cameras is not None:
            found = plan_for(spec, measured, cameras)
        else:
            found = reckon(spec, measured, max(most_cameras(spec, measured), 1))
    print_plan(found, as_json)
    if found.problems:
        raise typer.Exit(EXIT_VIOLATED)


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
    from deploy.shrink import print_report, shrink
    from deploy.simulate import Report, find_scenario, parse_seeds, print_scenarios, run_scenario
    from graph.costs import read_profile

    if scenario is None:
        print_scenarios(as_json)
        return
    with clear_errors(), usage():
        spec, numbers = load(file, overrides or []), parse_seeds(seeds)
        found = find_scenario(scenario).sized(sessions, windows)
        if profile is not None:
            found = found.priced(read_profile(profile))
    with clear_errors():
        report: Report = run_scenario(spec, found, numbers)
    shortest = shrink(spec, found, report.violations[0]) if report.violations else None
    print_report(report, shortest, as_json)
    if report.violations:
        raise typer.Exit(EXIT_VIOLATED)


@app.command()
def bench(
    name: Annotated[str | None, typer.Argument(help="Which benchmark; without it they are listed.")] = None,
    as_json: Json = False,
) -> None:
    """Run a benchmark beside its rival and print the ratios. --json: {machine, versions, rows: [{name, value, unit,
    rival, rival_value, ratio, command}]}."""
    from deploy.bench import run_bench

    with clear_errors():
        run_bench(name, as_json)


def parse_listener(pauses: list[str], barge_ins: list[str]) -> tuple[ListenerAction, ...]:
    """`paused@5s:10s` and `7s` as what the listener does. Raises UpError."""
    from deploy.up import UpError
    from stages.stage import ListenerAction

    actions = [ListenerAction(_duration("--barge-in", text), "barge_in") for text in barge_ins]
    for text in pauses:
        kind, _, times = text.partition("@")
        start, _, end = times.partition(":")
        if kind != "paused" or not start:
            raise UpError(f"--listener {text}: expected paused@START:END, like paused@5s:10s")
        start_ns = _duration("--listener", start)
        actions.append(ListenerAction(start_ns, "pause"))
        if end:
            end_ns = _duration("--listener", end)
            if end_ns <= start_ns:
                raise UpError(f"--listener {text}: the end must come after the start")
            actions.append(ListenerAction(end_ns, "resume"))
    return tuple(sorted(actions, key=lambda action: action.at_ns))


def _duration(option: str, text: str) -> int:
    """ns. Raises UpError, which names the option."""
    from deploy.up import UpError
    from graph.units import parse_duration

    try:
        duration_ns = parse_duration(text)
    except ValueError as error:
        raise UpError(f"{option}: {error}") from None
    if duration_ns == 0:
        raise UpError(f"{option}: must be longer than {text}")
    return duration_ns


def _with_cameras(spec: PipelineSpec, sources: dict[str, str]) -> PipelineSpec:
    """`--camera` replaces the file's cameras; checked like the file's."""
    import dataclasses
    import json

    from graph.errors import Problem, SpecError
    from graph.spec import parse_spec

    if not sources:
        return spec
    text = "version: 1\ncameras: " + json.dumps(
        {name: {"source": source} for name, source in sources.items()}, ensure_ascii=False
    )
    try:
        cameras = parse_spec(text, "--camera").cameras
    except SpecError as error:
        raise SpecError(Problem("--camera", problem.message) for problem in error.problems) from None
    return dataclasses.replace(spec, cameras=cameras)


def _detach() -> None:
    """Start the same command in the background, and wait until it runs or fails."""
    import subprocess
    import time

    from deploy.state import StateFolder

    state = StateFolder(Path.cwd())
    if (other := state.read()) is not None:
        fail(f"a pipeline of this folder is running already (pid {other.pid}); `pipeline down` stops it", EXIT_RUNTIME)
    with clear_errors(), state.hold():
        state.create()
    log = state.logs / "up.log"
    arguments = [argument for argument in sys.argv[1:] if argument not in ("-d", "--detach")]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    while process.poll() is None:
        if (running := state.read()) is not None and is_ready(running.url):
            tell(f"running in the background (pid {running.pid}), {running.url}; pipeline ps | logs | down")
            return
        time.sleep(0.2)
    sys.stderr.write(log.read_text(encoding="utf-8", errors="replace"))
    raise typer.Exit(process.returncode)


def _summary(ledger: Any) -> Iterator[str]:
    for edge, account in ledger.items():
        reasons = ", ".join(f"{count} {reason}" for reason, count in account.dropped.items() if count)
        dropped = f"{sum(account.dropped.values())} dropped" + (f" ({reasons})" if reasons else "")
        yield (
            f"  {edge:<34} {account.accepted:>6} accepted = {account.delivered} delivered + "
            f"{dropped} + {account.in_flight} in flight"
        )
