"""Speaker: where speech is heard, and where it is known how much of it was heard.

The default is a virtual listener: it plays in real time, acknowledges what it heard, and writes the speech as one WAV
on the session's time axis. `--speaker device` plays it on a sound device as well.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from graph.chunk import NS_PER_MS, NS_PER_S, Chunk, ChunkType, SessionId
from graph.stage_type import In, Out
from graph.tail import Heard, Player, ack_chunk
from graph.window import Unit
from stages.disk import Disk
from stages.kinds import EVENTS, PLAYBACK, SPEECH
from stages.light import LightOptions
from stages.rates import SPEECH_RATE_HZ
from stages.session import ListenerAction, Session
from stages.stage import TICK_NS, Site, Stage, StageError
from stages.wav import Output, OutputEvent, QueuedOutput

ACK_PERIOD_NS = 100 * NS_PER_MS
"""How often the listener is heard of while there is speech to hear, beside every event and window: the TTS spends
acknowledged playback only, and a tenth of a window is well below the lead."""
IDLE_ACK_PERIOD_NS = NS_PER_S
"""… and while there is none: nothing changes then, but who is never heard of is taken to be gone."""


@dataclass(slots=True)
class _Speech:
    """A received piece, as long as it may still be heard."""

    samples: np.ndarray
    text: str
    end_of_turn: bool
    started: bool = False


@dataclass(slots=True)
class _Open:
    session: Session
    player: Player
    outputs: list[Output]
    actions: deque[ListenerAction]
    epoch: int = 0
    pieces: deque[_Speech] = field(default_factory=deque)
    first_piece: int = 0
    next_ack_ns: int = 0
    in_turn: bool = False
    end_ns: int = 0


class SpeakerOptions(LightOptions):
    """sink: a virtual player with exact timing, or the machine's sound device."""

    sink: Literal["virtual", "device"] = "virtual"


class Speaker(Stage):
    """Speech to the listener, and from him what he has heard.

    open_device: makes the second output of a session, for a real sound device; None: the virtual listener only.
    most_delay: of a window; where speech keeps coming late, turns begin so long after their windows' ends at most.
    """

    speech = In(SPEECH)
    playback = Out(PLAYBACK)
    events = Out(EVENTS)
    Options = SpeakerOptions
    is_local = True
    can_be_off = False
    ends_windows = True
    most_delay: ClassVar[float] = 0.75

    @classmethod
    def load(cls, options: SpeakerOptions, site: Site) -> Speaker:
        if options.sink == "virtual":
            return cls()
        from stages.sound_device import SoundDevice

        return cls(SoundDevice)

    def __init__(self, open_device: Callable[[], Output] | None = None, disk: Disk | None = None) -> None:
        self._open_device = open_device
        self._disk = disk or Disk()
        self._open: dict[SessionId, _Open] = {}

    def open_session(self, session: Session) -> None:
        outputs: list[Output] = []
        try:
            if session.out is not None:
                path = session.out / f"{session.id}.wav"
                lossless, begin_ns = not session.paced, session.resume_ns
                outputs.append(QueuedOutput(self._disk, path, lossless=lossless, begin_ns=begin_ns))
            if self._open_device is not None:
                outputs.append(self._open_device())
        except Exception as error:
            for output in outputs:
                output.close(0)
            if isinstance(error, OSError):
                reason = error.strerror or str(error)
                raise StageError(f"speaker: {session.out} can't be written to: {reason}; name another --out") from error
            raise
        actions = deque(sorted(session.listener, key=lambda action: action.at_ns))
        ack = session.playback.latest
        most_ns = min(session.lead_ns, round(self.most_delay * session.window_ns))
        player = Player(delay_ns=session.delay_ns, most_delay_ns=most_ns, ack=ack, now_ns=session.begin_ns)
        self._open[session.id] = state = _Open(session, player, outputs, actions, ack.epoch)
        state.end_ns = session.begin_index * session.window_ns
        _pass_by(state)

    def close_session(self, session: SessionId) -> None:
        state = self._open.pop(session, None)
        for output in state.outputs if state else ():
            output.close(max(state.end_ns, state.player.now_ns) if state else 0)
        if state is not None and not self._open and not self._disk.drain():
            logging.error("speaker: the disk is too slow for what was left to write")

    def process(self, units: list[Unit]) -> list[Chunk]:
        """Queue each unit's speech; in virtual time, let the listener hear up to the end of the next window.

        Speech of the next window can't be heard before that window's end, so nothing can come in between.
        """
        chunks: list[Chunk] = []
        for unit in units:
            state = self._open[unit.session]
            if not state.session.paced:
                chunks += self._listen(state, unit.end_ns)
            for chunk in unit.of(self.speech):
                chunks += self._receive(state, chunk, unit)
            if unit.closed_by:  # of a window that was given up, speech may still come
                state.player.settled(unit.end_ns)
            state.player.ended(unit.index + 1)
            state.end_ns = max(state.end_ns, unit.end_ns)
            if not state.session.paced:
                chunks += self._listen(state, unit.end_ns + state.session.window_ns)
            chunks.append(_ack(state))
        return chunks

    def advance(self, session: SessionId, now_ns: int) -> list[Chunk]:
        state = self._open[session]
        if state.session.paced:
            return self._listen(state, now_ns)
        if state.next_ack_ns == 0:  # virtual time starts: no speech can come before the end of window 0
            return self._listen(state, state.session.window_ns)
        return []

    def cut_off(self, session: SessionId, now_ns: int) -> list[Chunk]:
        state = self._open[session]
        return [*self._listen(state, now_ns), *self._interrupt(state, state.player.now_ns, "cut_off")]

    def due_in_ns(self, session: SessionId, now_ns: int) -> int:
        state = self._open[session]
        if self._open_device is not None or not state.session.paced:
            return TICK_NS  # a device wants its sound in small pieces; in virtual time nothing here goes by the clock
        due_ns = [state.next_ack_ns]
        if state.actions:
            due_ns.append(state.actions[0].at_ns)
        if (change_ns := state.player.next_change_ns) is not None:
            due_ns.append(change_ns)
        return max(min(due_ns) - now_ns, 0)

    def finished(self, session: SessionId) -> bool:
        """True once everything queued has been heard, or nobody will listen any more. In virtual time: at once."""
        state = self._open[session]
        gone = state.player.paused and not state.actions
        return not state.session.paced or gone or state.player.unheard_ns == 0

    def drain(self, session: SessionId) -> list[Chunk]:
        """The last words of a session whose speech is over."""
        state = self._open[session]
        chunks: list[Chunk] = []
        if not state.session.paced:
            while state.player.unheard_ns and (state.actions or not state.player.paused):
                paused = state.player.paused
                chunks += self._listen(state, state.actions[0].at_ns if paused else state.player.last_end_ns)
        return [*chunks, _ack(state)]

    def _receive(self, state: _Open, chunk: Chunk, unit: Unit) -> list[Chunk]:
        samples = chunk.arrays["samples"]
        said = SPEECH.read(chunk)
        in_turn, state.in_turn = state.in_turn, not said.end_of_turn
        late_ns = state.player.receive(chunk.duration_ns, unit.end_ns, end_of_turn=said.end_of_turn)
        _plan_ack(state, state.player.now_ns)
        state.pieces.append(_Speech(samples, said.text, said.end_of_turn))
        if late_ns and in_turn:
            return [_event(state, state.player.now_ns, "underrun", window=unit.index, seconds=late_ns / NS_PER_S)]
        return []

    def _listen(self, state: _Open, now_ns: int) -> list[Chunk]:
        """Let the listener hear, and act when it is time to."""
        chunks: list[Chunk] = []
        had_to_hear = state.player.unheard_ns > 0
        while state.actions and state.actions[0].at_ns <= now_ns:
            action = state.actions.popleft()
            chunks += self._hear(state, action.at_ns)
            chunks += self._act(state, action)
        chunks += self._hear(state, now_ns)
        for output in state.outputs:
            chunks += _event_chunks(state, now_ns, output.advance(now_ns))
        has_heard_all = had_to_hear and not state.player.unheard_ns
        if has_heard_all or now_ns >= state.next_ack_ns:
            chunks.append(_ack(state))
        _plan_ack(state, now_ns)
        return chunks

    def _hear(self, state: _Open, now_ns: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        for heard in state.player.advance(now_ns):
            piece = self._piece(state, heard)
            first = heard.offset_ns * SPEECH_RATE_HZ // NS_PER_S
            last = (heard.offset_ns + heard.duration_ns) * SPEECH_RATE_HZ // NS_PER_S
            for output in state.outputs:
                chunks += _event_chunks(state, heard.at_ns, output.write(heard.at_ns, piece.samples[first:last]))
            if not piece.started:
                piece.started = True
                if piece.text:
                    duration_s = len(piece.samples) / SPEECH_RATE_HZ
                    chunks.append(_event(state, heard.at_ns, "heard", text=piece.text, seconds=duration_s))
        return chunks

    def _piece(self, state: _Open, heard: Heard) -> _Speech:
        while state.first_piece < heard.piece:
            state.pieces.popleft()
            state.first_piece += 1
        return state.pieces[0]

    def _act(self, state: _Open, action: ListenerAction) -> list[Chunk]:
        if action.kind == "pause":
            state.player.pause()
        elif action.kind == "resume":
            state.player.resume()
        else:
            return self._interrupt(state, action.at_ns, "barge_in")
        return [_event(state, action.at_ns, f"listener_{action.kind}"), _ack(state)]

    def _interrupt(self, state: _Open, at_ns: int, kind: str) -> list[Chunk]:
        state.epoch += 1
        state.in_turn = False
        unheard_ns = state.player.flush(state.epoch)
        state.first_piece += len(state.pieces)
        state.pieces.clear()
        control = Chunk(state.session.id, Speaker.playback.name, at_ns, epoch=state.epoch, type=ChunkType.BARGE_IN)
        return [
            _ack(state),  # first: whoever is interrupted shall know what was heard
            control,
            _event(state, at_ns, kind, seconds=unheard_ns / NS_PER_S, epoch=state.epoch),
        ]


def _pass_by(state: _Open) -> None:
    """What the listener has done before the session was resumed here."""
    while state.actions and state.actions[0].at_ns < state.session.begin_ns:
        action = state.actions.popleft()
        if action.kind == "pause":
            state.player.pause()
        elif action.kind == "resume":
            state.player.resume()


def _plan_ack(state: _Open, now_ns: int) -> None:
    """When the listener is to be heard of next, on a grid of the session's time."""
    period_ns = ACK_PERIOD_NS if state.player.unheard_ns else IDLE_ACK_PERIOD_NS
    state.next_ack_ns = (now_ns // period_ns + 1) * period_ns


def _ack(state: _Open) -> Chunk:
    return ack_chunk(state.session.id, state.player.ack(), state.session.level.num_steps)


def _event_chunks(state: _Open, at_ns: int, events: list[OutputEvent]) -> list[Chunk]:
    return [_event(state, at_ns, event.kind, **event.attrs) for event in events]


def _event(state: _Open, at_ns: int, kind: str, **attrs: int | float | str) -> Chunk:
    return Speaker.events.event(state.session.id, at_ns, kind, **attrs)
