"""How values and names are shown in messages: short, and without credentials."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Final

from graph.secret import mask_urls


def one_line(text: str) -> str:
    """The text without line breaks."""
    return " ".join(text.split())


def clipped(text: str, length: int = 400) -> str:
    """The text on one line, of a readable length."""
    text = one_line(text)
    return text if len(text) <= length else text[:length] + "…"


def shown(value: object) -> str:
    """A value of the file as it may stand in a message."""
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value is None:
        return "null"
    if isinstance(value, str):
        return repr(clipped(mask_urls(value), 120))
    return str(value).lower() if isinstance(value, bool) else str(value)


def is_text(value: str) -> bool:
    """False for half of a character, which UTF-8 can't hold: Python's way to keep a byte that is no UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


NOT_UTF_8: Final = "it holds a byte that is no UTF-8 (shown as \\udc…)"


def listed(names: Iterable[str]) -> str:
    """Names in alphabetical order: audio_encoder, tts."""
    return ", ".join(sorted(names))


def suggest(text: str, known: Collection[str], *, alone: bool = True) -> str:
    """The tail of a message: what was probably meant, else (when there is nothing else said) what there is."""
    close = difflib.get_close_matches(text, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there is: {', '.join(known)}" if alone else ""
