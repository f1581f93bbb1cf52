"""The media of a camera: how they are opened, decoded in a process of their own, and read.

Its face is `MediaReader` with what it takes and gives. Looked up when it is asked for: who needs a part of this package
alone does not load the others.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.media.reader import Ended, Failed, Frame, MediaReader, MediaRequest, Sound

__all__ = ["Ended", "Failed", "Frame", "MediaReader", "MediaRequest", "Sound"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("stages.media.reader"), name)
