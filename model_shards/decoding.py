"""Which token comes next: the duplex loop's rule from logits to one token per session.

The rule asks twice. First the raw logits say whether the model ends its chunk here; its own probability of ending is
thus kept. Only if it goes on, the logits are shaped (forbidden tokens, penalties, temperature, top-k, top-p) and asked
for a token. `choose` asks the host in between; `decide` is the same on a device, where the host waits once for all.

Source: MiniCPM-o 4.5 `utils.py` (StreamDecoder.decode), reference/minicpmo-4.5.md §4.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model_shards.errors import ModelError
from model_shards.noise import uniform, waits
from model_shards.sampling import draw, numbers_only
from model_shards.tokenizer import SpecialTokens

TIES: Final = 64
"""Tokens that `decide` looks at beyond the `top_k` likeliest, for those equal to the last of them: in bfloat16, whose
steps are coarse, some are. More are left out there."""


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """How text tokens are drawn. The defaults are those of the official demo (video; its audio page takes 1.05 for
    `length_penalty`).

    repetition_penalty divides the logit of every token in the last `repetition_window` sampled ones, whatever the
    logit's sign: negative logits become likelier. The checkpoint's demo speaks with it, so it stays.
    length_penalty makes <|turn_eos|> less likely above 1. top_k 0 and top_p 0 leave everything in.
    listen_prob_scale multiplies the listen token's logit; listen_top_k takes the listen token as soon as it is among so
    many likeliest. listen_means_im_end: the official code mistakes <|im_end|> for the listen token in these two.
    """

    mode: Literal["greedy", "sampling"] = "sampling"
    temperature: float = 0.7
    top_k: int = 20
    top_p: float = 0.8
    repetition_penalty: float = 1.05
    repetition_window: int = 512
    length_penalty: float = 1.1
    listen_prob_scale: float = 1.0
    listen_top_k: int | None = None
    listen_means_im_end: bool = True

    def __post_init__(self) -> None:
        if self.mode not in ("greedy", "sampling"):
            raise ModelError(f"sampling: mode is {self.mode!r}, it can be 'greedy' or 'sampling'")
        for name in ("temperature", "repetition_penalty", "length_penalty", "repetition_window"):
            if getattr(self, name) <= 0:
                raise ModelError(f"sampling: {name} is {getattr(self, name)}, it must be above 0")


class Choice(NamedTuple):
    """A token, and whether it counts as sampled for the repetition penalty of later ones."""

    token: int
    counts: bool


_NO_TOKEN: Final = torch.iinfo(torch.int64).min  # the probabilities were no numbers


def _uncounted(token: int) -> int:
    """A token that does not count as sampled, among those that do; and back."""
    return -1 - token


class DecisionRule:
    """The rule for one checkpoint and one way of sampling; keeps no state between calls."""

    def __init__(
        self,
        config: SamplingConfig,
        special: SpecialTokens,
        bad_token_ids: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        """bad_token_ids: never chosen, as <|tts_pad|>."""
        self.config = config
        self._chunk_eos = special.chunk_eos
        self._turn_eos = special.turn_eos
        self._listen = special.im_end if config.listen_means_im_end else special.listen
        self._forbidden = torch.tensor([special.tts_pad, *bad_token_ids, special.chunk_eos], device=device)

    def choose(
        self, logits: Tensor, recent: Sequence[Sequence[int]], generators: Sequence[torch.Generator]
    ) -> list[Choice]:
        """The next token of every session.

        logits: [sessions, vocab], raw. recent: what was sampled in each session so far, or the end of it.
        generators: drawn from once or twice each in "sampling" mode, on the device where they live; so a session draws
        the same alone and in any batch.
        """
        logits = logits.float()
        ends = [token == self._chunk_eos for token in self._pick(logits, generators)]
        choices = [Choice(self._chunk_eos, counts=False)] * len(ends)
        going = [row for row, end in enumerate(ends) if not end]
        if not going:
            return choices
        logits = self.shape(logits[going], [recent[row] for row in going])
        jumps = self._listens_at_once(logits)
        drawing = [index for index, jump in enumerate(jumps) if not jump]
        tokens = self._pick(self._narrow(logits[drawing]), [generators[going[index]] for index in drawing])
        for row in going:
            choices[row] = Choice(self._listen, counts=False)
        for index, token in zip(drawing, tokens, strict=True):
            choices[going[index]] = Choice(token, counts=True)
        return choices

    def decide(self, logits: Tensor, seeds: Tensor, draws: Tensor, recent: Tensor) -> Tensor:
        """As `choose`, without a look at a value: [sessions] int64, which `choices` reads.

        seeds, draws: [sessions], see model_shards/noise.py; a decision is one draw. recent: [sessions, any], see
        `recent_row`. The first question takes a number for the end's own probability, the second one for each token
        that is left; so the chances are those of `choose`.
        """
        logits = logits.float()
        shaped = self._shape(logits, recent)
        chosen = self._likeliest(shaped, seeds, draws)
        if self.config.listen_top_k is not None:
            rank = (shaped > shaped[:, self._listen, None]).sum(-1)
            chosen = chosen.masked_fill(rank < self.config.listen_top_k, _uncounted(self._listen))
        return chosen.masked_fill(self._ends(logits, seeds, draws), _uncounted(self._chunk_eos))

    def choices(self, decided: Tensor) -> list[Choice]:
        """What `decide` gave, on the host. Raises ModelError for NaN."""
        values = numbers_only(decided.tolist(), _NO_TOKEN)
        return [Choice(value, True) if value >= 0 else Choice(_uncounted(value), False) for value in values]

    def recent_row(self, recent: Sequence[int], row: np.ndarray) -> None:
        """What was sampled, as `decide` takes it: the end of it, and then what can't be chosen anyway. row: [any]."""
        kept = recent[-min(len(row), self.config.repetition_window) :]
        row[: len(kept)] = kept
        row[len(kept) :] = self._chunk_eos

    def _ends(self, logits: Tensor, seeds: Tensor, draws: Tensor) -> Tensor:
        if self.config.mode == "greedy":
            return logits.argmax(-1) == self._chunk_eos
        place = torch.full((1,), logits.shape[1], device=logits.device)  # behind all tokens
        return uniform(seeds, draws, place)[:, 0] < logits.softmax(-1)[:, self._chunk_eos]

    def _likeliest(self, shaped: Tensor, seeds: Tensor, draws: Tensor) -> Tensor:
        config = self.config
        if config.mode == "greedy":
            return shaped.argmax(-1)
        kept = min(config.top_k + TIES, shaped.shape[1]) if config.top_k > 0 else shaped.shape[1]
        values, tokens = shaped.topk(kept)
        values = values / config.temperature
        if config.top_k > 0:
            values = values.masked_fill(values < values[:, min(config.top_k, kept) - 1, None], -torch.inf)
        if config.top_p > 0.0:
            values = values.masked_fill(_beyond(values, config.top_p), -torch.inf)
        best, place = (values.softmax(-1) / waits(seeds, draws, tokens)).max(-1)
        return tokens.gather(1, place[:, None])[:, 0].masked_fill(best.isnan(), _NO_TOKEN)

    def shape(self, logits: Tensor, recent: Sequence[Sequence[int]]) -> Tensor:
        """A copy of the logits [sessions, vocab] with what is forbidden at -inf and all penalties applied."""
        rows = np.empty((len(recent), max(map(len, recent), default=0)), dtype=np.int64)
        for tokens, row in zip(recent, rows, strict=True):
            self.recent_row(tokens, row)
        return self._shape(logits, torch.from_numpy(rows).to(logits.device))

    def _shape(self, logits: Tensor, recent: Tensor) -> Tensor:
        config = self.config
        logits = logits.index_fill(1, self._forbidden, -torch.inf)
        if config.repetition_penalty != 1.0:  # a token that came twice is written twice, with one value
            logits.scatter_(1, recent, logits.gather(1, recent) / config.repetition_penalty)
        turn_eos = logits[:, self._turn_eos]
        longer, shorter = turn_eos / config.length_penalty, turn_eos * config.length_penalty
        logits[:, self._turn_eos] = torch.where(turn_eos > 0, longer, shorter)
        logits[:, self._listen] *= config.listen_prob_scale
        return logits

    def _listens_at_once(self, logits: Tensor) -> list[bool]:
        if self.config.listen_top_k is None:
            return [False] * len(logits)
        rank = (logits > logits[:, self._listen, None]).sum(-1)
        jumps: list[bool] = (rank < self.config.listen_top_k).tolist()
        return jumps

    def _narrow(self, logits: Tensor) -> Tensor:
        if self.config.mode == "greedy" or not len(logits):
            return logits
        return keep_likeliest(logits / self.config.temperature, self.config.top_k, self.config.top_p)

    def _pick(self, logits: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
        if self.config.mode == "greedy" or not len(logits):
            tokens: list[int] = logits.argmax(-1).tolist()
            return tokens
        return draw(logits.softmax(-1), generators)


def keep_likeliest(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Leave the `top_k` likeliest tokens and those equal to the last of them; of these the likeliest which together
    pass `top_p`, at least one; the rest becomes -inf. [sessions, vocab]. 0 switches either off.
    """
    kept = logits.shape[1]
    if top_k > 0:
        last = logits.topk(min(top_k, kept)).values[:, -1:]
        logits = logits.masked_fill(logits < last, -torch.inf)
        kept = int((logits >= last).sum(-1).max())  # saves sorting the whole vocabulary
    if top_p > 0.0:
        values, order = logits.topk(kept)
        cut = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, _beyond(values, top_p))
        logits = logits.masked_fill(cut, -torch.inf)
    return logits


def _beyond(values: Tensor, top_p: float) -> Tensor:
    """Which of the logits [sessions, any], the likeliest first, come after those that together pass `top_p`."""
    before = values.softmax(-1).cumsum(-1).roll(1, -1)
    before[:, 0] = 0.0
    return before > top_p
