"""Text which may hold credentials, and how it is shown: without them.

Rules:
- Every print of a `Secret` shows `masked`; only `reveal()` gives the text itself.
- What may be a password is masked: a mangled print is better than a leak.
- What is a login is decided here and not by a URL parser: those cut at the first "/", "?" or "#", and passwords hold
  all of them. From "://" to the last "@" all is login; where the "@" is missing, too, if no port follows the ":".
- The text of a foreign library's error about a source is not passed on: it repeats what was masked.
- The last line of defence is `KNOWN`: what this process has read of secrets, which `hide` takes out of any text. What
  is printed, logged or answered goes through it.

References (`${env:NAME}`) are resolved in graph/reference.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from threading import Lock
from typing import Final
from urllib.parse import quote, unquote

MASK: Final = "***"
REFERENCE: Final = re.compile(r"\$\{([^}]*)\}?")
MAX_SOURCES_IN_TEXT: Final = 1000
# They are made here and talk to nobody: their query is no login.
_MADE_HERE: Final = ("test://", "synthetic://")

# An address right behind "://", which is complete there, is no login: what follows it is path. Host names don't count,
# as in rtsp://admin:554/x@10.0.0.7 "admin:554/x" may be user and password.
_BEFORE_LOGIN: Final = re.compile(
    r"://(?!(?:\[[0-9A-Fa-f:.]+\]|[0-9]{1,3}(?:\.[0-9]{1,3}){3})(?::[0-9]{1,5})?(?:[/?#\s]|$))"
)
# What stands behind the ":" is no port, and no "@" follows: the rest of a login was cut off, by a "#" or a quote.
_CUT_OFF_LOGIN: Final = re.compile(r"://[^\s/?#@'\"\[$]*:(?!\$\{|[0-9]{1,5}(?![\w.~!%&+-]))(?=[^\s'\",;:)])")
# admin:Hunter2@10.0.0.7, rtsp:/admin:Hunter2@10.0.0.7: an address that lacks its "://".
_BARE_LOGIN: Final = re.compile(r"(?:^|(?<=[\s'\"=(]))(?![A-Za-z][A-Za-z0-9+.-]{0,15}://)[^\s:'\"=]{1,80}:\S*@")
_SOURCE_IN_TEXT: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,15}://\S+|" + _BARE_LOGIN.pattern + r"\S*")
_A_PATH: Final = re.compile(r"/(?!/)|\.{1,2}/|~")
# A user's name in clear, the password (or all) by reference: `admin:${env:PASSWORD}`.
_BY_REFERENCE: Final = re.compile(r"((\$\{[^}]*\}|[^:$]*):)?(\$\{[^}]*\})+")
# Cheap cameras take it in the path, too: rtsp://10.0.0.7/user=admin_password=…_channel=1_stream=0
_SECRET_PARAMETER: Final = re.compile(
    r"(?i)((?P<query>(?<=[?&;#]))?(?:(?:pass|psw|psk|pwd|token|secret|key|auth|jwt|bearer)[\w-]{0,40}"
    r"|(?<![A-Za-z])(?:pw|pin|sig|signature|sid|session_?id|credentials?))=)(?!\$\{)"
    r"\S+?(?=_(?:channel|stream)=|(?(query)&[\w-]{1,40}=|$)|[\s'\"]|$)"
)
_HARMLESS_VALUE: Final = re.compile(r"[0-9]{0,4}|(\$\{[^}]*\})+")  # channel=1, or a reference


def split_login(source: str) -> tuple[str, str, str]:
    """A source's parts: what stands before its login, the login without its "@", and the rest from the "@" on.

    Without a login all is rest. References count as text, whatever stands in them.
    """
    flat = REFERENCE.sub(lambda match: "$" * len(match[0]), source)  # they may hold "@" and "/" themselves
    end = flat.rfind("@")
    if (scheme := flat.find("://")) >= 0:
        start = scheme + 3
        if end > start and _BEFORE_LOGIN.match(flat, scheme):
            return source[:start], source[start:end], source[end:]
        if end < 0 and _CUT_OFF_LOGIN.match(source, scheme):
            return source[:start], source[start:], ""
        return "", "", source
    if ":" in flat[: max(end, 0)] and not _A_PATH.match(source):
        return "", source[:end], source[end:]
    return "", "", source


def mask_source(source: str) -> str:
    """A source as it may be shown: without its login, and without a query that may hold one; `${…}` stays."""
    before, login, rest = split_login(source)
    if login and not _BY_REFERENCE.fullmatch(login):
        login = MASK
    masked = before + login + _SECRET_PARAMETER.sub(rf"\1{MASK}", rest)
    url, mark, query = _split_query(masked)
    if not query or source.startswith(_MADE_HERE) or _is_harmless(query):
        return masked
    return f"{url}{mark}{MASK}"


def mask_urls(text: str) -> str:
    """Any text without the credentials of the sources in it; `${…}` references stay, as they reveal nothing.

    In each line all from the first "://" to the last "@" goes, unless a numeric address stands between: passwords with
    a raw "/", "@" or space are common.
    """
    return "\n".join(map(_mask_line, text.split("\n")))


def _mask_line(text: str) -> str:
    if scheme := _BEFORE_LOGIN.search(text):
        login, at, after = text[scheme.end() :].rpartition("@")
        if at and not _BY_REFERENCE.fullmatch(login):
            text = f"{text[: scheme.end()]}{MASK}@{after}"
    if cut_off := _CUT_OFF_LOGIN.search(text):
        end = re.compile(r"\s|$").search(text, cut_off.end())
        text = f"{text[: cut_off.start()]}://{MASK}{text[end.start() :] if end else ''}"
    text = _BARE_LOGIN.sub(f"{MASK}@", text)
    return _SECRET_PARAMETER.sub(rf"\1{MASK}", text)


def _split_query(source: str) -> tuple[str, str, str]:
    """A network source at its query or fragment."""
    if "://" not in source or (match := re.search(r"[?#]", source)) is None:
        return source, "", ""
    return source[: match.start()], match[0], source[match.end() :]


def _is_harmless(query: str) -> bool:
    return all(_HARMLESS_VALUE.fullmatch(value) for value in _values(query))


def _values(query: str) -> list[str]:
    """The values of a query; what has no key counts as one."""
    return [part.partition("=")[2] if "=" in part else part for part in re.split(r"[?&;#]", query)]


# ---- What this process knows ----------------------------------------------------------------------------------------


class KnownSecrets:
    """Secrets of this process, which `hide` takes out of any text, in each way in which they may be written.

    What is shorter than `MIN_LENGTH` is not kept: it would mask parts of every word. The oldest go beyond `MAX_KNOWN`.
    """

    MIN_LENGTH: Final = 4
    MAX_KNOWN: Final = 8192

    def __init__(self) -> None:
        self.variables: set[str] = set()  # of the environment, which hold some of them
        self._lock = Lock()
        self._known: dict[str, None] = {}
        self._pattern: re.Pattern[str] | None = None

    def add(self, *secrets: str) -> None:
        """Keep secrets out of what is said from now on."""
        new = {form for secret in secrets for form in _forms(secret) if len(form) >= self.MIN_LENGTH}
        new = {form for form in new if "${" not in form}  # a reference reveals nothing
        with self._lock:
            if new <= self._known.keys():
                return
            self._known |= dict.fromkeys(new)
            for oldest in list(self._known)[: -self.MAX_KNOWN]:
                del self._known[oldest]
            self._pattern = None

    def add_source(self, source: str) -> None:
        """Keep a source's login, and what its path and query hold of secrets, out of what is said from now on."""
        self.add(*_secrets_of(source))

    def add_text(self, text: str) -> None:
        """The same for the sources in a text which is not understood: a damaged file, or an argument."""
        for match in islice(_SOURCE_IN_TEXT.finditer(text), MAX_SOURCES_IN_TEXT):
            self.add_source(match[0])

    def hide(self, text: str) -> str:
        """The text without the secrets known so far."""
        pattern = self._known_pattern()
        return text if pattern is None else pattern.sub(MASK, text)

    def star(self, text: bytes) -> bytes:
        """The same, of the same length."""
        pattern, decoded = self._known_pattern(), text.decode(errors="surrogateescape")
        if pattern is None:
            return text
        starred = pattern.sub(lambda match: "*" * len(match[0].encode(errors="surrogateescape")), decoded)
        return starred.encode(errors="surrogateescape")

    def _known_pattern(self) -> re.Pattern[str] | None:
        with self._lock:
            if self._known and self._pattern is None:
                longest_first = sorted(self._known, key=len, reverse=True)
                self._pattern = re.compile("|".join(map(re.escape, longest_first)))
            return self._pattern


KNOWN: Final = KnownSecrets()
"""Of this process. One for all: a leak is prevented where text leaves, which is far from where a secret was read."""


def hide(text: str) -> str:
    """The text without the secrets which this process has read: for whatever leaves it."""
    return KNOWN.hide(text)


def _forms(secret: str) -> Iterator[str]:
    """How a secret may stand in a text: as it is, percent-encoded, decoded, in JSON and in Python's quotes."""
    for form in (secret, unquote(secret)):
        yield form
        yield quote(form, safe="")
        yield quote(form)
        yield json.dumps(form)[1:-1]
        yield json.dumps(form, ensure_ascii=False)[1:-1]
        yield repr(form)[1:-1]


def _secrets_of(source: str) -> Iterator[str]:
    _, login, rest = split_login(source)
    if login:
        colon = REFERENCE.sub(lambda match: "$" * len(match[0]), login).find(":")  # a reference may hold one itself
        yield from _with_pieces(login[colon + 1 :])
        yield from () if REFERENCE.search(login) else (login,)
    for match in _SECRET_PARAMETER.finditer(rest):
        yield from _with_pieces(match[0][len(match[1]) :])
    _, _, query = _split_query(rest) if "://" in rest else _split_query(f"://{rest}")
    if not source.startswith(_MADE_HERE):
        yield from (value for value in _values(query) if not _HARMLESS_VALUE.fullmatch(value))


def _with_pieces(secret: str) -> Iterable[str]:
    """The secret, and what a parser of URLs or YAML may make of it, which cuts where the next part seems to begin.

    The text of a reference is none: its name and path are what a user has to be told.
    """
    written = REFERENCE.sub(" ", secret)
    pieces = re.split(r"[/?#@:&,;\s'\"{}\[\]]+", written)
    return pieces if written != secret else (secret, *pieces)


class Secret:
    """Text which may hold credentials. Every print shows `masked`; only `reveal()` gives the text itself."""

    __slots__ = ("_text", "masked")

    def __init__(self, template: str, text: str | None = None) -> None:
        """template: as written, with its `${…}`; text: with the references resolved (None: there are none)."""
        self.masked = mask_source(template)
        self._text = template if text is None else text
        KNOWN.add_source(self._text)

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
