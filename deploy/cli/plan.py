"""`pipeline plan`: replicas, memory of the GPUs, and what is foreseen of so many sessions, before anything starts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.cli.common import EXIT_VIOLATED, File, Json, Set, clear_errors, load, silent, usage
from deploy.process.terminal import tell

if TYPE_CHECKING:
    from deploy.control.capacity import Plan
    from deploy.run.gpu_memory import GpuPlan
    from deploy.simulator.foresee import Foreseen
    from graph.costs import Profile
    from graph.spec import PipelineSpec
    from model_shards.config import ModelConfig


def plan(
    profile: Annotated[
        Path | None,
        typer.Option("--profile", metavar="FILE", help="What pipeline bench plan (or bench stages) measured."),
    ] = None,
    cameras: Annotated[
        int | None, typer.Option("--cameras", min=1, help="How many to serve; without it: as many as fit.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="h200|80GiB", help="The GPUs' kind or memory; without it: those that are here."),
    ] = None,
    file: File = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """How many replicas of each stage so many cameras need, or how many cameras the described ones serve on time, and
    what is foreseen of them; and, where stages have GPUs, whether all fits in their memory.

    Times need --profile. Exits with 3 where something does not fit.
    """
    from deploy.run.checkpoints import config_of
    from graph.costs import read_profile

    with clear_errors(), usage():
        spec = load(file, overrides or [])
        measured = None if profile is None else read_profile(profile)
        gpu_bytes = _gpu_bytes(spec, gpu)
        if measured is None and gpu_bytes is None:
            raise typer.BadParameter("nothing to plan with: give --profile, or stages GPUs and their memory by --gpu")
    reckoned, foreseen = None, list["Foreseen"]()
    with clear_errors():
        if measured is not None:
            if (hint := _gpu_hint(spec, measured)) is not None:
                tell(hint)
            spec, reckoned, foreseen = _times(spec, measured, cameras)
        on_gpus = None if gpu_bytes is None else _memory(spec, config_of(spec, tell), gpu_bytes, cameras, reckoned)
    _print(reckoned, foreseen, on_gpus, as_json)
    if (reckoned is not None and reckoned.problems) or (on_gpus is not None and on_gpus.problems):
        raise typer.Exit(EXIT_VIOLATED)


def _gpu_bytes(spec: PipelineSpec, gpu: str | None) -> int | None:
    """Memory of each GPU; None where stages have none, or where it is not known, which is told."""
    from deploy.run.gpu_memory import gpu_bytes_here, gpu_bytes_of, has_gpus

    if not has_gpus(spec):
        return None
    gpu_bytes = gpu_bytes_here() if gpu is None else gpu_bytes_of(gpu)
    if gpu_bytes is None:
        tell("memory is not reckoned: there is no GPU here; say which there will be: --gpu h200, or --gpu 80GiB")
    return gpu_bytes


def _memory(
    spec: PipelineSpec, config: ModelConfig, gpu_bytes: int, cameras: int | None, reckoned: Plan | None
) -> GpuPlan | None:
    """Of so many cameras; without a number, of those that have both time and room."""
    from deploy.run.gpu_memory import gpu_plan

    in_room = gpu_plan(spec, config, gpu_bytes, cameras)
    if cameras is not None or in_room is None or reckoned is None:
        return in_room
    in_time = gpu_plan(spec, config, gpu_bytes, reckoned.num_cameras)
    return min((in_room, in_time), key=lambda plan: plan.num_sessions if plan is not None else 0)


def _gpu_hint(spec: PipelineSpec, profile: Profile) -> str | None:
    """What to set, where a GPU was measured and no stage has one."""
    from deploy.run.gpu_memory import has_gpus

    gpu = profile.machine.get("gpu")
    if not gpu or has_gpus(spec):
        return None
    stages = [name for name in spec.stages if name in profile.stages and spec.types[name].has_model]
    share = f"{math.floor(100 / max(len(stages), 1)) / 100:g}"
    settings = " ".join(f"--set stages.{name}.gpus={share}" for name in stages)
    return (
        f"the profile is of a machine with a GPU ({gpu}), but no stage here has one: cores are planned; add {settings}"
    )


def _times(spec: PipelineSpec, profile: Profile, cameras: int | None) -> tuple[PipelineSpec, Plan, list[Foreseen]]:
    """The pipeline with as many replicas as it needs, what is reckoned, and what is foreseen: of so many sessions, or
    without a number of all that were tried."""
    from deploy.control.capacity import Demand, most_cameras, plan_for, reckon
    from deploy.simulator.foresee import MAX_SESSIONS, foresee, served

    if cameras is not None:
        reckoned = plan_for(spec, profile, cameras)
        spec = reckoned.applied_to(spec)
    else:
        reckoned = reckon(spec, profile, Demand.like(spec, max(most_cameras(spec, profile), 1)))
    if reckoned.demand.num_pictures != reckoned.num_cameras:
        tell("nothing is foreseen: windows with several pictures are reckoned only")
        return spec, reckoned, []
    with silent():
        if cameras is None:
            return spec, reckoned, served(spec, profile)
        if cameras <= MAX_SESSIONS:
            return spec, reckoned, [foresee(spec, profile, cameras)]
    tell(f"nothing is foreseen of more than {MAX_SESSIONS} sessions")
    return spec, reckoned, []


def _print(reckoned: Plan | None, foreseen: list[Foreseen], on_gpus: GpuPlan | None, as_json: bool) -> None:
    from deploy.run.gpu_memory import lines_of
    from deploy.simulator.foresee import GRADES, lines, most_served

    if as_json:
        document = {} if reckoned is None else reckoned.as_dict()
        if foreseen:
            document["foreseen"] = [each.as_dict() for each in foreseen]
            document["served"] = {f"{grade:g}": most_served(foreseen, grade) for grade in GRADES}
        if on_gpus is not None:
            document["memory"] = on_gpus.as_dict()
        print(json.dumps(document, indent=2))
        return
    if reckoned is not None:
        from deploy.control.capacity import print_plan

        print_plan(reckoned, False)
    for part in (lines(foreseen), [] if on_gpus is None else lines_of(on_gpus)):
        if part:
            print()
        for line in part:
            print(line)
    for problem in [] if on_gpus is None else on_gpus.problems:
        print(problem)
