"""The sources of a simulated pipeline: cameras and microphones on virtual time, and sources of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Final

import numpy as np

from graph.chunk import NS_PER_MS, NS_PER_S, Array, Chunk, SessionId
from graph.stage_type import outputs_of
from stages.camera import Camera
from stages.microphone import Microphone
from stages.session import Session, View
from stages.stage import Source, SourceId, Stage

PICTURE: Final = np.zeros((1, 1, 3), np.uint8)
SOUND: Final = np.zeros(16, np.float32)
CAMERA_DELAY_NS: Final = 40 * NS_PER_MS


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


def silent(cls: type[Source]) -> Source:
    """For a source of the user's own: its windows come, and nothing is in them."""
    ports: dict[str, Any] = {port.name: port for port in outputs_of(cls)}
    made: type[Source] = type(cls.__name__, (Source,), {**ports, "make": lambda *_: []})
    return made()
