"""What a kind of stream is, said once: what its chunks hold, how its edges behave, what may be done with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Final, Generic, Literal, TypeAlias, TypeVar

import numpy as np

from graph.chunk import Chunk, Scalar
from graph.credit import Limit
from graph.errors import GraphError

WhenFull: TypeAlias = Literal["wait", "drop_oldest"]
Late: TypeAlias = Literal["drop", "carry"]
A = TypeVar("A")

WINDOW_EVENT: Final = "window"
"""The type of the event that a window's end is: a row of windows.jsonl, written where windows end and nowhere else."""
EVENT_FIELDS: Final = frozenset({"type", "session", "time_s"})
"""What each event has."""


class KindError(GraphError):
    """A chunk is not what its kind says; names the array or the attribute, and what it must be."""


@lru_cache
def _name_of(dtype: np.dtype[Any]) -> str:
    """numpy makes it anew each time, which takes as long as all else that is checked."""
    return dtype.name


@dataclass(frozen=True, slots=True)
class Array:
    """An array of a kind's chunks. dtypes: those it may have. shape: its sides by name, or their lengths."""

    dtypes: tuple[str, ...]
    shape: tuple[str | int, ...]

    def __str__(self) -> str:
        return f"{' or '.join(self.dtypes)} [{', '.join(map(str, self.shape))}]"

    def fits(self, array: Any) -> bool:
        if not isinstance(array, np.ndarray) or array.ndim != len(self.shape):
            return False
        sides = zip(array.shape, self.shape, strict=True)
        wrong = [side for side, length in sides if type(length) is int and side != length]
        return not wrong and _name_of(array.dtype) in self.dtypes


@dataclass(frozen=True, slots=True)
class Nothing:
    """Attributes of a kind that has none."""


@dataclass(frozen=True, slots=True)
class Kind(Generic[A]):
    """A kind of stream. A port carries one kind; an edge joins an output and an input of the same kind.

    arrays:       what its chunks hold. None: whatever the bus can carry.
    attributes:   a frozen dataclass of the chunks' attributes. None: any.
    stream:       the name under which it travels; "{view}" stands for the camera's view. "": the kind's name.
    credit, when_full, late: what an edge does where the description does not say.
    is_windowed:  its chunks belong to windows, and watermarks come with them; else they are news, taken as they come.
    is_control:   it carries control chunks only, which take no credit and overtake data.
    is_raw:       what a source saw or heard itself: it is hashed into the window's digest.
    is_fenced:    it is said: what is under way when the listener interrupts is stale.
    is_picture:   one chunk per picture: its credit grows with the cameras' fps.
    is_sound:     it is heard: a camera without a microphone has none.
    is_sheddable: chunks of it may be left out under overload.
    tokens:       the array whose length counts as tokens made. "": none.
    is_event:     what is worth telling of a session; the machinery's own events travel with it.
    """

    name: str
    credit: Limit = field(default=Limit(8))
    arrays: Mapping[str, Array] | None = field(default=None, hash=False)
    attributes: type[A] | None = None
    stream: str = ""
    when_full: WhenFull = "wait"
    late: Late = "carry"
    is_windowed: bool = True
    is_control: bool = False
    is_raw: bool = False
    is_fenced: bool = False
    is_picture: bool = False
    is_sound: bool = False
    is_sheddable: bool = False
    is_event: bool = False
    tokens: str = ""

    def __str__(self) -> str:
        return self.name

    def read(self, chunk: Chunk) -> A:
        """The chunk's attributes. Raises KindError where it has others."""
        if self.attributes is None:
            raise KindError(f"{self.name}: its attributes have no type; read them from chunk.attrs")
        try:
            return self.attributes(**chunk.attrs)
        except TypeError:
            self._check_attributes(chunk.attrs)
            raise

    def check(self, chunk: Chunk) -> None:
        """Raises KindError for a chunk that is not of this kind."""
        if self.arrays is not None:
            self._check_arrays(chunk.arrays, self.arrays)
        if self.attributes is not None and chunk.attrs:
            self._check_attributes(chunk.attrs)
        if self.is_event and not isinstance(chunk.attrs.get("type"), str):
            raise KindError("an event has a type; make it by event(session, at_ns, type, …) of its port")

    def _check_arrays(self, arrays: Mapping[str, Any], expected: Mapping[str, Array]) -> None:
        for name, array in expected.items():
            if name not in arrays:
                raise KindError(f"array {name!r} is missing; it must be {array}")
            if not array.fits(arrays[name]):
                raise KindError(f"array {name!r} is {_described(arrays[name])}; it must be {array}")
        if len(arrays) > len(expected):
            raise KindError(f"{_others(arrays, expected)}: {self.name} has no such array; it has {_names(expected)}")

    def _check_attributes(self, attrs: Mapping[str, Scalar]) -> None:
        expected = _attributes_of(self.attributes)
        for name, value in attrs.items():
            if name not in expected:
                raise KindError(f"{name!r}: {self.name} has no such attribute; it has {_names(expected)}")
            if value.__class__.__name__ not in expected[name]:
                raise KindError(
                    f"attribute {name!r} is a {value.__class__.__name__}; it must be {' or '.join(expected[name])}"
                )


def attrs_of(attributes: Any) -> dict[str, Scalar]:
    """A kind's attributes as a chunk carries them; those that are None are left out."""
    values = {name: getattr(attributes, name) for name in _attributes_of(type(attributes))}
    return {name: value for name, value in values.items() if value is not None}


_KNOWN: Final[dict[type, Mapping[str, tuple[str, ...]]]] = {}


def _attributes_of(attributes: type[Any] | None) -> Mapping[str, tuple[str, ...]]:
    """By name, the types it may have ("int" for a float, too)."""
    if attributes is None:
        return {}
    if attributes not in _KNOWN:
        _KNOWN[attributes] = {each.name: _types(_written(each.type)) for each in fields(attributes)}
    return _KNOWN[attributes]


def _written(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else str(getattr(annotation, "__name__", annotation))


def _types(written: str) -> tuple[str, ...]:
    types = tuple("NoneType" if part.strip() == "None" else part.strip() for part in written.split("|"))
    return (*types, "int") if "float" in types else types


def _described(array: Any) -> str:
    if not isinstance(array, np.ndarray):
        return f"a {type(array).__name__}"
    return f"{array.dtype.name} {list(array.shape)}"


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _others(arrays: Iterable[str], expected: Mapping[str, Array]) -> str:
    return ", ".join(repr(name) for name in arrays if name not in expected)
