from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from graph.chunk import MAX_IN_TRACE, Chunk, ChunkType, Failure, SessionId, Span, Trace, watermark
from graph.codec import (
    DTYPES,
    MAX_ARRAYS,
    MAX_ATTRS,
    MAX_DIMENSIONS,
    MAX_HEADER_BYTES,
    MAX_NAME_CHARS,
    CodecError,
    Frame,
    check,
    decode,
    encode,
)

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure

LARGEST = 2**63 - 1
VERSION, KIND, SESSION, INCARNATION, STREAM, SEQ, EPOCH, START, DURATION, LAYOUT, ATTRS, TRACE, VIEW = range(13)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=MAX_NAME_CHARS)
times = st.integers(-LARGEST, LARGEST)
totals = st.integers(0, LARGEST)
scalars = st.none() | st.booleans() | times | st.floats() | texts
shapes = st.lists(st.integers(0, 4), max_size=MAX_DIMENSIONS).map(tuple)
arrays = st.sampled_from(sorted(DTYPES)).flatmap(lambda dtype: hnp.arrays(dtype, shapes))
spans = st.builds(Span, names, times, times, times)
failures = st.builds(Failure, names, texts)
traces = st.builds(
    Trace,
    texts,
    st.lists(names, max_size=4).map(tuple),
    st.lists(spans, max_size=4).map(tuple),
    st.lists(failures, max_size=2).map(tuple),
    st.lists(names, max_size=2).map(tuple),
)
chunks = st.builds(
    Chunk,
    session=names.map(SessionId),
    stream=names,
    start_ns=times,
    duration_ns=totals,
    view=st.just("") | names,
    seq=totals,
    epoch=totals,
    type=st.sampled_from(ChunkType),
    arrays=st.dictionaries(names, arrays, max_size=3),
    attrs=st.dictionaries(names, scalars, max_size=4),
    trace=st.none() | traces,
    incarnation=totals,
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | texts | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts | st.binary(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def bare(chunk: Chunk) -> tuple[object, ...]:
    """A chunk as a value which compares: arrays by their bytes, floats by their spelling (nan is nan)."""
    contents = {name: (a.dtype, a.shape, a.tobytes()) for name, a in chunk.arrays.items()}
    attrs = {name: repr(value) for name, value in chunk.attrs.items()}
    fields = (chunk.session, chunk.stream, chunk.start_ns, chunk.duration_ns, chunk.seq, chunk.epoch, chunk.type)
    fields += (chunk.incarnation,)
    return (*fields, contents, attrs, chunk.trace)


def as_bytes(frames: Sequence[Frame]) -> list[bytes]:
    return [bytes(frame) for frame in frames]


def decode_or_refuse(frames: Sequence[Frame]) -> Chunk | CodecError:
    """What decode answers; any exception but CodecError goes through and fails the test."""
    try:
        return decode(frames)
    except CodecError as error:
        return error


def is_legal_or_refused(frames: Sequence[Frame]) -> bool:
    """True when `frames` are refused by name, or are a chunk that travels on unchanged."""
    answer = decode_or_refuse(frames)
    if isinstance(answer, CodecError):
        return bool(answer.reason.isidentifier())
    return bare(decode(as_bytes(encode(answer)))) == bare(answer)


def header_of(chunk: Chunk) -> list[Any]:
    return list(msgpack.unpackb(encode(chunk)[0]))


def with_field(index: int, value: object) -> list[bytes]:
    """Frames of a plain chunk with one field of its header replaced."""
    header = header_of(Chunk(SessionId("s"), "mic", 0))
    header[index] = value
    return [msgpack.packb(header)]


def with_array(dtype: object, shape: object, frame: bytes) -> list[bytes]:
    return [*with_field(LAYOUT, [["a", dtype, shape]]), frame]


def replaced(tree: Any, path: Sequence[int], value: object) -> Any:
    """`tree` with the node that `path` leads to replaced by `value`."""
    if not path or not isinstance(tree, list) or not tree:
        return value
    index = path[0] % len(tree)
    return [*tree[:index], replaced(tree[index], path[1:], value), *tree[index + 1 :]]


def reason_of(frames: Sequence[Frame]) -> str:
    with pytest.raises(CodecError) as caught:
        decode(frames)
    return caught.value.reason


@unhurried
@given(chunks)
def test_a_chunk_comes_out_as_it_went_in(chunk: Chunk) -> None:
    assert bare(decode(encode(chunk))) == bare(chunk)


@unhurried
@given(chunks)
def test_what_was_decoded_can_be_sent_on(chunk: Chunk) -> None:
    assert bare(decode(encode(decode(as_bytes(encode(chunk)))))) == bare(chunk)


@unhurried
@given(chunks, st.sampled_from([bytes, bytearray, memoryview]))
def test_arrays_are_read_only_whatever_memory_they_came_in(chunk: Chunk, memory: Any) -> None:
    decoded = decode([memory(bytes(frame)) for frame in encode(chunk)])
    assert not any(array.flags.writeable for array in decoded.arrays.values())


def test_a_view_with_gaps_travels_like_its_copy() -> None:
    every_other = np.arange(24, dtype=np.int32).reshape(4, 6)[:, ::2]
    decoded = decode(encode(Chunk(SessionId("s"), "codes", 0, arrays={"codes": every_other})))
    assert np.array_equal(decoded.arrays["codes"], every_other)


def test_an_array_is_not_copied_on_its_way_out() -> None:
    pixels = np.zeros((448, 448, 3), dtype=np.uint8)
    frames = encode(Chunk(SessionId("s"), "camera/door", 0, arrays={"image": pixels}))
    assert np.shares_memory(np.frombuffer(frames[1], dtype=np.uint8), pixels)


def test_an_array_is_not_copied_on_its_way_in() -> None:
    frames = as_bytes(encode(Chunk(SessionId("s"), "mic", 0, arrays={"samples": np.zeros(16000, np.float32)})))
    decoded = decode(frames)
    assert np.shares_memory(decoded.arrays["samples"], np.frombuffer(frames[1], dtype=np.uint8))


@pytest.mark.parametrize("dtype", ["float64", "complex64", "bool", "object", "U4", ">f4", ">i2"])
def test_a_dtype_the_wire_does_not_know_is_refused_by_the_sender(dtype: str) -> None:
    with pytest.raises(CodecError) as caught:
        encode(Chunk(SessionId("s"), "mic", 0, arrays={"samples": np.zeros(3, dtype)}))
    assert caught.value.reason == "dtype"


@unhurried
@given(st.lists(st.binary(max_size=64), max_size=4))
def test_random_frames_are_refused_by_name(frames: list[bytes]) -> None:
    assert is_legal_or_refused(frames)


@unhurried
@given(anything, st.lists(st.binary(max_size=16), max_size=2))
def test_a_random_header_is_refused_by_name(header: object, frames: list[bytes]) -> None:
    assert is_legal_or_refused([msgpack.packb(header), *frames])


@unhurried
@given(chunks, st.lists(st.integers(0, 99), min_size=1, max_size=4), anything)
def test_a_header_with_anything_anywhere_is_legal_or_refused(chunk: Chunk, path: list[int], value: object) -> None:
    frames = as_bytes(encode(chunk))
    header = replaced(header_of(chunk), path, value)
    assert is_legal_or_refused([msgpack.packb(header), *frames[1:]])


@unhurried
@given(chunks, st.data())
def test_a_flipped_byte_is_legal_or_refused(chunk: Chunk, data: st.DataObject) -> None:
    frames = [bytearray(frame) for frame in encode(chunk)]
    frame = data.draw(st.sampled_from([frame for frame in frames if frame]))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    assert is_legal_or_refused(frames)


@unhurried
@given(chunks, st.data())
def test_a_truncated_frame_is_refused(chunk: Chunk, data: st.DataObject) -> None:
    frames = as_bytes(encode(chunk))
    index = data.draw(st.sampled_from([i for i, frame in enumerate(frames) if frame]))
    frames[index] = frames[index][: data.draw(st.integers(0, len(frames[index]) - 1))]
    assert isinstance(decode_or_refuse(frames), CodecError)


@unhurried
@given(chunks, st.binary(max_size=8))
def test_a_frame_too_many_is_refused(chunk: Chunk, frame: bytes) -> None:
    assert reason_of([*encode(chunk), frame]) == "arrays"


def test_no_frame_at_all_is_refused() -> None:
    assert reason_of([]) == "header"


def test_a_lost_array_is_refused() -> None:
    frames = encode(Chunk(SessionId("s"), "mic", 0, arrays={"samples": np.zeros(4, np.float32)}))
    assert reason_of(frames[:1]) == "arrays"


@pytest.mark.parametrize(
    ("index", "value", "reason"),
    [
        (VERSION, 1, "version"),
        (INCARNATION, -1, "number"),
        (INCARNATION, "1", "number"),
        (INCARNATION, True, "number"),
        (START, 2**63, "number"),
        (ATTRS, {"a": 2**63}, "attrs"),
        (KIND, 5, "kind"),
        (KIND, -1, "kind"),
        (KIND, True, "kind"),
        (KIND, "0", "kind"),
        (KIND, [], "kind"),
        (SESSION, "", "name"),
        (SESSION, b"s", "name"),
        (SESSION, None, "name"),
        (STREAM, "x" * (MAX_NAME_CHARS + 1), "name"),
        (SEQ, True, "number"),
        (SEQ, -1, "number"),
        (SEQ, 1.0, "number"),
        (EPOCH, -1, "number"),
        (EPOCH, None, "number"),
        (START, "0", "number"),
        (DURATION, -1, "number"),
        (DURATION, float("nan"), "number"),
        (LAYOUT, None, "arrays"),
        (LAYOUT, {}, "arrays"),
        (ATTRS, [], "attrs"),
        (ATTRS, {"a": [1]}, "attrs"),
        (ATTRS, {"a": {}}, "attrs"),
        (ATTRS, {"a": b"bytes"}, "attrs"),
        (ATTRS, {b"a": 1}, "attrs"),
        (ATTRS, {"": 1}, "attrs"),
        (ATTRS, {"a": msgpack.Timestamp(1)}, "attrs"),
        (TRACE, [], "trace"),
        (TRACE, ["", [], []], "trace"),
        (TRACE, ["", [], "spans", [], []], "trace"),
        (TRACE, [b"", [], [], [], []], "trace"),
        (TRACE, ["", [""], [], [], []], "trace"),
        (TRACE, ["", [], [["llm", 0, 0]], [], []], "trace"),
        (TRACE, ["", [], [["llm", 0, 0, 0.5]], [], []], "trace"),
        (TRACE, ["", [], [["llm", 0, 0, True]], [], []], "trace"),
        (TRACE, ["", [], [["llm", 0, 0, 2**63]], [], []], "trace"),
        (TRACE, ["", [], [], []], "trace"),
        (TRACE, ["", [], [], [], [""]], "trace"),
        (TRACE, ["", [], [], [], "views"], "trace"),
        (VIEW, "", "name"),
        (VIEW, b"back", "name"),
        (VIEW, 7, "name"),
        (TRACE, ["", [], [], ["llm"], []], "trace"),
        (TRACE, ["", [], [], [["", "reason"]], []], "trace"),
        (TRACE, ["", [], [], [["llm", 7]], []], "trace"),
    ],
)
def test_a_field_that_is_wrong_is_refused_under_its_own_name(index: int, value: object, reason: str) -> None:
    assert reason_of(with_field(index, value)) == reason


@pytest.mark.parametrize(
    ("dtype", "shape", "frame", "reason"),
    [
        ("object", [1], b"12345678", "dtype"),
        ("float64", [1], b"12345678", "dtype"),
        (["uint8"], [1], b"1", "dtype"),
        ({}, [1], b"1", "dtype"),
        ("uint8", [-1], b"", "shape"),
        ("uint8", [-1, -1], b"1", "shape"),
        ("uint8", [True], b"1", "shape"),
        ("uint8", [1.0], b"1", "shape"),
        ("uint8", 1, b"1", "shape"),
        ("uint8", [1] * (MAX_DIMENSIONS + 1), b"1", "shape"),
        ("uint8", [2**62, 2**62], b"1", "shape"),
        ("uint8", [0, 2**63], b"", "shape"),
        ("int64", [0, 2**40, 2**40], b"", "shape"),
        ("float32", [2], b"1234567", "shape"),
        ("float32", [1], b"12345678", "shape"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(dtype: object, shape: object, frame: bytes, reason: str) -> None:
    assert reason_of(with_array(dtype, shape, frame)) == reason


def test_more_arrays_than_allowed_are_refused() -> None:
    layout = [[f"a{i}", "uint8", [1]] for i in range(MAX_ARRAYS + 1)]
    assert reason_of([*with_field(LAYOUT, layout), *[b"1"] * len(layout)]) == "arrays"


def test_two_arrays_of_one_name_are_refused() -> None:
    layout = [["a", "uint8", [1]], ["a", "uint8", [1]]]
    assert reason_of([*with_field(LAYOUT, layout), b"1", b"2"]) == "arrays"


def test_more_attrs_than_allowed_are_refused() -> None:
    frames = with_field(ATTRS, {f"a{i}": i for i in range(MAX_ATTRS + 1)})
    assert isinstance(decode_or_refuse(frames), CodecError)


def test_a_header_beyond_its_limit_is_refused_unread() -> None:
    assert reason_of(with_field(ATTRS, {"a": "x" * MAX_HEADER_BYTES})) == "header"


@pytest.mark.parametrize(
    "frame",
    [
        b"\xdd\xff\xff\xff\xff",  # a list of 4 G entries, none of which came
        b"\xdf\xff\xff\xff\xff",  # a map of 4 G entries
        b"\xc6\xff\xff\xff\xff",  # 4 GiB of bytes
        b"\x91" * 60_000,  # a list in a list in a list …
        b"\xc1",  # never used in msgpack
        msgpack.packb([3] * 13) + b"\x00",  # something behind the header
        msgpack.packb([3] * 12),
        msgpack.packb([]),
        msgpack.packb([3] + [1] * (MAX_IN_TRACE + 1)),
        msgpack.packb({"version": 1}),
        b"\x9d" + b"\xa1\xff" * 13,  # text that is not UTF-8
        b"\x81\xc0\x01",  # a map whose key is nil
    ],
)
def test_a_header_made_to_hurt_is_refused(frame: bytes) -> None:
    assert reason_of([frame]) == "header"


def test_not_a_number_is_a_number_on_the_wire() -> None:
    decoded = decode(encode(Chunk(SessionId("s"), "mic", 0, attrs={"level_db": math.nan})))
    assert math.isnan(decoded.attrs["level_db"])  # type: ignore[arg-type]


# ---- one rule, both halves -------------------------------------------------------------------------------------------

surrogates = st.text(st.characters(categories=["Cs"]), min_size=1, max_size=2)
strange = (
    scalars
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([np.int64(3), np.float32(0.5), np.float64(0.5), np.bool_(True), [1], {}, b"b", 1j])
    | st.text(min_size=1000, max_size=1000)
    | surrogates
)
strange_names = names | st.sampled_from(["", "x" * 129, 7, None, "\ud800", b"b"])
strange_arrays = hnp.arrays(
    st.sampled_from(["uint8", "float16", "float64", "bool", "int64"]),
    st.lists(st.integers(0, 2), max_size=6).map(tuple),
) | st.sampled_from([[1, 2], None, np.ma.masked_array([1, 2], [True, False]), np.zeros((0, 2**40), np.uint8)])
few_or_many = st.sampled_from([0, 1, 8, 9])
made_by_a_stage = st.builds(
    Chunk,
    session=strange_names,
    stream=strange_names,
    start_ns=st.integers(-(2**64), 2**64) | st.sampled_from([1.0, np.int64(1), True]),
    duration_ns=st.integers(-1, 1),
    seq=st.integers(-1, 2**64),
    arrays=few_or_many.flatmap(lambda n: st.dictionaries(strange_names, strange_arrays, min_size=n, max_size=n)),
    attrs=st.dictionaries(strange_names, strange, max_size=3)
    | st.integers(60, 70).map(lambda n: {f"a{i}": "x" * 2000 for i in range(n)}),
    trace=st.none() | st.integers(0, 400).map(lambda n: Trace("", (), (Span("stage", 1, 2, 3),) * n)),
)


def encoded(chunk: Chunk) -> list[bytes] | None:
    """None where the sender refuses it; any exception but CodecError goes through and fails the test."""
    try:
        return as_bytes(encode(chunk))
    except CodecError:
        return None


def is_checked(chunk: Chunk) -> bool:
    try:
        check(chunk)
    except CodecError:
        return False
    return True


@unhurried
@given(made_by_a_stage | chunks)
def test_what_the_sender_takes_the_receiver_takes_and_gives_back_equal_and_the_rest_never_leaves(chunk: Chunk) -> None:
    frames = encoded(chunk)
    assert (frames is not None) == is_checked(chunk)
    assert frames is None or bare(decode(frames)) == bare(chunk)


@unhurried
@given(chunks, st.lists(st.integers(0, 99), min_size=1, max_size=4), anything)
def test_what_the_receiver_refuses_the_sender_would_not_have_sent(chunk: Chunk, path: list[int], value: object) -> None:
    header = replaced(header_of(chunk), path, value)
    answer = decode_or_refuse([msgpack.packb(header), *as_bytes(encode(chunk))[1:]])
    assert isinstance(answer, CodecError) or encoded(answer) is not None


@pytest.mark.parametrize(
    ("fields", "reason", "message"),
    [
        ({"attrs": {"n": np.int64(3)}}, "attrs", "attribute 'n' is a numpy.int64; use int(…)"),
        ({"attrs": {"n": np.float32(3)}}, "attrs", "attribute 'n' is a numpy.float32; use float(…)"),
        ({"attrs": {"n": np.bool_(1)}}, "attrs", "attribute 'n' is a numpy.bool; use bool(…)"),
        ({"attrs": {"n": 2**70}}, "attrs", "integers travel in 64 bits"),
        ({"attrs": {"n": [1]}}, "attrs", "attribute 'n' is a list; only int, float, str, bool and None travel"),
        ({"attrs": {"n": "\ud800"}}, "attrs", "attribute 'n' is text that UTF-8 can't write"),
        ({"attrs": {"": 1}}, "attrs", "its name is no text of 1 to 128 characters"),
        ({"attrs": {f"a{i}": i for i in range(MAX_ATTRS + 1)}}, "attrs", "more than 64 attributes"),
        ({"attrs": {"a": "x" * MAX_HEADER_BYTES}}, "header", "65536 is the most; what is long goes in an array"),
        ({"arrays": {"x": np.zeros((1,) * 5, np.uint8)}}, "shape", "array 'x' has 5 dimensions, 4 is the most"),
        ({"arrays": {f"a{i}": np.zeros(1, np.uint8) for i in range(9)}}, "arrays", "more than 8 arrays"),
        (
            {"arrays": {"x": np.zeros(1, np.float16)}},
            "dtype",
            r"array 'x' is 'float16'; use .astype(…) to one of float32,",
        ),
        ({"arrays": {"x": [1.0]}}, "dtype", "array 'x' is a list; use a numpy.ndarray"),
        ({"arrays": {"x" * 129: np.zeros(1, np.uint8)}}, "dtype", "its name is no text of 1 to 128 characters"),
        ({"arrays": {"x": np.broadcast_to(np.uint8(0), (2**29,))}}, "shape", "268435456 bytes is the most"),
        ({"start_ns": np.int64(5)}, "number", "use int(…)"),
        ({"duration_ns": -1}, "number", "below zero"),
        ({"stream": "x" * 129}, "name", "no text of 1 to 128 characters"),
    ],
)
def test_what_no_receiver_would_take_is_refused_by_the_sender_which_says_what_instead(
    fields: dict[str, Any], reason: str, message: str
) -> None:
    with pytest.raises(CodecError) as caught:
        check(Chunk(**({"session": SessionId("s"), "stream": "events", "start_ns": 0} | fields)))
    assert caught.value.reason == reason
    assert message in str(caught.value)


def test_a_pipeline_of_two_hundred_stages_has_room_for_the_trace_of_a_window() -> None:
    spans = tuple(Span(f"a_stage_with_a_long_name_{i}", i, i, i) for i in range(200))
    chunk = watermark(SessionId("s"), "text", 0, trace=Trace("digest", (), spans))
    assert decode(encode(chunk)).trace == chunk.trace


def test_of_a_chunk_whose_contents_are_garbled_it_is_still_known_whose_it_was() -> None:
    frames = encode(Chunk(SessionId("s"), "mic", 5, 7, incarnation=3, arrays={"samples": np.zeros(4, np.float32)}))
    with pytest.raises(CodecError) as caught:
        decode(frames[:1])
    assert caught.value.refused == Chunk(SessionId("s"), "mic", 5, 7, incarnation=3)
