from __future__ import annotations

from collections.abc import Mapping
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from graph.chunk import NS_PER_S, Chunk, Scalar, SessionId, Span, Trace
from graph.trace import Part, digest_of, leave_stage, slowest_stage, stage_seconds, waterfall
from graph.window import Unit, WindowJoin
from tests.support.streams import IMAGE, SPEECH, TEXT, inputs

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure

PORCH = SessionId("porch")
DOOR, GARAGE, MIC = "camera/door", "camera/garage", "mic"
T = 1000

times = st.integers(-100, 100)
stages = st.sampled_from(["vision_encoder", "audio_encoder", "llm", "tts"])
any_spans = st.lists(st.builds(Span, stages, times, times, times), max_size=8)
real_spans = st.lists(
    st.builds(lambda stage, stay: Span(stage, *sorted(stay)), stages, st.tuples(times, times, times)), max_size=8
)


# ---- where the time went -------------------------------------------------------------------------------------------


@unhurried
@given(times, times, any_spans)
def test_the_parts_sum_to_the_latency_exactly_whatever_the_spans(start: int, end: int, spans: list[Span]) -> None:
    assert sum(part.duration_ns for part in waterfall(start, end, spans, "speaker")) == end - start


@unhurried
@given(times, times, real_spans)
def test_no_part_is_shorter_than_nothing(a: int, b: int, spans: list[Span]) -> None:
    assert all(part.duration_ns >= 0 for part in waterfall(min(a, b), max(a, b), spans, "speaker"))


@unhurried
@given(times, times, real_spans, st.randoms(use_true_random=False))
def test_the_order_of_spans_does_not_change_the_total_of_any_phase(
    start: int, end: int, spans: list[Span], random: Random
) -> None:
    distinct = list({span.finished_ns: span for span in spans}.values())
    shuffled = random.sample(distinct, len(distinct))
    assert waterfall(start, end, shuffled, "speaker") == waterfall(start, end, distinct, "speaker")


def test_the_critical_path_is_hop_queue_compute_stage_by_stage() -> None:
    spans = [Span("vision_encoder", 10, 15, 40), Span("llm", 45, 50, 80)]
    assert waterfall(0, 85, spans, "speaker") == [
        Part("vision_encoder", "hop", 10),
        Part("vision_encoder", "queue", 5),
        Part("vision_encoder", "compute", 25),
        Part("llm", "hop", 5),
        Part("llm", "queue", 5),
        Part("llm", "compute", 30),
        Part("speaker", "hop", 5),
    ]


def test_what_ran_beside_the_critical_path_costs_nothing() -> None:
    slow, beside, last = Span("vision_encoder", 0, 0, 40), Span("audio_encoder", 0, 0, 30), Span("llm", 40, 40, 50)
    parts = waterfall(0, 50, [slow, beside, last], "speaker")
    assert stage_seconds(parts).keys() == {"vision_encoder.compute", "llm.compute"}


def test_work_before_the_windows_end_is_not_its_latency() -> None:
    parts = waterfall(100, 130, [Span("camera", 20, 30, 90), Span("vision_encoder", 80, 90, 120)], "speaker")
    assert [part for part in parts if part.duration_ns] == [
        Part("vision_encoder", "compute", 20),
        Part("speaker", "hop", 10),
    ]


def test_a_window_without_spans_was_all_on_its_way_to_the_sink() -> None:
    assert waterfall(0, 7, [], "speaker") == [Part("speaker", "hop", 7)]


def test_the_slowest_stage_has_the_largest_sum_of_its_parts() -> None:
    parts = [Part("llm", "queue", 4), Part("tts", "compute", 6), Part("llm", "compute", 3)]
    assert slowest_stage(parts) == "llm"
    assert slowest_stage([]) == ""


def test_seconds_of_a_stage_that_took_part_twice_add_up() -> None:
    parts = [Part("camera", "compute", NS_PER_S), Part("camera", "compute", NS_PER_S // 2), Part("llm", "queue", 0)]
    assert stage_seconds(parts) == {"camera.compute": 1.5}


# ---- what was seen and heard ---------------------------------------------------------------------------------------


def picture(start_ns: int, pixels: bytes, stream: str = DOOR, seq: int = 0, **attrs: Scalar) -> Chunk:
    image = np.frombuffer(pixels, dtype=np.uint8)
    return Chunk(PORCH, stream, start_ns, 0, seq, arrays={"image": image}, attrs=attrs)


def unit(
    *chunks: Chunk,
    missing: frozenset[str] = frozenset(),
    traces: Mapping[str, Trace] | None = None,
    awaited: frozenset[str] = frozenset(),
) -> Unit:
    by_stream = {stream: tuple(c for c in chunks if c.stream == stream) for stream in {c.stream for c in chunks}}
    taken = inputs(*{*by_stream, *missing, *awaited, *(traces or {})})
    return Unit(PORCH, 0, 0, T, by_stream, missing, traces or {}, awaited=awaited, inputs=taken)


def joined(chunks: list[Chunk]) -> Unit:
    """The unit which a join makes of these, in this order of arrival."""
    join = WindowJoin(PORCH, inputs(DOOR, GARAGE, MIC), window_ns=T, lateness_ns=None)
    for chunk in chunks:
        join.add(chunk)
    return next(u for stream in (DOOR, GARAGE, MIC) for u in join.advance(stream, T).units)


sensed = st.lists(
    st.builds(picture, st.integers(0, T - 1), st.binary(min_size=1, max_size=4), st.sampled_from([DOOR, GARAGE, MIC])),
    min_size=1,
    max_size=6,
    unique_by=lambda c: (c.stream, c.start_ns),
)


@unhurried
@given(sensed, st.randoms(use_true_random=False))
def test_equal_content_gives_an_equal_digest_in_any_order_of_arrival(chunks: list[Chunk], random: Random) -> None:
    shuffled = random.sample(chunks, len(chunks))
    assert digest_of(joined(shuffled)) == digest_of(joined(chunks))


@unhurried
@given(sensed, st.integers(0, 5), st.integers(1, 255))
def test_one_changed_byte_changes_the_digest(chunks: list[Chunk], pick: int, flip: int) -> None:
    index = pick % len(chunks)
    before = chunks[index]
    pixels = bytearray(before.arrays["image"].tobytes())
    pixels[pick % len(pixels)] ^= flip
    changed = [*chunks[:index], picture(before.start_ns, bytes(pixels), before.stream), *chunks[index + 1 :]]
    assert digest_of(joined(changed)) != digest_of(joined(chunks))


@unhurried
@given(sensed, st.integers(0, 5), st.integers(0, T - 1))
def test_another_time_changes_the_digest(chunks: list[Chunk], pick: int, start_ns: int) -> None:
    index = pick % len(chunks)
    before = chunks[index]
    assume(start_ns not in [c.start_ns for c in chunks])
    moved = picture(start_ns, before.arrays["image"].tobytes(), before.stream)
    assert digest_of(joined([*chunks[:index], moved, *chunks[index + 1 :]])) != digest_of(joined(chunks))


@unhurried
@given(sensed, st.integers(0, 5))
def test_a_lost_picture_changes_the_digest(chunks: list[Chunk], pick: int) -> None:
    index = pick % len(chunks)
    assert digest_of(joined([*chunks[:index], *chunks[index + 1 :]])) != digest_of(joined(chunks))


def test_two_pictures_are_not_one_with_the_bytes_of_both() -> None:
    assert digest_of(unit(picture(0, b"ab"))) != digest_of(unit(picture(0, b"a"), picture(0, b"b", seq=1)))


def test_the_same_bytes_in_another_shape_or_dtype_are_something_else() -> None:
    square = Chunk(PORCH, DOOR, 0, arrays={"image": np.zeros((2, 2), np.uint8)})
    flat = Chunk(PORCH, DOOR, 0, arrays={"image": np.zeros(4, np.uint8)})
    wide = Chunk(PORCH, DOOR, 0, arrays={"image": np.zeros(2, np.uint16)})
    assert len({digest_of(unit(chunk)) for chunk in (square, flat, wide)}) == 3


def test_a_camera_that_gave_nothing_is_part_of_the_digest() -> None:
    seen = picture(0, b"a")
    assert digest_of(unit(seen)) != digest_of(unit(seen, missing=frozenset({GARAGE})))


def test_the_digest_says_what_was_sensed_not_when_it_was_processed() -> None:
    fast = unit(picture(0, b"a", measured_at=1.0))
    slow = unit(picture(0, b"a", seq=7, measured_at=2.0))
    assert digest_of(fast) == digest_of(slow)


def test_behind_the_encoders_the_digest_is_made_of_theirs() -> None:
    image, audio = Trace(digest="seen"), Trace(digest="heard")
    both = digest_of(unit(traces={"image": image, "audio": audio}))
    assert both == digest_of(unit(traces={"audio": audio, "image": image}))
    assert both != digest_of(unit(traces={"image": audio, "audio": image}))


def test_a_stage_of_one_stream_hands_the_digest_on() -> None:
    assert digest_of(unit(traces={"text": Trace(digest="seen and heard")})) == "seen and heard"


# ---- what travels on -----------------------------------------------------------------------------------------------


def test_a_unit_leaves_with_every_span_before_it_once_and_its_own() -> None:
    camera, vision, audio = Span("camera", 0, 0, 5), Span("vision", 6, 7, 20), Span("audio", 2, 3, 9)
    traces = {"image": Trace(spans=(camera, vision)), "audio": Trace(spans=(camera, audio))}
    own = Span("llm", 21, 22, 30)
    assert leave_stage(unit(traces=traces), own).spans == (camera, audio, vision, own)


@pytest.mark.parametrize("stream", ["text", "codes", "speech"])
def test_silence_is_not_loss_but_what_was_missing_before_still_is(stream: str) -> None:
    trace = Trace(missing=(DOOR,))
    left = leave_stage(unit(missing=frozenset({stream}), traces={stream: trace}), Span("tts", 0, 0, 0))
    assert left.missing == (DOOR,)


@pytest.mark.parametrize("stream", [IMAGE, TEXT, SPEECH])
def test_of_a_window_that_was_given_up_what_was_awaited_is_missing(stream: str) -> None:
    left = leave_stage(unit(missing=frozenset({stream}), awaited=frozenset({stream})), Span("speaker", 0, 0, 0))
    assert left.missing == (stream,)


def test_a_sensed_stream_that_gave_nothing_is_named_in_order() -> None:
    left = leave_stage(unit(missing=frozenset({MIC, GARAGE})), Span("llm", 0, 0, 0))
    assert left.missing == (GARAGE, MIC)


def test_a_stage_hands_on_the_digest_of_its_unit() -> None:
    seen = unit(picture(0, b"a"))
    assert leave_stage(seen, Span("vision", 0, 0, 0)).digest == digest_of(seen)
