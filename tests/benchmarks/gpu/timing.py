"""How long a call takes: by the device's own clock where there is one, once it is warm."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor

from model_shards.programs import Captured

NUM_WARM_UP: Final = 2
NUM_CALLS: Final = 20
Call = Callable[[], Any]


def timed_ms(call: Call, device: str) -> float:
    """Of one call."""
    if device != "cuda":
        begin_s = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - begin_s)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def times_ms(call: Call, device: str, limit_s: float, num_calls: int = NUM_CALLS) -> list[float]:
    """Of so many calls, or fewer when the time is over, but of one at least; those that warm up are not among them."""
    until_s = time.monotonic() + limit_s
    for _ in range(NUM_WARM_UP):
        call()
    durations_ms: list[float] = []
    while not durations_ms or (len(durations_ms) < num_calls and time.monotonic() < until_s):
        durations_ms.append(timed_ms(call, device))
    return durations_ms


@contextmanager
def without_programs(device: str) -> Iterator[None]:
    """In here what was captured is called as it is written, kernel by kernel. device: where programs have their
    inputs, whose rows may come from the host."""

    def eager(program: Captured, *inputs: Tensor) -> tuple[Tensor, ...]:
        return program._function(*(tensor.to(device, non_blocking=True) for tensor in inputs))

    with patch.object(Captured, "__call__", eager):
        yield


class Counted:
    """How often programs are called while this is open."""

    def __enter__(self) -> Counted:
        self.num_calls = 0
        captured = Captured.__call__

        def counting(program: Captured, *inputs: Any) -> Any:
            self.num_calls += 1
            return captured(program, *inputs)

        self._patch = patch.object(Captured, "__call__", counting)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


def peak_gib(device: str) -> float | None:
    """Of the device's memory since `forget_peak`."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if device == "cuda" else None


def forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
