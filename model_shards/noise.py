"""Random numbers that a program on a device makes itself, for many sessions at once: each a hash of whose they are.

A torch.Generator draws for one session per call: for 64 sessions that is more launches than a decode step has, and a
captured program can't call it. A number here depends on the session's seed, on how many draws the session has made,
and on its place in the draw, and on nothing else: neither on the batch nor on how many steps a launch has.

Rule: sessions draw so where the draw is part of a program on a device. Elsewhere they draw from a generator.

Source: the mixing function of splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

# Of splitmix64, as int64: torch's arithmetic wraps around.
_GAMMA: Final = 0x9E3779B97F4A7C15 - (1 << 64)
_FACTORS: Final = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
_BITS: Final = 23  # of a number: half a step beside 0 and 1 is exact in float32


def uniform(seeds: Tensor, draws: Tensor, places: Tensor) -> Tensor:
    """Numbers in (0, 1), float32 [n, m]. seeds, draws: [n] int64. places: int64 [m] or [n, m]."""
    own = _mixed(seeds + draws * _GAMMA)
    bits = _shifted(_mixed(own[:, None] + places * _GAMMA), 64 - _BITS)
    return (bits.to(torch.float32) + 0.5) * 2.0**-_BITS


def waits(seeds: Tensor, draws: Tensor, places: Tensor) -> Tensor:
    """Exponential numbers, as `uniform`. The largest of probabilities over their waits is a draw from them."""
    return -uniform(seeds, draws, places).log()


def _mixed(state: Tensor) -> Tensor:
    state = (state ^ _shifted(state, 30)) * _FACTORS[0]
    state = (state ^ _shifted(state, 27)) * _FACTORS[1]
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, num_bits: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (state >> num_bits) & ((1 << (64 - num_bits)) - 1)
