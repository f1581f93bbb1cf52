"""The command line. Data goes to stdout, talk to stderr.

Exit codes: 0 ok · 1 runtime · 2 usage or configuration · 3 what must hold does not · 4 missing dependency ·
130 interrupted.
Rule: nothing heavy is imported at the top; `--help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from graph.spec import PipelineSpec
    from stages.stage import ListenerAction

EXIT_RUNTIME, EXIT_USAGE, EXIT_VIOLATED, EXIT_DEPENDENCY, EXIT_INTERRUPTED = 1, 2, 3, 4, 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Run a full-duplex omni-modal model over many cameras: every component an actor, in order, throttled by the "
    "listener.\n\nExamples:\n\n  pipeline up --camera door=clip.mp4 --for 20s --out run/\n\n  pipeline up -d && "
    "pipeline ps\n\n  pipeline validate -f pipeline.yaml",
)
shards = typer.Typer(no_args_is_help=True, help="Look at checkpoints, and make them.")
app.add_typer(shards, name="shards")
camera = typer.Typer(no_args_is_help=True, help="Add cameras to the running pipeline, and remove them.")
app.add_typer(camera, name="camera")
nano = typer.Typer(no_args_is_help=True, help="Measure nano, the small model which is shipped.")
app.add_typer(nano, name="nano")

File = Annotated[Path | None, typer.Option("-f", "--file", help="The pipeline's description (default: pipeline.yaml).")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a value of the description.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Entry point of the `pipeline` command."""
    from deploy.packages import PackageCollision, check_packages

    try:
        check_packages()
    except PackageCollision as error:
        _fail(str(error), EXIT_DEPENDENCY)
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
    with _clear_errors():
        with _usage():
            sets = [*(overrides or []), *([f"stages.speaker.sink={speaker}"] if speaker else [])]
            if speed not in ("real", "max"):
                raise UpError(f"--speed {speed}: expected real or max")
            actions = parse_listener(listener or [], barge_in or [])
            duration_ns = _duration("--for", duration) if duration is not None else None
            spec = _with_cameras(_load(file, sets), parse_cameras(camera or []))
            check_sources(spec, paced=speed == "real")
        options = UpOptions(duration_ns, out, speed == "real", actions, address)
        outcome = run_up(spec, options, _tell)
    for line in _summary(outcome.ledger):
        _tell(line)
    if outcome.out is not None:
        _tell(f"left in {outcome.out}: transcript.txt, events.jsonl, windows.jsonl, ledger.json, one WAV per session")
    if outcome.interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)


@app.command()
def down(timeout: Annotated[float, typer.Option(help="Seconds to wait for the end.")] = 20.0) -> None:
    """Stop the pipeline that runs in the background of this folder."""
    import os
    import signal
    import time

    state, running = _running()
    os.kill(running.pid, signal.SIGTERM)
    deadline_s = time.monotonic() + timeout
    while state.read() is not None:
        if time.monotonic() > deadline_s:
            _fail(f"pid {running.pid} has not ended within {timeout:g} s; `pipeline logs` may say why", EXIT_RUNTIME)
        time.sleep(0.1)
    _tell("stopped")


@app.command()
def ps(as_json: Json = False) -> None:
    """Show stages and sessions of the running pipeline. --json: {model, ready, uptime_s, stages, sessions, edges}."""
    import json

    _, running = _running()
    try:
        with _directly(f"{running.url}/api/v1/ps", timeout_s=5) as answer:
            status = json.load(answer)
    except OSError as error:
        _fail(f"{running.url} does not answer: {error}", EXIT_RUNTIME)
    if as_json:
        print(json.dumps(status, indent=2))
        return
    trained = "" if status["trained"] else "  (UNTRAINED)"
    print(f"model {status['model']}{trained}  up {status['uptime_s']:.0f} s  {status['problem'] or 'ready'}")
    _table(status["stages"], ("stage", "replica", "state", "process", "pid", "node", "sessions", "units", "waiting"))
    _table(status["sessions"], ("session", "state", "windows", "late", "source"))
    _table(
        [{"edge": edge, **row, "dropped": sum(row["dropped"].values())} for edge, row in status["edges"].items()],
        ("edge", "accepted", "delivered", "dropped", "in_flight"),
    )


@camera.command("add")
def camera_add(
    what: Annotated[str, typer.Argument(metavar="NAME=SOURCE", help="Like yard=rtsp://10.0.0.7/live.")],
    fps: Annotated[float | None, typer.Option("--fps", help="Pictures per second (default: 1).")] = None,
    microphone: Annotated[
        str | None, typer.Option("--microphone", metavar="embedded|none", help="The sound in the source, or none.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Watch another camera; the others are not disturbed. Refused at once where there is no room for it.

    --json: {name, source, warnings}.
    """
    import json
    import os

    from deploy.sources import parse_cameras
    from graph.secret import Secret, resolve

    with _clear_errors():
        with _usage():
            ((name, written),) = parse_cameras([what], option="").items()
            resolved = resolve(written, os.environ)
        source = resolved.reveal() if isinstance(resolved, Secret) else resolved
        wanted = {"name": name, "source": source, "fps": fps, "microphone": microphone}
        asked = {key: value for key, value in wanted.items() if value is not None}
        added = _ask_gateway("POST", "/api/v1/cameras", asked)
    if as_json:
        print(json.dumps(added, indent=2))
        return
    for warning in added["warnings"]:
        _tell(warning)
    _tell(f"camera {name}: added")


@camera.command("remove")
def camera_remove(name: Annotated[str, typer.Argument(help="As `pipeline ps` shows it.")]) -> None:
    """End a camera's session: what it saw and heard is gone through to the end, and said."""
    from urllib.parse import quote

    with _clear_errors():
        _ask_gateway("DELETE", f"/api/v1/cameras/{quote(name, safe='')}")
    _tell(f"camera {name}: removed")


def _ask_gateway(method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Ask the pipeline of this folder to change something; what it refuses is the end."""
    import json
    import urllib.error
    import urllib.request

    _, running = _running()
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
        message = _told_in(error.read()) or f"{running.url} answers {error.code} to {method} {path}"
        if (retry_after_s := error.headers.get("Retry-After")) is not None:
            message += f"; try again in {retry_after_s} s"
        return _fail(message, EXIT_USAGE if error.code in (400, 404, 409, 422) else EXIT_RUNTIME)
    except OSError as error:
        return _fail(f"{running.url} does not answer: {error}", EXIT_RUNTIME)


def _told_in(answer: bytes) -> str:
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


@app.command()
def logs(
    process: Annotated[str | None, typer.Argument(help="Only this process, like llm.0 or up.")] = None,
    tail: Annotated[int, typer.Option("--tail", help="Lines per process.")] = 50,
) -> None:
    """Print the logs of this folder's pipeline, running or not."""
    from deploy.state import StateFolder

    found = sorted(StateFolder(Path.cwd()).logs.glob(f"{process or '*'}.log"))
    if not found:
        _fail("no logs here; `pipeline up` makes them" + (f" (none of {process!r})" if process else ""), EXIT_RUNTIME)
    for path in found:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[-tail:]:
            print(f"{path.stem:<18} {line}")


@app.command()
def validate(file: File = None, overrides: Set = None) -> None:
    """Check the description and print it as it was understood, secrets masked."""
    from graph.spec import render

    with _clear_errors(), _usage():
        print(render(_load(file, overrides or [])), end="")


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

    with _clear_errors(), _usage():
        spec, measured = _load(file, overrides or []), read_profile(profile)
    with _clear_errors():
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
    with _clear_errors(), _usage():
        spec, numbers = _load(file, overrides or []), parse_seeds(seeds)
        found = find_scenario(scenario).sized(sessions, windows)
        if profile is not None:
            found = found.priced(read_profile(profile))
    with _clear_errors():
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

    with _clear_errors():
        run_bench(name, as_json)


@shards.command("init")
def shards_init(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A folder that does not exist yet, or is empty.")],
    size: Annotated[str, typer.Option(help="tiny.")] = "tiny",
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
) -> None:
    """Write an UNTRAINED checkpoint in the released file layout."""
    from deploy.checkpoints import UNTRAINED
    from model_shards.init import init_checkpoint

    with _clear_errors():
        init_checkpoint(out, size, seed)
    _tell(f"{out}: {size}, {UNTRAINED}")


@shards.command("inspect")
def shards_inspect(path: Annotated[Path, typer.Argument(metavar="DIR")], as_json: Json = False) -> None:
    """List the components of a checkpoint. --json: [{component, tensors, parameters, bytes, dtypes}]."""
    import json

    from deploy.checkpoints import tell_differences
    from model_shards.checkpoint import inspect
    from model_shards.config import load_config

    with _clear_errors():
        config = load_config(path)
        rows: list[dict[str, Any]] = [
            {
                "component": info.component,
                "tensors": info.num_tensors,
                "parameters": info.num_parameters,
                "bytes": info.num_bytes,
                "dtypes": ",".join(info.dtypes),
            }
            for info in inspect(path)
        ]
    tell_differences(config, _tell)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    if config.untrained:
        print("UNTRAINED: random weights")
    _table(rows, ("component", "tensors", "parameters", "bytes", "dtypes"))


@shards.command("split")
def shards_split(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A folder that does not exist yet, or is empty.")],
) -> None:
    """Write a checkpoint with one file per component, and a manifest to verify it by; it runs like the checkpoint."""
    from model_shards.split import split_checkpoint

    with _clear_errors():
        manifest = split_checkpoint(checkpoint, out)
    _tell(f"{out}: {_what_is_in(manifest)}")


@shards.command("quantize")
def shards_quantize(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A folder that does not exist yet, or is empty.")],
    bits: Annotated[int, typer.Option(help="8 or 4.")] = 4,
) -> None:
    """Write a checkpoint with the LLM's weights in 8 or 4 bits; says how much smaller it is, and how fast here."""
    from model_shards.quantize import compare_speed, quantize_checkpoint

    if bits not in (8, 4):
        raise typer.BadParameter(f"{bits}: expected 8 or 4", param_hint="--bits")
    with _clear_errors():
        done = quantize_checkpoint(checkpoint, out, 8 if bits == 8 else 4)
    before, after = done.before_bytes / 1e9, done.after_bytes / 1e9
    off = f"its weights are off by {done.relative_error:.2%} of their size"
    _tell(f"{out}: llm in {done.quantization}: {before:.3g} GB, now {after:.3g} GB; {off}")
    if done.largest is not None:
        shape = "x".join(map(str, done.largest.shape))
        for timing in compare_speed(done.largest, done.quantization):
            before_ms, after_ms = timing.before_s * 1e3, timing.after_s * 1e3
            ratio = before_ms / after_ms
            told = f"{before_ms:.3g} ms in bfloat16, {after_ms:.3g} ms in {bits} bits ({ratio:.2g} times as fast)"
            _tell(f"  {shape} with {timing.num_rows} row(s) on this CPU: {told}")


@shards.command("verify")
def shards_verify(folder: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """Compare a split checkpoint with its manifest, byte by byte; names what is missing, extra, cut off or changed."""
    from model_shards.split import verify_split

    with _clear_errors():
        manifest = verify_split(folder)
    _tell(f"{folder}: as its manifest tells: {_what_is_in(manifest)}")


@shards.command("voice")
def shards_voice(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT")],
    recording: Annotated[Path, typer.Option("--from", metavar="SPEECH.WAV", help="1 to 17 s of one speaker.")],
) -> None:
    """Give a checkpoint the voice of a recording; needs onnxruntime, and the ONNX files of a released checkpoint."""
    from deploy.speech import read_speech
    from model_shards.checkpoint import VOICE_FILE, save_voice
    from model_shards.mel import RATE_HZ
    from model_shards.vocoder import MEL_RATE_HZ
    from model_shards.voice import make_voice

    with _clear_errors():
        speech = read_speech(recording, RATE_HZ)
        voice = make_voice(checkpoint, speech, read_speech(recording, MEL_RATE_HZ))
        save_voice(checkpoint, voice, speech)
    _tell(f"{checkpoint / VOICE_FILE}: {len(voice.prompt_tokens)} codes from {recording}")


@nano.command("eval")
def nano_eval(
    seed: Annotated[int, typer.Option(help="Of the rooms; all of them are unseen.")] = 0,
    episodes: Annotated[int, typer.Option(help="Of a minute each: calm, busy and quiet in turn.")] = 12,
    ablation: Annotated[
        str, typer.Option(metavar="NAME", help="tail-off, frames-late, half-frames, audio-late, or all beside whole.")
    ] = "whole",
    overrides: Set = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Keep what the runs leave.")] = None,
    as_json: Json = False,
) -> None:
    """Watch episodes of the synthetic room in virtual time, and count what nano said right. --json: {recall, precision,
    reaction_p95_s, false_per_10min, question_accuracy, standing_honoured, stop_obeyed, wer, teacher_wer,
    unheard_max_s, by_kind}; with --ablation all, one such per ablation."""
    from deploy.nano import EvalOptions, run_eval

    with _clear_errors():
        with _usage():
            options = EvalOptions(seed, episodes, ablation, as_json, tuple(overrides or ()), out)
        run_eval(options)


def _what_is_in(manifest: Any) -> str:
    num_tensors = sum(len(file.tensors) for file in manifest.values())
    num_bytes = sum(file.num_bytes for file in manifest.values())
    return f"{len(manifest)} files, {num_tensors} tensors, {num_bytes:,} bytes"


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


def _load(file: Path | None, overrides: list[str]) -> PipelineSpec:
    from graph.spec import default_spec_path, load_spec

    return load_spec(file or default_spec_path(), overrides)


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
        _fail(f"a pipeline of this folder is running already (pid {other.pid}); `pipeline down` stops it", EXIT_RUNTIME)
    with _clear_errors(), state.hold():
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
        if (running := state.read()) is not None and _is_ready(running.url):
            _tell(f"running in the background (pid {running.pid}), {running.url}; pipeline ps | logs | down")
            return
        time.sleep(0.2)
    sys.stderr.write(log.read_text(encoding="utf-8", errors="replace"))
    raise typer.Exit(process.returncode)


def _is_ready(url: str) -> bool:
    import urllib.error
    import urllib.request

    try:
        with _directly(f"{url}/readyz", timeout_s=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.HTTPError):
        return False


def _running() -> Any:
    """(state folder, what runs there), or the end."""
    from deploy.state import StateFolder

    state = StateFolder(Path.cwd())
    running = state.read()
    if running is None:
        _fail("no pipeline of this folder is running; `pipeline up -d` starts one", EXIT_RUNTIME)
    return state, running


def _summary(ledger: Any) -> Iterator[str]:
    for edge, account in ledger.items():
        reasons = ", ".join(f"{count} {reason}" for reason, count in account.dropped.items() if count)
        dropped = f"{sum(account.dropped.values())} dropped" + (f" ({reasons})" if reasons else "")
        yield (
            f"  {edge:<34} {account.accepted:>6} accepted = {account.delivered} delivered + "
            f"{dropped} + {account.in_flight} in flight"
        )


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
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
def _usage() -> Iterator[None]:
    """What goes wrong in here is the user's command or description."""
    from deploy.up import UpError
    from graph.errors import GraphError

    try:
        yield
    except (GraphError, UpError, ValueError) as error:
        _fail(str(error), EXIT_USAGE)


@contextmanager
def _clear_errors() -> Iterator[None]:
    """One clear message and an exit code instead of a traceback, for everything that the world may do wrong."""
    from graph.errors import GraphError
    from model_shards.errors import DependencyError, ModelError
    from stages.media_wire import MediaError
    from stages.stage import MissingDependency, StageError

    try:
        yield
    except KeyboardInterrupt:
        _fail("interrupted", EXIT_INTERRUPTED)
    except (DependencyError, MissingDependency) as error:
        _fail(str(error), EXIT_DEPENDENCY)
    except (GraphError, ModelError, StageError, MediaError, OSError) as error:
        _fail(str(error), EXIT_RUNTIME)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _fail(message: str, code: int) -> Any:
    for line in message.splitlines():
        _tell(f"pipeline: {line}")
    raise typer.Exit(code)
