"""The feeds of a process, and what the stages share that read them: camera and microphone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from graph.chunk import NS_PER_MS, SessionId
from stages.media.feed import STOPPED, Feed, Open
from stages.media.feed_opening import Opener, at_once, in_thread
from stages.media.reader import MediaReader
from stages.session import Session, View
from stages.stage import TICK_NS, Site, SourceId, SourceReport, Stage

LOOK_NS = 50 * NS_PER_MS  # a source that is opened, or has gone silent, need not be seen sooner
MAX_CLOSED = 256  # sources of which is known how they did when they are gone


class Feeds:
    """The open feeds of the process, by view; owned by the process, read by its camera and microphone stages."""

    def __init__(self, open_reader: Open = MediaReader, opener: Opener = at_once) -> None:
        """opener: `in_thread` where a source that can't be opened must not hold up the others."""
        self._open = open_reader
        self._opener = opener
        self._feeds: dict[SourceId, Feed] = {}
        self._closed: dict[SourceId, SourceReport] = {}
        self._users: dict[SourceId, int] = {}

    @classmethod
    def of(cls, site: Site) -> Feeds:
        """Those of the process."""
        return site.common(cls, lambda: cls(opener=in_thread))

    def open(self, session: Session, view: View) -> Feed:
        """The view's feed, made by its first user."""
        source = SourceId(session.id, view.name)
        if source not in self._feeds:
            self._feeds[source] = Feed(session.of_view(view), self._open, self._opener, view.from_ns)
        self._users[source] = self._users.get(source, 0) + 1
        return self._feeds[source]

    def close(self, source: SourceId) -> None:
        """Closed by its last user."""
        if source not in self._users:
            return
        self._users[source] -= 1
        if self._users[source] == 0:
            del self._users[source]
            feed = self._feeds.pop(source)
            feed.close()
            self._closed.pop(source, None)  # so that the newest is the last
            self._closed[source] = feed.report
            for oldest in [*self._closed][:-MAX_CLOSED]:
                del self._closed[oldest]

    def reports(self) -> dict[SourceId, SourceReport]:
        """How the sources do that are open, and those that were until lately."""
        return self._closed | {source: feed.report for source, feed in self._feeds.items()}

    def wakes(self) -> dict[int, SessionId]:
        return {descriptor: source.session for source, feed in self._feeds.items() for descriptor in feed.wakes()}


def soonest_ns(session: Session, now_ns: int, *at_ns: int | None) -> int:
    """In how many ns the first of these times comes. What a decoder brings wakes its stage; for what does not, such as
    a source that opens, it looks now and then. In virtual time no clock is waited for."""
    if not session.paced:
        return TICK_NS
    return max(min(LOOK_NS, *(each - now_ns for each in at_ns if each is not None)), 0)


@dataclass(slots=True)
class Reading:
    """A view of a session at a stage that reads its feed. removed: it was taken away."""

    session: Session
    view: View
    feed: Feed
    ended: bool = False
    removed: bool = False


R = TypeVar("R", bound=Reading)


class FeedStage(Stage, Generic[R]):
    """What camera and microphone share: they read the feeds of a session's views, until their ends.

    begin: makes the state of a view that opens.
    """

    def __init__(self, feeds: Feeds, begin: Callable[[Session, View, Feed], R]) -> None:
        self._feeds = feeds
        self._begin = begin
        self._open: dict[SessionId, dict[str, R]] = {}  # by view

    def views_of(self, session: Session) -> Sequence[View]:
        """Those whose feeds it reads."""
        return session.media.views

    def open_session(self, session: Session) -> None:
        self._open[session.id] = {}
        try:
            for view in self.views_of(session):
                self._open_view(session, view)
        except Exception:
            self.close_session(session.id)
            raise

    def _open_view(self, session: Session, view: View) -> None:
        feed = self._feeds.open(session, view)
        try:
            self._open[session.id][view.name] = self._begin(session, view, feed)
        except Exception:
            self._feeds.close(SourceId(session.id, view.name))
            raise

    def close_session(self, session: SessionId) -> None:
        for name in self._open.pop(session, {}):
            self._feeds.close(SourceId(session, name))

    def wakes(self) -> dict[int, SessionId]:
        return self._feeds.wakes()

    def sources(self) -> dict[SourceId, SourceReport]:
        return self._feeds.reports()

    def end(self, session: SessionId, now_ns: int) -> None:
        for reading in self._open[session].values():
            reading.feed.stop(now_ns, STOPPED)

    def finished(self, session: SessionId) -> bool:
        return all(reading.ended for reading in self._open[session].values())
