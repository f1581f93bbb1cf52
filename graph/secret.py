"""Text which may hold credentials: how it is written, resolved and shown.

Rules:
- Every print of a `Secret` shows `masked`; only `reveal()` gives the text itself.
- `${env:NAME}` and `${file:path}` reveal nothing and are shown as they were written.
- What may be a password is masked: a mangled print is better than a leak.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

MAX_SECRET_BYTES: Final = 64 << 10

# An address right behind "://", which is complete there, is no login: what follows it is path. Host names don't count,
# as in rtsp://admin:554/x@10.0.0.7 "admin:554/x" may be user and password.
_BEFORE_LOGIN: Final = re.compile(
    r"://(?!(?:\[[0-9A-Fa-f:.]+\]|[0-9]{1,3}(?:\.[0-9]{1,3}){3})(?::[0-9]{1,5})?(?:[/?#\s]|$))"
)
# A user's name in clear, the password (or all) by reference: `admin:${env:PASSWORD}`.
_BY_REFERENCE: Final = re.compile(r"((\$\{[^}]*\}|[^:$]*):)?(\$\{[^}]*\})+")
# Cheap cameras take it in the path, too: rtsp://10.0.0.7/user=admin_password=…_channel=1_stream=0
_SECRET_PARAMETER: Final = re.compile(
    r"(?i)((?:pass|pwd|token|secret|key|auth)[\w-]{0,40}=)(?!\$\{)[^&\s'\"]+?(?=_(?:channel|stream)=|[&\s'\"]|$)"
)
_REFERENCE: Final = re.compile(r"\$\{([^}]*)\}?")


def mask_urls(text: str) -> str:
    """The text without the credentials of the URLs in it; `${…}` references stay, as they reveal nothing.

    All from the first "://" to the last "@" goes, unless a numeric address stands between: passwords with a raw "/",
    "@" or space are common.
    """
    if scheme := _BEFORE_LOGIN.search(text):
        login, at, after = text[scheme.end() :].rpartition("@")
        if at and not _BY_REFERENCE.fullmatch(login):
            text = f"{text[: scheme.end()]}***@{after}"
    return _SECRET_PARAMETER.sub(r"\1***", text)


class Secret:
    """Text which may hold credentials. Every print shows `masked`; only `reveal()` gives the text itself."""

    __slots__ = ("_text", "masked")

    def __init__(self, template: str, text: str | None = None) -> None:
        """template: as written, with its `${…}`; text: with the references resolved (None: there are none)."""
        self.masked = mask_urls(template)
        self._text = template if text is None else text

    def reveal(self) -> str:
        """The text itself: for opening the source, never for a message."""
        return self._text

    def __repr__(self) -> str:
        return f"Secret({self.masked!r})"

    def __str__(self) -> str:
        return self.masked

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


def resolve(template: str, environment: Mapping[str, str]) -> Secret | str:
    """A Secret where the template has references, else the template. ValueError says which can't be resolved, and why.

    environment: where `${env:NAME}` is looked up.
    """
    if "${" not in template:
        return template
    return Secret(template, _REFERENCE.sub(lambda match: _resolved(match[0], environment), template))


def _resolved(reference: str, environment: Mapping[str, str]) -> str:
    kind, _, name = reference[2:].removesuffix("}").partition(":")
    if not reference.endswith("}") or kind not in ("env", "file") or not name:
        raise ValueError(f"'{reference}' is not read; write ${{env:NAME}} or ${{file:path}}")
    if kind == "file":
        return _read_secret(Path(name))
    if not environment.get(name):
        raise ValueError(f"environment variable {name} is not set (or empty)")
    return environment[name]


def _read_secret(path: Path) -> str:
    try:
        path = path.expanduser()
        if not path.is_file():  # a pipe would hang
            raise ValueError(f"secret file {path}: no such file")
        with path.open("rb") as file:
            content = file.read(MAX_SECRET_BYTES + 1)
        text = content.decode().strip()
    except UnicodeDecodeError:
        raise ValueError(f"secret file {path}: not UTF-8 text") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: ~nobody
        raise ValueError(f"secret file {path}: {error}") from None
    if not text or len(content) > MAX_SECRET_BYTES:
        raise ValueError(f"secret file {path}: must have 1 byte to 64 KiB")
    return text
