"""What a stage is given of a session: what is fixed, what its sources read, and a mailbox of what comes in meanwhile.

All times are ns on the session's event-time axis.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from graph.chunk import SessionId
from graph.ladder import Level, Step
from graph.tail import Playback


@dataclass(frozen=True, slots=True)
class ListenerAction:
    """Something the listener does, at an event time: stop listening, go on, or interrupt."""

    at_ns: int
    kind: Literal["pause", "resume", "barge_in"]


@dataclass(frozen=True, slots=True)
class View:
    """One of the pictures of a camera that has several, or its only one: its name is "" then.

    masked_source: as it may be shown; "": as `mask_source` shows it. from_ns: event time from which on it is watched.
    """

    name: str
    source: str = field(repr=False)
    masked_source: str = ""
    from_ns: int = 0


@dataclass(frozen=True, slots=True)
class Media:
    """What the sources of a session read.

    views:      what it sees; a camera that has one source only has one view, without a name.
    heard:      the view whose sound the microphone hears.
    fps:        pictures per second of event time.
    max_pixels: of a picture; larger ones are scaled down.
    """

    views: tuple[View, ...] = (View("", ""),)
    heard: str = ""
    fps: float = 1.0
    max_pixels: int = 4 * 448 * 448

    @classmethod
    def of(cls, source: str, **more: Any) -> Media:
        """Of a camera with one source."""
        return cls((View("", source),), **more)

    def with_view(self, view: View) -> Media:
        """With this view, in the place of one of its name."""
        return replace(self, views=(*self.without_view(view.name).views, view))

    def without_view(self, name: str) -> Media:
        return replace(self, views=tuple(view for view in self.views if view.name != name))


@dataclass(frozen=True, slots=True)
class Mailbox:
    """What comes in for a session while it runs: the actor keeps it up to date, the stage reads it.

    playback: the listener as the sink's Acks describe it. level: how far down the shedding ladder it is.
    """

    playback: Playback = field(default_factory=Playback)
    level: Level = field(default_factory=Level)


@dataclass(frozen=True, slots=True)
class Session:
    """What a stage is told when a session opens.

    id:          usually one camera with its microphone.
    pictures, microphone, speech: whether there is somebody to see, to hear and to speak (a checkpoint may lack parts).
    ladder:      what the session may shed.
    duration_ns: how long the sources run; None: as long as they can.
    resume_ns:   the event time from which a replica resumes it that takes the place of one that has died; None: it
                 begins. What was before is past: a source makes nothing of it, and what lies in files is kept.
    paced:       real time; False: virtual time, as fast as the stages can (`--speed max`).
    listener:    what the listener does, where that is played. out: the folder for what is left of a run; None: none is.
    """

    id: SessionId
    camera: str
    media: Media = Media()
    pictures: bool = True
    microphone: bool = True
    speech: bool = True
    window_ns: int = 1_000_000_000
    lateness_ns: int = 150_000_000
    lead_ns: int = 1_000_000_000
    delay_ns: int = 300_000_000
    duration_ns: int | None = None
    resume_ns: int | None = None
    paced: bool = True
    ladder: tuple[Step, ...] = ()
    listener: tuple[ListenerAction, ...] = ()
    out: Path | None = None
    mailbox: Mailbox = field(default_factory=Mailbox)

    @property
    def playback(self) -> Playback:
        """The listener, as far as is known."""
        return self.mailbox.playback

    @property
    def level(self) -> Level:
        """How far down the shedding ladder it is."""
        return self.mailbox.level

    def of_view(self, view: View) -> Session:
        """The session as if this view were all that there is."""
        media = replace(self.media, views=(view,), heard=view.name)
        return replace(self, media=media, microphone=self.microphone and view.name == self.media.heard)

    def with_view(self, view: View) -> Session:
        """The session with this view, in the place of one of its name."""
        return replace(self, media=self.media.with_view(view))

    def without_view(self, name: str) -> Session:
        return replace(self, media=self.media.without_view(name))

    @property
    def begin_ns(self) -> int:
        """The event time from which this replica has it."""
        return max(self.resume_ns or 0, 0)

    @property
    def begin_index(self) -> int:
        """The window which that lies in."""
        return self.begin_ns // self.window_ns

    @property
    def taken(self) -> tuple[Step, ...]:
        """The steps of the shedding ladder that are taken now."""
        return self.ladder[: self.level.num_steps]
