"""The loop which all of nano's trainings share: resumable, with a progress line, and averaged weights at the end.

Rule: a training is a folder. Whatever is in `state.pt` there is where it goes on; `best` is never chosen on test data,
so what is kept is the exponential average of the last weights.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

SAVE_EVERY_S = 120.0
TELL_EVERY_S = 20.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """How one training goes.

    minutes: of this process's CPU time, over all resumptions, so that a busy machine trains as much; the rate follows
    the part of it that has passed: linear to `rate` in `warm_up_steps`, constant until `constant`, then a cosine down
    to `final` of it.
    clip: of the gradient's norm. average: of the weights, per step.
    """

    minutes: float
    rate: float
    warm_up_steps: int = 100
    constant: float = 0.3
    final: float = 0.03
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    clip: float = 1.0
    average: float = 0.998
    eval_every_minutes: float = 5.0

    def rate_at(self, step: int, passed: float) -> float:
        """`passed`: the part of `minutes` that is over, 0 to 1."""
        warm = min(1.0, (step + 1) / self.warm_up_steps)
        if passed <= self.constant:
            return self.rate * warm
        fallen = 0.5 * (1 + math.cos(math.pi * min(1.0, (passed - self.constant) / (1 - self.constant))))
        return self.rate * warm * (self.final + (1 - self.final) * fallen)


Loss = Callable[[int, float], tuple[Tensor, Mapping[str, float]]]
"""(step, passed part of the time) to a loss to go down, and numbers for the progress line."""
Evaluate = Callable[[nn.Module], Mapping[str, float]]
"""The averaged module, in eval mode and without gradients, to scores."""


class Training:
    """One module's training in one folder."""

    def __init__(self, folder: Path, module: nn.Module, schedule: Schedule) -> None:
        """Goes on where `folder` stands, or begins."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.module, self.schedule = folder, module, schedule
        self.averaged = deepcopy(module).eval().requires_grad_(False)
        self.optimizers = list(_optimizers(module, schedule))
        self.step, self.spent_s = 0, 0.0
        if self._state_file.is_file():
            self._load()

    @property
    def _state_file(self) -> Path:
        return self.folder / "state.pt"

    @property
    def passed(self) -> float:
        """The part of the schedule's time that is over, 0 to 1."""
        return min(1.0, self.spent_s / (60 * self.schedule.minutes))

    def run(self, loss: Loss, evaluate: Evaluate | None = None) -> nn.Module:
        """Train until the schedule's time is over; returns the averaged module, which `state.pt` has too."""
        reported_s = saved_s = time.monotonic()
        evaluated_s = self.spent_s
        while self.passed < 1.0:
            begin_s = time.process_time()
            numbers = self._take_step(loss)
            self.spent_s += time.process_time() - begin_s
            now_s = time.monotonic()
            if now_s - reported_s >= TELL_EVERY_S:
                reported_s = now_s
                self._tell(numbers)
            if evaluate and self.spent_s - evaluated_s >= 60 * self.schedule.eval_every_minutes:
                evaluated_s = self.spent_s
                self._tell(evaluate(self.averaged), "eval")
            if now_s - saved_s >= SAVE_EVERY_S:
                saved_s = now_s
                self._save()
        self._save()
        if evaluate:
            self._tell(evaluate(self.averaged), "eval")
        return self.averaged

    def _take_step(self, loss: Loss) -> Mapping[str, float]:
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = self.schedule.rate_at(self.step, self.passed) * group["scale"]
        value, numbers = loss(self.step, self.passed)
        self.module.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.module.parameters(), self.schedule.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        keep = min(self.schedule.average, 1 - 1 / (self.step + 1))
        with torch.no_grad():
            for average, new in zip(self.averaged.parameters(), self.module.parameters(), strict=True):
                average.lerp_(new, 1 - keep)
            for kept, buffer in zip(self.averaged.buffers(), self.module.buffers(), strict=True):
                kept.copy_(buffer)
        return {"loss": float(value.detach()), **numbers}

    def _tell(self, numbers: Mapping[str, float], what: str = "train") -> None:
        left_min = self.schedule.minutes - self.spent_s / 60
        measures = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        print(
            f"{what:5}  step {self.step}  {self.spent_s / 60:.1f} min  {measures}  ETA {left_min:.0f} min", flush=True
        )
        row = {"what": what, "step": self.step, "minutes": round(self.spent_s / 60, 2), **numbers}
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _save(self) -> None:
        state = {
            "module": self.module.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "spent_s": self.spent_s,
        }
        unfinished = self._state_file.with_suffix(".new")
        torch.save(state, unfinished)
        unfinished.replace(self._state_file)  # a kill in the middle leaves the state of before

    def _load(self) -> None:
        state = torch.load(self._state_file, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.averaged.load_state_dict(state["averaged"])
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            settings = [(group["scale"], group["weight_decay"]) for group in optimizer.param_groups]
            optimizer.load_state_dict(stored)
            for group, (scale, decay) in zip(optimizer.param_groups, settings, strict=True):
                group["scale"], group["weight_decay"] = scale, decay  # what the code says now, not what was stored
        self.step, self.spent_s = int(state["step"]), float(state["spent_s"])


def saved_at(folder: Path) -> float:
    """When a training saved last, in s of the wall clock; 0 when it never has."""
    file = folder / "state.pt"
    return file.stat().st_mtime if file.is_file() else 0.0


def load_averaged_tensors(folder: Path) -> dict[str, Tensor]:
    """The averaged weights of a training, as its module names them."""
    tensors: dict[str, Tensor] = torch.load(folder / "state.pt", weights_only=True)["averaged"]
    return tensors


def load_averaged(folder: Path, module: nn.Module) -> nn.Module:
    """Give `module` the averaged weights of a training; in eval mode, without gradients."""
    module.load_state_dict(load_averaged_tensors(folder))
    return module.eval().requires_grad_(False)


def _optimizers(module: nn.Module, schedule: Schedule) -> Iterator[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices that ask for it: those between hidden states of a transformer learn from fewer
    examples with it.

    Matrices decay; norms, biases and other vectors don't. A parameter's `rate_scale` slows it down.
    """
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            decay = schedule.weight_decay if parameter.ndim > 1 else 0.0
            key = (bool(getattr(parameter, "by_muon", False)), float(getattr(parameter, "rate_scale", 1.0)), decay)
            groups.setdefault(key, []).append(parameter)
    for by_muon in sorted({key[0] for key in groups}):
        own: list[dict[str, object]] = [
            {"params": parameters, "scale": scale, "weight_decay": decay}
            for (muon, scale, decay), parameters in groups.items()
            if muon == by_muon
        ]
        if by_muon:
            yield torch.optim.Muon(own, lr=schedule.rate, adjust_lr_fn="match_rms_adamw")
        else:
            yield torch.optim.AdamW(own, lr=schedule.rate, betas=schedule.betas)
