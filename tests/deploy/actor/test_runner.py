"""deploy/actor/runner.py: batches, credit, epochs and ends, with stages that a test writes and a real bus."""

from collections.abc import Iterator

import numpy as np
import pytest

from deploy.actor.afterword import UNSAID
from deploy.actor.runner import StageRunner
from deploy.actor.session_plan import Listener, SessionSnapshot
from graph.chunk import NS_PER_MS, NS_PER_S, Chunk, ChunkType, SessionId, end_of_stream, watermark
from graph.credit import Limit
from graph.edge import Arrival, Sender, SilentObserver
from graph.gather import MARGIN_NS, NUM_WAYS
from graph.ladder import STEPS
from graph.tail import Ack, ack_chunk
from graph.window import Unit
from stages.llm import Llm
from stages.stage import StageError
from tests.support.house import (
    LEVELS,
    NOTED,
    PLAYED,
    SEEN,
    SOUND,
    SPOKEN,
    Ear,
    Echo,
    HeldEcho,
    House,
    ManualClock,
    Notes,
    PacedEcho,
    Shutter,
    Sink,
    Ticker,
    barge_in,
    heard,
)
from tests.support.sessions import make_session
from tests.support.streams import MIC, SPEECH, TEXT, camera_stream
from tests.support.units import session as session_of

DOOR, YARD = SessionId("door"), SessionId("yard")


@pytest.fixture
def clock() -> ManualClock:
    """What the houses of a test that asks for it go by."""
    return ManualClock()


@pytest.fixture
def houses() -> Iterator[list[House]]:
    """Whatever a test builds is closed."""
    built: list[House] = []
    yield built
    for house in built:
        house.__exit__()


@pytest.fixture
def build(houses: list[House], request: pytest.FixtureRequest):
    clock = request.getfixturevalue("clock") if "clock" in request.fixturenames else None

    def build(*args: object, **kwargs: object) -> House:
        houses.append(House(*args, clock=clock, **kwargs))
        return houses[-1]

    return build


def whole(build, num_windows: int = 20, echo: Echo | None = None, **kwargs: object) -> House:
    """Source, stage, sink and events."""
    stages = {"microphone": Ticker(num_windows), "llm": echo or Echo(), "speaker": Ear(), "events": Notes()}
    return build(stages, **kwargs)


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_a_unit_waits_for_peers_and_no_longer_than_it_may(build, clock: ManualClock):
    echo = Echo()
    house = build({"llm": echo}, (SOUND,), wait_ns=5_000_000)
    house.open("door"), house.open("yard")
    house.window("door", 0)
    house.runners["llm"].step()
    assert echo.batches == []
    clock.advance(0.004)
    house.runners["llm"].step()
    assert echo.batches == []
    clock.advance(0.001)
    house.runners["llm"].step()
    assert echo.batches == [[("door", 0)]]


def test_a_batch_goes_at_once_when_everybody_is_there(build, clock: ManualClock):
    echo = Echo()
    house = build({"llm": echo}, (SOUND,), wait_ns=5_000_000)
    house.open("door"), house.open("yard")
    house.window("door", 0), house.window("yard", 0)
    house.runners["llm"].step()
    assert echo.batches == [[("door", 0), ("yard", 0)]]


def test_a_unit_does_not_wait_for_a_session_whose_window_ends_later(build, clock: ManualClock):
    echo = Echo()
    house = build({"llm": echo}, (SOUND,), wait_ns=5_000_000)
    house.open("door", 0), house.open("yard", 400_000_000)
    house.window("door", 0)
    house.runners["llm"].step()
    assert echo.batches == [[("door", 0)]]


def test_a_batch_goes_at_once_when_it_is_full(build, clock: ManualClock):
    echo = Echo()
    house = build({"llm": echo}, (SOUND,), wait_ns=5_000_000, max_units=2)
    for name in ("a", "b", "c"):
        house.open(name)
    house.window("a", 0), house.window("b", 0)
    house.runners["llm"].step()
    assert echo.batches == [[("a", 0), ("b", 0)]]


def test_a_batch_takes_the_earliest_deadlines(build, clock: ManualClock):
    echo = Echo()
    house = build({"llm": echo}, (SOUND,), max_units=2)
    for name, origin_ns in (("late", 700), ("early", 100), ("middle", 400)):
        house.open(name, origin_ns)
        house.window(name, 0)
    assert house.runners["llm"].step()
    assert not house.runners["llm"].step()
    assert echo.batches == [[("early", 0), ("middle", 0)], [("late", 0)]]


def test_speech_is_held_for_that_of_others_while_its_listener_has_something_to_hear(build, clock: ManualClock):
    echo = HeldEcho()
    house = build({"llm": echo}, (SOUND, PLAYED), hold_ns=NS_PER_S)
    house.open("door", paced=True), house.open("yard", paced=True)
    for index in range(NUM_WAYS):  # what has come to a listener says how long the way is
        hear_window(house, clock, index, ["door", "yard"])
    echo.batches.clear()
    hear_window(house, clock, NUM_WAYS, ["door"])
    assert echo.batches == []
    clock.advance(0.05)
    house.window("yard", NUM_WAYS)
    house.runners["llm"].step()
    assert [sorted(batch) for batch in echo.batches] == [[("door", NUM_WAYS), ("yard", NUM_WAYS)]]


def test_held_speech_goes_in_time_when_nobody_comes(build, clock: ManualClock):
    echo = HeldEcho()
    house = build({"llm": echo}, (SOUND, PLAYED), hold_ns=NS_PER_S)
    house.open("door", paced=True), house.open("yard", paced=True)
    for index in range(NUM_WAYS):
        hear_window(house, clock, index, ["door", "yard"])
    echo.batches.clear()
    hear_window(house, clock, NUM_WAYS, ["door"])
    due_ns = house.runners["llm"].due_in_ns()
    assert due_ns == (400 - 100) * NS_PER_MS - MARGIN_NS
    clock.advance(due_ns / NS_PER_S)
    house.runners["llm"].step()
    assert echo.batches == [[("door", NUM_WAYS)]]


def test_speech_that_a_barge_in_has_dropped_says_nothing_of_the_way(build, clock: ManualClock):
    house = build({"llm": HeldEcho()}, (SOUND, PLAYED), hold_ns=NS_PER_S)
    house.open("door", paced=True), house.open("yard", paced=True)
    hear_window(house, clock, 0, ["door", "yard"])
    under_way = house.runners["llm"].replica.open
    assert under_way[SessionId("door")].sent and under_way[SessionId("yard")].sent
    house.take(ack_chunk(SessionId("door"), Ack(2 * NS_PER_S, epoch=1)), PLAYED)
    assert not under_way[SessionId("door")].sent and under_way[SessionId("yard")].sent


def hear_window(house: House, clock: ManualClock, index: int, names: list[str]) -> None:
    """At a window's end its sound comes in, while each listener has 400 ms left to hear; what is said of it comes to
    its listener 100 ms later."""
    end_ns = (index + 1) * NS_PER_S
    clock.advance((end_ns - clock.monotonic_ns()) / NS_PER_S)
    for name in ("door", "yard"):
        house.take(ack_chunk(SessionId(name), Ack(end_ns, queue=((end_ns, 400 * NS_PER_MS),))), PLAYED)
    for name in names:
        house.window(name, index)
    house.runners["llm"].step()
    for name in names:
        came = Ack(end_ns + 100 * NS_PER_MS, through_ns=end_ns)
        house.take(ack_chunk(SessionId(name), came), PLAYED)


def test_a_session_has_one_unit_in_a_batch(build, clock: ManualClock):
    echo = Echo()
    house = build({"llm": echo}, (SOUND,))
    house.open("door"), house.open("yard")
    house.window("door", 0), house.window("door", 1), house.window("yard", 0)
    assert house.runners["llm"].step()
    house.runners["llm"].step()
    assert echo.batches == [[("door", 0), ("yard", 0)], [("door", 1)]]


def test_the_loop_sleeps_as_long_as_a_unit_may_wait(build, clock: ManualClock):
    house = build({"llm": Echo()}, (SOUND,), wait_ns=20_000_000)
    house.open("door"), house.open("yard")
    assert house.runners["llm"].due_in_ns() is None
    house.window("door", 0)
    house.runners["llm"].step()
    clock.advance(0.005)
    assert house.runners["llm"].due_in_ns() == 15_000_000


# ---- credit ----------------------------------------------------------------------------------------------------------


def test_a_blocked_lane_stops_its_session_only(build, clock: ManualClock):
    # Given: nobody takes the text, and a lane holds one chunk; the second waits, and the third is not made.
    echo = Echo()
    house = build({"llm": echo}, (SOUND, SPOKEN), limit=Limit(1))
    house.open("door"), house.open("yard")
    for index in range(3):
        house.window("door", index)
        house.runners["llm"].step()
    house.window("yard", 0)
    house.runners["llm"].step()
    assert echo.batches == [[("door", 0)], [("door", 1)], [("yard", 0)]]
    assert house.account(SOUND).in_flight == 1


def test_a_blocked_session_costs_no_idle_turns(build, clock: ManualClock):
    house = build({"llm": Echo()}, (SOUND, SPOKEN), limit=Limit(1))
    house.open("door")
    for index in range(3):
        house.window("door", index)
        house.runners["llm"].step()
    clock.advance(1.0)
    assert house.runners["llm"].due_in_ns() is None


def test_a_blocked_session_goes_on_when_its_credit_comes_back(build):
    house = whole(build, num_windows=40, limit=Limit(1))
    house.open("door")
    house.run()
    assert [unit.index for unit in house.runners["speaker"].stage.units] == list(range(40))


def test_a_chunk_is_settled_when_its_unit_has_been_processed(build, clock: ManualClock):
    house = build({"llm": Echo()}, (SOUND,))
    house.open("door")
    house.take(heard(DOOR, 0))
    assert house.account(SOUND).in_flight == 1
    house.take(watermark(DOOR, MIC, NS_PER_S))
    house.runners["llm"].step()
    assert (house.account(SOUND).in_flight, house.account(SOUND).delivered) == (0, 1)


def test_a_stage_that_falls_behind_still_takes_what_comes(build, clock: ManualClock):
    class Slow(Echo):
        def process(self, units: list[Unit]) -> list[Chunk]:
            clock.advance(3.0 * len(units))
            assert len(self.batches) < 9, "it never looks up"
            return super().process(units)

    echo = Slow()
    house = build({"llm": echo}, (SOUND,))
    house.open("door", paced=True)
    clock.advance(3600.0)
    for num_turns in range(1, 6):
        house.turn()
        assert len(echo.batches) == num_turns


# ---- the beginning ---------------------------------------------------------------------------------------------------


def test_a_source_is_silent_until_its_sessions_time_begins(build, clock: ManualClock):
    house = build({"microphone": Ticker(1)}, (SOUND,))
    runner = house.runners["microphone"]
    runner.open_session(house.plan("microphone", make_session("door")))
    runner.step()
    assert house.account(SOUND).accepted == 0
    runner.begin_session(DOOR, 0)
    runner.step()
    assert house.account(SOUND).accepted == 1


# ---- late ------------------------------------------------------------------------------------------------------------


def test_in_real_time_a_window_is_given_up_and_what_comes_then_is_late(build, clock: ManualClock):
    echo = Echo()
    house = build({"llm": echo}, (SOUND,))
    house.open("door", paced=True)
    clock.advance(2.149)
    house.runners["llm"].step()
    assert echo.batches == []
    clock.advance(0.001)  # one window and 150 ms after its end
    house.runners["llm"].step()
    assert (echo.units[0].missing, echo.units[0].closed_by) == ({MIC}, "")
    house.take(heard(DOOR, 0))
    assert house.account(SOUND).dropped["late"] == 1
    assert house.account(SOUND).in_flight == 0


def test_a_window_that_was_given_up_names_what_was_awaited_and_of_whom(build, clock: ManualClock):
    house = build({"speaker": Ear(), "events": Notes()}, (SPOKEN, NOTED))
    house.open("door", paced=True)
    clock.advance(2.15)
    house.runners["speaker"].step()
    clock.advance(0.001)
    house.settle()
    (window,) = house.runners["events"].stage.events("window")
    fields = {name: window[name] for name in ("missing", "digest", "on_time", "late_stage", "stages")}
    stages = '{"llm.queue": 1.15}'
    assert fields == {"missing": "text", "digest": "", "on_time": False, "late_stage": "llm", "stages": stages}


# ---- a replica that has died -----------------------------------------------------------------------------------------

HEARD = Listener(Ack(3 * NS_PER_S, heard_ns=NS_PER_S, received_ns=2 * NS_PER_S, num_turns=1, epoch=2), level=1)


def resume(house: House, stage: str = "llm") -> StageRunner:
    """Session `door` goes on at this stage."""
    runner = house.runners[stage]
    session = session_of("door", paced=True, resume_ns=house.clock.monotonic_ns())
    runner.open_session(house.plan(stage, session, resume_from=HEARD))
    runner.begin_session(DOOR, 0)
    return runner


def test_a_session_goes_on_with_the_window_that_it_is_in(build, clock: ManualClock):
    house = build({"llm": (echo := Echo())}, (SOUND, SPOKEN))
    clock.advance(3.4)
    resume(house)
    house.window("door", 2), house.window("door", 3)
    house.runners["llm"].step()
    assert echo.batches == [[("door", 3)]]
    assert house.account(SOUND).dropped["late"] == 1
    (chunk, *_) = house.arrivals(2)
    assert chunk.epoch == 2, "what was said before the last barge-in stays stale"


@pytest.mark.parametrize("edges", [(SPOKEN, NOTED), (SPOKEN, NOTED, PLAYED)])
def test_where_windows_end_those_before_are_counted_with_those_that_were_late(
    build, clock: ManualClock, edges: tuple[str, ...]
):
    house = build({"speaker": Ear(), "events": Notes()}, edges)
    clock.advance(9.4)
    ended = Listener(Ack(0, num_windows=7), 0)
    session = session_of("door", paced=True, resume_ns=clock.monotonic_ns())
    runner = house.runners["speaker"]
    runner.open_session(house.plan("speaker", session, resume_from=ended, num_late=3))
    runner.begin_session(DOOR, 0)
    assert runner.snapshot().sessions[DOOR] == SessionSnapshot(num_windows=7, num_late=3)


def test_it_knows_the_listener_as_the_others_do(build, clock: ManualClock):
    house = build({"llm": Echo()}, (SOUND,))
    state = resume(house).replica.open[DOOR]
    assert (state.session.playback.latest, state.session.level.num_steps) == (HEARD.ack, 1)
    assert house.runners["llm"].listener(DOOR) == HEARD
    assert house.runners["llm"].listener(YARD) is None


def test_numbers_of_chunks_never_come_twice(build, clock: ManualClock):
    house = build({"llm": Echo()}, (SOUND, SPOKEN))
    house.open("door", paced=True)
    seqs = []
    for second in (1.0, 1.0):
        clock.advance(second)
        house.window("door", int(clock.now_ns // NS_PER_S) - 1)
        house.runners["llm"].step()
        seqs += [chunk.seq for chunk in house.arrivals(2) if not chunk.is_control]
        house.runners["llm"].close_session(DOOR)
        resume(house)
    assert len(seqs) == len(set(seqs)) == 2


def test_its_end_is_where_it_would_have_been(build, clock: ManualClock):
    house = build({"llm": Echo()}, (SOUND, SPOKEN))
    clock.advance(3.4)
    runner = resume(house)
    house.window("door", 3)
    house.take(end_of_stream(DOOR, MIC, 4 * NS_PER_S))
    runner.step()
    (*_, end) = house.arrivals(3)
    assert end.type is ChunkType.END
    assert end.start_ns == 4 * NS_PER_S


def test_an_input_that_nobody_is_left_to_end_is_ended(build, clock: ManualClock):
    house = build({"llm": Echo()}, (SOUND, SPOKEN))
    clock.advance(3.4)
    runner = resume(house)
    runner.end_input(DOOR, SOUND, 3)
    runner.step()
    assert runner.snapshot().sessions == {}


def test_a_session_is_sent_to_another_replica_which_knows_nothing_of_it(build, clock: ManualClock):
    house = build({"microphone": (ticker := Ticker(9))}, (SOUND,))
    begun_anew: list[str] = []
    ticker.downstream_replaced = begun_anew.append  # type: ignore[method-assign]
    house.open("door")
    runner, sink = house.runners["microphone"], Sink()
    other = Sender(house.senders[SOUND].rule, sink, SilentObserver())
    runner.replica.senders[SOUND].append(other)
    house.bus.bury(house.senders[SOUND])
    runner.step()
    assert house.senders[SOUND].num_waiting == 1
    assert runner.reroute(DOOR, SOUND, 1) is None
    assert [chunk.type for chunk in sink.chunks] == [ChunkType.DATA, ChunkType.WATERMARK]
    assert begun_anew == ["door"]
    assert runner.reroute(YARD, SOUND, 1) == 0, "it is not open here"


def test_an_end_that_is_told_again_by_who_takes_a_dead_ones_place_counts_once(build, clock: ManualClock):
    house = build({"events": Notes()}, (NOTED, "llm.events->events.events"))
    house.open("door")
    for edge in ("llm.events->events.events",) * 2:
        house.take(end_of_stream(DOOR, "events", NS_PER_S), edge)
        house.runners["events"].step()
    assert set(house.runners["events"].snapshot().sessions) == {"door"}
    house.take(end_of_stream(DOOR, "events", NS_PER_S), NOTED)
    house.runners["events"].step()
    assert house.runners["events"].snapshot().sessions == {}


def test_who_has_died_is_told_and_what_was_not_heard_is_cut_off(build, clock: ManualClock):
    house = build({"speaker": Ear(), "events": (notes := Notes())}, (SPOKEN, NOTED))
    ear = house.runners["speaker"].stage
    ear.cut_off = lambda session, now_ns: [Chunk(session, "events", now_ns, attrs={"type": "cut_off"})]
    house.open("door")
    clock.advance(3.4)
    for cuts in (False, True):
        house.runners["speaker"].tell(DOOR, "recovered", {"actor": "tts.0"}, cuts=cuts)
    house.runners["speaker"].tell(YARD, "recovered", {"actor": "tts.0"}, cuts=True)  # it has ended
    house.settle()
    assert [chunk.attrs["type"] for chunk in notes.chunks] == ["recovered", "cut_off", "recovered"]
    assert {chunk.start_ns for chunk in notes.chunks} == {3_400_000_000}


# ---- the shedding ladder ---------------------------------------------------------------------------------------------


def test_windows_that_come_late_take_a_step_of_the_ladder_which_is_told(build, clock: ManualClock):
    house = build({"llm": Echo(), "speaker": Ear(), "events": Notes()})
    session = house.open("door", paced=True, ladder=STEPS)
    for index in range(2):
        clock.advance(1.9)  # after the window's end
        house.take(watermark(DOOR, TEXT, (index + 1) * NS_PER_S), SPOKEN)
        house.settle()
        clock.advance(-0.9)
    assert session.taken == STEPS[:1]
    shed = house.runners["events"].stage.events("shed")
    assert [(event["step"], event["level"]) for event in shed] == [("fewer_frames", 1)]
    assert [window["level"] for window in house.runners["events"].stage.events("window")] == [0, 0]
    assert house.registry.get_sample_value("omni_shedding_level", {"camera": "door"}) == 1


def test_a_stage_learns_the_level_with_the_listeners_news(build):
    house = build({"llm": Echo()}, (SOUND, PLAYED))
    session = house.open("door", ladder=STEPS)
    house.take(ack_chunk(DOOR, Ack(NS_PER_S), level=2), PLAYED)
    assert session.taken == ("fewer_frames", "vision_off")


def test_a_camera_hears_of_the_level_when_it_changes_and_once_per_window(build, clock: ManualClock):
    house = build({"speaker": Ear()}, (SPOKEN, PLAYED, LEVELS))
    session = house.open("door", paced=True, ladder=STEPS)
    sink = house.senders[LEVELS]._link = Sink()
    runner = house.runners["speaker"]
    runner.step()
    for now_s, level in ((0.3, 0), (0.6, 1), (0.7, 1), (1.2, 1), (1.7, 1)):
        clock.now_ns = round(now_s * NS_PER_S)
        session.level.update(clock.now_ns, level)
        runner.replica.out.send_all(runner.replica.open[DOOR], [ack_chunk(DOOR, Ack(clock.now_ns), level)])
    assert [chunk.attrs["level"] for chunk in sink.chunks] == [1, 1]
    assert [chunk.start_ns for chunk in sink.chunks] == [600_000_000, 1_700_000_000]


def test_pictures_that_are_shed_are_accounted_for(build, clock: ManualClock):
    house = build({"camera": Shutter(), "vision_encoder": Echo()}, (SEEN,), limit=Limit(32))
    session = house.open("door", paced=True, ladder=STEPS)
    for at_ns, num_steps, accepted, shed in ((0, 0, 4, 0), (1, 1, 8, 2), (2, 2, 12, 6), (3, 0, 16, 6)):
        session.level.update(at_ns, num_steps)
        for _ in range(4):
            clock.advance(1.0)
            house.runners["camera"].step()
        account = house.account(SEEN)
        assert (account.accepted, account.dropped["shed"]) == (accepted, shed)


def test_a_new_session_begins_where_the_others_are(build):
    house = build({"speaker": Ear()}, (SPOKEN, PLAYED))
    first = house.open("door", paced=True, ladder=STEPS)
    first.level.update(NS_PER_S, 3)
    second = house.open("yard", paced=True, ladder=(*STEPS[:1], *STEPS[2:]))
    assert second.taken == ("fewer_frames", "merged_windows")
    assert house.registry.get_sample_value("omni_shedding_level", {"camera": "yard"}) == 2
    house.runners["speaker"].close_session(YARD)
    assert house.registry.get_sample_value("omni_shedding_level", {"camera": "yard"}) is None


# ---- what costs nothing, and what comes too late to be worth it ------------------------------------------------------


def test_a_unit_that_costs_nothing_waits_for_nobody_and_takes_no_place(build, clock: ManualClock):
    echo = Echo()
    echo.is_idle = lambda unit: unit.session == YARD
    house = build({"llm": echo}, (SOUND,), wait_ns=5_000_000, max_units=1)
    house.open("door"), house.open("yard"), house.open("hall")
    house.window("door", 0), house.window("yard", 0)
    house.runners["llm"].step()
    assert echo.batches == [[("yard", 0)], [("door", 0)]]


def test_all_units_that_cost_nothing_go_in_one_step_and_are_no_batches(build, clock: ManualClock):
    echo = Echo()
    echo.is_idle = lambda unit: True
    house = build({"llm": echo}, (SOUND,), wait_ns=5_000_000)
    house.open("door")
    house.window("door", 0), house.window("door", 1)
    house.runners["llm"].step()
    assert echo.batches == [[("door", 0)], [("door", 1)]]
    assert house.registry.get_sample_value("omni_units_total", {"stage": "llm"}) == 2
    assert house.registry.get_sample_value("omni_stage_batch_units_count", {"stage": "llm"}) == 0


def test_pictures_of_a_window_that_its_listener_gave_up_are_late_and_named(build, clock: ManualClock):
    echo = Echo()
    house = build({"vision_encoder": echo}, (SEEN,))
    house.open("door", paced=True)
    camera = camera_stream("door")
    for index, now_s in enumerate((2.15, 3.2)):
        picture = {"image": np.zeros((1, 1, 3), np.uint8)}
        house.take(Chunk(DOOR, camera, index * NS_PER_S, 0, index, arrays=picture), SEEN)
        house.take(watermark(DOOR, camera, (index + 1) * NS_PER_S), SEEN)
        clock.now_ns = round(now_s * NS_PER_S)
        house.runners["vision_encoder"].step()
    assert [(unit.overdue, len(unit.chunks.get(camera, ())), unit.missing) for unit in echo.units] == [
        (False, 1, frozenset()),
        (True, 0, {camera}),
    ]
    assert (house.account(SEEN).delivered, house.account(SEEN).dropped["late"]) == (1, 1)


def test_what_is_late_may_be_carried_into_the_next_unit(build, clock: ManualClock):
    echo = Echo()
    house = build({"llm": echo}, (SOUND,), late="carry")
    house.open("door", paced=True)
    clock.advance(2.15)
    house.runners["llm"].step()
    house.take(heard(DOOR, 0))
    house.window("door", 1)
    house.runners["llm"].step()
    assert [chunk.seq for chunk in echo.units[1].chunks.get(MIC, ())] == [0, 1]
    assert house.account(SOUND).delivered == 2
    assert house.registry.get_sample_value("omni_stage_carried_total", {"stage": "llm"}) == 1


def test_virtual_time_gives_nothing_up(build, clock: ManualClock):
    echo = Echo()
    house = build({"llm": echo}, (SOUND,))
    house.open("door")
    clock.advance(3600.0)
    house.runners["llm"].step()
    assert echo.batches == []


# ---- barge-in --------------------------------------------------------------------------------------------------------


def said(session: SessionId, index: int, epoch: int) -> Chunk:
    return Chunk(session, TEXT, index * NS_PER_S, NS_PER_S, index, epoch)


def test_a_barge_in_overtakes_what_came_before_it(build, clock: ManualClock):
    house = build({"tts": Echo()}, ("llm.text->tts.text", "speaker.playback->tts.playback"))
    house.open("door")
    text = [Arrival(said(DOOR, index, epoch=0), "llm.text->tts.text", b"x") for index in range(3)]
    barge = Arrival(barge_in(DOOR, 5, epoch=1), "speaker.playback->tts.playback", b"x")
    house.loop.turn([*text, barge])
    assert house.account("llm.text->tts.text").dropped["stale"] == 3


def test_after_a_barge_in_what_was_said_before_is_stale_and_others_feel_nothing(build, clock: ManualClock):
    ear = Echo()  # stands at the end of the text edge
    house = build({"speaker": ear}, (SPOKEN, PLAYED))
    house.open("door"), house.open("yard")
    for session in (DOOR, YARD):
        house.take(said(session, 0, epoch=0), SPOKEN)
    house.runners["speaker"].take(Arrival(barge_in(DOOR, 5, epoch=1), PLAYED, b"x"))
    for session in (DOOR, YARD):
        house.take(said(session, 1, epoch=0), SPOKEN)
        house.take(watermark(session, TEXT, 2 * NS_PER_S), SPOKEN)
    while house.runners["speaker"].step():
        pass
    kept = {(unit.session, unit.index): len(unit.chunks.get(TEXT, ())) for unit in ear.units}
    assert kept == {("door", 0): 0, ("door", 1): 0, ("yard", 0): 1, ("yard", 1): 1}
    assert house.account(SPOKEN).dropped["stale"] == 2
    assert (house.account(SPOKEN).delivered, house.account(SPOKEN).in_flight) == (2, 0)


def test_a_stage_is_interrupted_once_per_epoch_and_told_what_was_heard(build, clock: ManualClock):
    echo = Echo()
    house = build({"llm": echo}, (SOUND, PLAYED))
    house.open("door")
    ack = Ack(7, heard_ns=3, received_ns=3, epoch=1)
    for chunk in (ack_chunk(DOOR, ack), barge_in(DOOR, 7, epoch=1), ack_chunk(DOOR, ack)):
        house.take(chunk, PLAYED)
    assert echo.interruptions == [("door", ack)]


def test_the_first_chunk_of_a_newer_epoch_tells_of_a_barge_in_as_well(build, clock: ManualClock):
    echo = Echo()
    house = build({"speaker": echo}, (SPOKEN,))
    house.open("door")
    house.take(said(DOOR, 0, epoch=2), SPOKEN)
    house.take(said(DOOR, 1, epoch=1), SPOKEN)
    assert len(echo.interruptions) == 1
    assert house.account(SPOKEN).dropped["stale"] == 1


def test_what_a_stage_makes_after_a_barge_in_belongs_to_the_new_epoch(build):
    house = whole(build, num_windows=0)
    ear = house.runners["speaker"].stage
    house.open("door")
    house.runners["llm"].take(Arrival(barge_in(DOOR, 0, epoch=3), PLAYED, b"x"))
    house.window("door", 0)
    house.take(end_of_stream(DOOR, MIC, NS_PER_S))
    house.run()
    assert [chunk.epoch for chunk in ear.units[0].chunks.get(TEXT, ())] == [3]


def test_what_is_seen_and_heard_goes_on_through_a_barge_in(build, clock: ManualClock):
    echo = Echo()
    house = build({"llm": echo}, (SOUND, PLAYED))
    house.open("door")
    house.take(barge_in(DOOR, 0, epoch=1), PLAYED)
    house.window("door", 0)
    house.runners["llm"].step()
    assert len(echo.units[0].chunks.get(MIC, ())) == 1


# ---- a whole chain ---------------------------------------------------------------------------------------------------


def test_a_chain_loses_nothing_ends_and_leaves_nothing_under_way(build):
    house = whole(build)
    for name in ("a", "b", "c"):
        house.open(name)
    house.run()
    units = house.runners["speaker"].stage.units
    for name in ("a", "b", "c"):
        heard_ = [(unit.index, [int(c.arrays["token_ids"][0]) for c in unit.chunks.get(TEXT, ())]) for unit in units]
        mine = [row for row, unit in zip(heard_, units, strict=True) if unit.session == name]
        assert mine == [(index, [index]) for index in range(20)]
    for edge in (SOUND, SPOKEN):
        account = house.account(edge)
        assert (account.accepted, account.delivered, account.in_flight) == (60, 60, 0)
    assert house.account(NOTED).in_flight == 0


def test_each_window_is_told_once_at_the_end_of_its_way(build):
    house = whole(build)
    house.open("door")
    house.run()
    windows = house.runners["events"].stage.events("window")
    assert [window["index"] for window in windows] == list(range(20))
    assert {window["missing"] for window in windows} == {""}
    assert len({window["digest"] for window in windows}) == 20
    assert {window["latency_s"] for window in windows} == {None}  # in virtual time nothing is late


def test_equal_input_gives_equal_digests(build):
    digests = []
    for limit in (1, 8):
        house = whole(build, limit=Limit(limit))
        house.open("door")
        house.run()
        digests.append([window["digest"] for window in house.runners["events"].stage.events("window")])
    assert digests[0] == digests[1]


def test_virtual_time_waits_for_the_clock_of_the_listener(build, clock: ManualClock):
    echo = PacedEcho()
    house = build({"llm": echo}, (SOUND, PLAYED))
    house.open("door")
    house.window("door", 0)
    house.take(ack_chunk(DOOR, Ack(NS_PER_S - 1)), PLAYED)
    house.runners["llm"].step()
    assert echo.batches == []
    house.take(ack_chunk(DOOR, Ack(NS_PER_S)), PLAYED)
    house.runners["llm"].step()
    assert echo.batches == [[("door", 0)]]


@pytest.mark.parametrize("fields", [{"paced": True}, {"speech": False}])
def test_nobody_waits_for_a_listener_in_real_time_or_where_there_is_none(build, clock: ManualClock, fields):
    echo = PacedEcho()
    house = build({"llm": echo}, (SOUND, PLAYED))
    house.open("door", **fields)
    house.window("door", 0)
    house.runners["llm"].step()
    assert echo.batches == [[("door", 0)]]


def test_a_paced_chain_in_virtual_time_comes_to_its_end(build):
    house = whole(build, echo=PacedEcho())
    house.open("door"), house.open("yard")
    house.run()
    assert len(house.runners["speaker"].stage.units) == 40


# ---- opening and closing ---------------------------------------------------------------------------------------------


def test_a_session_for_which_there_is_no_room_leaves_nothing_behind(build, clock: ManualClock):
    house = build({"llm": Echo(room=1)}, (SOUND, SPOKEN))
    house.open("door")
    with pytest.raises(StageError, match="no room"):
        house.open("yard")
    assert set(house.runners["llm"].snapshot().sessions) == {"door"}
    assert house.runners["llm"].stage.open == ["door"]
    house.take(heard(YARD, 0))
    assert house.account(SOUND).dropped["closed"] == 1


def test_closing_drops_what_is_held_and_counts_it(build, clock: ManualClock):
    house = build({"llm": Echo()}, (SOUND, SPOKEN), limit=Limit(1))
    house.open("door")
    for index in range(4):
        house.window("door", index)
        house.runners["llm"].step()
    house.runners["llm"].close_session(DOOR)
    house.runners["llm"].close_session(DOOR)
    assert (house.account(SOUND).dropped["closed"], house.account(SOUND).in_flight) == (2, 0)
    assert house.account(SPOKEN).dropped["closed"] == 1  # waited for credit
    assert house.runners["llm"].stage.open == []


def test_what_comes_for_a_session_that_is_gone_is_counted(build, clock: ManualClock):
    house = build({"llm": Echo()}, (SOUND, PLAYED))
    house.open("door")
    house.runners["llm"].close_session(DOOR)
    house.window("door", 0)
    house.take(ack_chunk(DOOR, Ack(1)), PLAYED)
    assert (house.account(SOUND).dropped["closed"], house.account(SOUND).in_flight) == (1, 0)


def test_a_session_may_be_opened_again(build):
    house = whole(build, num_windows=3)
    for _ in range(2):
        house.open("door")
        house.run()
    assert house.account(SOUND).delivered == 6


def test_an_end_that_waits_for_credit_is_not_lost(build):
    # Given: a live lane, which drops and never says that it is full; its end stands behind a waiting chunk.
    house = build({"microphone": Ticker(20)}, (SOUND,), limit=Limit(2), when_full="drop_oldest")
    house.open("door", paced=True)
    for _ in range(25):
        house.runners["microphone"].step()
    assert set(house.runners["microphone"].snapshot().sessions) == {"door"}
    # When: whoever receives it takes what there is.
    kinds = []
    for _ in range(200):
        for arrival in house.bus.wait(0.01):
            kinds.append(arrival.chunk.type.name)
            if not arrival.chunk.is_control:
                house.receivers[SOUND].deliver(arrival, 0.0)
        house.runners["microphone"].step()
        if "END" in kinds:
            break
    assert kinds.count("END") == 1
    house.runners["microphone"].step()
    assert house.runners["microphone"].snapshot().sessions == {}
    account = house.account(SOUND)
    assert (account.accepted, account.delivered + account.dropped["overflow"], account.in_flight) == (20, 20, 0)


def test_a_stage_without_windows_takes_each_chunk_as_it_comes(build, clock: ManualClock):
    notes = Notes()
    house = build({"events": notes}, (NOTED,))
    house.open("door")
    house.take(Chunk(DOOR, "events", 5, attrs={"type": "barge_in"}), NOTED)
    assert notes.events("barge_in") == [{"type": "barge_in"}]
    assert house.account(NOTED).delivered == 1
    house.take(end_of_stream(DOOR, "events", 9), NOTED)
    house.runners["events"].step()
    assert house.runners["events"].snapshot().sessions == {}


def test_the_last_words_of_a_stage_come_before_its_end(build):
    house = whole(build, num_windows=2)
    house.open("door")
    house.run()
    assert house.runners["events"].stage.events("goodbye") == [{"type": "goodbye"}]


class Slow(Echo):
    """Hears all it can in a window, says one word; `deaf`: where nobody listens, none."""

    def __init__(self, *, deaf: bool = False) -> None:
        super().__init__()
        self._deaf = deaf
        self._waiting: list[Chunk] = []

    def process(self, units: list[Unit]) -> list[Chunk]:
        self.units += units
        (unit,) = units
        self._waiting += [*unit.chunks.get(MIC, ()), *unit.chunks.get(MIC, ())]
        if self._deaf or not self._waiting:
            return []
        arrays = {"token_ids": self._waiting.pop().arrays["samples"].astype(np.int64)}
        return [Llm.text.over(unit, arrays=arrays)]

    def has_more_to_say(self, session: SessionId) -> bool:
        return bool(self._waiting)


def test_what_is_left_to_say_at_the_end_has_windows_of_its_own_and_they_are_not_the_cameras(build):
    slow = Slow()
    house = whole(build, num_windows=3, echo=slow)
    house.open("door")
    house.run()
    ear, notes = house.runners["speaker"].stage, house.runners["events"].stage
    assert [len(unit.chunks.get(TEXT, ())) for unit in ear.units] == [1] * 6
    assert [unit.is_afterword for unit in slow.units] == [False] * 3 + [True] * 3
    assert [event["index"] for event in notes.events("window")] == [0, 1, 2]


def test_in_real_time_such_a_window_leaves_at_its_end(build, clock: ManualClock):
    slow = Slow()
    house = build({"llm": slow}, (SOUND,))
    house.open("door", paced=True)
    llm = house.runners["llm"]
    clock.advance(1.0)
    house.window("door", 0)
    house.take(end_of_stream(DOOR, MIC, NS_PER_S))
    llm.step()
    llm.step()
    assert ([unit.index for unit in slow.units], llm.due_in_ns()) == ([0], NS_PER_S)
    clock.advance(0.999)
    llm.step()
    assert [unit.index for unit in slow.units] == [0]
    clock.advance(0.001)
    llm.step()
    assert [unit.index for unit in slow.units] == [0, 1]
    assert llm.snapshot().sessions == {}


def test_for_a_listener_who_hears_nothing_a_stage_waits_five_windows_and_no_more(build):
    deaf = Slow(deaf=True)
    house = whole(build, num_windows=2, echo=deaf)
    house.open("door")
    house.run()
    assert [unit.is_afterword for unit in deaf.units] == [False] * 2 + [True] * 5
    notes = house.runners["events"].stage
    assert notes.events("unit_failed") == [{"type": "unit_failed", "window": 6, "stage": "llm", "reason": UNSAID}]
    assert house.registry.get_sample_value("omni_stage_unsaid_total", {"stage": "llm"}) == 1


def test_a_snapshot_tells_what_is_done_and_what_waits(build, clock: ManualClock):
    house = build({"llm": Echo()}, (SOUND,), wait_ns=5_000_000)
    house.open("door"), house.open("yard")
    house.window("door", 0), house.window("yard", 0)
    house.runners["llm"].step()
    house.window("door", 1)
    snapshot = house.runners["llm"].snapshot()
    assert (snapshot.num_units, snapshot.num_ready) == (2, 1)
    assert {name: s.num_windows for name, s in snapshot.sessions.items()} == {"door": 1, "yard": 1}


def test_a_late_window_is_told_with_the_stage_that_made_it_late(build, clock: ManualClock):
    notes, ear = Notes(), Ear()
    house = build({"speaker": ear, "events": notes}, ("llm.speech->speaker.speech", NOTED))
    house.open("door", paced=True)
    clock.advance(2.1)
    house.take(watermark(DOOR, SPEECH, NS_PER_S), "llm.speech->speaker.speech")
    house.runners["speaker"].step()
    assert house.runners["speaker"].snapshot().sessions[DOOR].num_late == 1
