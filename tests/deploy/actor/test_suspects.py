"""deploy/actor/suspects.py: whose data an actor was at work on when it died."""

import subprocess
import sys
from pathlib import Path

import pytest

from deploy.actor.suspects import CLEARED_AFTER_S, NOTE_BYTES, Suspects, Work, WorkNote, note_path, read_note
from graph.chunk import SessionId
from graph.window import Unit
from tests.support.actors import Clock
from tests.support.house import SOUND, Echo, House, ManualClock, PacedEcho
from tests.support.units import session

DIES = """
import os, signal, sys
from pathlib import Path

import pytest
from deploy.actor.suspects import WorkNote
from graph.window import Unit
with WorkNote(Path(sys.argv[1])).of("llm", [Unit("door", 2, 0, 1), Unit("ya rd", 3, 0, 1)]):
    os.kill(os.getpid(), signal.SIGKILL)
"""
A, B, C = map(SessionId, "abc")


def units(*sessions: SessionId) -> list[Unit]:
    return [Unit(session, 0, 0, 1) for session in sessions]


def test_a_process_that_is_killed_in_the_middle_of_its_work_leaves_the_names(tmp_path: Path) -> None:
    path = note_path(tmp_path, "llm.0-1")
    assert subprocess.run([sys.executable, "-c", DIES, str(path)], check=False).returncode == -9
    assert read_note(path) == Work("llm", ((SessionId("door"), 2), (SessionId("ya rd"), 3)))
    assert read_note(path).named == "window 2 of door, window 3 of ya rd"


def test_what_is_done_is_no_ones_fault(tmp_path: Path) -> None:
    note = WorkNote(tmp_path / "note")
    with note.of("llm", units(A, B)):
        assert read_note(tmp_path / "note").sessions == {A, B}
    assert read_note(tmp_path / "note") == Work()


def test_an_error_that_ends_the_process_is_like_a_death(tmp_path: Path) -> None:
    note = WorkNote(tmp_path / "note")
    with pytest.raises(MemoryError), note.of("llm", units(A)):
        raise MemoryError
    assert read_note(tmp_path / "note").sessions == {A}
    with note.of("llm", units(B)):
        pass
    assert read_note(tmp_path / "note") == Work()


def test_a_note_that_is_not_here_or_holds_too_much_is_no_error(tmp_path: Path) -> None:
    assert read_note(tmp_path / "nowhere") == Work()
    with WorkNote(tmp_path / "note").of("llm", units(SessionId("é" * NOTE_BYTES))):
        assert len(read_note(tmp_path / "note").sessions) == 1


def test_one_in_the_work_of_two_deaths_in_a_row_is_guilty() -> None:
    suspects = Suspects(Clock())
    assert suspects.died("llm", [A]) == []
    assert suspects.died("tts", [A]) == [], "which is another stage"
    assert suspects.died("llm", [A]) == [A]
    assert suspects.died("llm", [A]) == [], "it was closed, and is another one now"


def test_in_a_row_means_in_every_death_of_somebody_at_work() -> None:
    suspects = Suspects(Clock())
    suspects.died("llm", [A, B])
    suspects.died("llm", [])
    assert suspects.died("llm", [B, C]) == [B]
    assert suspects.died("llm", [A, C]) == [C], "A was not in the second"


def test_several_that_are_always_together_are_guilty_the_third_time() -> None:
    suspects = Suspects(Clock())
    assert [suspects.died("llm", [A, B]) for _ in range(3)] == [[], [], [A, B]]


def test_who_has_gone_on_for_a_minute_is_cleared() -> None:
    clock = Clock()
    suspects = Suspects(clock)
    suspects.died("llm", [A])
    clock.advance(300.0)  # as long as a large checkpoint takes to load
    assert suspects.is_suspect("llm", A)
    clock.advance(CLEARED_AFTER_S + 1)
    assert suspects.died("llm", [A]) == []
    assert suspects.is_suspect("llm", A)
    clock.advance(CLEARED_AFTER_S - 1)
    assert suspects.died("llm", [A]) == [A]


def test_a_suspect_goes_alone_for_so_many_units_and_the_others_together() -> None:
    clock, echo = ManualClock(), Echo()
    with House({"llm": echo}, (SOUND,), clock=clock) as house:
        runner = house.runners["llm"]
        for name, alone_for in (("a", 0), ("b", 1), ("c", 0)):
            runner.open_session(house.plan("llm", session(name), alone_for=alone_for))
            runner.begin_session(SessionId(name), 0)
        for index in range(2):
            for name in "abc":
                house.window(name, index)
        for _ in range(6):
            runner.step()
    assert echo.batches == [[("a", 0), ("c", 0)], [("b", 0)], [("a", 1), ("b", 1), ("c", 1)]]


def test_what_is_worked_on_is_noted_while_it_is(tmp_path: Path) -> None:
    class Looks(PacedEcho):
        def process(self, units):  # type: ignore[no-untyped-def]
            self.seen = read_note(tmp_path / "note")
            return super().process(units)

    looks = Looks()
    with House({"llm": looks}, (SOUND,), clock=ManualClock()) as house:
        house.runners["llm"].replica.working_on = WorkNote(tmp_path / "note").of
        house.open("door", paced=True)
        house.window("door", 0)
        house.runners["llm"].step()
    assert looks.seen == Work("llm", ((SessionId("door"), 0),))
    assert read_note(tmp_path / "note") == Work()
