"""graph/edge.py: what is sent where a replica has died and another one takes its place."""

from __future__ import annotations

from dataclasses import dataclass, field

from graph.chunk import Chunk, ChunkType, SessionId, end_of_stream
from graph.credit import Grant, Limit
from graph.edge import EdgeRule, Sender, SilentObserver

DOOR, YARD = SessionId("door"), SessionId("yard")
RULE = EdgeRule("tts.codes->vocoder.codes", Limit(4))


@dataclass
class Link:
    chunks: list[Chunk] = field(default_factory=list)

    def send(self, chunk: Chunk) -> bool:
        self.chunks.append(chunk)
        return True

    def grants(self) -> list[tuple[SessionId, int, Grant]]:
        return []

    @property
    def sessions(self) -> set[SessionId]:
        return {chunk.session for chunk in self.chunks}


def sender_of(*sessions: SessionId) -> Sender:
    sender = Sender(RULE, Link(), SilentObserver(), lambda: 0)
    for session in sessions:
        sender.open_session(session)
    return sender


def say_all(sender: Sender, *sessions: SessionId) -> None:
    for session in sessions:
        sender.send(Chunk(session, "codes", 0))
        sender.send(end_of_stream(session, "codes", 0))


def test_a_replica_that_takes_a_dead_ones_place_is_sent_what_is_open_there_and_nothing_else():
    sender, new = sender_of(DOOR, YARD), Link()
    sender.bury()
    say_all(sender, DOOR, YARD)
    sender.release(DOOR)
    sender.meet(new)
    assert new.sessions == {DOOR}
    assert sender.is_drained(DOOR)
    assert not sender.is_drained(YARD), "its end waits for the replica that will have it"
    sender.send(Chunk(YARD, "playback", 0, type=ChunkType.PLAYBACK))
    assert new.sessions == {DOOR}
    sender.release(YARD)
    assert new.sessions == {DOOR, YARD}


def test_a_session_that_goes_to_another_replica_meanwhile_takes_along_what_waited():
    sender, other, new = sender_of(DOOR), sender_of(), Link()
    sender.bury()
    say_all(sender, DOOR)
    sender.meet(new)
    assert new.chunks == []
    sender.move(DOOR, other)
    assert [chunk.type for chunk in other._link.chunks] == [ChunkType.DATA, ChunkType.END]  # type: ignore[attr-defined]


def test_who_opens_a_session_that_is_open_nowhere_behind_it_sends_nothing_before_it_is():
    sender = sender_of()
    sender.open_session(DOOR, held=True)
    say_all(sender, DOOR)
    assert not sender.is_drained(DOOR)
    sender.release(DOOR)
    assert sender.is_drained(DOOR)
