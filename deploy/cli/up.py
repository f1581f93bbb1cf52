"""`pipeline up`: what the command line says, checked, and run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer

from deploy.cli.common import EXIT_INTERRUPTED, EXIT_RUNTIME, clear_errors, load, usage
from deploy.process.terminal import Teller, tell
from graph.chunk import NS_PER_S

if TYPE_CHECKING:
    from deploy.run.up import Outcome
    from graph.ledger import Account
    from graph.spec import PipelineSpec
    from stages.session import ListenerAction

OUT_FILES: Final = ("transcript.txt", "events.jsonl", "windows.jsonl", "ledger.json")


@dataclass(frozen=True, slots=True)
class UpArguments:
    """The command line, taken apart once: what it says, as it says it. Plain values, so that they may travel."""

    file: str | None = None
    overrides: tuple[str, ...] = ()
    cameras: tuple[str, ...] = ()
    duration: str | None = None
    out: str | None = None
    speed: str = "real"
    listener: tuple[str, ...] = ()
    barge_in: tuple[str, ...] = ()
    speaker: str | None = None
    address: str | None = None
    wait_for_cameras: str | None = None
    ledger: bool = False


def run_in_foreground(arguments: UpArguments) -> None:
    """Check, run, and say how it ended. Raises typer.Exit."""
    from deploy.cameras.sources import check_sources, parse_cameras
    from deploy.run.leftovers import end_left
    from deploy.run.state import StateFolder
    from deploy.run.up import UpError, UpOptions, run_up

    with clear_errors():
        with usage():
            speaker, speed, duration = arguments.speaker, arguments.speed, arguments.duration
            sets = [*arguments.overrides, *([f"stages.speaker.sink={speaker}"] if speaker else [])]
            if speed not in ("real", "max"):
                raise UpError(f"--speed {speed}: expected real or max")
            actions = parse_listener(arguments.listener, arguments.barge_in)
            duration_ns = _duration("--for", duration) if duration is not None else None
            wait = arguments.wait_for_cameras
            wait_s = None if wait is None else _duration("--wait-for-cameras", wait, least_ns=0) / NS_PER_S
            file = None if arguments.file is None else Path(arguments.file)
            spec = _with_cameras(load(file, sets), parse_cameras(list(arguments.cameras)))
            check_sources(spec, paced=speed == "real")
        out = None if arguments.out is None else Path(arguments.out)
        options = UpOptions(duration_ns, out, speed == "real", actions, arguments.address, wait_for_cameras_s=wait_s)
        if num_left := end_left(StateFolder(Path.cwd())):
            tell(f"ended what a killed pipeline of this folder had left (processes of Ray: {num_left})")
        with Teller() as teller:
            outcome = run_up(spec, options, teller.tell)
            for line in _summary(outcome, every_edge=arguments.ledger):
                teller.tell(line)
    if outcome.interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)
    if outcome.in_vain or outcome.problem:
        raise typer.Exit(EXIT_RUNTIME)


def parse_listener(pauses: Sequence[str], barge_ins: Sequence[str]) -> tuple[ListenerAction, ...]:
    """`paused@5s:10s` and `7s` as what the listener does. Raises UpError."""
    from deploy.run.up import UpError
    from stages.session import ListenerAction

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


def _duration(option: str, text: str, least_ns: int = 1) -> int:
    """ns. Raises UpError, which names the option."""
    from deploy.run.up import UpError
    from graph.units import parse_duration

    try:
        duration_ns = parse_duration(text)
    except ValueError as error:
        raise UpError(f"{option}: {error}") from None
    if duration_ns < least_ns:
        raise UpError(f"{option}: must be longer than {text}")
    return duration_ns


def _with_cameras(spec: PipelineSpec, sources: dict[str, str]) -> PipelineSpec:
    """`--camera` replaces the file's cameras; checked like the file's. `porch/back=…` is a view of camera `porch`."""
    import json

    from graph.errors import Problem, SpecError
    from graph.spec import parse_spec
    from stages.catalog import CATALOG

    if not sources:
        return spec
    described: dict[str, dict[str, Any]] = {}
    for written, source in sources.items():
        name, slash, view = written.partition("/")
        camera = described.setdefault(name, {})
        camera.update({"views": {**camera.get("views", {}), view: source}} if slash else {"source": source})
    text = "version: 1\ncameras: " + json.dumps(described, ensure_ascii=False)
    try:
        cameras = parse_spec(text, "--camera", CATALOG).cameras
    except SpecError as error:
        raise SpecError(Problem("--camera", problem.message) for problem in error.problems) from None
    return spec.with_cameras(cameras)


def _summary(outcome: Outcome, *, every_edge: bool = False) -> Iterator[str]:
    """every_edge: also of edges on which all that was accepted has been delivered."""
    if outcome.ledger:
        yield _ledger_line(outcome.ledger)
    for edge, account in outcome.ledger.items():
        if every_edge or account.accepted != account.delivered:
            yield f"  {edge:<38} {_account_text(account)}"
    if outcome.out is not None:
        left = ", ".join(_left_in(outcome.out))
        yield f"left in {outcome.out}: {left}" if left else f"nothing is left in {outcome.out}: its files were removed"


def _ledger_line(ledger: Mapping[str, Account]) -> str:
    """One line: whether every chunk is accounted for."""
    from graph.ledger import merge

    num_open = sum(account.in_flight != 0 for account in ledger.values())
    how = f"not exact on {num_open} of {len(ledger)} edges" if num_open else f"exact on all {len(ledger)} edges"
    return f"ledger {how}: {_account_text(merge(ledger.values())).lstrip()}"


def _account_text(account: Account) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in account.dropped.items() if count)
    dropped = f"{sum(account.dropped.values())} dropped" + (f" ({reasons})" if reasons else "")
    return f"{account.accepted:>6} accepted = {account.delivered} delivered + {dropped} + {account.in_flight} in flight"


def _left_in(out: Path) -> Iterator[str]:
    """What is really there: somebody may have removed it during the run."""
    yield from (name for name in OUT_FILES if (out / name).is_file())
    if num_recordings := len(list(out.glob("*.wav"))):
        yield f"{num_recordings} WAV" + ("s" if num_recordings > 1 else "")
