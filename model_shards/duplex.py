"""The duplex loop: each second a session sees, hears, and then listens or speaks.

A unit in the cache, one per window:

    <unit> (<image> 64 </image> (<slice> 64 </slice>)*)* audio   then   <|listen|>
                                                                 or     <|speak|> text … [<|turn_eos|>] <|chunk_eos|>
    </unit>

All sessions whose unit is ready go together: one ragged prefill, then shared decode steps, which a session leaves when
its unit ends. The last tokens of a unit are only fed with the next unit's prefill (they need no logits), which saves a
forward per unit; the order of tokens is the official one.

Rule: turns are opened and closed in `_open`, `_take` and `_advance` only.

Source: MiniCPM-o 4.5 demo (DuplexCapability), reference/minicpmo-4.5.md §0 (demo variant), §4.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import NamedTuple

import torch
from torch import Tensor

from model_shards import quantized
from model_shards.attention import Kernel
from model_shards.context import Context, SlidingWindow, UnitSpan, WindowConfig, is_due
from model_shards.decode_steps import Decider, DecodeSteps, Fed, Question
from model_shards.decoding import Choice, DecisionRule, SamplingConfig
from model_shards.errors import ModelError
from model_shards.kv_cache import KvCache, KvCacheFull, KvSequence
from model_shards.llm import LanguageModel, SequenceInput
from model_shards.programs import ladder_to
from model_shards.tokenizer import Tokenizer

MAX_TEXT_TOKENS = 18  # the official loop takes 20 steps: one for <|speak|>, one for <|chunk_eos|>
MAX_GENERATED = 1 + MAX_TEXT_TOKENS + 3  # <|speak|> first, <|turn_eos|> <|listen|> </unit> at the end
MAX_CUT = 3  # tokens that can hold a part of one character: UTF-8 has at most 4 bytes
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # how bytes are decoded that are no character


@dataclass(frozen=True, slots=True)
class DuplexConfig:
    """How sessions behave; the defaults are the official demo's, save the window.

    max_text_chars: a token with which the unit's text would reach so many characters isn't said; None: no limit.
    force_listen_count: so many first units of a session listen, whatever the model wants.
    max_unit_tokens: what a unit may bring (16 unsliced pictures and a second of sound are 1067 tokens), so that
    a session's memory has a bound.
    listen_discards_speech: the official loop throws away what a unit said before it ended with <|listen|>; its speech
    is lost, though the model has it in its context. False lets it be heard.
    """

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    window: WindowConfig = field(default_factory=WindowConfig)
    max_text_chars: int | None = 28
    force_listen_count: int = 3
    max_unit_tokens: int = 1100
    listen_discards_speech: bool = False


PrefixKey = tuple[tuple[int, ...], bytes]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A session's system prompt: prefix, reference voice as embeddings [n, hidden_size], suffix."""

    prefix_ids: Sequence[int]
    suffix_ids: Sequence[int] = ()
    ref_audio: Tensor | None = None

    def __len__(self) -> int:
        return self.prefix_length + len(self.suffix_ids)

    @property
    def prefix_length(self) -> int:
        """With the voice."""
        return len(self.prefix_ids) + (0 if self.ref_audio is None else len(self.ref_audio))

    def prefix_key(self) -> PrefixKey:
        """What is the same where prefix and voice are."""
        voice = b"" if self.ref_audio is None else self.ref_audio.contiguous().view(torch.uint8).cpu().numpy().tobytes()
        return tuple(self.prefix_ids), sha256(voice).digest()


@dataclass(frozen=True, slots=True)
class UnitInput:
    """One window of one session.

    images: per picture its embeddings [64, hidden_size], the whole picture first, then its slices.
    audio: embeddings [n, hidden_size], 10 for a second, or None.
    max_text_tokens: how much may be said (TAIL), cut to 0 .. 18. 0 says nothing now: inside a turn the speech that is
    still running goes on, outside the session listens. A unit with neither images nor audio is taken as if this were 0.
    force_listen: close an open turn, and listen.
    before: windows that were held back until now, while no turn was open. They come first, as units of their own in
    which the session listens, in the same forward; max_text_tokens and force_listen of theirs mean nothing.
    """

    images: Sequence[Sequence[Tensor]] = ()
    audio: Tensor | None = None
    max_text_tokens: int = MAX_TEXT_TOKENS
    force_listen: bool = False
    before: Sequence[UnitInput] = ()


@dataclass(frozen=True, slots=True)
class UnitOutput:
    """What a session did in a unit.

    token_ids, hidden: what the talker is to say, with the final-norm hidden states [n, hidden_size] at these tokens'
    own positions. The unit's first token (<|speak|>) is never among them, <|turn_eos|> and <|tts_bos|> are. n may be 0
    inside a turn: the talker goes on by itself.
    text: the same decoded, without special tokens; bytes of a character cut in two wait for the next unit.
    turn_start: the talker begins anew. end_of_turn: and it ends here. turn_cut: force_listen closed an open turn.
    A unit that neither listens nor stands in a turn (<|chunk_eos|> at once) has nothing to say and no turn_start.
    """

    is_listen: bool
    token_ids: list[int]
    hidden: Tensor
    text: str
    turn_start: bool
    end_of_turn: bool
    turn_cut: bool
    num_sampled: int


class DuplexSession:
    """What one session carries from unit to unit. Owned by the caller, changed by DuplexEngine only.

    turn_open: the model is inside a turn (it can't listen then). speaking: the talker is, i.e. it was given a turn's
    start and not yet its end. The two differ when a token after <|turn_eos|> was sampled but not fed.
    """

    def __init__(self, generator: torch.Generator, seed: int) -> None:
        self.generator = generator
        self.seed = seed  # of what is decided on a device; num_draws: how often that was
        self.num_draws = 0
        self.context = Context()
        self.recent: array[int] = array("q")  # sampled tokens, for the repetition penalty
        self.ending: list[int] = []  # last tokens of the last unit, not yet fed
        self.spoken_ids: tuple[int, ...] = ()  # of the last unit
        self.unit_start = 0  # where the last unit begins in the cache
        self.num_units = 0
        self.turn_open = False
        self.speaking = False
        self.cut_ids: list[int] = []  # tokens whose text waits for the rest of a character
        self.prefix_key: PrefixKey | None = None  # None: not begun

    @property
    def sequence(self) -> KvSequence:
        return self.context.sequence


@dataclass(slots=True)
class OpenUnit:
    """A unit from its prefill to its end. `ending` tells how it ended; None: it goes on."""

    session: DuplexSession
    last_hidden: Tensor  # [1, hidden_size]
    max_text_tokens: int
    next_choice: Choice | None = None  # decided already, with the last token's step
    ending: list[int] | None = None
    is_listen: bool = False
    end_of_turn: bool = False
    turn_cut: bool = False
    last_token: int = -1
    num_sampled: int = 0
    num_fed: int = 0
    token_ids: list[int] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)


Parts = list[list[int] | Tensor]
"""What is fed in one go: token ids, and embeddings [n, hidden_size]."""


class _Begin(NamedTuple):
    """A session that begins."""

    session: DuplexSession
    prompt: Prompt
    key: PrefixKey

    @property
    def parts(self) -> Parts:
        """What of the prompt it has not yet: all, or the suffix."""
        prompt = self.prompt
        voice: Parts = [] if prompt.ref_audio is None else [prompt.ref_audio]
        prefix: Parts = [] if self.session.sequence.length else [list(prompt.prefix_ids), *voice]
        return [*prefix, list(prompt.suffix_ids)]


class DuplexEngine:
    """Runs units of many sessions on one model and one cache. Callers set torch.inference_mode.

    A session's outputs are the same alone and in any batch: greedy ones up to ties within float rounding, sampled ones
    because, besides, each session draws from its own generator.
    """

    def __init__(
        self,
        model: LanguageModel,
        cache: KvCache,
        tokenizer: Tokenizer,
        config: DuplexConfig,
        on_device: bool | None = None,
    ) -> None:
        """on_device: the next tokens are decided there, and fetched once per step; None: where that is a GPU. Sampled
        ones are drawn from other numbers then (model_shards/noise.py)."""
        self.config = config
        self._model = model
        self._cache = cache
        self._tokenizer = tokenizer
        self._special = tokenizer.special
        self._terminators = {self._special.listen, self._special.chunk_eos, self._special.chunk_tts_eos}
        self._rule = DecisionRule(config.sampling, tokenizer.special, tokenizer.bad_token_ids, cache.device)
        marker_ids = tokenizer.encode(config.window.previous_marker)
        self._window = SlidingWindow(config.window, model, cache, marker_ids, tokenizer.special_ids)
        self._alike: dict[PrefixKey, list[DuplexSession]] = {}  # those that are open, by what they begin with
        decides = cache.device.type == "cuda" if on_device is None else on_device
        self._decider = Decider(model, self._rule, cache.device) if decides else None
        self._steps: DecodeSteps | None = None

    @property
    def runs_with(self) -> str:
        """For the user."""
        graphs = "decode steps as graphs" if self._steps is not None else ""
        weights = quantized.runs_with(self._model)
        return ", ".join(filter(None, (f"{self._model.attention} attention", graphs, weights)))

    def new_session(self, seed: int) -> DuplexSession:
        """An empty session; the same seed and inputs give the same outputs."""
        return DuplexSession(torch.Generator(self._cache.device).manual_seed(seed), seed)

    @torch.no_grad()
    def capture(self, max_tokens: int, max_sessions: int, kernel: Kernel | None = None) -> None:
        """Make decode steps one program each, for sessions of at most so many tokens and batches of so many sessions.

        From then on what comes next is decided on the device. kernel: a ragged one, where it is not the model's.
        """
        self._decider = self._decider or Decider(self._model, self._rule, self._cache.device)
        num_pages, ladder = self._cache.pages_for(max_tokens), ladder_to(max_sessions)
        self._steps = DecodeSteps(self._model, self._cache, self._decider, num_pages, ladder, kernel)

    def max_session_tokens(self, prompt_length: int) -> int | None:
        """What a session with such a prompt takes of the cache at most, however long it lives; None: no bound."""
        marker = len(self._tokenizer.encode(self.config.window.previous_marker))
        return max_session_tokens(self.config, prompt_length + marker)

    @property
    def num_saved_pages(self) -> int:
        """Pages that sessions have in common and that count once."""
        return sum(
            (len(alike) - 1) * (alike[0].context.prefix_length // self._cache.page_size)
            for alike in self._alike.values()
        )

    def begin(self, batch: Sequence[tuple[DuplexSession, Prompt]]) -> None:
        """Feed the system prompts of new sessions: the first one of each in one forward; those that begin as an open
        session does have its prefix, and are fed their suffix only.

        Raises ModelError when a prompt leaves no room for units in the window, KvCacheFull when pages are missing;
        then no session has changed.
        """
        for session, prompt in batch:
            assert session.sequence.length == 0
            self._check_prompt(prompt)
        firsts: dict[PrefixKey, _Begin] = {}
        others: list[_Begin] = []
        for session, prompt in batch:
            begun = _Begin(session, prompt, prompt.prefix_key())
            if begun.key in self._alike or firsts.setdefault(begun.key, begun) is not begun:
                others.append(begun)
        try:
            self._begin(list(firsts.values()))
            self._begin(others)
        except KvCacheFull:
            for session, _ in batch:
                self.end(session)
            raise

    def _begin(self, batch: Sequence[_Begin]) -> None:
        """A prefix that no open session has may stand in it once."""
        for begun in batch:
            if alike := self._alike.get(begun.key):
                self._cache.fork(alike[0].sequence, begun.prompt.prefix_length, begun.session.sequence)
        # What lies behind the prefix moves when the window slides: no page of it is shared.
        self._cache.own([(begun.session.sequence, begun.prompt.prefix_length) for begun in batch])
        feeds = [(begun.session, begun.parts) for begun in batch]
        self._feed([(session, parts) for session, parts in feeds if _length(parts)])
        for session, prompt, key in batch:
            session.prefix_key = key
            session.context.prefix_length = prompt.prefix_length
            session.context.suffix_ids = list(prompt.suffix_ids)
            self._alike.setdefault(key, []).append(session)

    def _check_prompt(self, prompt: Prompt) -> None:
        low = self.config.window.low_tokens
        if self.config.window.mode == "basic" and len(prompt) >= low:
            raise ModelError(f"system prompt: {len(prompt)} tokens leave no room below low_tokens {low}")

    def end(self, session: DuplexSession) -> None:
        """Give the session's pages back, but for those that others have, too."""
        self._cache.free(session.sequence)
        if session.prefix_key is not None:
            alike = self._alike[session.prefix_key]
            alike.remove(session)
            if not alike:
                del self._alike[session.prefix_key]
            session.prefix_key = None

    def step(self, batch: Sequence[tuple[DuplexSession, UnitInput]]) -> list[UnitOutput]:
        """Run one unit of every session to its end. A session may appear once.

        Raises ModelError for a unit that is too large, and KvCacheFull, both before any unit has begun.
        """
        units = self.prefill(batch)
        while decoding := [unit for unit in units if unit.ending is None]:
            self.decode_step(decoding)
        return [self.close(unit) for unit in units]

    def prefill(self, batch: Sequence[tuple[DuplexSession, UnitInput]]) -> list[OpenUnit]:
        """First part of a step: the end of the last units and all that was seen and heard, in one ragged forward.

        Only the sessions whose window has to slide have the end of their last unit fed by a forward of its own.
        """
        held = [self._held_parts(unit) for _, unit in batch]
        seen = [self._unit_parts(unit) for _, unit in batch]
        self.finalize([s for s, _ in batch if is_due(self.config.window, s.context, len(s.ending))])
        feeds: list[tuple[DuplexSession, Parts]] = [
            (session, [list(session.ending), *(part for window in before for part in window), *parts])
            for (session, _), before, parts in zip(batch, held, seen, strict=True)
        ]
        self._cache.reserve([(session.sequence, _length(parts) + MAX_GENERATED) for session, parts in feeds])
        hidden = self._feed(feeds)
        for (session, _), before, parts in zip(batch, held, seen, strict=True):
            lengths = [_length(window) for window in before]
            start = session.sequence.length - _length(parts)
            self._register(session, start - sum(lengths))
            session.unit_start = start
            session.context.units += [UnitSpan(length, ()) for length in lengths]
            session.num_units += len(before)
        return [self._open(session, unit, rows[-1:]) for (session, unit), rows in zip(batch, hidden, strict=True)]

    def decode_step(self, units: Sequence[OpenUnit]) -> None:
        """One token for every one of these units: choose it, and feed it unless it ends the unit."""
        choices = self._choose(units)
        fed = [unit for unit, choice in zip(units, choices, strict=True) if self._take(unit, choice)]
        for unit, row in zip(fed, self._feed_chosen(fed), strict=True):
            self._advance(unit, row)

    def _choose(self, units: Sequence[OpenUnit]) -> list[Choice]:
        """The next token of each; on a device it may have been decided with the last one's step."""
        if self._decider is None:
            logits = self._model.logits(torch.cat([unit.last_hidden for unit in units]))
            sessions = [unit.session for unit in units]
            return self._rule.choose(logits, [s.recent for s in sessions], [s.generator for s in sessions])
        if open_ones := [unit for unit in units if unit.next_choice is None]:
            hidden = torch.cat([unit.last_hidden for unit in open_ones])
            decided = self._decider(hidden, [_question(unit.session) for unit in open_ones])
            for unit, choice in zip(open_ones, decided, strict=True):
                unit.next_choice = choice
        return [_taken(unit) for unit in units]

    def _feed_chosen(self, units: Sequence[OpenUnit]) -> Sequence[Tensor]:
        """The hidden states [1, hidden_size] at the last token of each."""
        if self._steps is None or not units:
            return self._feed([(unit.session, [[unit.last_token]]) for unit in units])
        batch = [Fed(unit.session.sequence, unit.last_token, _question(unit.session)) for unit in units]
        hidden, choices = self._steps(batch)
        for unit, choice in zip(units, choices, strict=True):
            unit.next_choice = choice
        return torch.split(hidden, 1)

    def close(self, unit: OpenUnit) -> UnitOutput:
        """Last part of a step: what the unit says, now that it has ended."""
        assert unit.ending is not None
        session = unit.session
        was_speaking = session.speaking and not unit.turn_cut
        lost = unit.is_listen and self.config.listen_discards_speech
        silent = lost or (unit.is_listen and not unit.token_ids and not was_speaking)
        ids = [] if silent else unit.token_ids
        turn_start = not silent and not was_speaking and unit.num_fed > 0
        end_of_turn = not silent and unit.end_of_turn
        session.ending = [*unit.ending, self._special.unit_end]
        session.spoken_ids = tuple(ids)
        session.num_units += 1
        session.speaking = not silent and not end_of_turn and (was_speaking or turn_start)
        hidden = torch.cat([unit.last_hidden[:0], *unit.hidden[: len(ids)]])
        text = self._text(session, ids)
        return UnitOutput(silent, ids, hidden, text, turn_start, end_of_turn, unit.turn_cut, unit.num_sampled)

    def finalize(self, sessions: Sequence[DuplexSession]) -> None:
        """Feed the ends of the last units and slide the windows that are due.

        `step` does so by itself, and cheaper; this is for those who have time to spare between two units.
        """
        waiting = [session for session in sessions if session.ending]
        self._feed([(session, [list(session.ending)]) for session in waiting])
        for session in waiting:
            self._register(session, session.sequence.length)
        self._window.slide([session.context for session in sessions])

    def _register(self, session: DuplexSession, end: int) -> None:
        """Note the last unit, of which now everything has been fed, up to position `end`."""
        if session.ending:
            session.context.units.append(UnitSpan(end - session.unit_start, session.spoken_ids))
            session.ending = []

    def num_tokens(self, unit: UnitInput) -> int:
        """What a unit brings, the windows before it included; no more than config.max_unit_tokens is taken."""
        return sum(map(_length, [self._parts(unit), *self._held_parts(unit)]))

    def _held_parts(self, unit: UnitInput) -> list[Parts]:
        """Of each window that was held back: its own, and that the session listened."""
        listened = [self._special.listen, self._special.unit_end]
        return [[*self._parts(window), listened] for window in unit.before]

    def _unit_parts(self, unit: UnitInput) -> Parts:
        if (num_tokens := self.num_tokens(unit)) > self.config.max_unit_tokens:
            raise ModelError(f"unit: {num_tokens} tokens, max_unit_tokens is {self.config.max_unit_tokens}")
        return self._parts(unit)

    def _parts(self, unit: UnitInput) -> Parts:
        special = self._special
        parts: Parts = [[special.unit]]
        for picture in unit.images:
            for index, embeds in enumerate(picture):
                start, end = (special.slice, special.slice_end) if index else (special.image, special.image_end)
                parts += [[start], embeds, [end]]
        if unit.audio is not None:
            parts.append(unit.audio)
        return parts

    def _open(self, session: DuplexSession, unit: UnitInput, last_hidden: Tensor) -> OpenUnit:
        """Decide what is decided without the model: forced listening, and a budget of nothing."""
        budget = min(max(unit.max_text_tokens, 0), MAX_TEXT_TOKENS) if unit.images or unit.audio is not None else 0
        opened = OpenUnit(session, last_hidden, budget)
        if unit.force_listen or session.num_units < self.config.force_listen_count or not (budget or session.turn_open):
            opened.is_listen = True
            opened.turn_cut = session.turn_open
            opened.ending = [self._special.turn_eos] * session.turn_open + [self._special.listen]
            session.turn_open = False
        elif not budget:
            opened.ending = [self._special.chunk_eos]
        return opened

    def _take(self, unit: OpenUnit, choice: Choice) -> bool:
        """Take a sampled token into the unit; returns whether it is to be fed."""
        special, session, token = self._special, unit.session, choice.token
        unit.num_sampled += 1
        if choice.counts:
            session.recent.append(token)
            del session.recent[: -self.config.sampling.repetition_window]
        if token == special.listen and session.turn_open:
            token = special.tts_bos
        if token in self._terminators:
            unit.ending, unit.is_listen = [token], token == special.listen
            return False
        session.turn_open = True  # officially also by a token that is then too long to be said
        if unit.num_fed and self._is_too_long([*unit.token_ids, token]):
            unit.ending = [special.chunk_eos]
            return False
        unit.last_token = token
        return True

    def _advance(self, unit: OpenUnit, hidden: Tensor) -> None:
        """Note that the unit's last token has been fed: hidden [1, hidden_size] is at its position."""
        unit.last_hidden = hidden
        if unit.num_fed:
            unit.token_ids.append(unit.last_token)
            unit.hidden.append(hidden)
        unit.num_fed += 1
        unit.end_of_turn = unit.last_token == self._special.turn_eos
        unit.session.turn_open = not unit.end_of_turn
        if unit.num_fed > unit.max_text_tokens:
            unit.ending = [self._special.chunk_eos]

    def _is_too_long(self, ids: list[int]) -> bool:
        limit = self.config.max_text_chars
        if limit is None or sum(map(self._tokenizer.most_chars, ids)) < limit:
            return False
        return len(self._tokenizer.decode(ids, skip_special=True)) >= limit

    def _text(self, session: DuplexSession, ids: list[int]) -> str:
        """Decode what was said; inside a turn, half a character at the end waits for its other half."""
        ids = session.cut_ids + ids
        cut = self._num_cut(ids) if session.speaking else 0
        whole, session.cut_ids = ids[: len(ids) - cut], ids[len(ids) - cut :]
        return self._tokenizer.decode(whole, skip_special=True)

    def _num_cut(self, ids: list[int]) -> int:
        """How many of the last tokens hold the first bytes of a character and nothing else; 0 if that isn't why."""
        for count in range(min(MAX_CUT, len(ids)) + 1):
            if not self._tokenizer.decode(ids[: len(ids) - count], skip_special=True).endswith(REPLACEMENT):
                return count
        return 0

    def _feed(self, feeds: Sequence[tuple[DuplexSession, Parts]]) -> list[Tensor]:
        """Feed all sessions in one forward; returns the hidden states [n, hidden_size] of each."""
        ids = [part for _, parts in feeds for part in parts if isinstance(part, list)]
        flat = torch.tensor([token for part in ids for token in part], dtype=torch.int64, device=self._cache.device)
        embeds = iter(torch.split(self._model.embed(flat), [len(part) for part in ids]))
        inputs = []
        for session, parts in feeds:
            rows = [next(embeds) if isinstance(part, list) else part for part in parts]
            inputs.append(SequenceInput(session.sequence, rows[0] if len(rows) == 1 else torch.cat(rows)))
        hidden: list[Tensor] = self._model(self._cache, inputs)
        return hidden


def _question(session: DuplexSession) -> Question:
    return Question(session.seed, session.num_draws, session.recent)


def _taken(unit: OpenUnit) -> Choice:
    """A decision counts once it is taken: what is left over at a unit's end was never made."""
    assert unit.next_choice is not None
    choice, unit.next_choice = unit.next_choice, None
    unit.session.num_draws += 1
    return choice


def _length(parts: Parts) -> int:
    return sum(len(part) for part in parts)


def max_session_tokens(config: DuplexConfig, prompt_length: int) -> int | None:
    """What a session takes of the cache at most, however long it lives; None: no bound.

    prompt_length: with the marker of what was said before, in "context" mode.
    """
    window, unit = config.window, config.max_unit_tokens + MAX_GENERATED
    if window.mode == "basic":
        return window.high_tokens + unit
    if window.mode == "context":
        return prompt_length + window.max_previous_tokens + (window.max_units + 1) * unit
    return None
