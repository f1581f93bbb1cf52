"""Which token comes next: the duplex loop's rule from logits to one token per session.

The rule asks twice. First the raw logits say whether the model ends its chunk here; its own probability of ending is
thus kept. Only if it goes on, the logits are shaped (forbidden tokens, penalties, temperature, top-k, top-p) and asked
for a token.

Source: MiniCPM-o 4.5 `utils.py` (StreamDecoder.decode), reference/minicpmo-4.5.md §4.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from model_shards.errors import ModelError
from model_shards.sampling import draw
from model_shards.tokenizer import SpecialTokens


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

    def shape(self, logits: Tensor, recent: Sequence[Sequence[int]]) -> Tensor:
        """A copy of the logits [sessions, vocab] with what is forbidden at -inf and all penalties applied."""
        config = self.config
        logits = logits.index_fill(1, self._forbidden, -torch.inf)
        if config.repetition_penalty != 1.0:
            distinct = enumerate(set(tokens[-config.repetition_window :]) for tokens in recent)
            places = [row * logits.shape[1] + token for row, tokens in distinct for token in tokens]
            logits.view(-1)[torch.tensor(places, dtype=torch.int64, device=logits.device)] /= config.repetition_penalty
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
        before = values.softmax(-1).cumsum(-1).roll(1, -1)
        before[:, 0] = 0.0
        cut = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before > top_p)
        logits = logits.masked_fill(cut, -torch.inf)
    return logits
