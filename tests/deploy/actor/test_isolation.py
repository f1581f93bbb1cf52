"""deploy/actor/isolation.py and how deploy/actor/runner.py uses it: one bad unit costs its session, never the actor."""

from collections.abc import Iterator

import numpy as np
import pytest

from deploy.actor.isolation import MAX_REASON_CHARS, breaks_process, process, reason_of
from graph.chunk import NS_PER_S, Chunk, Failure, SessionId, end_of_stream, watermark
from graph.ladder import STEPS
from graph.ledger import Account
from graph.window import Unit
from stages.llm import Llm
from stages.session import Session
from stages.stage import BatchLost, Stage, StageError
from tests.support.house import (
    NOTED,
    PLAYED,
    SOUND,
    SPOKEN,
    Ear,
    Echo,
    House,
    ManualClock,
    Notes,
    Ticker,
    barge_in,
    heard,
)
from tests.support.streams import MIC, TEXT
from tests.support.units import session as session_of

DOOR, YARD = SessionId("door"), SessionId("yard")
COUNTED = "microphone.sound->counter.sound"
ASIDE = "counter.events->events.events"
PAGED, REPORTED = "speaker.events->pager.events", "pager.events->events.events"


class Picky(Echo):
    """Raises at the units of some sessions, from window `at` on; `lost`: so that no unit can be tried again."""

    def __init__(self, *bad: str, at: int = 0, until: int = 1000, lost: bool = False) -> None:
        super().__init__()
        self._bad, self._at, self._until, self._lost = bad, at, until, lost

    def process(self, units: list[Unit]) -> list[Chunk]:
        for unit in units:
            if unit.session in self._bad and self._at <= unit.index < self._until:
                raise BatchLost("half done") if self._lost else ValueError(f"no such picture: {unit.index}")
        return super().process(units)


class Hooked(Echo):
    """Raises in one of its hooks, for the session `door`."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self._answer = hook == "finished"
        setattr(self, hook, self._raise)

    def _raise(self, first: Session | SessionId | Unit, *_: object) -> object:
        name = first if isinstance(first, str) else first.session if isinstance(first, Unit) else first.id
        if name == "door":
            raise KeyError("door")
        return self._answer

    def advance(self, session: SessionId, now_ns: int) -> list[Chunk]:
        return []


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def build(clock: ManualClock) -> Iterator[object]:
    built: list[House] = []

    def build(stages: dict[str, Stage], edges: tuple[str, ...], *, manual: bool = True, **more: object) -> House:
        built.append(House(stages, edges, clock=clock if manual else None, **more))
        return built[-1]

    yield build
    for house in built:
        house.__exit__()


def chain(build, llm: Stage, num_windows: int = 6) -> House:
    """Source, stage, sink and events, on a clock that runs."""
    stages = {"microphone": Ticker(num_windows), "llm": llm, "speaker": Ear(), "events": Notes()}
    return build(stages, (SOUND, SPOKEN, PLAYED, NOTED), manual=False)


def rows(house: House, kind: str, name: str = "door") -> list[dict[str, object]]:
    notes = house.runners["events"].stage
    return [dict(c.attrs) for c in notes.chunks if c.session == name and c.attrs["type"] == kind]


# ---- what breaks a process -------------------------------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    """As torch calls its own."""


@pytest.mark.parametrize(
    ("error", "breaks"),
    [
        (MemoryError(), True),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (SystemExit(4), False),
        (ValueError("bad picture"), False),
        (AssertionError(), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_only_memory_and_devices_break_a_process(error: BaseException, breaks: bool):
    assert breaks_process(error) is breaks


def test_what_lies_behind_an_error_breaks_it_too():
    try:
        raise BatchLost("llm") from MemoryError()
    except BatchLost as error:
        assert breaks_process(error)


def test_a_reason_is_one_short_line():
    reason = reason_of(ValueError("no\nsuch " + "x" * 1000 + "\ud800"))
    assert reason.startswith("ValueError: no such xx")
    assert (len(reason), "\n" in reason) == (MAX_REASON_CHARS, False)


# ---- a batch ---------------------------------------------------------------------------------------------------------


def units(*names: str) -> list[Unit]:
    return [Unit(SessionId(name), 0, 0, NS_PER_S, chunks={MIC: (heard(SessionId(name), 0),)}) for name in names]


def test_a_batch_that_raises_is_tried_again_one_by_one():
    outcome = process(Picky("b"), units("a", "b", "c"))
    assert [chunk.session for chunk in outcome.chunks] == ["a", "c"]
    assert {session: str(error) for session, error in outcome.failed.items()} == {"b": "no such picture: 0"}


def test_what_can_not_be_tried_again_fails_together():
    outcome = process(Picky("b", lost=True), units("a", "b", "c"))
    assert (outcome.chunks, set(outcome.failed)) == ([], {"a", "b", "c"})


@pytest.mark.parametrize("made", [None, [None], ["text"], [Chunk(SessionId("x"), TEXT, 0)]])
def test_a_stage_that_returns_what_is_none_of_the_batchs_fails_at_it(made: object):
    class Odd(Stage):
        def process(self, units: list[Unit]) -> list[Chunk]:
            return made  # type: ignore[return-value]

    assert set(process(Odd(), units("a")).failed) == {"a"}


def test_out_of_memory_goes_through():
    class Full(Stage):
        def process(self, units: list[Unit]) -> list[Chunk]:
            raise MemoryError

    with pytest.raises(MemoryError):
        process(Full(), units("a", "b"))


# ---- a session -------------------------------------------------------------------------------------------------------


def test_one_bad_unit_is_a_failed_window_of_its_session_and_of_no_other(build):
    house = chain(build, Picky("door", at=2, until=3))
    house.open("door"), house.open("yard")
    house.run()
    assert [row["failed"] for row in rows(house, "window")] == ["", "", "llm", "", "", ""]
    assert [row["failed"] for row in rows(house, "window", "yard")] == [""] * 6
    event = {"type": "unit_failed", "window": 2, "stage": "llm", "reason": "ValueError: no such picture: 2"}
    assert rows(house, "unit_failed") == [event]
    account = house.account(SOUND)
    assert (account.accepted, account.delivered, account.dropped["failed"], account.in_flight) == (12, 11, 1, 0)


def test_who_fails_three_times_in_a_row_is_given_up_and_comes_to_its_end_the_others_go_on(build):
    picky = Picky("door", at=1)
    house = chain(build, picky)
    house.open("door"), house.open("yard")
    house.run()
    assert [row["failed"] for row in rows(house, "window")] == ["", *["llm"] * 5]
    assert [unit.index for unit in picky.units if unit.session == "door"] == [0]
    assert [row["failed"] for row in rows(house, "window", "yard")] == [""] * 6
    assert rows(house, "unit_failed")[-1]["reason"] == (
        "stage llm failed three times in a row: ValueError: no such picture: 3"
    )
    assert house.account(SOUND).in_flight == 0


def test_a_stage_reports_whom_it_has_given_up(build, clock: ManualClock):
    house = build({"llm": Picky("door")}, (SOUND, SPOKEN))
    house.open("door"), house.open("yard")
    for index in range(3):
        house.window("door", index), house.window("yard", index)
        house.runners["llm"].step()
    given_up = house.runners["llm"].snapshot().given_up
    assert given_up == {"door": "stage llm failed three times in a row: ValueError: no such picture: 2"}
    assert house.registry.get_sample_value("omni_stage_failures_total", {"stage": "llm"}) == 3


def test_two_failures_and_a_success_are_none_in_a_row(build, clock: ManualClock):
    house = build({"llm": Picky("door", at=0, until=2)}, (SOUND,))
    house.open("door")
    for index in range(5):
        house.window("door", index)
        house.runners["llm"].step()
    assert house.runners["llm"].snapshot().given_up == {}


def test_what_no_receiver_would_take_costs_its_session_and_no_credit(build, clock: ManualClock):
    class Counting(Echo):
        def process(self, units: list[Unit]) -> list[Chunk]:
            return [Llm.text.over(unit, attrs={"n": np.int64(3)}) for unit in units if unit.session == "door"]

    house = build({"llm": Counting()}, (SOUND, SPOKEN))
    house.open("door"), house.open("yard")
    house.window("door", 0), house.window("yard", 0)
    house.runners["llm"].step()
    assert house.account(SPOKEN).accepted == 0
    (watermark_,) = house.arrivals(1)
    assert watermark_.trace is not None
    reason = "StageError: stage llm, port text: attribute 'n' is a numpy.int64; use int(…)"
    assert watermark_.trace.failures == (Failure("llm", reason),)


@pytest.mark.parametrize(
    "hook", ["is_idle", "has_more_to_say", "finished", "drain", "interrupt", "due_in_ns", "advance"]
)
def test_a_hook_that_raises_costs_its_session_which_ends_like_the_others(build, hook: str):
    house = chain(build, Hooked(hook), num_windows=3)
    house.open("door"), house.open("yard")
    house.take(barge_in(DOOR, 0, epoch=1), PLAYED)
    house.run()
    for name in ("door", "yard"):
        assert [row["index"] for row in rows(house, "window", name)] == [0, 1, 2], name
    assert house.account(SOUND).in_flight == 0


@pytest.mark.parametrize("hook", ["close_session", "downstream_replaced", "cut_off", "end"])
def test_a_call_that_raises_inside_the_stage_costs_its_session(build, clock: ManualClock, hook: str):
    house = build({"llm": Hooked(hook)}, (SOUND, SPOKEN))
    house.open("door"), house.open("yard")
    runner = house.runners["llm"]
    runner.reroute(DOOR, SPOKEN, 0), runner.tell(DOOR, "recovered", {}, cuts=True), runner.end_session(DOOR)
    runner.close_session(DOOR)
    assert set(runner.snapshot().sessions) == {"yard"}
    assert house.registry.get_sample_value("omni_stage_failures_total", {"stage": "llm"}) == 1


def test_what_a_stage_refuses_itself_is_told_with_its_name_and_the_session(build, clock: ManualClock):
    class Full(Echo):
        def open_session(self, session: Session) -> None:
            raise StageError(self.said)

    house = build({"llm": (full := Full())}, (SOUND,))
    for said, message in (
        ("no room\nfor it", "llm: session 'door' can't be opened: no room for it"),
        ("llm: no room for session 'door'", "llm: no room for session 'door'"),
    ):
        full.said = said
        with pytest.raises(StageError) as caught:
            house.open("door")
        assert str(caught.value) == message


class Panic(BaseException):
    """As extensions raise that are written in Rust."""


@pytest.mark.parametrize("error", [SystemExit(4), Panic("index out of bounds"), GeneratorExit()])
def test_whatever_a_stage_raises_costs_the_window_of_its_camera_and_no_actor(build, error: BaseException):
    class Exits(Echo):
        def process(self, units: list[Unit]) -> list[Chunk]:
            if any((unit.session, unit.index) == ("door", 2) for unit in units):
                raise error
            return super().process(units)

    house = chain(build, Exits())
    house.open("door"), house.open("yard")
    house.run()
    assert [row["index"] for row in rows(house, "window") if row["failed"]] == [2]
    assert not any(row["failed"] for row in rows(house, "window", "yard"))
    (failed,) = rows(house, "unit_failed")
    assert failed["reason"] == reason_of(error)


def test_a_session_that_can_not_be_opened_is_refused_and_leaves_nothing(build, clock: ManualClock):
    house = build({"llm": Hooked("open_session")}, (SOUND,))
    with pytest.raises(StageError, match="llm: session 'door' can't be opened: KeyError: 'door'"):
        house.open("door")
    assert house.runners["llm"].snapshot().sessions == {}


def test_a_source_that_raises_ends_its_streams_and_the_rest_comes_to_its_end(build, clock: ManualClock):
    class Broken(Ticker):
        def advance(self, session: SessionId, now_ns: int) -> list[Chunk]:
            raise RuntimeError("no such device")

    house = build({"microphone": Broken(3)}, (SOUND,))
    house.open("door", paced=True)
    clock.advance(1.5)
    for _ in range(4):
        house.runners["microphone"].step()
        clock.advance(0.01)
    (end,) = house.arrivals(1)
    assert (end.type.name, end.stream, end.start_ns) == ("END", MIC, 2 * NS_PER_S)
    assert house.runners["microphone"].snapshot().sessions == {}


def test_a_stage_without_windows_that_raises_is_given_up_and_its_chunks_are_named(build, clock: ManualClock):
    class Deaf(Notes):
        def process(self, units: list[Unit]) -> list[Chunk]:
            raise OSError("gone")

    house = build({"events": Deaf()}, (NOTED,))
    house.open("door")
    for index in range(5):
        house.take(Chunk(DOOR, "events", index, attrs={"type": "word"}), NOTED)
    assert (house.account(NOTED).dropped["failed"], house.account(NOTED).in_flight) == (5, 0)
    assert set(house.runners["events"].snapshot().given_up) == {"door"}
    house.take(end_of_stream(DOOR, "events", 9), NOTED)
    house.runners["events"].step()
    assert house.runners["events"].snapshot().sessions == {}


def test_a_chunk_of_a_stream_that_is_none_of_the_stages_costs_its_session(build, clock: ManualClock):
    house = build({"llm": Echo()}, (SOUND,))
    house.open("door"), house.open("yard")
    house.take(Chunk(DOOR, "smell", 0))
    house.take(watermark(DOOR, "smell", 1))
    house.window("yard", 0)
    house.runners["llm"].step()
    account: Account = house.account(SOUND)
    assert (account.delivered, account.dropped["failed"], account.in_flight) == (1, 1, 0)


# ---- where windows end -----------------------------------------------------------------------------------------------


def test_a_stage_beside_the_way_ends_no_window(build):
    class Counter(Echo):
        def process(self, units: list[Unit]) -> list[Chunk]:
            return []

    sides = {"microphone": Ticker(3), "llm": Echo(), "counter": Counter(), "speaker": Ear(), "events": Notes()}
    edges = (SOUND, COUNTED, SPOKEN, PLAYED, NOTED, ASIDE)
    house = build(sides, edges, manual=False, ends_windows="speaker")
    house.open("door")
    house.run()
    assert [row["index"] for row in rows(house, "window")] == [0, 1, 2]


def aside(build, counter: Stage, num_windows: int) -> House:
    """A stage on a side branch that has come through its windows, and the events behind it."""
    house = build({"counter": counter, "events": Notes()}, (COUNTED, ASIDE))
    for name, fields in (("counter", {"is_aside": True}), ("events", {})):
        house.runners[name].open_session(house.plan(name, session_of("door", paced=True), ends_windows=False, **fields))
        house.runners[name].begin_session(DOOR, 0)
    for index in range(num_windows):
        house.take(heard(DOOR, index), COUNTED)
        house.take(watermark(DOOR, MIC, (index + 1) * NS_PER_S), COUNTED)
    house.settle()
    return house


def test_a_stage_on_a_side_branch_reports_itself_what_fails_there(build, clock: ManualClock):
    house = aside(build, Picky("door", at=1, until=2), num_windows=3)
    event = {"type": "unit_failed", "window": 1, "stage": "counter", "reason": "ValueError: no such picture: 1"}
    assert rows(house, "unit_failed") == [event]


def test_that_a_side_branch_goes_on_without_a_camera_is_told_once(build, clock: ManualClock):
    house = aside(build, Picky("door"), num_windows=8)
    raised = [(index, f"ValueError: no such picture: {index}") for index in range(3)]
    given_up = (3, "stage counter failed three times in a row: ValueError: no such picture: 2")
    assert [(row["window"], row["reason"]) for row in rows(house, "unit_failed")] == [*raised, given_up]


def test_a_side_branch_that_always_fails_is_not_among_what_ends_a_session(build, clock: ManualClock):
    house = build({"counter": Picky("door"), "events": Notes()}, (COUNTED, ASIDE))
    runner = house.runners["counter"]
    runner.open_session(house.plan("counter", session_of("door", paced=True), ends_windows=False, is_aside=True))
    runner.begin_session(DOOR, 0)
    for index in range(3):
        house.take(heard(DOOR, index), COUNTED)
        house.take(watermark(DOOR, MIC, (index + 1) * NS_PER_S), COUNTED)
        runner.step()
    assert (runner.snapshot().given_up, list(runner.snapshot().given_up_aside)) == ({}, [DOOR])


class Returns(Echo):
    """Returns what a test says."""

    def __init__(self, make) -> None:
        super().__init__()
        self._make = make

    def process(self, units: list[Unit]) -> list[Chunk]:
        return self._make(units[0])


def event_of(session: object) -> Chunk:
    return Chunk(session, "events", 0, attrs={"type": "x"})


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda unit: event_of(DOOR), "TypeError: process() returned a Chunk; return a list of chunks"),
        (
            lambda unit: [event_of(YARD)],
            "ValueError: a chunk of session 'yard', which is none of its units'; they are of: door",
        ),
        (
            lambda unit: [event_of(unit)],
            "TypeError: a chunk whose session is a Unit; give its id, such as unit.session",
        ),
        (
            lambda unit: unit.of("events"),
            "TypeError: of() takes a port, such as self.events, and not its name 'events'",
        ),
        (lambda unit: ["x"], "TypeError: it returned a str"),
        (lambda unit: None, "TypeError: process() returned None; return a list of chunks"),
        (
            lambda unit: [Chunk(DOOR, "events", 0, attrs={"text": "x"})],
            "StageError: stage pager, port events: an event has a type; make it by event(session, at_ns, type, …)",
        ),
        (
            lambda unit: [Chunk(DOOR, "events", 0.5, attrs={"type": "x"})],
            "StageError: stage pager, port events: times in nanoseconds, seq and epoch are integers of 64 bits; not a",
        ),
    ],
)
def test_what_a_stage_without_windows_returns_is_checked_as_well(build, make, reason: str):
    house = build({"pager": Returns(make), "events": Notes()}, (PAGED, REPORTED))
    runner = house.runners["pager"]
    runner.open_session(house.plan("pager", session_of("door", paced=True), ends_windows=False, is_aside=True))
    runner.begin_session(DOOR, 0)
    for _ in range(3):
        house.take(event_of(DOOR), PAGED)
    (given_up,) = runner.snapshot().given_up_aside.values()
    assert given_up.startswith(f"stage pager failed three times in a row: {reason}")
    assert house.account(PAGED).dropped["failed"] == 3


def test_why_a_session_was_given_up_is_known_after_its_end(build, clock: ManualClock):
    house = build({"counter": Picky("door"), "events": Notes()}, (COUNTED, ASIDE))
    runner = house.runners["counter"]
    for is_aside in (True, False):
        plan = house.plan("counter", session_of("door", paced=True), ends_windows=False, is_aside=is_aside)
        runner.open_session(plan)
        assert not runner.snapshot().given_up_aside, "of another one of that name"
        runner.begin_session(DOOR, 0)
        for index in range(3):
            house.take(heard(DOOR, index), COUNTED)
            house.take(watermark(DOOR, MIC, (index + 1) * NS_PER_S), COUNTED)
            runner.step()
        runner.close_session(DOOR)
        snapshot = runner.snapshot()
        assert (list(snapshot.given_up_aside), list(snapshot.given_up_before)) == (
            [DOOR] if is_aside else [],
            [] if is_aside else [DOOR],
        )
        assert snapshot.given_up == {}


def test_a_ladder_belongs_to_where_windows_end(build, clock: ManualClock):
    house = build({"speaker": Ear(), "events": Notes()}, (SPOKEN, PLAYED, NOTED))
    session = session_of("door", paced=True, ladder=STEPS)
    house.open("door", paced=True, ladder=STEPS)
    assert session.taken == ()
    assert house.runners["speaker"].replica.open[DOOR].sink is not None
