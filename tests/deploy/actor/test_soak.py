"""What is counted in is counted out: thousands of sessions that come and go leave every table as empty as before."""

from collections.abc import Sized

from deploy.actor.lives import Lives
from deploy.actor.replica import Replica
from deploy.actor.runner import StageRunner
from graph.chunk import SessionId
from graph.edge import Receiver, Sender
from stages.events import Events
from stages.stage import Stage
from tests.support.house import CHAIN, Ear, Echo, House, ManualClock, Ticker

NUM_SESSIONS = 2000


class Forgetful(Ear):
    """Keeps nothing of what it has heard."""

    def close_session(self, session: SessionId) -> None:
        self._sessions.pop(session, None)
        self._begun.discard(session)
        self.units.clear()


class Quiet(Echo):
    """Keeps no record of its batches."""

    def close_session(self, session: SessionId) -> None:
        super().close_session(session)
        self.batches.clear(), self.units.clear(), self.interruptions.clear()


def tables(of: StageRunner | Replica | Lives | Sender | Receiver | Stage) -> dict[str, int]:
    """How much everything in it holds that can hold something."""
    return {name: len(value) for name, value in vars(of).items() if isinstance(value, Sized) and name != "_arrived"}


def all_tables(house: House) -> dict[str, dict[str, int]]:
    held: dict[str, dict[str, int]] = {}
    for name, runner in house.runners.items():
        held |= {
            name: tables(runner),
            f"{name}.replica": tables(runner.replica),
            f"{name}.lives": tables(runner._lives),
            f"{name}.stage": tables(runner.stage),
        }
    for edge in house.edges:
        held |= {f"{edge} out": tables(house.senders[edge]), f"{edge} in": tables(house.receivers[edge])}
    return held


def test_two_thousand_sessions_that_come_and_go_leave_every_table_as_it_was():
    stages = {"microphone": Ticker(2), "llm": Quiet(), "speaker": Forgetful(), "events": Events()}
    with House(stages, CHAIN, clock=ManualClock()) as house:
        before = all_tables(house)
        for number in range(NUM_SESSIONS):
            house.open(f"camera{number}")
            for _ in range(number % 4):  # some have said something, some have ended, some have just begun
                house.loop.turn(house.bus.wait(0.0))
            for runner in house.runners.values():
                runner.close_session(SessionId(f"camera{number}"))
        house.settle()
        for _ in range(1000):  # the last grants are on their way
            house.turn()
            if not any(sender._left for sender in house.senders.values()):
                break
        for runner in house.runners.values():
            runner.step()
        assert all_tables(house) == before
        assert {edge: house.account(edge).in_flight for edge in house.edges} == dict.fromkeys(house.edges, 0)
