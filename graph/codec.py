"""A chunk on the wire: one msgpack header, then one frame per array. No pickle; every field is checked before use.

Header: [version, kind, session, stream, seq, epoch, start_ns, duration_ns, [[name, dtype, shape] …], attrs, trace]
        trace: nil or [digest, [missing …], [[stage, received_ns, started_ns, finished_ns] …]]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np

from graph.chunk import Array, Chunk, Kind, Scalar, SessionId, Span, Trace
from graph.errors import GraphError

VERSION = 1
MAX_HEADER_BYTES = 64 * 1024
MAX_ARRAYS = 8
MAX_DIMENSIONS = 4
MAX_ARRAY_BYTES = 256 * 1024 * 1024  # the embeddings of a 9-cell picture at 4096 wide are 10 MB
MAX_NAME_CHARS = 128
MAX_ATTRS = 64
MAX_SPANS = 32
DTYPES = frozenset({"uint8", "int16", "uint16", "int32", "int64", "float32"})
_DTYPE_OF = {name: np.dtype(name) for name in DTYPES}
_NAME_OF = {dtype: name for name, dtype in _DTYPE_OF.items()}  # numpy makes dtype.name anew each time: 1 us and more
_KIND_OF = {kind.value: kind for kind in Kind}

Frame = bytes | memoryview


class CodecError(GraphError):
    """A message is not a chunk. `reason` is one word for the metric omni_bus_invalid_total."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def encode(chunk: Chunk) -> list[Frame]:
    """Frames of a chunk. The arrays are not copied: they must not be changed until the message has left."""
    layout = []
    frames: list[Frame] = [b""]
    for name, array in chunk.arrays.items():
        dtype = _NAME_OF.get(array.dtype)
        if dtype is None:
            raise CodecError(
                "dtype", f"stream {chunk.stream!r}: array {name!r} is {array.dtype}; the wire knows {sorted(DTYPES)}"
            )
        layout.append([name, dtype, list(array.shape)])
        frames.append(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
    frames[0] = msgpack.packb(
        [
            VERSION,
            int(chunk.kind),
            chunk.session,
            chunk.stream,
            chunk.seq,
            chunk.epoch,
            chunk.start_ns,
            chunk.duration_ns,
            layout,
            dict(chunk.attrs),
            _pack_trace(chunk.trace),
        ]
    )
    if len(frames[0]) > MAX_HEADER_BYTES:
        raise CodecError("header", f"stream {chunk.stream!r}: its header takes {len(frames[0])} bytes")
    return frames


def decode(frames: Sequence[Frame]) -> Chunk:
    """The chunk in `frames`; its arrays are read-only views of them.

    Raises CodecError for anything else, before any of it is used.
    """
    header = _unpack(frames[0] if frames else b"")
    version, kind, session, stream, seq, epoch, start_ns, duration_ns, layout, attrs, trace = header
    if version != VERSION:
        raise CodecError("version", f"version {version!r}; this side speaks {VERSION}")
    if type(kind) is not int or kind not in _KIND_OF:
        raise CodecError("kind", f"unknown kind {kind!r}")
    if not (_is_name(session) and _is_name(stream)):
        raise CodecError("name", "session or stream is not a short string")
    if not type(seq) is type(epoch) is type(start_ns) is type(duration_ns) is int:
        raise CodecError("number", "seq, epoch and times must be integers")
    if seq < 0 or epoch < 0 or duration_ns < 0:
        raise CodecError("number", f"seq, epoch or duration below zero: {(seq, epoch, duration_ns)!r}")
    return Chunk(
        session=SessionId(session),
        stream=stream,
        start_ns=start_ns,
        duration_ns=duration_ns,
        seq=seq,
        epoch=epoch,
        kind=_KIND_OF[kind],
        arrays=_decode_arrays(layout, frames[1:]),
        attrs=_checked_attrs(attrs),
        trace=_unpack_trace(trace),
    )


def _unpack(frame: Frame) -> list[Any]:
    _expect(0 < len(frame) <= MAX_HEADER_BYTES, "header", "header of %r bytes", len(frame))
    try:
        header = msgpack.unpackb(frame, strict_map_key=True, max_array_len=256, max_map_len=MAX_ATTRS)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise CodecError("header", f"header is not msgpack: {error}") from error
    _expect(isinstance(header, list) and len(header) == 11, "header", "header is not a list of 11 fields")
    return list(header)


def _decode_arrays(layout: Any, frames: Sequence[Frame]) -> dict[str, Array]:
    _expect(type(layout) is list and len(layout) <= MAX_ARRAYS, "arrays", "bad list of arrays")
    _expect(len(layout) == len(frames), "arrays", "%r arrays announced, %r frames came", len(layout), len(frames))
    arrays = dict(map(_decode_array, layout, frames))
    _expect(len(arrays) == len(layout), "arrays", "two arrays of one name")
    return arrays


def _decode_array(entry: Any, frame: Frame) -> tuple[str, Array]:
    _expect(type(entry) is list and len(entry) == 3, "arrays", "array described as %r", entry)
    name, dtype_name, shape = entry
    dtype = _DTYPE_OF.get(dtype_name) if type(dtype_name) is str else None
    if dtype is None or not _is_name(name):
        raise CodecError("dtype", f"array {name!r} of dtype {dtype_name!r}")
    if not (type(shape) is list and len(shape) <= MAX_DIMENSIONS and all(type(n) is int and n >= 0 for n in shape)):
        raise CodecError("shape", f"array {name!r} of shape {shape!r}")
    num_bytes = math.prod(shape) * dtype.itemsize
    fits = num_bytes == len(frame) <= MAX_ARRAY_BYTES
    if fits and not num_bytes:  # an empty array has a size too: numpy won't shape one with a side beyond memory
        fits = math.prod(max(n, 1) for n in shape) * dtype.itemsize <= MAX_ARRAY_BYTES
    if not fits:
        raise CodecError("shape", f"array {name!r}: {shape!r} does not fit {len(frame)!r} bytes")
    return name, np.frombuffer(memoryview(frame).toreadonly(), dtype=dtype).reshape(shape)


def _checked_attrs(attrs: Any) -> Mapping[str, Scalar]:
    _expect(isinstance(attrs, dict) and len(attrs) <= MAX_ATTRS, "attrs", "attrs are not a small map")
    for key, value in attrs.items():
        is_scalar = value is None or isinstance(value, bool | int | float | str)
        _expect(_is_name(key) and is_scalar, "attrs", "attr %r is %r; only scalars travel", key, type(value))
    return dict(attrs)


def _pack_trace(trace: Trace | None) -> list[Any] | None:
    if trace is None:
        return None
    spans = [[s.stage, s.received_ns, s.started_ns, s.finished_ns] for s in trace.spans]
    return [trace.digest, list(trace.missing), spans]


def _unpack_trace(trace: Any) -> Trace | None:
    if trace is None:
        return None
    _expect(isinstance(trace, list) and len(trace) == 3, "trace", "trace is not [digest, missing, spans]")
    digest, missing, spans = trace
    _expect(isinstance(digest, str) and isinstance(missing, list), "trace", "bad digest or missing")
    _expect(all(_is_name(name) for name in missing), "trace", "missing does not name streams")
    _expect(isinstance(spans, list) and len(spans) <= MAX_SPANS, "trace", "bad list of spans")
    return Trace(digest, tuple(missing), tuple(_unpack_span(span) for span in spans))


def _unpack_span(span: Any) -> Span:
    _expect(isinstance(span, list) and len(span) == 4 and _is_name(span[0]), "trace", "bad span %r", span)
    _expect(set(map(type, span[1:])) == {int}, "trace", "times of a span must be integers: %r", span)
    return Span(*span)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME_CHARS


def _expect(condition: bool, reason: str, message: str, *values: object) -> None:
    """values: put into the message only if it is needed; writing a dozen of them would cost more than decoding."""
    if not condition:
        raise CodecError(reason, message % values)
