"""The talker outside duplex: speech of a turn whose text comes in pieces of any length (chat, half-duplex).

Rule: the attention types differ only in what they do to a session's cache and condition before the decoder is called;
decoding itself is `Talker.generate_chunks`, for all sessions at once.

    full_attention      the cache of the whole turn
    sliding_window      the latest positions only; position numbers go on
    sliding_recompute   no cache: the chunk before (text and codes) is read again in front of the new one
    reindex             the first and the last chunk; the last one's keys are turned to follow the first

Unlike in a duplex unit the last draw is given out when it is a code, though it was not fed: the cache is one shorter
than the position then. The official generator does the same, and the next chunk's positions depend on it.

Source: MiniCPM-o 4.5 `utils.py` (TTSStreamingGenerator) and `modeling_minicpmo.py` (MiniCPMTTS.interleaved_generate).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from model_shards.errors import ModelError
from model_shards.sampling import REPETITION_WINDOW, Sampling
from model_shards.tts import ChunkRequest, Spoken, Talker, TalkerState, rope, rotate

AttentionType = Literal["full_attention", "sliding_window", "sliding_recompute", "reindex"]


@dataclass(frozen=True, slots=True)
class SpokenChunk:
    """One piece of text as it was spoken. condition: [rows, hidden_size] with its closing rows."""

    condition: Tensor
    codes: list[int]

    def __len__(self) -> int:
        return self.condition.shape[0] + len(self.codes)


@dataclass(slots=True)
class SpeechState:
    """What a session's turn keeps; a new turn takes a new one."""

    talker: TalkerState
    recent: list[int] = field(default_factory=list)  # the latest codes, for the repetition penalty
    buffer: list[int] = field(default_factory=list)  # codes which don't fill a block yet
    first_length: int = 0  # condition and codes of the turn's first chunk
    last: SpokenChunk | None = None


@dataclass(frozen=True, slots=True)
class SpeechInput:
    """A piece of text. condition: [n, hidden_size] from `Talker.condition`; the closing rows are added here."""

    condition: Tensor
    text_finished: bool = False


@dataclass(frozen=True, slots=True)
class Block:
    """Codes for the vocoder: a full block, or what is left (also nothing) when the turn is over."""

    codes: list[int]
    last: bool


class SpeechStream:
    """Speaks text that arrives in pieces. It holds settings only; sessions are `SpeechState`s."""

    def __init__(self, talker: Talker, attention: str, sampling: Sampling, block_size: int = 25) -> None:
        if attention not in get_args(AttentionType):
            raise ModelError(f"talker: attention type {attention!r}; it is one of {', '.join(get_args(AttentionType))}")
        self.talker = talker
        self.attention = attention
        self.sampling = sampling
        self.block_size = block_size
        self.window = talker.config.sliding_window_tokens if attention == "sliding_window" else None

    def speak(self, batch: Sequence[tuple[SpeechState, SpeechInput]], max_steps: int = 500) -> list[list[Block]]:
        """Speak one piece of text of each session, up to EOS or `max_steps` codes; gives the blocks that are full.

        A turn ends with a block marked `last`. When `max_steps` cuts off the last piece of a turn there is none: what
        is left stays in the session's buffer.
        """
        closed = [self._close(piece) for _, piece in batch]
        requests = [self._request(state, rows, max_steps) for (state, _), rows in zip(batch, closed, strict=True)]
        spoken = self.talker.generate_chunks(requests, self.sampling, self.window)
        blocks: list[list[Block]] = []
        for (state, piece), rows, chunk in zip(batch, closed, spoken, strict=True):
            codes = self._codes(state, chunk)
            self._remember(state, SpokenChunk(rows, codes))
            blocks.append(self._blocks(state, codes, piece.text_finished and chunk.last_draw == self.talker.eos))
        return blocks

    def _close(self, piece: SpeechInput) -> Tensor:
        config = self.talker.config
        closing = [config.text_eos_token_id] if piece.text_finished else []
        rows = [self.talker.text_row(token_id) for token_id in [*closing, config.audio_bos_token_id]]
        return torch.cat([piece.condition, *rows])

    def _request(self, state: SpeechState, rows: Tensor, max_steps: int) -> tuple[TalkerState, ChunkRequest]:
        if self.attention == "sliding_recompute" and state.last is not None:
            rows = torch.cat([state.last.condition, code_rows(self.talker, state.last.codes), rows])
            state.talker.end_turn()
        if self.attention == "reindex" and state.last is not None:
            reindex(state.talker, state.first_length, len(state.last), self.talker.config.rope_theta)
        return state.talker, ChunkRequest(rows, 0, max_steps, tuple(state.recent))

    def _codes(self, state: SpeechState, chunk: Spoken) -> list[int]:
        """The codes of a call, with the draw that was one too many; it takes a position, but no place in the cache."""
        if chunk.last_draw == self.talker.eos:
            return chunk.codes
        state.talker.next_position += 1
        return [*chunk.codes, chunk.last_draw]

    def _remember(self, state: SpeechState, chunk: SpokenChunk) -> None:
        if state.last is None:
            state.first_length = len(chunk)
        state.last = chunk
        state.recent = [*state.recent, *chunk.codes][-REPETITION_WINDOW:]

    def _blocks(self, state: SpeechState, codes: list[int], over: bool) -> list[Block]:
        waiting, size = state.buffer + codes, self.block_size
        full = len(waiting) // size * size
        blocks = [Block(waiting[start : start + size], last=False) for start in range(0, full, size)]
        state.buffer = waiting[full:]
        if over:
            blocks.append(Block(state.buffer, last=True))
            state.buffer = []
        return blocks


def code_rows(talker: Talker, codes: Sequence[int]) -> Tensor:
    """Codes as the decoder reads them: [len(codes), hidden_size]."""
    table = talker.tts.emb_code[0]
    rows: Tensor = table(torch.tensor(codes, dtype=torch.int64, device=talker.tts.emb_text.weight.device))
    return rows


def reindex(state: TalkerState, first: int, last: int, theta: float) -> None:
    """Keep the `first` oldest and the `last` newest positions of a cache, if it has more than both.

    The newest keys are turned from where they were to behind the oldest. The official code turns the i-th of them by i
    positions too many; kept, as its numbers have it (no released mode uses this type).
    """
    if state.kv is None or state.kv.shape[3] <= first + last:
        return
    oldest, newest = state.kv[:, :, :, :first], state.kv[:, :, :, -last:]
    moved = torch.arange(last, device=state.kv.device) + first - (state.kv.shape[3] - last)
    cos, sin = rope(moved, newest.shape[-1], theta)
    keys = rotate(newest[:, :1], cos.to(newest.dtype), sin.to(newest.dtype))
    state.kv = torch.cat([oldest, torch.cat([keys, newest[:, 1:]], dim=1)], dim=3)
    state.next_position = first + last


def speak_interleaved(
    talker: Talker,
    conditions: Sequence[Tensor],
    attention: str,
    sampling: Sampling,
    generator: torch.Generator | None = None,
    max_steps: int = 500,
) -> list[int]:
    """Speak a whole text that is there in pieces, each [rows, hidden_size] with its closing rows; gives all codes.

    With sliding_recompute the cache is dropped now and then and the latest pieces are read again; any other type keeps
    the cache of the turn (sliding_window, which the official code can't run here, is refused).
    """
    config, state = talker.config, TalkerState(generator)
    if attention == "sliding_window":
        raise ModelError("talker: pieces of a whole text can't be spoken with sliding_window")
    stride = config.window_size - config.recomputed_chunks
    chunks: list[SpokenChunk] = []
    for index, condition in enumerate(conditions):
        rows = condition
        again = index >= config.window_size and (index - config.recomputed_chunks) % stride == 0
        if attention == "sliding_recompute" and again:
            earlier = [(old.condition, code_rows(talker, old.codes)) for old in chunks[-config.recomputed_chunks :]]
            rows = torch.cat([part for pair in earlier for part in pair] + [condition])
            state.end_turn()
        (chunk,) = talker.generate_chunks([(state, ChunkRequest(rows, 0, max_steps))], sampling)
        chunks.append(SpokenChunk(condition, chunk.codes))
    return [code for spoken in chunks for code in spoken.codes]
