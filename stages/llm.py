"""LLM: what was seen and heard in a window, in this order, and then: listen, or say so much as TAIL allows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from graph.chunk import NS_PER_MS, Chunk, Scalar, SessionId
from graph.costs import StageCost
from graph.kinds import attrs_of
from graph.ladder import holds_window
from graph.sections import Bytes, Section, Seed, StageOptions, or_empty
from graph.stage_type import Feedback, In, Out
from graph.tail import MAX_TEXT_TOKENS, Ack, TextBudget
from graph.window import Unit
from stages.audio_encoder import VOICE_ROLE
from stages.events import SAID_EVENT
from stages.inference import inference
from stages.kinds import AUDIO, EVENTS, IMAGE, PLAYBACK, TEXT, Said
from stages.session import Session
from stages.stage import BatchLost, Site, Stage, StageError, session_seed

if TYPE_CHECKING:
    import torch

    from model_shards.config import GenerationConfig
    from model_shards.duplex import DuplexConfig, DuplexEngine, DuplexSession, Prompt, UnitInput, UnitOutput
    from model_shards.kv_cache import KvCache
    from model_shards.tokenizer import Tokenizer
    from stages.tensors import Runtime

MAX_VOICE_TOKENS = 320  # 30 s of reference voice at 10 per second, and the prompt's own control tokens


class ContextOptions(Section):
    """What is forgotten when a session's context is full. None: as the checkpoint says.

    basic: the oldest units go once more than `high` tokens are cached, until `low` are left. context: the oldest units
    go, the model's own words stay. (The official default is to forget nothing, and to stop when the context is full.)
    """

    mode: Literal["basic", "context"] = "basic"
    high: Annotated[int, Field(ge=1, le=40960)] | None = None
    low: Annotated[int, Field(ge=0, le=40960)] | None = None

    @model_validator(mode="after")
    def _go_together(self) -> ContextOptions:
        if (self.high is None) != (self.low is None):
            other = "high" if self.high is None else "low"
            raise ValueError(f"high and low go together; write {other}, too, or neither")
        if self.high is not None and self.low is not None and self.low >= self.high:
            raise ValueError(f"low ({self.low}) is not less than high ({self.high})")
        return self


class LlmOptions(StageOptions):
    """decoding None: as the checkpoint says. force_listen: the session listens for this many windows at first.

    attention None: the fastest that runs there, see model_shards/attention.py. kv_dtype auto: as the model computes.
    """

    decoding: Literal["greedy", "sampling"] | None = None
    seed: Seed = 0
    system_prompt: str = Field(default="Streaming Omni Conversation.", max_length=20_000)
    kv_memory_bytes: Bytes = Field(default=512 << 20, alias="kv_memory")
    kv_dtype: Literal["auto", "fp8"] = "auto"
    attention: Literal["sdpa", "varlen", "flash"] | None = None
    context: Annotated[ContextOptions, or_empty] = ContextOptions()
    force_listen: int = Field(default=3, ge=0, le=3600)


@dataclass(slots=True)
class _Open:
    session: Session
    duplex: DuplexSession
    budget: TextBudget
    begun: bool = False
    cut: bool = False  # the listener barged in: close the turn with the next unit
    speaking: bool = False
    last: Chunk | None = None  # what was said in the last window of the turn
    num_tokens: int = 0  # allowed in the last window
    num_skipped: int = 0  # pictures of the last window for which the unit had no room
    held: tuple[UnitInput, ...] = ()  # windows that go with the next one
    seen: tuple[list[torch.Tensor], ...] = ()  # the last picture

    @property
    def mark(self) -> tuple[int, int]:
        """How far its context has come."""
        return self.duplex.sequence.length, self.duplex.num_units


class Llm(Stage):
    """Embeddings to text: token_ids [n], hidden [n, dim], and what they read, for each window in a turn.

    A window takes so many pictures as the model's unit has room for, the newest; an event tells of the others.
    needs_pictures: a window without a picture is shown the last one again, for the model is lost without.
    system_prompt: the text of it; the voice comes from the audio encoder with a session's first window.
    A session for which the KV cache has no room, however long it will live, is refused when it opens, never later.

    Raises StageError for a system prompt that leaves no room for windows.
    """

    image = In(IMAGE, optional=True)
    audio = In(AUDIO, optional=True)
    playback = Feedback(PLAYBACK)
    text = Out(TEXT)
    events = Out(EVENTS)
    Options = LlmOptions
    component = "llm"
    cost = StageCost(20 * NS_PER_MS, 3 * NS_PER_MS, spread=0.2)
    can_be_off = False
    is_needed = True
    ends_windows = True
    paced_by_listener = True

    @classmethod
    def load(cls, options: LlmOptions, site: Site) -> Llm:
        from model_shards.attention import PAGE_SIZES
        from model_shards.checkpoint import load_shard
        from model_shards.config import load_config
        from model_shards.duplex import DuplexEngine
        from model_shards.fold import fold
        from model_shards.kv_cache import FP8, KvCache, KvShape
        from model_shards.tokenizer import Tokenizer
        from stages.tensors import attention_for, runtime

        config = load_config(site.checkpoint)
        has_codes = options.dtype == "auto" and config.llm.quantization is not None  # their kernels are for bfloat16
        where = runtime(site.device, "bfloat16" if has_codes else options.dtype)
        kv_dtype = FP8 if options.kv_dtype == "fp8" else where.dtype
        attention = attention_for(site, where, options.attention, kv_dtype)  # before weights are read
        model = load_shard(site.checkpoint, "llm", dtype=where.dtype, device=where.device)
        model.attention = attention
        fold(model)
        tokenizer = Tokenizer.load(site.checkpoint)
        shape, page_size = KvShape.of(model.config), PAGE_SIZES[attention]
        cache = KvCache.of_bytes(shape, options.kv_memory_bytes, page_size, kv_dtype, where.device)
        return cls(
            DuplexEngine(model, cache, tokenizer, duplex_config(options, config.generation)),
            cache,
            tokenizer,
            where,
            system_prompt=options.system_prompt,
            seed=options.seed,
            needs_pictures=config.generation.needs_pictures,
            captured=options.batch if where.device.startswith("cuda") else 0,
        )

    def __init__(
        self,
        engine: DuplexEngine,
        cache: KvCache,
        tokenizer: Tokenizer,
        where: Runtime,
        *,
        system_prompt: str,
        seed: int,
        needs_pictures: bool = False,
        captured: int = 0,
    ) -> None:
        """captured: decode steps are graphs for so many sessions; 0: they are not."""
        self._needs_pictures = needs_pictures
        self._engine = engine
        self._cache = cache
        self._tokenizer = tokenizer
        self._where = where
        self._system_prompt = system_prompt
        self._seed = seed
        max_tokens = self._max_session_tokens()
        if captured:
            engine.capture(max_tokens, captured)
        self._session_pages = cache.pages_for(max_tokens)
        self._num_pages = cache.num_free_pages
        self._open: dict[SessionId, _Open] = {}

    @property
    def runs_with(self) -> str:
        kv_dtype = "" if self._cache.dtype == self._where.dtype else ", keys and values in fp8"
        return f"{self._where}, {self._engine.runs_with}{kv_dtype}"

    def open_session(self, session: Session) -> None:
        needed = (len(self._open) + 1) * self._session_pages - self._engine.num_saved_pages
        if needed > self._num_pages:
            raise StageError(
                f"llm: no room for session {session.id!r}: a session may take {self._session_pages} pages of the KV "
                f"cache, {len(self._open)} sessions are open, and it has {self._num_pages}; "
                "raise stages.llm.kv_memory or lower stages.llm.context.high"
            )
        budget = TextBudget(session.playback, lead_ns=session.lead_ns, window_ns=session.window_ns)
        duplex = self._engine.new_session(session_seed(self._seed, session.id))
        self._open[session.id] = _Open(session, duplex, budget)

    def close_session(self, session: SessionId) -> None:
        state = self._open.pop(session, None)
        if state is not None:
            self._engine.end(state.duplex)

    def interrupt(self, session: SessionId, ack: Ack) -> list[Chunk]:
        state = self._open[session]
        state.budget.interrupted(ack)
        state.cut = True
        return []

    def drain(self, session: SessionId) -> list[Chunk]:
        """The end of a turn which the session's end cuts off, so that what was said of it is heard."""
        state = self._open[session]
        if state.last is None or not state.speaking or state.cut or not state.session.speech:
            return []
        arrays = {name: array[:0] for name, array in state.last.arrays.items()}
        said = replace(TEXT.read(state.last), text="", end_of_turn=True, turn_start=False)
        attrs = attrs_of(said)
        return [replace(state.last, start_ns=state.last.end_ns, arrays=arrays, attrs=attrs)]

    @inference
    def process(self, units: list[Unit]) -> list[Chunk]:
        self._begin([unit for unit in units if not self._open[unit.session].begun])
        before = {unit.session: (replace(state := self._open[unit.session]), state.mark) for unit in units}
        try:
            going = [(unit, window) for unit in units if (window := self._input(unit)) is not None]
            outputs = self._engine.step([(self._open[unit.session].duplex, window) for unit, window in going])
        except Exception as error:
            self._open |= {session: state for session, (state, _) in before.items()}
            moved = [session for session, (state, mark) in before.items() if state.mark != mark]
            if not moved:  # the engine refuses a unit before it begins any
                raise
            self._start_anew(moved)
            raise BatchLost(str(error)) from error
        skipped = [chunk for unit in units for chunk in self._tell_skipped(unit)]
        said = [chunk for (unit, _), output in zip(going, outputs, strict=True) for chunk in self._say(unit, output)]
        return skipped + said

    def _start_anew(self, sessions: list[SessionId]) -> None:
        """Nobody knows what of a unit is in their context: it is forgotten, and they begin with the system prompt."""
        for session in sessions:
            state = self._open[session]
            self._engine.end(state.duplex)
            duplex = self._engine.new_session(session_seed(self._seed, session))
            self._open[session] = _Open(state.session, duplex, state.budget)

    def text_budget(self, session: SessionId) -> int:
        """Tokens that were allowed in the session's last window."""
        return self._open[session].num_tokens

    def kv_usage(self) -> float:
        """Share of the KV cache's pages in use."""
        return self._cache.num_used_pages / self._cache.num_pages

    def _max_session_tokens(self) -> int:
        prompt = len(self._tokenizer.encode(self._system_prompt)) + MAX_VOICE_TOKENS
        window = self._engine.config.window
        if window.mode == "basic" and prompt >= window.low_tokens:
            raise StageError(
                f"llm: system prompt and voice may take {prompt} tokens, which leaves no room for windows below "
                f"stages.llm.context.low ({window.low_tokens}); shorten stages.llm.system_prompt, or raise low and high"
            )
        tokens = self._engine.max_session_tokens(prompt)
        if tokens is None:
            raise StageError("llm: a session that forgets nothing has no bound; set stages.llm.context.mode: basic")
        return tokens

    def _begin(self, units: list[Unit]) -> None:
        self._engine.begin([(self._open[unit.session].duplex, self._prompt(unit)) for unit in units])
        for unit in units:
            self._open[unit.session].begun = True

    def _prompt(self, unit: Unit) -> Prompt:
        from model_shards.duplex import Prompt
        from stages.tensors import to_tensor

        special = self._tokenizer.special
        sound = unit.of(self.audio)
        voices = [to_tensor(c, "embeds", self._where) for c in sound if AUDIO.read(c).role == VOICE_ROLE]
        text = self._tokenizer.encode(f"system\n{self._system_prompt}")
        if not voices:
            return Prompt([special.im_start, *text, special.im_end])
        line_break = self._tokenizer.encode("\n")
        prefix = [special.im_start, *text, *line_break, special.audio_start]
        return Prompt(prefix, [special.audio_end, special.im_end], voices[0])

    def _input(self, unit: Unit) -> UnitInput | None:
        """What the engine is given; None where the window is held for the next one."""
        import torch

        from model_shards.duplex import UnitInput
        from stages.tensors import to_tensor

        state = self._open[unit.session]
        # Without speech nobody listens, and nothing can run ahead of the ear: the model paces itself.
        state.num_tokens = state.budget.tokens(unit.end_ns) if state.session.speech else MAX_TEXT_TOKENS
        if "listen_only" in state.session.taken and not state.duplex.turn_open:
            state.num_tokens = 0
        cut, state.cut = state.cut, False
        held, state.held = state.held, ()
        sound = [chunk for chunk in unit.of(self.audio) if AUDIO.read(chunk).role != VOICE_ROLE]
        heard = [to_tensor(chunk, "embeds", self._where) for chunk in sound]
        seen = [list(to_tensor(chunk, "embeds", self._where)) for chunk in unit.of(self.image)]
        if self._needs_pictures:
            seen = seen or list(state.seen)
            state.seen = tuple(seen[-1:])
        audio = torch.cat(heard) if heard else None
        window = UnitInput((), audio, max_text_tokens=state.num_tokens, force_listen=cut, before=held)
        fitting = _fitting(seen, self._engine.config.max_unit_tokens - self._engine.num_tokens(window))
        state.num_skipped = len(seen) - len(fitting)
        window = replace(window, images=fitting)
        if self._is_held(state, unit, window):
            state.held = (*held, replace(window, before=()))
            return None
        return window

    def _is_held(self, state: _Open, unit: Unit, window: UnitInput) -> bool:
        """As `holds_window` says, while there is room; within a turn none is."""
        overdue = unit.overdue and state.session.speech  # where nobody listens, nobody gave up
        num_held = len(window.before)
        if not holds_window(state.session.taken, unit.session, unit.index, num_held=num_held, overdue=overdue):
            return False
        leaves_room = self._engine.num_tokens(window) <= self._engine.config.max_unit_tokens // 2
        return leaves_room and not (state.duplex.turn_open or window.force_listen)

    def _tell_skipped(self, unit: Unit) -> list[Chunk]:
        num_skipped = self._open[unit.session].num_skipped
        if not num_skipped:
            return []
        counted: dict[str, Scalar] = {"window": unit.index, "num_pictures": num_skipped}
        return [self.events.event(unit.session, unit.start_ns, "pictures_skipped", **counted)]

    def _say(self, unit: Unit, output: UnitOutput) -> list[Chunk]:
        state = self._open[unit.session]
        if output.is_listen:
            state.speaking = False
            return []
        from stages.tensors import to_arrays

        state.speaking = state.speaking or output.turn_start
        if not state.speaking:
            return []
        state.speaking = not output.end_of_turn
        state.budget.generated(len(output.token_ids), end_of_turn=output.end_of_turn)
        hidden, dtype = to_arrays("hidden", output.hidden)
        arrays = {"token_ids": np.array(output.token_ids, dtype=np.int64), **hidden}
        attrs = attrs_of(Said(output.text, output.turn_start, output.end_of_turn))
        text = self.text.over(unit, arrays=arrays, attrs={**attrs, **dtype})
        state.last = text
        turn: dict[str, Scalar] = {"text": output.text, "end_of_turn": output.end_of_turn}
        return [text, self.events.event(unit.session, unit.end_ns, SAID_EVENT, window=unit.index, **turn)]


def duplex_config(options: LlmOptions, generation: GenerationConfig) -> DuplexConfig:
    """How sessions behave: as the user says, else as the checkpoint does."""
    from model_shards.context import WindowConfig
    from model_shards.decoding import SamplingConfig
    from model_shards.duplex import DuplexConfig

    high, low = options.context.high, options.context.low
    return DuplexConfig(
        sampling=SamplingConfig(
            mode=options.decoding or generation.decoding,
            repetition_penalty=generation.repetition_penalty,
            length_penalty=generation.length_penalty,
            listen_prob_scale=generation.listen_prob_scale,
            listen_means_im_end=generation.listen_means_im_end,
        ),
        window=WindowConfig(
            mode=options.context.mode,
            high_tokens=generation.high_tokens if high is None else high,
            low_tokens=generation.low_tokens if low is None else low,
        ),
        max_text_chars=generation.max_text_chars,
        force_listen_count=options.force_listen,
    )


def _fitting(pictures: list[list[torch.Tensor]], num_tokens: int) -> list[list[torch.Tensor]]:
    """The newest pictures that fit; each cell of a picture takes its embeddings and a mark before and behind."""
    kept: list[list[torch.Tensor]] = []
    for picture in reversed(pictures):
        num_tokens -= sum(len(cell) + 2 for cell in picture)
        if num_tokens < 0:
            break
        kept.insert(0, picture)
    return kept
