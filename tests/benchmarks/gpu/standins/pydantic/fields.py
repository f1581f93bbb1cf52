"""What is known of a field of a class of options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class _Missing: ...


MISSING = _Missing()


@dataclass(eq=False)
class FieldInfo:
    default: Any = MISSING
    default_factory: Callable[[], Any] | None = None
    alias: str | None = None
    annotation: Any = None

    def is_required(self) -> bool:
        return self.default is MISSING and self.default_factory is None

    def value(self) -> Any:
        return self.default if self.default_factory is None else self.default_factory()
