"""TTS: what is said in a window becomes speech codes, 25 per second, for all speaking sessions in shared steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from graph.chunk import NS_PER_MS, Chunk, SessionId
from graph.costs import StageCost
from graph.kinds import attrs_of
from graph.sections import Bytes, Seed, StageOptions
from graph.stage_type import Feedback, In, Out
from graph.tail import Ack, SpeechQueue
from graph.window import Unit
from stages.inference import inference
from stages.kinds import CODES, PLAYBACK, TEXT, Said, continues_turn
from stages.session import Session
from stages.stage import Site, Stage, StageError, moving, session_seed

if TYPE_CHECKING:
    from model_shards.attention import AttentionName
    from model_shards.tts import Talker, TalkerInput, TalkerState
    from model_shards.tts_paged import PagedTalker
    from stages.tensors import Runtime


class TtsOptions(StageOptions):
    """decoding None: as the checkpoint says. attention None: the fastest that runs there.

    kv_memory: for the keys and values of all sessions of a replica, on a GPU.
    """

    decoding: Literal["greedy", "sampling"] | None = None
    seed: Seed = 0
    attention: Literal["sdpa", "varlen", "flash"] | None = None
    kv_memory_bytes: Bytes = Field(default=4 << 30, alias="kv_memory")


@dataclass(slots=True)
class _Open:
    queue: SpeechQueue[Chunk]  # text that the listener is not ready for
    talker: TalkerState
    window_ns: int


class Tts(Stage):
    """Text to speech codes: at most one window of speech per window and session, and only as far as TAIL allows.

    Text that may not be spoken yet waits in order; a window without text inside a turn ("the speech goes on") does
    not queue behind it, because the waiting text goes on by itself. So the queue is bounded by the text budget.
    seed: the codes of a session are drawn from it and the session's name; None takes the likeliest code.
    """

    text = In(TEXT)
    playback = Feedback(PLAYBACK)
    codes = Out(CODES)
    Options = TtsOptions
    component = "tts"
    cost = StageCost(40 * NS_PER_MS, 2 * NS_PER_MS, spread=0.2)
    paced_by_listener = True

    @classmethod
    def load(cls, options: TtsOptions, site: Site) -> Tts:
        from model_shards.checkpoint import load_shard
        from model_shards.config import load_config
        from model_shards.fold import fold
        from stages.tensors import attention_for, runtime

        where = runtime(site.device, options.dtype)
        attention = attention_for(site, where, options.attention, where.dtype)
        model = load_shard(site.checkpoint, "tts", dtype=where.dtype, device=where.device)
        fold(model)
        decoding = options.decoding or load_config(site.checkpoint).generation.decoding
        speaker = _paged(model, where, attention, options) if where.device.startswith("cuda") else model
        return cls(speaker, where, options.seed if decoding == "sampling" else None, attention)

    def __init__(
        self, model: Talker | PagedTalker, where: Runtime, seed: int | None, attention: AttentionName = "sdpa"
    ) -> None:
        self._model = model
        self._where = where
        self._seed = seed
        self._attention = attention
        self._open: dict[SessionId, _Open] = {}

    @property
    def runs_with(self) -> str:
        steps = f", {self._model.num_steps} codes per graph" if self._model.num_steps > 1 else ""
        return f"{self._where}, {self._attention} attention{steps}"

    def open_session(self, session: Session) -> None:
        most = self._model.max_sessions
        if most is not None and len(self._open) >= most:
            raise StageError(
                f"tts: no room for session {session.id!r}: {len(self._open)} sessions are open, and the KV cache holds "
                f"the longest turns of {most}; raise stages.tts.kv_memory"
            )
        seed = None if self._seed is None else session_seed(self._seed, session.id)
        queue = SpeechQueue[Chunk](session.playback, lead_ns=session.lead_ns, window_ns=session.window_ns)
        self._open[session.id] = _Open(queue, self._model.new_state(seed), session.window_ns)

    def close_session(self, session: SessionId) -> None:
        state = self._open.pop(session, None)
        if state is not None:
            state.talker.end_turn()

    def interrupt(self, session: SessionId, ack: Ack) -> list[Chunk]:
        state = self._open[session]
        state.queue.interrupted()
        state.talker.end_turn()
        return []

    def is_idle(self, unit: Unit) -> bool:
        return not (unit.of(self.text) or self._open[unit.session].queue)

    def may_hold(self, unit: Unit) -> bool:
        return continues_turn(TEXT.read(text) for text in unit.of(self.text))

    def has_more_to_say(self, session: SessionId) -> bool:
        return bool(self._open[session].queue)

    @inference
    def process(self, units: list[Unit]) -> list[Chunk]:
        for unit in units:  # one that can't be used is refused before anything has moved
            for said in unit.of(self.text):
                self._input(said)
        with moving(lambda: self._start_anew(units)):
            speaking = [(unit, text) for unit in units if (text := self._next_text(unit)) is not None]
            batch = [(self._open[unit.session].talker, self._input(text)) for unit, text in speaking]
            codes = self._model.generate(batch)
        return [self._say(unit, text, said) for (unit, text), said in zip(speaking, codes, strict=True)]

    def _start_anew(self, units: list[Unit]) -> None:
        """The turns that were being said end here."""
        for unit in units:
            self._open[unit.session].talker.end_turn()

    def _next_text(self, unit: Unit) -> Chunk | None:
        state = self._open[unit.session]
        for text in unit.of(self.text):
            is_silent = len(text.arrays["token_ids"]) == 0 and not TEXT.read(text).end_of_turn
            if not (is_silent and state.queue):
                state.queue.put(text)
        return state.queue.take(lambda text: state.window_ns, unit.end_ns)

    def _input(self, text: Chunk) -> TalkerInput:
        import torch

        from model_shards.tts import TalkerInput
        from stages.tensors import to_tensor

        token_ids = torch.from_numpy(np.array(text.arrays["token_ids"])).to(self._where.device)
        return TalkerInput(token_ids, to_tensor(text, "hidden", self._where), TEXT.read(text).end_of_turn)

    def _say(self, unit: Unit, text: Chunk, codes: list[int]) -> Chunk:
        state = self._open[unit.session]
        state.queue.made(state.window_ns, unit.end_ns)
        said = TEXT.read(text)
        attrs = attrs_of(Said(said.text, said.turn_start, said.end_of_turn))
        return self.codes.over(unit, arrays={"codes": np.array(codes, dtype=np.int64)}, attrs=attrs)


def _paged(model: Talker, where: Runtime, attention: AttentionName, options: TtsOptions) -> PagedTalker:
    from model_shards.attention import PAGE_SIZES
    from model_shards.kv_cache import KvCache
    from model_shards.programs import ladder_to
    from model_shards.tts_paged import PagedTalker, shape_of

    shape, page_size = shape_of(model.config), PAGE_SIZES[attention]
    cache = KvCache.of_bytes(shape, options.kv_memory_bytes, page_size, where.dtype, where.device)
    return PagedTalker(model, cache, attention, ladder_to(options.batch))
