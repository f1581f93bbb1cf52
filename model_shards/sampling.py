"""How the talker turns logits into a speech code: penalty, nucleus, draw. The text decoder shares the draw.

Every function works on a batch of rows, and a row's result is its own: no row sees another.

Source: MiniCPM-o 4.5 `modeling_minicpmo.py` (CustomRepetitionPenaltyLogitsProcessorRepeat, gen_logits); the top-p and
top-k rules are those of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_shards.errors import ModelError

REPETITION_WINDOW = 16
NO_CODE = -1
_NO_CHOICE = -2
MIN_KEPT = 3  # codes which top-p and top-k always leave


@dataclass(frozen=True, slots=True)
class Sampling:
    """How codes are drawn. `top_p` 1 and `top_k` 0 leave everything in, as a duplex session does."""

    temperature: float
    repetition_penalty: float
    top_p: float = 1.0
    top_k: int = 0


def penalise_repetition(logits: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Make codes of the last 16 steps less likely, by `penalty` once per occurrence, whatever the logit's sign.

    logits: [batch, codes] float32. history: [batch, steps] int64, oldest first; NO_CODE fills shorter rows anywhere.
    """
    recent = history[:, -REPETITION_WINDOW:]
    recent = recent.masked_fill(recent == NO_CODE, logits.shape[1])
    counts = logits.new_zeros(logits.shape[0], logits.shape[1] + 1)
    counts = counts.scatter_add_(1, recent, torch.ones_like(recent, dtype=logits.dtype))[:, :-1]
    alpha = penalty**counts
    return torch.where(logits < 0, logits * alpha, logits / alpha)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Leave the likeliest codes that together reach `top_p` (at least 3), the rest becomes -inf: [batch, codes]."""
    ascending, order = logits.sort(dim=-1)
    drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - top_p
    drop[:, -MIN_KEPT:] = False
    return logits.masked_fill(drop.scatter(1, order, drop), -torch.inf)


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Leave the `top_k` likeliest codes (at least 3, and all equal to the last of them): [batch, codes]."""
    kept = min(max(top_k, MIN_KEPT), logits.shape[1])
    return logits.masked_fill(logits < logits.topk(kept).values[:, -1:], -torch.inf)


def shape_logits(logits: Tensor, history: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, penalty, top-p and top-k, in this order: [batch, codes] float32.

    history: [batch, steps] int64, the last 16 codes at most; NO_CODE fills shorter rows on their left. A row with no
    history gets the temperature only.
    """
    plain = logits.float() / sampling.temperature
    if history.shape[1] == 0:
        return plain
    shaped = plain
    if sampling.repetition_penalty != 1.0:
        shaped = penalise_repetition(plain, history, sampling.repetition_penalty)
    if sampling.top_p < 1.0:
        shaped = keep_top_p(shaped, sampling.top_p)
    if sampling.top_k > 0:
        shaped = keep_top_k(shaped, sampling.top_k)
    return torch.where(history[:, -1:] == NO_CODE, plain, shaped)


def draw(probs: Tensor, generators: Sequence[torch.Generator | None]) -> list[int]:
    """One index per row of [batch, choices]: the likeliest where the generator is None, else drawn with it.

    A row is drawn on its generator's device and alone, so that its choices depend neither on the batch nor, with a CPU
    generator, on where the model runs. Raises ModelError for NaN.
    """
    probs = probs.clone()
    for row, generator in enumerate(generators):
        if generator is None:
            continue
        # What torch.multinomial does for one draw, without its checks and a call per row: the likeliest of the
        # probabilities, each over an exponential number of its own.
        waits = torch.empty(probs.shape[1:], dtype=probs.dtype, device=generator.device)
        probs[row] /= waits.exponential_(generator=generator).to(probs.device)
    best, choices = probs.max(dim=-1)
    return numbers_only(choices.masked_fill(best.isnan(), _NO_CHOICE).tolist(), _NO_CHOICE)


def numbers_only(chosen: list[int], no_choice: int) -> list[int]:
    """What was chosen. Raises ModelError where one is `no_choice`, which stands for NaN."""
    if no_choice in chosen:
        raise ModelError("sampling: the probabilities are no numbers: the weights or what was fed hold NaN or infinity")
    return chosen
