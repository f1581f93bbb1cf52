"""A YAML file as plain values which know where they stand in it, so that an error can say line and column.

Rules, which make a hostile file a short message instead of a hot machine:
- no tag is read, no merge key, one document only;
- a file has at most 1 MiB, 10 000 values (aliases count in full) and 32 levels;
- keys are text and occur once;
- `${env:NAME}` and `${file:path}` become a `Secret` (graph/secret.py), which shows itself in no print.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, TypeAlias, cast

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, StringMark, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from ruamel.yaml.reader import ReaderError

from graph.errors import Problem, SpecError
from graph.reference import resolve
from graph.secret import mask_urls
from graph.wording import NOT_UTF_8, clipped, is_text

MAX_BYTES: Final = 1 << 20
MAX_VALUES: Final = 10_000
MAX_DEPTH: Final = 32

KeyPath: TypeAlias = tuple[str | int, ...]

# YAML 1.2 core schema: `on`, `off`, `yes`, `no` are text.
_CONSTANTS: Final[Mapping[str, object]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INT: Final = re.compile(r"[-+]?[0-9]{1,300}")
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


class Unreadable:
    """Stands where a value could not be read and a problem was already noted, so that it is told once."""


class Place(NamedTuple):
    """Where something stands; sorts in file order, `--set` after the file."""

    line: int
    column: int
    label: str


@dataclass(slots=True)
class Document:
    """The values of one file (dict, list, str, int, float, bool, None, Secret, Unreadable) and their places."""

    name: str
    tree: object = None
    keys: dict[KeyPath, Place] = field(default_factory=dict)
    values: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[tuple[Place, str]] = field(default_factory=list)

    def place(self, path: KeyPath, *, of_key: bool = False) -> Place:
        """Where the value at `path` stands, or the nearest thing around it; with `of_key` where its key stands."""
        if of_key and path in self.keys:
            return self.keys[path]
        path = self.nearest(path)
        return self.values[path] if path else Place(0, 0, self.name)

    def nearest(self, path: KeyPath) -> KeyPath:
        """The path, as far as something stands there."""
        while path and path not in self.values:
            path = path[:-1]
        return path

    def put(self, path: Sequence[str], value: object, place: Place) -> None:
        """Set one value, with the mappings on its way; ValueError where something on the way is no mapping."""
        parent, steps = self.tree, cast(KeyPath, ())
        for part in path[:-1]:
            step = _step(parent, part, steps)
            parent = _child(parent, step)
            steps = (*steps, step)
        steps = (*steps, _step(parent, path[-1], steps))
        cast(Any, parent)[steps[-1]] = value
        self._move(steps, place)

    def _move(self, path: KeyPath, place: Place) -> None:
        for places in (self.keys, self.values):
            for known in [known for known in places if known[: len(path)] == path]:
                del places[known]
            for depth in range(1, len(path) + 1):
                places.setdefault(path[:depth], place)


class Finding(NamedTuple):
    """A problem and the place to change; `also` are other places which it follows from."""

    path: KeyPath
    message: str
    also: tuple[KeyPath, ...] = ()


def dotted(path: KeyPath) -> str:
    """The path as people say it: stages.llm.gpus, edges[3].to."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part or repr(part)}" for part in path)
    return text.removeprefix(".")


def read_yaml(text: str, name: str, environment: Mapping[str, str]) -> Document:
    """Read one document. What can be skipped is noted in `problems`; raises SpecError where nothing more can be read.

    environment: where `${env:NAME}` is looked up.
    """
    document = Document(name)
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise SpecError([Problem(name, "the file is larger than 1 MiB; a pipeline description has a few kB")])
    reader = _Reader(document, environment)
    try:
        reader.read(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reader.note(mark, f"not YAML: {', '.join(filter(None, (error.context, error.problem)))}")
        raise SpecError(in_file_order(document.problems)) from None
    except ReaderError as error:
        raise SpecError([Problem(name, f"not text: character {error.position + 1} is {error.character!r}")]) from None
    except YAMLError as error:
        raise SpecError([Problem(name, f"not YAML: {error}")]) from None
    except _GaveUpError:
        raise SpecError(in_file_order(document.problems)) from None
    return document


def apply_override(document: Document, assignment: str, environment: Mapping[str, str]) -> None:
    """Set one value from `--set a.b=c`, the value read as YAML; problems are noted in the document."""
    place = Place(1 << 60, len(document.problems), f"--set {clipped(mask_urls(assignment))}")
    dotted_path, equals, text = assignment.partition("=")
    path = dotted_path.strip().split(".")
    if not equals or "" in path:
        document.problems.append((place, "must be section.name=value, like stages.llm.gpus=1"))
        return
    if not is_text(assignment):
        document.problems.append((place, NOT_UTF_8))
        return
    try:
        value = read_yaml(text, place.label, environment)
        document.problems += [(place, message) for _, message in value.problems]
        document.put(path, value.tree, place)
    except SpecError as error:
        document.problems += [(place, problem.message) for problem in error.problems]
    except ValueError as error:
        document.problems.append((place, str(error)))


def in_file_order(problems: list[tuple[Place, str]]) -> list[Problem]:
    """The problems as they go into a SpecError, each once and of a readable length."""
    return [Problem(place.label, clipped(message)) for place, message in sorted(set(problems))]


class _GaveUpError(Exception):
    """The problem is noted; what follows can't be read."""


class _Reader:
    """Builds the tree from the parser's events, so that limits bite before anything large exists."""

    def __init__(self, document: Document, environment: Mapping[str, str]) -> None:
        self._document = document
        self._environment = environment
        self._events: Iterator[Event] = iter(())
        self._anchors: dict[str, tuple[object, int]] = {}  # name -> value, number of values in it
        self._num_values = 0

    def read(self, text: str) -> None:
        yaml = YAML(typ="safe", pure=True)
        self._events = _own_errors(cast(Iterator[Event], yaml.parse(text)))
        documents = 0
        for event in self._events:
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self.give_up(event.start_mark, "a second document ('---'); write one")
            elif isinstance(event, (AliasEvent, ScalarEvent, SequenceStartEvent, MappingStartEvent)):
                self._document.tree = self._value(event, ())

    def note(self, mark: Any, message: str) -> None:
        self._document.problems.append((self._place(mark), message))

    def give_up(self, mark: Any, message: str) -> None:
        self.note(mark, message)
        raise _GaveUpError

    def _place(self, mark: StringMark | None) -> Place:
        if mark is None:
            return Place(0, 0, self._document.name)
        line, column = mark.line + 1, mark.column + 1
        return Place(line, column, f"{self._document.name}:{line}:{column}")

    def _value(self, event: Any, path: KeyPath) -> object:
        self._document.values[path] = self._place(event.start_mark)
        self._count(1, event, path)
        if isinstance(event, AliasEvent):
            return self._aliased(event, path)
        if event.tag is not None:
            self.note(event.start_mark, f"tags are not read (<{event.tag}>); write a plain value")
        num_before = self._num_values
        if isinstance(event, MappingStartEvent):
            value: object = self._mapping(path)
        elif isinstance(event, SequenceStartEvent):
            value = self._sequence(path)
        else:
            value = self._scalar(event)
        if event.tag is not None:
            value = Unreadable()
        if event.anchor is not None:
            self._anchors[event.anchor] = (value, self._num_values - num_before + 1)
        return value

    def _count(self, num_values: int, event: Any, path: KeyPath) -> None:
        self._num_values += num_values
        if self._num_values > MAX_VALUES:
            self.give_up(event.start_mark, f"more than {MAX_VALUES} values (aliases count in full)")
        if len(path) > MAX_DEPTH:
            self.give_up(event.start_mark, f"nested deeper than {MAX_DEPTH} levels")

    def _aliased(self, event: Any, path: KeyPath) -> object:
        if event.anchor not in self._anchors:
            self.note(event.start_mark, f"alias '*{event.anchor}' has no '&{event.anchor}' before it")
            return Unreadable()
        value, size = self._anchors[event.anchor]
        self._count(size, event, path)
        return copy.deepcopy(value)

    def _sequence(self, path: KeyPath) -> list[object]:
        items: list[object] = []
        for event in self._events:
            if isinstance(event, SequenceEndEvent):
                break
            items.append(self._value(event, (*path, len(items))))
        return items

    def _mapping(self, path: KeyPath) -> dict[str, object]:
        items: dict[str, object] = {}
        for event in self._events:
            if isinstance(event, MappingEndEvent):
                break
            key = self._key(event, path)
            place = self._place(event.start_mark)
            if key in items:
                self._note_duplicate(place, (*path, key))
                self._value(next(self._events), (*path, key, "(again)"))  # read past it
                continue
            self._document.keys[(*path, key)] = place
            items[key] = self._value(next(self._events), (*path, key))
        return items

    def _note_duplicate(self, place: Place, path: KeyPath) -> None:
        within = f" in {dotted(path[:-1])}" if path[:-1] else ""
        message = f"duplicate key '{path[-1]}'{within}; first in line {self._document.keys[path].line}"
        self._document.problems.append((place, message))

    def _key(self, event: Any, path: KeyPath) -> str:
        if not isinstance(event, ScalarEvent) or not is_text(event.value):
            self.give_up(event.start_mark, "a key must be text")
        if event.value == "<<":
            self.give_up(event.start_mark, "merge keys ('<<') are not read; write the keys out")
        self._count(1, event, path)
        return str(event.value)

    def _scalar(self, event: Any) -> object:
        plain = event.implicit[0]
        if not plain or event.value not in _CONSTANTS:
            value = _number(event.value) if plain else None
            return self._text(event) if value is None else value
        return _CONSTANTS[event.value]

    def _text(self, event: Any) -> object:
        if not is_text(str(event.value)):
            self.note(event.start_mark, "half of a character (a surrogate, \\ud800 to \\udfff) is no text")
            return Unreadable()
        try:
            return resolve(str(event.value), self._environment)
        except ValueError as error:
            self.note(event.start_mark, str(error))
            return Unreadable()


def _own_errors(events: Iterator[Event]) -> Iterator[Event]:
    """The events; what the parser raises beside its own errors, as for a character beyond Unicode, becomes one."""
    try:
        yield from events
    except YAMLError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError, AttributeError) as error:
        raise YAMLError(f"the parser can't read it ({type(error).__name__})") from error


def _number(text: str) -> int | float | None:
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if text.lower().lstrip("+-") in (".inf", ".nan"):
        return float(text.replace(".", "", 1))
    return None


def _step(parent: object, part: str, path: KeyPath) -> str | int:
    """`part` as an index of a list or a key of a mapping; ValueError where `parent` is neither."""
    if isinstance(parent, list) and part.isdecimal() and int(part) < len(parent):
        return int(part)
    if isinstance(parent, dict):
        return part
    raise ValueError(f"{dotted(path) or 'the file'} has no '{part}'")


def _child(parent: Any, step: str | int) -> object:
    """The container at `step`, made where it is absent."""
    if isinstance(parent, dict) and parent.get(step) is None:
        parent[step] = {}
    return parent[step]
