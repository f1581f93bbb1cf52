from __future__ import annotations

from collections.abc import Callable
from typing import Any


def choose_encoder(accept: str) -> tuple[Callable[[Any], bytes], str]:
    return lambda registry: b"", "text/plain"
