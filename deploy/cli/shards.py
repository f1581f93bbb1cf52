"""Commands for checkpoints: `shards …`, and `nano eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.cli.common import Json, Set, clear_errors, table, usage
from deploy.process.terminal import tell

shards = typer.Typer(no_args_is_help=True, help="Look at checkpoints, and make them.")
nano = typer.Typer(no_args_is_help=True, help="Measure nano, the small model which is shipped.")


@shards.command("init")
def shards_init(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A folder that does not exist yet, or is empty.")],
    size: Annotated[str, typer.Option(help="tiny.")] = "tiny",
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
) -> None:
    """Write an UNTRAINED checkpoint in the released file layout."""
    from deploy.run.checkpoints import UNTRAINED
    from model_shards.init import init_checkpoint

    with clear_errors():
        init_checkpoint(out, size, seed)
    tell(f"{out}: {size}, {UNTRAINED}")


@shards.command("inspect")
def shards_inspect(path: Annotated[Path, typer.Argument(metavar="DIR")], as_json: Json = False) -> None:
    """List the components of a checkpoint. --json: [{component, tensors, parameters, bytes, dtypes}]."""
    import json

    from deploy.run.checkpoints import tell_differences
    from model_shards.checkpoint import inspect
    from model_shards.config import load_config

    with clear_errors():
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
    tell_differences(config, tell)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    if config.untrained:
        print("UNTRAINED: random weights")
    table(rows, ("component", "tensors", "parameters", "bytes", "dtypes"))


@shards.command("split")
def shards_split(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A folder that does not exist yet, or is empty.")],
) -> None:
    """Write a checkpoint with one file per component, and a manifest to verify it by; it runs like the checkpoint."""
    from model_shards.split import split_checkpoint

    with clear_errors():
        manifest = split_checkpoint(checkpoint, out)
    tell(f"{out}: {_what_is_in(manifest)}")


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
    with clear_errors():
        done = quantize_checkpoint(checkpoint, out, 8 if bits == 8 else 4)
    before, after = done.before_bytes / 1e9, done.after_bytes / 1e9
    off = f"its weights are off by {done.relative_error:.2%} of their size"
    tell(f"{out}: llm in {done.quantization}: {before:.3g} GB, now {after:.3g} GB; {off}")
    if done.largest is not None:
        shape = "x".join(map(str, done.largest.shape))
        for timing in compare_speed(done.largest, done.quantization):
            before_ms, after_ms = timing.before_s * 1e3, timing.after_s * 1e3
            ratio = before_ms / after_ms
            comparison = f"{before_ms:.3g} ms in bfloat16, {after_ms:.3g} ms in {bits} bits ({ratio:.2g} times as fast)"
            tell(f"  {shape} with {timing.num_rows} row(s) on this CPU: {comparison}")


@shards.command("verify")
def shards_verify(folder: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """Compare a split checkpoint with its manifest, byte by byte; names what is missing, extra, cut off or changed."""
    from model_shards.split import verify_split

    with clear_errors():
        manifest = verify_split(folder)
    tell(f"{folder}: as its manifest tells: {_what_is_in(manifest)}")


@shards.command("voice")
def shards_voice(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT")],
    recording: Annotated[Path, typer.Option("--from", metavar="SPEECH.WAV", help="1 to 17 s of one speaker.")],
) -> None:
    """Give a checkpoint the voice of a recording; needs onnxruntime, and the ONNX files of a released checkpoint."""
    from deploy.evaluate.speech import read_speech
    from model_shards.checkpoint import VOICE_FILE, save_voice
    from model_shards.mel import RATE_HZ
    from model_shards.vocoder import MEL_RATE_HZ
    from model_shards.voice import make_voice

    with clear_errors():
        speech = read_speech(recording, RATE_HZ)
        voice = make_voice(checkpoint, speech, read_speech(recording, MEL_RATE_HZ))
        save_voice(checkpoint, voice, speech)
    tell(f"{checkpoint / VOICE_FILE}: {len(voice.prompt_tokens)} codes from {recording}")


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
    from deploy.evaluate.nano import EvalOptions, run_eval

    with clear_errors():
        with usage():
            options = EvalOptions(seed, episodes, ablation, as_json, tuple(overrides or ()), out)
        run_eval(options)


def _what_is_in(manifest: Any) -> str:
    num_tensors = sum(len(file.tensors) for file in manifest.values())
    num_bytes = sum(file.num_bytes for file in manifest.values())
    return f"{len(manifest)} files, {num_tensors} tensors, {num_bytes:,} bytes"
