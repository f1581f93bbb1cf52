"""What Ray reads from the environment when it is imported; so it must be set before that."""

from __future__ import annotations

import os
import secrets


def prepare(address: str | None) -> None:
    """Set up the environment for a Ray of our own (address None), or for joining one, whose token the user gives.

    Ray's GCS and agents listen on all interfaces whatever one says; with token authentication, set explicitly and with
    a token of this run's own, nobody else gets in.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    if address is None:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray reads it once per process
