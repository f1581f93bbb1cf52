"""A chunk on the wire: one msgpack header, then one frame per array. No pickle; every field is checked before use.

Header: [version, kind, session, incarnation, stream, seq, epoch, start_ns, duration_ns,
         [[name, dtype, shape] …], attrs, trace, view]
        trace: nil or [digest, [missing …], [[stage, received_ns, started_ns, finished_ns] …], [[stage, reason] …],
                       [missing view …]]
        view: nil where the camera has one only

Rule: what may travel is said once, by `_check_address` and `_check_contents`. Who sends goes through them before
anything is spent (`check`), who receives before anything is used (`decode`): neither takes what the other would refuse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import msgpack
import numpy as np

from graph.chunk import MAX_IN_TRACE, Array, Chunk, ChunkType, Failure, SessionId, Span, Trace
from graph.errors import GraphError

VERSION: Final = 3
MAX_HEADER_BYTES = 64 * 1024
MAX_ARRAYS = 8
MAX_DIMENSIONS = 4
MAX_ARRAY_BYTES = 256 * 1024 * 1024  # the embeddings of a 9-cell picture at 4096 wide are 10 MB
MAX_NAME_CHARS = 128
MAX_ATTRS = 64
DTYPES = frozenset({"uint8", "int16", "uint16", "int32", "int64", "float32"})
_DTYPE_OF = {name: np.dtype(name) for name in DTYPES}
_NAME_OF = {dtype: name for name, dtype in _DTYPE_OF.items()}  # numpy makes dtype.name anew each time: 1 us and more
_KIND_OF = {kind.value: kind for kind in ChunkType}
_LEAST, _MOST = -(2**63), 2**63 - 1
_INT = frozenset({int})
_NO_NAME = f"no text of 1 to {MAX_NAME_CHARS} characters"

Frame = bytes | memoryview


class CodecError(GraphError):
    """Something is no chunk that may travel. `reason` is one word for the metric omni_bus_invalid_total.

    refused: at the receiver, the chunk without its contents, where so much of it could be read; its credit can go back.
    """

    def __init__(self, reason: str, message: str, refused: Chunk | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.refused = refused


def check(chunk: Chunk) -> None:
    """Raises CodecError, which says what to do instead, for a chunk that no receiver would take."""
    if _Last.packed[0] is not chunk:
        _packed(chunk)


def encode(chunk: Chunk) -> list[Frame]:
    """Frames of a chunk. The arrays are not copied: they must not be changed until the message has left.

    Raises CodecError as `check` does.
    """
    header = _packed(chunk)
    arrays = chunk.arrays.values()
    return [header, *(np.ascontiguousarray(array).data.cast("B") if array.size else b"" for array in arrays)]


def decode(frames: Sequence[Frame]) -> Chunk:
    """The chunk in `frames`; its arrays are read-only views of them.

    Raises CodecError for anything else, before any of it is used.
    """
    header = _unpack(frames[0] if frames else b"")
    _check_address(header)
    _, kind, session, incarnation, stream, seq, epoch, start_ns, duration_ns, layout, attrs, trace, view = header
    bare = Chunk(
        session=SessionId(session),
        stream=stream,
        start_ns=start_ns,
        duration_ns=duration_ns,
        seq=seq,
        epoch=epoch,
        type=_KIND_OF[kind],
        incarnation=incarnation,
        view=view or "",
    )
    try:
        _check_contents(layout, attrs, trace, list(map(len, frames[1:])))
    except CodecError as error:
        raise CodecError(error.reason, str(error), refused=bare) from None
    arrays = dict(map(_decode_array, layout, frames[1:]))
    times = (start_ns, duration_ns, seq, epoch, bare.type)
    return Chunk(bare.session, stream, *times, arrays, attrs, _trace_of(trace), incarnation, bare.view)


# ---- what may travel -------------------------------------------------------------------------------------------------


def _check_address(header: Sequence[Any]) -> None:
    """Whose chunk it is, of which kind and when."""
    version, kind, session, incarnation, stream, seq, epoch, start_ns, duration_ns, *_, view = header
    if version != VERSION:
        raise CodecError("version", f"version {version!r}; this side speaks {VERSION}")
    if type(kind) is not int or kind not in _KIND_OF:
        raise CodecError("kind", f"unknown kind {kind!r}")
    for name in (session, stream):
        if not (isinstance(name, str) and _may_be_name(name)):
            raise CodecError("name", f"session or stream {name!r:.200} is {_NO_NAME}")
    if view is not None and not _is_name(view):
        raise CodecError("name", f"view {view!r:.200} is {_NO_NAME}")
    for number in (seq, epoch, duration_ns, incarnation, start_ns):
        if type(number) is not int or not _LEAST <= number <= _MOST:
            reason = f"{number!r:.50} is too large" if type(number) is int else f"not a {_type_of(number)}: use int(…)"
            raise CodecError("number", f"times in nanoseconds, seq and epoch are integers of 64 bits; {reason}")
    if seq < 0 or epoch < 0 or duration_ns < 0 or incarnation < 0:
        raise CodecError("number", f"seq, epoch or duration below zero: {(seq, epoch, duration_ns)!r}")


def _check_contents(layout: Any, attrs: Any, trace: Any, sizes: Sequence[int]) -> None:
    """sizes: bytes of the arrays' frames."""
    if type(layout) is not list or len(layout) > MAX_ARRAYS:
        raise CodecError("arrays", f"more than {MAX_ARRAYS} arrays")
    if len(layout) != len(sizes):
        raise CodecError("arrays", f"{len(layout)} arrays announced, {len(sizes)} frames came")
    if layout and len(set(map(_check_array, layout, sizes))) != len(layout):
        raise CodecError("arrays", "two arrays of one name")
    if type(attrs) is not dict or len(attrs) > MAX_ATTRS:
        raise CodecError("attrs", f"more than {MAX_ATTRS} attributes")
    for key, value in attrs.items():
        if type(value) is not int or not (_LEAST <= value <= _MOST and isinstance(key, str) and _may_be_name(key)):
            _check_attribute(key, value)
    if trace is not None:
        _check_trace(trace)


def _check_array(entry: Any, num_bytes: int) -> str:
    """Returns its name."""
    if type(entry) is not list or len(entry) != 3:
        raise CodecError("arrays", f"array described as {entry!r:.200}")
    name, dtype, shape = entry
    if not _is_name(name):
        raise CodecError("dtype", f"array {name!r:.200}: its name is {_NO_NAME}")
    if type(dtype) is not str or dtype not in DTYPES:
        raise CodecError("dtype", f"array {name!r} is {dtype!r}; use .astype(…) to one of {', '.join(sorted(DTYPES))}")
    if not (type(shape) is list and _INT.issuperset(map(type, shape)) and min(shape, default=0) >= 0):
        raise CodecError("shape", f"array {name!r} of shape {shape!r}")
    if len(shape) > MAX_DIMENSIONS:
        raise CodecError("shape", f"array {name!r} has {len(shape)} dimensions, {MAX_DIMENSIONS} is the most")
    size = _DTYPE_OF[dtype].itemsize
    if math.prod(shape) * size != num_bytes:
        raise CodecError("shape", f"array {name!r}: {shape!r} does not fit {num_bytes} bytes")
    # An empty array has a size too: numpy won't shape one with a side beyond memory.
    if (num_bytes or math.prod([n or 1 for n in shape]) * size) > MAX_ARRAY_BYTES:
        raise CodecError("shape", f"array {name!r} of shape {shape!r}: {MAX_ARRAY_BYTES} bytes is the most")
    return str(name)


def _check_attribute(key: Any, value: Any) -> None:
    if not _is_name(key):
        raise CodecError("attrs", f"attribute {key!r:.200}: its name is {_NO_NAME}")
    if isinstance(value, str):
        if not _is_text(value):
            raise CodecError("attrs", f"attribute {key!r} is text that UTF-8 can't write")
    elif isinstance(value, int):
        if not _LEAST <= value <= _MOST:
            raise CodecError("attrs", f"attribute {key!r} is {value!r:.200}: integers travel in 64 bits")
    elif value is not None and not isinstance(value, float):
        raise CodecError("attrs", f"attribute {key!r} is a {_type_of(value)}; {_instead(value)}")


def _check_trace(trace: Any) -> None:
    if type(trace) is not list or len(trace) != 5:
        raise CodecError("trace", "trace is not [digest, missing, spans, failures, missing views]")
    digest, missing, spans, failures, missing_views = trace
    _expect(_is_text(digest), "trace", "bad digest")
    for part in (missing, spans, failures, missing_views):
        if type(part) is not list or len(part) > MAX_IN_TRACE:
            raise CodecError("trace", f"more than {MAX_IN_TRACE} parts")
    _expect(all(map(_is_name, missing)) and all(map(_is_name, missing_views)), "trace", "missing does not name streams")
    for span in spans:
        if not (type(span) is list and len(span) == 4 and isinstance(span[0], str) and _may_be_name(span[0])):
            raise CodecError("trace", f"bad span {span!r}")
        times = span[1:]
        if not _INT.issuperset(map(type, times)):
            raise CodecError("trace", f"times of a span must be integers: {span!r}")
        if min(times) < _LEAST or max(times) > _MOST:
            raise CodecError("trace", f"times of a span take 64 bits: {span!r}")
    for failure in failures:
        is_failure = type(failure) is list and len(failure) == 2 and _is_name(failure[0]) and _is_text(failure[1])
        _expect(is_failure, "trace", "bad failure %r", failure)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _may_be_name(value)


@lru_cache(maxsize=4096)  # the same few hundred come again and again
def _may_be_name(value: str) -> bool:
    return 0 < len(value) <= MAX_NAME_CHARS and (value.isascii() or _is_unicode(value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and (value.isascii() or _is_unicode(value))  # ASCII is what names mostly are


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _instead(value: Any) -> str:
    """What to write for a value that is none of ours."""
    scalars = ((np.bool_, "bool"), (np.integer, "int"), (np.floating, "float"))
    name = next((name for kind, name in scalars if isinstance(value, kind)), None)
    return f"use {name}(…)" if name else "only int, float, str, bool and None travel; arrays have a place of their own"


def _type_of(value: Any) -> str:
    module, name = type(value).__module__, type(value).__qualname__
    return name if module == "builtins" else f"{module}.{name}"


# ---- from a chunk to its header, and back ----------------------------------------------------------------------------


class _Last:
    """The chunk that was packed last, with its header: one chunk is checked and sent on several edges, in turn."""

    packed: tuple[Chunk | None, bytes] = (None, b"")


def _packed(chunk: Chunk) -> bytes:
    """The header, checked."""
    last, packed = _Last.packed
    if last is not chunk:
        packed = _pack(chunk)
        _Last.packed = (chunk, packed)
    return packed


def _pack(chunk: Chunk) -> bytes:
    layout = [_described(name, array) for name, array in chunk.arrays.items()]
    times = (chunk.seq, chunk.epoch, chunk.start_ns, chunk.duration_ns)
    attrs, trace = dict(chunk.attrs), None if chunk.trace is None else _pack_trace(chunk.trace)
    address = (chunk.session, chunk.incarnation, chunk.stream)
    header = [VERSION, int(chunk.type), *address, *times, layout, attrs, trace, chunk.view or None]
    _check_address(header)
    _check_contents(layout, attrs, trace, [array.nbytes for array in chunk.arrays.values()])
    packed = bytes(msgpack.packb(header))
    if len(packed) > MAX_HEADER_BYTES:
        raise CodecError(
            "header",
            f"attributes and trace take {len(packed)} bytes, {MAX_HEADER_BYTES} is the most; "
            "what is long goes in an array",
        )
    return packed


def _described(name: str, array: Any) -> list[Any]:
    if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
        raise CodecError("dtype", f"array {name!r} is a {_type_of(array)}; use a numpy.ndarray")
    return [name, _NAME_OF.get(array.dtype) or str(array.dtype), list(array.shape)]


def _pack_trace(trace: Trace) -> list[Any]:
    spans = [[s.stage, s.received_ns, s.started_ns, s.finished_ns] for s in trace.spans]
    failures = [[f.stage, f.reason] for f in trace.failures]
    return [trace.digest, list(trace.missing), spans, failures, list(trace.missing_views)]


def _unpack(frame: Frame) -> list[Any]:
    _expect(0 < len(frame) <= MAX_HEADER_BYTES, "header", "header of %r bytes", len(frame))
    try:
        header = msgpack.unpackb(frame, strict_map_key=True, max_array_len=MAX_IN_TRACE, max_map_len=MAX_ATTRS)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise CodecError("header", f"header is not msgpack: {error}") from error
    _expect(type(header) is list and len(header) > 0, "header", "header is not a list")
    _expect(header[0] == VERSION, "version", "version %r; this side speaks %r", header[0], VERSION)
    _expect(len(header) == 13, "header", "header is not a list of 13 fields")
    return list(header)


def _decode_array(entry: Sequence[Any], frame: Frame) -> tuple[str, Array]:
    name, dtype, shape = entry
    return name, np.frombuffer(memoryview(frame).toreadonly(), dtype=_DTYPE_OF[dtype]).reshape(shape)


def _trace_of(trace: Any) -> Trace | None:
    if trace is None:
        return None
    digest, missing, spans, failures, missing_views = trace
    return Trace(
        digest,
        tuple(missing),
        tuple(Span(*span) for span in spans),
        tuple(Failure(*failure) for failure in failures),
        tuple(missing_views),
    )


def _expect(condition: bool, reason: str, message: str, *values: object) -> None:
    """values: put into the message only if it is needed; writing a dozen of them would cost more than decoding."""
    if not condition:
        raise CodecError(reason, message % values)
