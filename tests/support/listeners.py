"""Listeners that a test puts behind a stage."""

from graph.chunk import NS_PER_S, Chunk, SessionId
from graph.tail import Playback
from graph.window import Unit
from stages.session import Session
from stages.stage import Stage
from tests.support.units import ack


class HearsAtOnce(Stage):
    """Goes before a stage's class: its listeners have heard everything by the end of each window."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.playbacks: dict[SessionId, Playback] = {}

    def open_session(self, session: Session) -> None:
        super().open_session(session)
        self.playbacks[session.id] = session.playback

    def process(self, units: list[Unit]) -> list[Chunk]:
        for one in units:
            heard_s = one.end_ns / NS_PER_S
            self.playbacks[one.session].ack(ack(heard_s, through_s=heard_s))
        return super().process(units)
