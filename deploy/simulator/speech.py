"""What speaks in a simulated pipeline: text, codes and sound, as much of them as TAIL allows.

As the real stages do, these ask graph/tail.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Final

import numpy as np

from deploy.simulator.costly import Costly
from deploy.simulator.world import Computer
from graph.chunk import NS_PER_MS, NS_PER_S, Array, Chunk, SessionId
from graph.costs import Speaking, StageCost
from graph.kinds import attrs_of
from graph.ladder import holds_window
from graph.tail import Ack, SpeechQueue, TextBudget
from graph.window import Unit
from stages.kinds import CODES, TEXT, Said, continues_turn
from stages.llm import Llm
from stages.rates import CODES_PER_S, SPEECH_RATE_HZ
from stages.session import Session
from stages.tts import Tts
from stages.vocoder import HELD_BACK_NS, Vocoder

HIDDEN: Final = np.zeros((64, 1), np.float32)
SILENCE: Final = np.zeros(2 * SPEECH_RATE_HZ, np.float32)


def ns_per_token(session: SessionId) -> int:
    """Each session has its own pace of speaking."""
    return Random(f"pace {session}").randint(180 * NS_PER_MS, 380 * NS_PER_MS)


@dataclass(slots=True)
class Talk:
    """What a session says. left: text tokens of the turn that are still to come; most: in a window; said: that came.
    before_ns: speech received before the turn."""

    session: Session
    budget: TextBudget
    rng: Random
    is_held: bool = False
    num_waiting: int = 0  # windows that go with the next one
    left: int = 0
    most: int = 0
    said: int = 0
    before_ns: int = 0
    is_cut: bool = False

    def wasted(self, ack: Ack, pace_ns: int) -> float:
        """Text tokens of the turn that nobody has heard."""
        return max(self.said - max(ack.heard_ns - self.before_ns, 0) / pace_ns, 0.0)


class VirtualLlm(Costly):
    """Begins a turn now and then, and goes on with it as far as TAIL allows."""

    text = Llm.text
    paced_by_listener = True
    MOST_TOKENS: Final = 12  # a window
    TURN: Final = (2, 40)  # tokens
    speaking: Speaking | None = None  # as it was measured

    def __init__(
        self, cost: StageCost, token_ns: int, picture_ns: int, talks: float, device: Computer, rng: Random
    ) -> None:
        """talks: how likely a silent window begins a turn."""
        super().__init__(cost, device, rng)
        self._token_ns, self._picture_ns, self._talks_often = token_ns, picture_ns, talks
        self._talks: dict[SessionId, Talk] = {}
        self.wasted: list[float] = []  # text tokens of each turn that was interrupted

    def open_session(self, session: Session) -> None:
        super().open_session(session)
        budget = TextBudget(session.playback, lead_ns=session.lead_ns, window_ns=session.window_ns)
        self._talks[session.id] = Talk(session, budget, Random(self._rng.random()))

    def interrupt(self, session: SessionId, ack: Ack) -> list[Chunk]:
        talk = self._talks[session]
        self.wasted.append(talk.wasted(ack, ns_per_token(session)))
        talk.budget.interrupted(ack)
        talk.is_cut, talk.said, talk.before_ns = True, 0, ack.received_ns
        return []

    def drain(self, session: SessionId) -> list[Chunk]:
        talk = self._talks[session]
        if not talk.left or talk.is_cut:
            return []
        window_ns = talk.session.window_ns
        end_ns = (self._next[session] or 0) * window_ns
        attrs = attrs_of(Said(end_of_turn=True))
        return [self.text.chunk(session, end_ns, window_ns, arrays=_tokens(0), attrs=attrs)]

    def process(self, units: list[Unit]) -> list[Chunk]:
        made = super().process(units)
        if nums := [len(pictures) for unit in units if (pictures := unit.of(Llm.image))]:
            self._work(sum(nums) * self._picture_ns + (sum(nums) - len(nums)) * self._cost.picture_ns)
        token_ns = self._token_ns + self._cost.token_ns
        self._work(max((len(c.arrays["token_ids"]) for c in made), default=0) * token_ns)
        return made

    def _turn(self, rng: Random) -> tuple[int, int]:
        """Tokens of a turn, and at most of a window of it; 0: drawn for each."""
        if self.speaking is None:
            return rng.randint(*self.TURN), 0
        tokens = max(int(self.speaking.tokens + rng.random()), 1)
        num_windows = max(rng.randint(1, max(round(2 * self.speaking.windows) - 1, 1)), 1)
        return num_windows * tokens, tokens

    def num_items(self, units: list[Unit], made: list[Chunk]) -> int:
        """Windows that are fed now; one that is held is fed with the next one."""
        talks = [self._talks[unit.session] for unit in units]
        num_items = sum(talk.num_waiting + 1 for talk in talks if not talk.is_held)
        for talk in talks:
            talk.num_waiting = talk.num_waiting + 1 if talk.is_held else 0
        return num_items

    def make(self, unit: Unit) -> list[Chunk]:
        talk = self._talks[unit.session]
        overdue, num_held = unit.overdue and talk.session.speech, talk.num_waiting
        waits = holds_window(talk.session.taken, unit.session, unit.index, num_held=num_held, overdue=overdue)
        talk.is_held = waits and not talk.left
        is_quiet = talk.is_held or "listen_only" in talk.session.taken
        talks = self._talks_often if self.speaking is None else self.speaking.begins
        begins = talk.left == 0 and talk.rng.random() < talks and not is_quiet
        if talk.is_cut or (talk.left == 0 and not begins):
            talk.left, talk.is_cut = 0, False
            return []
        if begins:
            talk.left, talk.most = self._turn(talk.rng)
            talk.said, talk.before_ns = 0, talk.session.playback.latest.received_ns
        allowed = talk.budget.tokens(unit.end_ns)
        count = min(allowed, talk.left, talk.most or talk.rng.randint(2, self.MOST_TOKENS))
        talk.left -= count
        talk.said += count
        talk.budget.generated(count, end_of_turn=talk.left == 0)
        attrs = attrs_of(Said("word", turn_start=begins, end_of_turn=talk.left == 0))
        return [self.text.over(unit, arrays=_tokens(count), attrs=attrs)]


def _tokens(count: int) -> dict[str, Array]:
    return {"token_ids": np.zeros(count, np.int64), "hidden": HIDDEN[:count]}


@dataclass(slots=True)
class _Speech:
    queue: SpeechQueue[Chunk]
    window_ns: int
    ns_per_token: int
    owed_ns: int = 0


class VirtualTts(Costly):
    """As the talker does: inside a turn a whole window of codes, in its first and last window at most so many."""

    codes = Tts.codes
    paced_by_listener = True
    speaking: Speaking | None = None  # as it was measured

    def __init__(self, cost: StageCost, device: Computer, rng: Random) -> None:
        super().__init__(cost, device, rng)
        self._open: dict[SessionId, _Speech] = {}

    def open_session(self, session: Session) -> None:
        super().open_session(session)
        queue = SpeechQueue[Chunk](session.playback, lead_ns=session.lead_ns, window_ns=session.window_ns)
        pace_ns = ns_per_token(session.id) if self.speaking is None else self.speaking.token_ns
        self._open[session.id] = _Speech(queue, session.window_ns, pace_ns)

    def interrupt(self, session: SessionId, ack: Ack) -> list[Chunk]:
        self._open[session].queue.interrupted()
        self._open[session].owed_ns = 0
        return []

    def has_more_to_say(self, session: SessionId) -> bool:
        return bool(self._open[session].queue)

    def may_hold(self, unit: Unit) -> bool:
        return continues_turn(TEXT.read(text) for text in unit.of(Tts.text))

    def is_idle(self, unit: Unit) -> bool:
        return not (unit.of(Tts.text) or self._open[unit.session].queue)

    def make(self, unit: Unit) -> list[Chunk]:
        state = self._open[unit.session]
        for text in unit.of(Tts.text):
            is_silent = len(text.arrays["token_ids"]) == 0 and not TEXT.read(text).end_of_turn
            if not (is_silent and state.queue):
                state.queue.put(text)
        taken = state.queue.take(lambda text: state.window_ns, unit.end_ns)
        if taken is None:
            return []
        said = TEXT.read(taken)
        state.owed_ns += len(taken.arrays["token_ids"]) * state.ns_per_token
        num_codes = min(state.owed_ns * CODES_PER_S // NS_PER_S, CODES_PER_S)
        if not (said.turn_start or said.end_of_turn):
            num_codes = CODES_PER_S  # the official talker may end its speech in no other window
        state.owed_ns = 0 if said.end_of_turn else max(state.owed_ns - num_codes * NS_PER_S // CODES_PER_S, 0)
        state.queue.made(state.window_ns, unit.end_ns)
        return [self.codes.over(unit, arrays={"codes": np.zeros(num_codes, np.int64)}, attrs=taken.attrs)]

    def num_items(self, units: list[Unit], made: list[Chunk]) -> int:
        return len(made)


@dataclass(slots=True)
class _Sound:
    queue: SpeechQueue[Chunk]
    num_held: int = 0  # codes that were too few to sound


class VirtualVocoder(Costly):
    """As the vocoder does: a whole second where the turn goes on, since silence fills it up in front."""

    speech = Vocoder.speech
    paced_by_listener = True
    LEAST_CODES: Final = 5  # that sound, where the turn goes on

    def __init__(self, cost: StageCost, device: Computer, rng: Random) -> None:
        super().__init__(cost, device, rng)
        self._open: dict[SessionId, _Sound] = {}

    def open_session(self, session: Session) -> None:
        super().open_session(session)
        queue = SpeechQueue[Chunk](session.playback, lead_ns=session.lead_ns, window_ns=session.window_ns)
        self._open[session.id] = _Sound(queue)

    def interrupt(self, session: SessionId, ack: Ack) -> list[Chunk]:
        self._open[session].queue.interrupted()
        self._open[session].num_held = 0
        return []

    def has_more_to_say(self, session: SessionId) -> bool:
        return bool(self._open[session].queue)

    def is_idle(self, unit: Unit) -> bool:
        return not (unit.of(Vocoder.codes) or self._open[unit.session].queue)

    def make(self, unit: Unit) -> list[Chunk]:
        state = self._open[unit.session]
        for codes in unit.of(Vocoder.codes):
            state.queue.put(codes)
        taken = state.queue.take(lambda codes: _duration_ns(codes, state.num_held), unit.end_ns)
        if taken is None:
            return []
        num_codes, ends = state.num_held + len(taken.arrays["codes"]), CODES.read(taken).end_of_turn
        if num_codes < self.LEAST_CODES and not ends:
            state.num_held = num_codes
            return []
        duration_ns, state.num_held = _duration_ns(taken, state.num_held), 0
        state.queue.made(duration_ns, unit.end_ns)
        arrays = {"samples": SILENCE[: duration_ns * SPEECH_RATE_HZ // NS_PER_S]}
        return [self.speech.chunk(unit.session, unit.start_ns, duration_ns, arrays=arrays, attrs=taken.attrs)]

    def num_items(self, units: list[Unit], made: list[Chunk]) -> int:
        return len(made)


def _duration_ns(codes: Chunk, num_held: int) -> int:
    """What these codes sound for, and those that were held before them."""
    sounds_ns = (num_held + len(codes.arrays["codes"])) * NS_PER_S // CODES_PER_S
    return sounds_ns + HELD_BACK_NS if CODES.read(codes).end_of_turn else max(sounds_ns, NS_PER_S)
