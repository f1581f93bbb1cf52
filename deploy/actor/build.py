"""Stages from their plans: which class, with which options, on which device."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from deploy.actor.plan import StagePlan
from graph.sections import StageOptions
from graph.stage_type import StageTypeError
from graph.wording import one_line
from stages.catalog import stage_class
from stages.stage import Site, Stage, StageError


def build_stage(name: str, plan: StagePlan, checkpoint: Path, shared: dict[type, object]) -> Stage:
    """Build a stage and load its component; nothing else of the checkpoint is read.

    shared: what the stages of this process have in common.
    Raises StageError or ModelError; says what is wrong and what instead.
    """
    try:
        cls = stage_class(plan.use)
    except StageTypeError as error:
        raise StageError(f"stages.{name}: {error}") from error
    options = options_of(cls, plan)
    if options.gpus and not _has_cuda():
        raise StageError(
            f"{name}: gpus is {options.gpus:g}, but torch sees no CUDA device here; set stages.{name}.gpus: 0"
        )
    if cls.component or "torch" in sys.modules:
        import torch

        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
    try:
        return cls.load(options, Site(name, checkpoint, device_of(options), shared))
    except StageError as error:
        if type(error) is not StageError or str(error).startswith(f"{name}: "):
            raise
        raise StageError(f"{name}: {one_line(str(error))}") from error


def options_of(cls: type[Stage], plan: StagePlan) -> StageOptions:
    """The options of a plan, as the stage's class has them."""
    return cls.Options.model_validate(plan.options)


def memory_limit(plans: Iterable[StagePlan]) -> int | None:
    """What a process with these stages may take beyond what it has, in bytes; None where one of them has no limit."""
    limits = [options_of(stage_class(plan.use), plan).memory for plan in plans]
    return None if None in limits else sum(limit for limit in limits if limit is not None)


def device_of(options: StageOptions) -> str:
    """Where a stage computes, cpu or cuda; "auto": cuda where it has a GPU, or a part of one."""
    if options.device == "auto":
        return "cuda" if options.gpus > 0 else "cpu"
    return options.device


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
