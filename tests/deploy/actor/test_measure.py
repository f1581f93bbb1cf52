"""deploy/actor/measure.py: the counters say what happened."""

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from deploy.actor.measure import StageMeter
from graph.chunk import NS_PER_S, Chunk
from graph.clock import SystemClock
from graph.metrics import MAX_CAMERAS, Metrics
from graph.stage_type import Out
from stages import kinds
from stages.media.health import Totals
from stages.session import Session
from stages.stage import Stage
from tests.support.streams import CODES, EVENTS, TEXT, camera_stream, kind_of
from tests.support.units import DOOR, session

STAGES = ("camera", "llm", "speaker")


class FakeLlm(Stage):
    """A stage with readings."""

    text = Out(kinds.TEXT)

    def kv_usage(self) -> float:
        return 0.25

    def text_budget(self, session: object) -> int:
        return 7


class FakeCamera(Stage):
    """A stage that says what was damaged so far, one total after the other."""

    def __init__(self, *totals: Totals) -> None:
        self._totals = list(totals)

    def totals(self, session: object) -> Totals:
        return self._totals.pop(0) if self._totals else Totals()

    def delivers(self, session: object) -> frozenset[str]:
        return frozenset({"video"})


class FakeTts(Stage):
    codes = Out(kinds.CODES)


class FakeSpeaker(Stage):
    playback = Out(kinds.PLAYBACK)


FAKES = {"camera": FakeCamera, "llm": FakeLlm, "tts": FakeTts, "speaker": FakeSpeaker}
UPSTREAM = ("image", "audio", "text", "codes", "speech")


class Meter:
    """A stage's meter with the session `door` open, and what it exports. Windows end at the speaker, unless told."""

    def __init__(
        self, name: str, stage: Stage | None = None, ends_windows: bool | None = None, **fields: object
    ) -> None:
        self.registry = CollectorRegistry()
        self.meter = StageMeter(Metrics(self.registry), name, stage or FAKES.get(name, Stage)(), STAGES, SystemClock())
        self.session: Session = session("door", **fields)
        self.ends_windows = name == "speaker" if ends_windows is None else ends_windows
        self.meter.opened(self.session, UPSTREAM if self.ends_windows else None)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    def of_door(self, name: str, **labels: str) -> float | None:
        return self.value(name, camera="door", **labels)

    def made(self, stream: str, **arrays: np.ndarray) -> None:
        self.meter.made(self.session, Chunk(DOOR, stream, 0, arrays=arrays), kind_of(stream))

    def event(self, kind: str, **attrs: object) -> None:
        self.meter.made(self.session, Chunk(DOOR, EVENTS, 0, attrs={"type": kind, **attrs}), kinds.EVENTS)


def test_a_batch_counts_its_units_and_its_times():
    meter = Meter("vision_encoder")
    meter.meter.processed(3, queue_s=0.5, compute_s=0.25, cpu_s=0.125)
    meter.meter.processed(1, queue_s=0.5, compute_s=0.25, cpu_s=0.125)
    assert meter.value("omni_units_total", stage="vision_encoder") == 4
    assert meter.value("omni_stage_seconds_sum", stage="vision_encoder", phase="queue") == 1.0
    assert meter.value("omni_stage_seconds_sum", stage="vision_encoder", phase="compute") == 0.5
    assert meter.value("omni_stage_cpu_seconds_total", stage="vision_encoder") == 0.25
    assert meter.value("omni_stage_batch_units_count", stage="vision_encoder") == 2


def test_chunks_in_a_later_unit_than_their_own_are_counted():
    meter = Meter("llm")
    for num_chunks in (0, 2, 1):
        meter.meter.carried(num_chunks)
    assert meter.value("omni_stage_carried_total", stage="llm") == 3


def test_a_session_that_ends_with_something_left_to_say_is_counted():
    meter = Meter("tts")
    meter.meter.unsaid(meter.session)
    assert meter.value("omni_stage_unsaid_total", stage="tts") == 1


def test_a_camera_is_up_while_it_delivers():
    meter = Meter("camera")
    states = [meter.of_door("omni_camera_up")]
    for kind in ("camera_up", "camera_lost", "camera_up", "camera_ended", "camera_up", "view_removed"):
        meter.event(kind, reason="closed")
        states.append(meter.of_door("omni_camera_up"))
    assert states == [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(("reason", "counted"), [("closed", "closed"), ("timeout", "timeout"), ("odd", "other")])
def test_a_lost_camera_is_counted_by_its_reason(reason: str, counted: str):
    meter = Meter("camera")
    meter.event("camera_lost", reason=reason)
    assert meter.of_door("omni_camera_reconnects_total", reason=counted) == 1


def test_pictures_are_counted_as_they_come():
    meter = Meter("camera")
    for _ in range(3):
        meter.made(camera_stream("door"), image=np.zeros((4, 4, 3), np.uint8))
    assert meter.of_door("omni_camera_frames_total") == 3
    assert (meter.of_door("omni_camera_last_frame_timestamp_seconds") or 0) > 0


def test_what_is_damaged_within_a_camera_is_counted_by_track():
    meter = Meter("camera", FakeCamera(Totals(1, 0, 7), Totals(1, 2, 7), Totals(3, 2, 9)))
    for _ in range(3):
        meter.event("camera_warning", reason="damaged")
    assert meter.of_door("omni_camera_gaps_total") == 3
    assert meter.of_door("omni_camera_bad_total", track="video") == 2
    assert meter.of_door("omni_camera_bad_total", track="audio") == 9
    assert meter.of_door("omni_camera_up") == 0, "a warning is neither up nor lost"


def test_a_track_that_does_not_come_is_down_while_the_other_is_up():
    meter = Meter("camera", FakeCamera(Totals()))
    before = [meter.of_door("omni_camera_track_up", track=track) for track in ("video", "audio")]
    meter.event("camera_warning", reason="track_frozen")
    after = [meter.of_door("omni_camera_track_up", track=track) for track in ("video", "audio")]
    assert (before, after) == ([0, 0], [1, 0])


def test_a_session_that_closed_leaves_no_series():
    meter = Meter("camera")
    meter.event("camera_up")
    meter.meter.closed(meter.session)
    meter.meter.closed(meter.session)
    assert meter.of_door("omni_camera_up") is None


def test_of_cameras_that_come_and_go_nothing_is_left():
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    stages = [
        StageMeter(metrics, name, FAKES.get(name, Stage)(), STAGES, SystemClock())
        for name in ("camera", "microphone", "speaker", "events")
    ]
    before = {(sample.name, *sample.labels.values()) for family in registry.collect() for sample in family.samples}
    seen = set()
    for number in range(2 * MAX_CAMERAS):
        camera = session(f"camera-{number}")
        for stage in stages:
            stage.opened(camera, UPSTREAM if stage is stages[2] else None)
        seen |= {sample.labels.get("camera") for family in registry.collect() for sample in family.samples}
        for stage in reversed(stages):
            stage.closed(camera)
    after = {(sample.name, *sample.labels.values()) for family in registry.collect() for sample in family.samples}
    assert after == before
    assert seen == {f"camera-{number}" for number in range(2 * MAX_CAMERAS)} | {None}


def test_a_camera_with_the_name_of_one_that_ended_counts_from_zero():
    meter = Meter("speaker")
    meter.event("barge_in")
    meter.meter.closed(meter.session)
    meter.meter.opened(meter.session, UPSTREAM)
    assert meter.of_door("omni_speech_interrupted_total") == 0


def test_a_closed_session_gives_its_share_of_the_cache_back():
    class Emptying(FakeLlm):
        usage = 0.25

        def kv_usage(self) -> float:
            return self.usage

    meter = Meter("llm", Emptying())
    meter.meter.processed(1, 0.0, 0.0, 0.0)
    Emptying.usage = 0.0
    meter.meter.closed(meter.session)
    assert meter.value("omni_kv_cache_usage_ratio") == 0.0


def test_tokens_are_counted_by_kind():
    llm, tts = Meter("llm", FakeLlm()), Meter("tts")
    llm.made(TEXT, token_ids=np.arange(5))
    tts.made(CODES, codes=np.arange(25))
    assert llm.value("omni_tokens_total", kind="text") == 5
    assert tts.value("omni_tokens_total", kind="codes") == 25


def test_a_window_in_which_something_is_said_is_counted_as_speaking():
    meter = Meter("llm", FakeLlm())
    meter.made(TEXT, token_ids=np.arange(0))
    for index in range(3):
        meter.meter.unit_done(meter.session, (index + 1) * NS_PER_S)
    assert meter.of_door("omni_decisions_total", decision="speak") == 1
    assert meter.of_door("omni_decisions_total", decision="listen") == 2


def test_what_the_llm_can_be_read_off_is_exported():
    meter = Meter("llm", FakeLlm())
    meter.meter.processed(1, 0.0, 0.0, 0.0)
    meter.meter.unit_done(meter.session, NS_PER_S)
    assert meter.value("omni_kv_cache_usage_ratio") == 0.25
    assert meter.of_door("omni_text_budget_tokens") == 7


@pytest.mark.parametrize(("paced", "parked"), [(True, 1.0), (False, 0.0)])
def test_a_session_parks_when_its_listener_is_gone(paced: bool, parked: float):
    meter = Meter("llm", FakeLlm(), paced=paced)
    meter.meter.unit_done(meter.session, 6 * NS_PER_S)
    assert meter.of_door("omni_session_parked") == parked


def test_what_was_heard_and_what_is_ahead_is_told_by_the_acks():
    meter = Meter("speaker")
    for heard_s in (0.0, 0.25, 0.25, 1.5):
        meter.meter.played(meter.session, round(heard_s * NS_PER_S), 2 * NS_PER_S)
    assert meter.of_door("omni_speech_seconds_total") == 1.5
    assert meter.of_door("omni_playback_lead_seconds") == 0.5


def test_underruns_and_interruptions_are_counted():
    meter = Meter("speaker")
    meter.event("underrun", seconds=0.5)
    meter.event("underrun", seconds=0.25)
    meter.event("barge_in", seconds=1.0, epoch=1)
    assert meter.of_door("omni_playback_underruns_total") == 2
    assert meter.of_door("omni_playback_underrun_seconds_total") == 0.75
    assert meter.of_door("omni_speech_interrupted_total") == 1


def test_windows_are_counted_where_they_end():
    meter = Meter("speaker")
    meter.meter.window(meter.session, 0.5, "", ())
    meter.meter.window(meter.session, 1.5, "llm", ("image",))
    assert meter.of_door("omni_windows_total", outcome="on_time") == 1
    assert meter.of_door("omni_windows_total", outcome="late") == 1
    assert meter.of_door("omni_window_late_total", stage="llm") == 1
    assert meter.of_door("omni_window_missing_total", stream="image") == 1
    assert meter.of_door("omni_window_seconds_sum") == 2.0


def test_where_nothing_speaks_windows_end_at_the_llm():
    meter = Meter("llm", FakeLlm(), ends_windows=True, speech=False)
    meter.meter.window(meter.session, 0.5, "", ())
    assert meter.of_door("omni_windows_total", outcome="on_time") == 1


def test_a_stage_exports_nothing_of_what_it_does_not_do():
    meter = Meter("tts")
    meter.event("camera_up")
    meter.meter.unit_done(meter.session, NS_PER_S)
    meter.meter.played(meter.session, 0, 0)
    meter.meter.window(meter.session, 0.5, "", ())
    names = {family.name for family in meter.registry.collect()}
    assert not {name for name in names if name.startswith(("omni_camera", "omni_playback", "omni_window"))}
