"""A document's values checked against a model of sections, every problem in our words and with its place."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import TYPE_CHECKING, Any, Final, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from graph.secret import Secret, mask_urls
from graph.wording import shown, suggest
from graph.yaml_file import Document, KeyPath, Place, Unreadable, dotted

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Model = TypeVar("Model", bound=BaseModel)

_EXPECTED: Final[Mapping[str, str]] = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "model_type": "must be a mapping (key: value)",
    "dict_type": "must be a mapping (key: value)",
    "mapping_type": "must be a mapping (key: value)",
    "list_type": "must be a list",
    "greater_than": "must be more than {gt:.15g}",
    "greater_than_equal": "must be at least {ge:.15g}",
    "less_than": "must be less than {lt:.15g}",
    "less_than_equal": "must be at most {le:.15g}",
    "literal_error": "must be {expected}",
    "string_too_long": "must have at most {max_length} characters",
}


def check_document(document: Document, model: type[Model]) -> tuple[Model, list[KeyPath]]:
    """The document's values as `model`, which must accept an empty mapping, and the places of what is wrong.

    Every problem is noted in the document; what is wrong counts as not written, so that the rest can be checked on.
    """
    details = _details(document.tree, model)
    document.problems += [problem for detail in details for problem in _problem(document, model, detail)]
    rest = copy.deepcopy(document.tree)
    while remaining := _details(rest, model):  # ends: each round takes something away
        _remove(rest, remaining)
    return model.model_validate(rest), [_path(detail) for detail in details]


def _details(tree: object, model: type[BaseModel]) -> list[ErrorDetails]:
    try:
        model.model_validate(tree)
    except ValidationError as error:
        return error.errors(include_url=False)
    return []


def _path(detail: ErrorDetails) -> KeyPath:
    """Where pydantic found it; it marks a wrong key by one more part."""
    path = tuple(detail["loc"])
    return path[:-1] if path[-1:] == ("[key]",) else path


def _remove(tree: object, details: Iterable[ErrorDetails]) -> None:
    """Take the values with these errors away; a section which lacks something goes as a whole."""
    paths = {_as_far_as_written(tree, _path(detail)) for detail in details}
    # From the back, so that the indexes of a list stay right, and the parts before the whole.
    for path in sorted(paths, key=lambda path: [str(part).zfill(6) for part in path], reverse=True):
        parent: Any = tree
        for part in path[:-1]:
            parent = parent[part]
        del parent[path[-1]]


def _as_far_as_written(tree: Any, path: KeyPath) -> KeyPath:
    for depth, part in enumerate(path):
        written = part in tree if isinstance(tree, dict) else isinstance(tree, list)
        if not written:
            return path[:depth]
        tree = tree[part]
    return path


def _problem(document: Document, model: type[BaseModel], detail: ErrorDetails) -> list[tuple[Place, str]]:
    """The problem in our words; none if it was already told when the file was read."""
    path, value = _path(detail), detail["input"]
    if isinstance(value, Unreadable):
        return []
    if detail["type"] == "extra_forbidden":
        return [(document.place(path, of_key=True), mask_urls(_unknown_key(model, path)))]
    of_key = detail["loc"] != path or value is None  # `door:` with nothing behind it
    name = dotted(path if detail["type"] == "missing" else document.nearest(path))
    return [(document.place(path, of_key=of_key), mask_urls(f"{name}: {_wrong_value(detail, value)}"))]


def _unknown_key(model: type[BaseModel], path: KeyPath) -> str:
    key, within = str(path[-1]), dotted(path[:-1])
    return f"unknown key {shown(key)}{f' in {within}' if within else ''}{suggest(key, _known_keys(model, path[:-1]))}"


def _wrong_value(detail: ErrorDetails, value: object) -> str:
    context = detail.get("ctx", {})
    if detail["type"] == "missing":
        return "is missing"
    if detail["type"] == "value_error":
        return str(context["error"])
    if isinstance(value, Secret):
        return "takes no ${env:…} or ${file:…}: those are for secrets, and this would be printed"
    expected = _EXPECTED[detail["type"]].format(**context) if detail["type"] in _EXPECTED else detail["msg"]
    return f"{expected}, not {shown(value)}"


def _known_keys(model: type[BaseModel], path: KeyPath) -> list[str]:
    """The keys which the section at `path` may have."""
    section: Any = model
    for part in path:
        if isinstance(section, type) and issubclass(section, BaseModel):
            fields = section.model_fields.items()
            section = next(info.annotation for name, info in fields if (info.alias or name) == part)
            section = get_args(section)[0] if isinstance(section, UnionType) else section  # X | None
        else:
            section = get_args(section)[-1]  # of Mapping[str, X] or list[X]
    return [info.alias or name for name, info in section.model_fields.items()]
