"""Whom an HTTP request means.

Rule: a request is answered that names this machine by the address at which it came in. A name that is none of ours may
belong to a foreign page which lets it point here (DNS rebinding), so that its visitors' browsers read us for it.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final
from urllib.parse import urlsplit

_HOST: Final = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::[0-9]{0,5})?")


def is_own_host(host: str | None, local_address: str) -> bool:
    """Whether a Host header means us. None: there is none, as in HTTP/1.0, which no browser speaks.

    local_address: the numeric address at which the connection came in. The port does not count: a tunnel has another.
    """
    if host is None:
        return True
    match = _HOST.fullmatch(host.strip())
    if match is None:
        return False
    named, here = _address(match["v6"] or match["name"]), _address(local_address)
    if here is None:
        return False
    if named is None:
        return here.is_loopback and match["name"].lower().removesuffix(".") == "localhost"
    return named == here or (named.is_loopback and here.is_loopback)


def is_same_origin(origin: str, host: str | None) -> bool:
    """Whether the page which asks was served by the host that it asks."""
    try:
        page = urlsplit(origin).netloc.lower()
    except ValueError:  # no URL is none of ours
        return False
    return origin != "null" and host is not None and page == host.strip().lower()


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped or address
