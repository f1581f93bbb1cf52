"""Classes of options with defaults. Values are spelled and read as the validators say; nothing else is checked.

Rule: what is written here is right. Mistakes of people are found where the real package is.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

from pydantic.fields import MISSING, FieldInfo


class ValidationError(ValueError):
    def errors(self) -> list[dict[str, Any]]:
        return [{"msg": str(self), "loc": ()}]


@dataclass(frozen=True)
class BeforeValidator:
    func: Callable[[Any], Any]


class AfterValidator(BeforeValidator): ...


class PlainValidator(BeforeValidator): ...


@dataclass(frozen=True)
class PlainSerializer:
    func: Callable[[Any], Any]


def ConfigDict(**settings: Any) -> dict[str, Any]:
    return settings


def Field(
    default: Any = MISSING, *, default_factory: Callable[[], Any] | None = None, alias: str | None = None, **_: Any
) -> Any:
    """Limits are not looked at."""
    return FieldInfo(default, default_factory, alias)


def model_validator(*, mode: str) -> Callable[[Any], Any]:
    return lambda method: method


class BaseModel:
    """Frozen by agreement. model_fields: by name, also those of the bases."""

    model_fields: ClassVar[Mapping[str, FieldInfo]] = {}
    model_fields_set: set[str]

    def __init_subclass__(cls) -> None:
        own: dict[str, FieldInfo] = {}
        for name in inspect.get_annotations(cls):
            default = vars(cls).get(name, MISSING)
            if not name.startswith("_") and name != "model_config":
                own[name] = replace(default) if isinstance(default, FieldInfo) else FieldInfo(default)
                if name in vars(cls):
                    delattr(cls, name)
        cls.model_fields = {**cls.model_fields, **own}
        hints = get_type_hints(cls, include_extras=True)
        for name in own:
            own[name].annotation = hints[name]

    def __init__(self, **given: Any) -> None:
        read = {name: _read(name, info, given) for name, info in type(self).model_fields.items()}
        vars(self).update({name: value for name, (value, _) in read.items()})
        object.__setattr__(self, "model_fields_set", {name for name, (_, is_given) in read.items() if is_given})

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __setattr__(self, name: str, value: object) -> None:
        raise ValidationError(f"{type(self).__name__} is frozen: {name} can't be set")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    @classmethod
    def model_validate(cls, value: Any) -> Any:
        return value if isinstance(value, cls) else cls(**value)

    def model_dump(
        self, *, by_alias: bool = False, include: set[str] | None = None, exclude: set[str] | None = None
    ) -> dict[str, Any]:
        return {
            (info.alias or name) if by_alias else name: _written(info.annotation, getattr(self, name), by_alias)
            for name, info in type(self).model_fields.items()
            if (include is None or name in include) and name not in (exclude or ())
        }

    def model_copy(self, *, update: Mapping[str, Any]) -> Any:
        copied = copy.copy(self)
        vars(copied).update(update)
        return copied


def create_model(name: str, *, __base__: type[BaseModel], **fields: tuple[Any, Any]) -> Any:
    annotations = {field: annotation for field, (annotation, _) in fields.items()}
    defaults = {field: default for field, (_, default) in fields.items()}
    return type(name, (__base__,), {"__annotations__": annotations, "__module__": __name__, **defaults})


def _read(name: str, info: FieldInfo, given: Mapping[str, Any]) -> tuple[Any, bool]:
    """A field's value, and whether it was given."""
    key = next((key for key in (info.alias, name) if key in given), None)
    if key is None:
        if info.is_required():
            raise ValidationError(f"{info.alias or name} is missing")
        return info.value(), False
    return _as(info.annotation, given[key]), True


def _as(annotation: Any, value: Any) -> Any:
    """A value as its type says: validators are called in order, options become their class."""
    if get_origin(annotation) is Annotated:
        inner, *rest = get_args(annotation)
        validators = [each for each in rest if isinstance(each, BeforeValidator)]
        for each in validators:
            if not isinstance(each, AfterValidator):
                value = each.func(value)
        value = _as(inner, value)
        for each in validators:
            if isinstance(each, AfterValidator):
                value = each.func(value)
        return value
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.model_validate(value)
    if value is not None and type(None) in get_args(annotation):
        return _as(next(arg for arg in get_args(annotation) if arg is not type(None)), value)
    if isinstance(value, Mapping) and len(get_args(annotation)) == 2:
        return {key: _as(get_args(annotation)[1], item) for key, item in value.items()}
    return value


def _written(annotation: Any, value: Any, by_alias: bool) -> Any:
    """A value as it may be read again."""
    if get_origin(annotation) is Annotated:
        serializers = [each for each in get_args(annotation)[1:] if isinstance(each, PlainSerializer)]
        if serializers:
            return serializers[0].func(value)
        return _written(get_args(annotation)[0], value, by_alias)
    if isinstance(value, BaseModel):
        return value.model_dump(by_alias=by_alias)
    if value is not None and type(None) in get_args(annotation):
        return _written(next(arg for arg in get_args(annotation) if arg is not type(None)), value, by_alias)
    return value
