"""`${env:NAME}` and `${file:path}`: secrets that stand elsewhere, put where they are referred to.

Rule: the camera sees the secret itself. In the login or the query of a URL it is percent-encoded, since the URL is
decoded on its way; elsewhere it stands as it is.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import quote

from graph.secret import KNOWN, REFERENCE, Secret, split_login

MAX_SECRET_BYTES: Final = 64 << 10

# What a login may hold as it is (RFC 3986): the fewer are encoded, the longer a password may be.
_SAFE_IN_LOGIN: Final = "!$&'()*+,;="
# A space would end the request's line; the rest of a path is sent as it stands.
_SAFE_IN_PATH: Final = string.punctuation


def resolve(template: str, environment: Mapping[str, str]) -> Secret | str:
    """A Secret where the template has references, else the template. ValueError says which can't be resolved, and why.

    environment: where `${env:NAME}` is looked up.
    """
    if "${" not in template:
        return template
    before, login, rest = split_login(template)
    url, mark, query = _split(rest, r"[?#]") if "://" in template else (rest, "", "")
    is_whole = template == url
    text = _filled(before, environment, _SAFE_IN_PATH)
    text += _filled_login(login, environment)
    text += _filled(url, environment, None if is_whole else _SAFE_IN_PATH)
    text += mark + _filled(query, environment, "")
    return Secret(template, text)


def _split(text: str, at: str) -> tuple[str, str, str]:
    """The text at the first place outside of a reference where `at` matches."""
    flat = REFERENCE.sub(lambda match: "$" * len(match[0]), text)
    match = re.search(at, flat)
    return (text[: match.start()], text[match.start()], text[match.end() :]) if match else (text, "", "")


def _filled(template: str, environment: Mapping[str, str], safe: str | None) -> str:
    """The template with its references resolved. safe: what is not encoded in them; None: nothing is encoded."""

    def put(match: re.Match[str]) -> str:
        value = _resolved(match[0], environment)
        return value if safe is None else quote(value, safe=safe)

    return REFERENCE.sub(put, template)


def _filled_login(login: str, environment: Mapping[str, str]) -> str:
    if not REFERENCE.fullmatch(login):
        return _filled(login, environment, _SAFE_IN_LOGIN)
    # One reference for both: its first colon stands between user and password, as no user's name has one.
    user, colon, password = _resolved(login, environment).partition(":")
    KNOWN.add(password)
    return quote(user, safe=_SAFE_IN_LOGIN) + colon + quote(password, safe=_SAFE_IN_LOGIN)


def _resolved(reference: str, environment: Mapping[str, str]) -> str:
    kind, _, name = reference[2:].removesuffix("}").partition(":")
    if not reference.endswith("}") or kind not in ("env", "file") or not name:
        raise ValueError(f"'{reference}' is not read; write ${{env:NAME}} or ${{file:path}}")
    if kind == "file":
        value, where = _read_secret(Path(name)), f"secret file {name}"
    elif environment.get(name):
        value, where = environment[name], f"environment variable {name}"
        KNOWN.variables.add(name)
    else:
        raise ValueError(f"environment variable {name} is not set (or empty)")
    if "://" in value:
        KNOWN.add_source(value)
    else:
        KNOWN.add(value)
    _check_printable(value, where)
    return value


def _check_printable(value: str, where: str) -> None:
    """A control character is none of a password's; it came with an editor or `echo`. Only it is shown."""
    for position, character in enumerate(value, 1):
        if ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0 or 0xD800 <= ord(character) < 0xE000:
            named = {"\n": "a line's end", "\r": "a carriage return", "\t": "a tab", "\0": "a zero"}.get(character)
            named = f"{named} (U+{ord(character):04X})" if named else f"the control character U+{ord(character):04X}"
            raise ValueError(f"{where}: character {position} is {named}; write the secret without it")


def _read_secret(path: Path) -> str:
    """The content without the line's end which editors put there."""
    try:
        path = path.expanduser()
        if not path.is_file():  # a pipe would hang
            raise ValueError(f"secret file {path}: no such file")
        with path.open("rb") as file:
            content = file.read(MAX_SECRET_BYTES + 1)
        text = content.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise ValueError(f"secret file {path}: not UTF-8 text") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: ~nobody
        reason = error.strerror if isinstance(error, OSError) else "no such user"
        raise ValueError(f"secret file {path}: {reason}") from None
    if not text.strip() or len(content) > MAX_SECRET_BYTES:
        raise ValueError(f"secret file {path}: must have 1 byte to 64 KiB")
    return text
