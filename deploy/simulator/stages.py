"""The stages of a simulated pipeline: what they cost and how much they make, without a model.

They spend what TAIL allows as the real ones do, through the same graph/tail.py. The speaker is the real one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

import numpy as np

from deploy.simulator.world import Device
from graph.chunk import NS_PER_MS, NS_PER_S, Array, Chunk, SessionId
from graph.costs import StageCost
from graph.kinds import attrs_of
from graph.ladder import holds_window
from graph.stage_type import StageType, outputs_of
from graph.tail import Ack, SpeechQueue, TextBudget
from graph.window import Unit
from stages.audio_encoder import AudioEncoder
from stages.camera import Camera
from stages.kinds import TEXT, Said
from stages.llm import Llm
from stages.microphone import Microphone
from stages.rates import CODES_PER_S, SPEECH_RATE_HZ
from stages.session import Session, View
from stages.stage import Source, SourceId, Stage
from stages.tts import Tts
from stages.vision_encoder import VisionEncoder
from stages.vocoder import Vocoder

PICTURE: Final = np.zeros((1, 1, 3), np.uint8)
SOUND: Final = np.zeros(16, np.float32)
PICTURE_EMBEDS: Final = {"embeds": np.zeros((1, 1, 1), np.float32)}
SOUND_EMBEDS: Final = {"embeds": np.zeros((1, 1), np.float32)}
HIDDEN: Final = np.zeros((64, 1), np.float32)
SILENCE: Final = np.zeros(2 * SPEECH_RATE_HZ, np.float32)
CAMERA_DELAY_NS: Final = 40 * NS_PER_MS


class OutOfOrder(AssertionError):
    """A unit came twice, or not after the one before it; or its pictures are in disorder."""


class Spoilt(ValueError):
    """A unit at which its stage raises."""


class Costly(Stage):
    """A stage that computes on a device, and sees that units come as 0, 1, 2 …"""

    def __init__(self, cost: StageCost, device: Device, rng: Random) -> None:
        self._cost, self._device, self._rng = cost, device, rng
        self._next: dict[SessionId, int | None] = {}  # None: any
        self.slow_down = 1.0
        self.spoils = 0.0  # how likely a unit is one at which it raises
        self.unsaid: list[SessionId] = []  # sessions that were closed with something left to say

    def open_session(self, session: Session) -> None:
        self._next[session.id] = 0

    def begin_anywhere(self, session: SessionId) -> None:
        """The session goes on here in the place of a replica that has died."""
        self._next[session] = None

    def close_session(self, session: SessionId) -> None:
        if self._next.pop(session, 0) and self.has_more_to_say(session):
            self.unsaid.append(session)

    def process(self, units: list[Unit]) -> list[Chunk]:
        if spoilt := [unit for unit in units if self._is_spoilt(unit)]:
            self._spoil(spoilt, units)
        for unit in units:
            awaited = self._next[unit.session]
            if awaited is not None and unit.index != awaited:
                raise OutOfOrder(f"{unit.session}: unit {unit.index} where {awaited} was to come")
            self._next[unit.session] = unit.index + 1
        made = [chunk for unit in units for chunk in self.make(unit)]
        if num_items := self.num_items(units, made):
            cost_ns = self._cost.batch_ns(num_items) * (1 + self._cost.spread * self._rng.random())
            self._device.work(round(cost_ns * self.slow_down))
        return made

    def _is_spoilt(self, unit: Unit) -> bool:
        """The same each time that it is tried."""
        return self.spoils > 0 and Random(f"{type(self).__name__} {unit.session} {unit.index}").random() < self.spoils

    def _spoil(self, spoilt: list[Unit], units: list[Unit]) -> None:
        if spoilt == units:  # else those beside it are tried again
            for unit in spoilt:
                self._next[unit.session] = unit.index + 1
        raise Spoilt(f"{spoilt[0].session}: unit {spoilt[0].index}")

    def make(self, unit: Unit) -> list[Chunk]:
        return []

    def num_items(self, units: list[Unit], made: list[Chunk]) -> int:
        """How much there was to do."""
        return len(units)


class VirtualCamera(Stage):
    """Pictures of each view at their rate; while it is dead none, and its watermark follows the clock as that of
    stages/camera.py does. Views come and go as there, too."""

    def __init__(
        self,
        rng: Random,
        dead_ns: Mapping[SourceId, tuple[int, int]],
        look: Callable[[SessionId, int], Array] | None = None,
        *,
        delay_ns: int = CAMERA_DELAY_NS,
    ) -> None:
        """dead_ns: from when until when a view gives nothing. look: what a camera shows at a time; None: a dot.
        delay_ns: from the shutter to here, at most."""
        self._rng, self._dead_ns, self._delay_ns = rng, dead_ns, delay_ns
        self._look = look or (lambda session, at_ns: PICTURE)
        self._open: dict[SessionId, dict[str, _Shots]] = {}

    def open_session(self, session: Session) -> None:
        self._open[session.id] = {view.name: self._shots(session, view.name) for view in session.media.views}

    def _shots(self, session: Session, view: str, from_ns: int = 0) -> _Shots:
        period_ns = round(NS_PER_S / session.media.fps)
        dead_ns = self._dead_ns.get(SourceId(session.id, view), (0, 0))
        from_ns = max(from_ns, session.begin_ns)
        next_ns = -(-from_ns // period_ns) * period_ns
        return _Shots(session, view, period_ns, dead_ns, session.duration_ns or 0, from_ns, next_ns)

    def close_session(self, session: SessionId) -> None:
        self._open.pop(session, None)

    def add_view(self, session: Session, view: View, now_ns: int) -> None:
        from_ns = (max(now_ns, 0) // session.window_ns + 1) * session.window_ns
        self._open[session.id][view.name] = self._shots(session, view.name, from_ns)

    def remove_view(self, session: SessionId, view: str, now_ns: int) -> None:
        shots = self._open[session].get(view)
        if shots is not None:
            window_ns = shots.session.window_ns
            shots.end_ns = min(-(-max(now_ns, 0) // window_ns) * window_ns, shots.end_ns)
            shots.removed, shots.ended = True, False

    def advance(self, session: SessionId, now_ns: int) -> list[Chunk]:
        views = self._open[session]
        for name in [name for name, shots in views.items() if shots.removed and shots.ended]:
            del views[name]
        return [chunk for shots in views.values() for chunk in self._advance(shots, now_ns)]

    def _advance(self, shots: _Shots, now_ns: int) -> list[Chunk]:
        chunks, session, end_ns = list[Chunk](), shots.session.id, shots.end_ns
        while shots.next_ns < end_ns and shots.here_ns <= now_ns:
            if not shots.is_dead:
                chunks += self._settle(shots, shots.next_ns)
                image = {"image": self._look(session, shots.next_ns)}
                chunks.append(Camera.frames.chunk(session, shots.next_ns, arrays=image, view=shots.view))
            shots.next_ns += shots.period_ns
            shots.delay_ns = int(self._rng.random() * self._delay_ns)
            if not shots.is_dead:
                chunks += self._settle(shots, min(shots.next_ns, end_ns))
        window_ns = shots.session.window_ns
        given_up_ns = (now_ns - shots.session.lateness_ns) // window_ns * window_ns
        chunks += self._settle(shots, min(max(given_up_ns, shots.from_ns), end_ns))
        if not shots.ended and shots.next_ns >= end_ns and now_ns >= end_ns:
            shots.ended = True
            chunks.append(Camera.frames.end(session, end_ns, view=shots.view, removed=shots.removed))
        return chunks

    def due_in_ns(self, session: SessionId, now_ns: int) -> int:
        return min(self._due_in_ns(shots, now_ns) for shots in self._open[session].values())

    @staticmethod
    def _due_in_ns(shots: _Shots, now_ns: int) -> int:
        window_ns, lateness_ns = shots.session.window_ns, shots.session.lateness_ns
        given_up_ns = ((now_ns - lateness_ns) // window_ns + 1) * window_ns + lateness_ns
        return max(min(shots.here_ns, given_up_ns) - now_ns, 0)

    def finished(self, session: SessionId) -> bool:
        return all(shots.ended for shots in self._open[session].values())

    @staticmethod
    def _settle(shots: _Shots, at_ns: int) -> list[Chunk]:
        if at_ns <= shots.watermark_ns or shots.ended:
            return []
        shots.watermark_ns = at_ns
        return [Camera.frames.watermark(shots.session.id, at_ns, view=shots.view)]


@dataclass(slots=True)
class _Shots:
    session: Session
    view: str
    period_ns: int
    dead_ns: tuple[int, int]
    end_ns: int
    from_ns: int
    next_ns: int
    delay_ns: int = 0
    watermark_ns: int = 0
    ended: bool = False
    removed: bool = False

    @property
    def here_ns(self) -> int:
        return self.next_ns + self.delay_ns

    @property
    def is_dead(self) -> bool:
        return self.dead_ns[0] <= self.next_ns < self.dead_ns[1]


class VirtualMicrophone(Stage):
    """A chunk per window, at its end."""

    def __init__(self, listen: Callable[[SessionId, int, int], Array] | None = None) -> None:
        """listen: what is heard from when until when; None: next to nothing."""
        self._listen = listen or (lambda session, start_ns, end_ns: SOUND)
        self._open: dict[SessionId, _Sound] = {}

    def open_session(self, session: Session) -> None:
        self._open[session.id] = _Sound(session, session.begin_index * session.window_ns)

    def close_session(self, session: SessionId) -> None:
        self._open.pop(session, None)

    def advance(self, session: SessionId, now_ns: int) -> list[Chunk]:
        sound, chunks = self._open[session], list[Chunk]()
        window_ns, end_ns = sound.session.window_ns, sound.session.duration_ns or 0
        while sound.sent_ns + window_ns <= min(now_ns, end_ns):
            samples = self._listen(session, sound.sent_ns, sound.sent_ns + window_ns)
            chunks.append(Microphone.sound.chunk(session, sound.sent_ns, window_ns, arrays={"samples": samples}))
            sound.sent_ns += window_ns
            chunks.append(Microphone.sound.watermark(session, sound.sent_ns))
        if not sound.ended and sound.sent_ns + window_ns > end_ns:
            sound.ended = True
            chunks.append(Microphone.sound.end(session, min(sound.sent_ns, end_ns)))
        return chunks

    def due_in_ns(self, session: SessionId, now_ns: int) -> int:
        sound = self._open[session]
        return max(sound.sent_ns + sound.session.window_ns - now_ns, 0)

    def finished(self, session: SessionId) -> bool:
        return self._open[session].ended


@dataclass(slots=True)
class _Sound:
    session: Session
    sent_ns: int
    ended: bool = False


class VirtualVision(Costly):
    image = VisionEncoder.image

    def is_idle(self, unit: Unit) -> bool:
        return not unit.chunks

    def make(self, unit: Unit) -> list[Chunk]:
        pictures = unit.of(VisionEncoder.frames)
        if [(p.start_ns, p.view) for p in pictures] != sorted({(p.start_ns, p.view) for p in pictures}):
            raise OutOfOrder(f"{unit.session}: pictures of window {unit.index} are not in the order of time and view")
        return [self.image.like(picture, arrays=PICTURE_EMBEDS, attrs={}) for picture in pictures]

    def num_items(self, units: list[Unit], made: list[Chunk]) -> int:
        return len(made)


class VirtualAudio(Costly):
    audio = AudioEncoder.audio

    def make(self, unit: Unit) -> list[Chunk]:
        return [self.audio.over(unit, arrays=SOUND_EMBEDS)] if unit.of(AudioEncoder.sound) else []


def ns_per_token(session: SessionId) -> int:
    """Each session has its own pace of speaking."""
    return Random(f"pace {session}").randint(180 * NS_PER_MS, 380 * NS_PER_MS)


@dataclass(slots=True)
class Talk:
    """What a session says. left: text tokens of the turn that are still to come; said: those that came.
    before_ns: speech received before the turn."""

    session: Session
    budget: TextBudget
    rng: Random
    is_held: bool = False
    num_waiting: int = 0  # windows that go with the next one
    left: int = 0
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
    TALKS: Final = 0.3  # how often a silent window begins a turn

    def __init__(self, cost: StageCost, token_ns: int, picture_ns: int, device: Device, rng: Random) -> None:
        super().__init__(cost, device, rng)
        self._token_ns, self._picture_ns = token_ns, picture_ns
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
        if num_pictures := sum(len(unit.of(Llm.image)) for unit in units):
            self._device.work(num_pictures * self._picture_ns)
        self._device.work(max((len(c.arrays["token_ids"]) for c in made), default=0) * self._token_ns)
        return made

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
        begins = talk.left == 0 and talk.rng.random() < self.TALKS and not is_quiet
        if talk.is_cut or (talk.left == 0 and not begins):
            talk.left, talk.is_cut = 0, False
            return []
        if begins:
            talk.left = talk.rng.randint(*self.TURN)
            talk.said, talk.before_ns = 0, talk.session.playback.latest.received_ns
        allowed = talk.budget.tokens(unit.end_ns)
        count = min(allowed, talk.left, talk.rng.randint(2, self.MOST_TOKENS))
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
    """A window of codes at most."""

    codes = Tts.codes
    paced_by_listener = True

    def __init__(self, cost: StageCost, device: Device, rng: Random) -> None:
        super().__init__(cost, device, rng)
        self._open: dict[SessionId, _Speech] = {}

    def open_session(self, session: Session) -> None:
        super().open_session(session)
        queue = SpeechQueue[Chunk](session.playback, lead_ns=session.lead_ns, window_ns=session.window_ns)
        self._open[session.id] = _Speech(queue, session.window_ns, ns_per_token(session.id))

    def interrupt(self, session: SessionId, ack: Ack) -> list[Chunk]:
        self._open[session].queue.interrupted()
        self._open[session].owed_ns = 0
        return []

    def has_more_to_say(self, session: SessionId) -> bool:
        return bool(self._open[session].queue)

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
        state.owed_ns += len(taken.arrays["token_ids"]) * state.ns_per_token
        num_codes = min(state.owed_ns * CODES_PER_S // NS_PER_S, CODES_PER_S)
        state.owed_ns = 0 if taken.attrs["end_of_turn"] else state.owed_ns - num_codes * NS_PER_S // CODES_PER_S
        state.queue.made(state.window_ns, unit.end_ns)
        return [self.codes.over(unit, arrays={"codes": np.zeros(num_codes, np.int64)}, attrs=taken.attrs)]

    def num_items(self, units: list[Unit], made: list[Chunk]) -> int:
        return len(made)


class VirtualVocoder(Costly):
    speech = Vocoder.speech
    paced_by_listener = True

    def __init__(self, cost: StageCost, device: Device, rng: Random) -> None:
        super().__init__(cost, device, rng)
        self._open: dict[SessionId, SpeechQueue[Chunk]] = {}

    def open_session(self, session: Session) -> None:
        super().open_session(session)
        self._open[session.id] = SpeechQueue(session.playback, lead_ns=session.lead_ns, window_ns=session.window_ns)

    def interrupt(self, session: SessionId, ack: Ack) -> list[Chunk]:
        self._open[session].interrupted()
        return []

    def has_more_to_say(self, session: SessionId) -> bool:
        return bool(self._open[session])

    def is_idle(self, unit: Unit) -> bool:
        return not (unit.of(Vocoder.codes) or self._open[unit.session])

    def make(self, unit: Unit) -> list[Chunk]:
        queue = self._open[unit.session]
        for codes in unit.of(Vocoder.codes):
            queue.put(codes)
        taken = queue.take(_duration_ns, unit.end_ns)
        if taken is None or not len(taken.arrays["codes"]):
            return []
        duration_ns = _duration_ns(taken)
        queue.made(duration_ns, unit.end_ns)
        samples = SILENCE[: duration_ns * SPEECH_RATE_HZ // NS_PER_S]
        arrays = {"samples": samples}
        return [self.speech.chunk(unit.session, unit.start_ns, duration_ns, arrays=arrays, attrs=taken.attrs)]

    def num_items(self, units: list[Unit], made: list[Chunk]) -> int:
        return len(made)


def _duration_ns(codes: Chunk) -> int:
    return len(codes.arrays["codes"]) * NS_PER_S // CODES_PER_S


@dataclass(slots=True)
class VirtualEvents(Stage):
    """Keeps what is told."""

    chunks: list[Chunk] = field(default_factory=list)

    def process(self, units: list[Unit]) -> list[Chunk]:
        self.chunks += [chunk for unit in units for chunks in unit.chunks.values() for chunk in chunks]
        return []


class StandIn(Costly):
    """For a stage of the user's own: it costs what its class says, and lets pass what comes in at a port of each kind
    that it makes."""

    def __init__(self, stage_type: StageType, cost: StageCost, device: Device, rng: Random) -> None:
        super().__init__(cost, device, rng)
        makes = {port.kind.name: port for port in stage_type.outputs.values()}
        self._ways = [(port, makes[port.kind.name]) for port in stage_type.inputs.values() if port.kind.name in makes]

    def make(self, unit: Unit) -> list[Chunk]:
        return [output.like(chunk) for port, output in self._ways for chunk in unit.of(port)]


def silent(cls: type[Source]) -> Source:
    """For a source of the user's own: its windows come, and nothing is in them."""
    ports: dict[str, Any] = {port.name: port for port in outputs_of(cls)}
    made: type[Source] = type(cls.__name__, (Source,), {**ports, "make": lambda *_: []})
    return made()


TWINS: Final[Mapping[type[Stage], type[Costly]]] = {
    VisionEncoder: VirtualVision,
    AudioEncoder: VirtualAudio,
    Tts: VirtualTts,
    Vocoder: VirtualVocoder,
}
"""What stands for a stage, where it needs no more than its costs."""
FREE: Final = StageCost(0, 0)
