"""What Ray says of a failure, in one line.

Ray's own texts have up to fifty lines, with its statistics and the command lines of whatever runs on the machine, which
may hold passwords: of what it says only the cause is passed on.
"""

from __future__ import annotations

import re
from typing import Final

from ray.exceptions import (
    ActorUnavailableError,
    ActorUnschedulableError,
    AuthenticationError,
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    RayTaskError,
    TaskUnschedulableError,
    WorkerCrashedError,
)

from graph.secret import hide, mask_urls
from graph.wording import clipped

MAX_REASON: Final = 300

_USED: Final = re.compile(r"was ([0-9.]+) ?GB(?: used)? / ([0-9.]+) ?GB")
_THRESHOLD: Final = re.compile(r"threshold of (?:\S+ \()?([0-9]*\.?[0-9]+)(%?)")
_COLOURS: Final = re.compile(r"\x1b\[[0-9;]*m")
_EXIT_CODE: Final = re.compile(r"exits with an exit code (-?\d+)")
_EXIT_DETAIL: Final = re.compile(r"Worker exit detail: (.*?)(?: Some common causes|$)")

_BY_KIND: Final[tuple[tuple[type[Exception], str], ...]] = (
    (GetTimeoutError, "it has not answered in time"),
    (LocalRayletDiedError, "Ray's own process on this machine (the raylet) has died"),
    (WorkerCrashedError, "its process has died"),
    (NodeDiedError, "its machine has left the cluster, or does not answer"),
    (ObjectStoreFullError, "Ray's object store is full"),
    (OutOfDiskError, "the disk with Ray's folder is full; free some of it, or set TMPDIR to another"),
    (ObjectLostError, "its answer was lost with the process or machine that held it"),
    (ActorUnavailableError, "it can't be reached for now"),
    (ActorUnschedulableError, "no machine of the cluster has what it needs"),
    (TaskUnschedulableError, "no machine of the cluster has what it needs"),
    (AuthenticationError, "the cluster takes another token; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to its own"),
)


def ray_reason(error: BaseException) -> str:
    """Why a call failed, an actor died or Ray did not start: one line without secrets, of at most `MAX_REASON`."""
    text = _COLOURS.sub("", str(error))
    for explain in (_out_of_memory, _lost_gcs, _timed_out_at_start, _worker_exit):
        if reason := explain(text):
            return reason
    if isinstance(error, RayTaskError) and error.cause is not None:
        return ray_reason(error.cause)
    for kind, reason in _BY_KIND:
        if isinstance(error, kind):
            return reason
    return _cause_of(error, text)


def _out_of_memory(text: str) -> str:
    if "low on memory" not in text and "memory usage threshold" not in text:
        return ""
    reason = "it was stopped because the machine was low on memory"
    if used := _USED.search(text):
        reason += f": {float(used[1]):.3g} of {float(used[2]):.3g} GB were taken"
    if threshold := _THRESHOLD.search(text):
        share = float(threshold[1]) / (100 if threshold[2] else 1)
        reason += f", and Ray's limit is {share:.0%} (RAY_memory_usage_threshold)"
    return f"{reason}; close other programs, or take fewer cameras or a smaller checkpoint"


def _lost_gcs(text: str) -> str:
    if not re.search(r"\bGCS\b", text) or not re.search(r"connect|unavailable|died|lost|timed out|RPC", text, re.I):
        return ""
    return "Ray's control process (GCS) does not answer"


def _timed_out_at_start(text: str) -> str:
    if "timed out during startup" not in text:
        return ""
    return "it was not up within its 30 s; the machine may be too busy, try again"


def _worker_exit(text: str) -> str:
    match = _EXIT_DETAIL.search(text)
    if match is None:
        return ""
    detail = match[1]
    if "connection error code" in detail or "by a signal" in detail:  # its socket has closed, and that is all there is
        return "its process has ended without a word: killed from outside, out of memory, or crashed"
    if code := _EXIT_CODE.search(detail):
        return f"its process has ended itself, with exit code {code[1]}"
    return _one_line(detail)


def _cause_of(error: BaseException, text: str) -> str:
    """Of a traceback its last line; of what Ray lists of an actor the last sentence; else the first line."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    if not lines:
        return type(error).__name__
    cause_is_last = any(mark in text for mark in ("actor_id:", "class_name:", "creation task", "Traceback"))
    return _one_line(lines[-1 if cause_is_last else 0])


def _one_line(text: str) -> str:
    printable = "".join(character if character.isprintable() else " " for character in text)
    return clipped(hide(mask_urls(" ".join(printable.split()).rstrip("."))), MAX_REASON)
