"""What nano is held to in an episode: what the oracle would say, and when it may begin. Needs no torch."""

from __future__ import annotations

from typing import Final

from model_shards.nano.oracle import NUM_SILENT
from model_shards.nano.phrases import AWAITED, keep_promise
from model_shards.nano.score import Due, Kind, Truth
from model_shards.nano.world import Episode, Expected, expected

PATIENCE: Final = 3
"""Windows by which an utterance may begin later than the oracle's: the listener paces the one before it."""


def truth_of(episode: Episode, first_windows: int | None = None) -> Truth:
    """Of the whole episode, or of so many of its windows."""
    num_windows = episode.num_windows if first_windows is None else first_windows
    windows = episode.windows()[:num_windows]
    requests = [(window.index, request) for window in windows for request in window.requests]
    return Truth(
        dues=tuple(_due(one, num_windows) for one in expected(episode) if one.window < num_windows),
        stops=tuple(window for window, request in requests if request == "stop"),
        num_windows=num_windows,
        first_window=NUM_SILENT,
        requests=tuple(window for window, _ in requests),
    )


def _due(one: Expected, num_windows: int) -> Due:
    last_window = num_windows if one.ideal_window is None else one.ideal_window + PATIENCE
    plain = (one.text.removeprefix(keep_promise("")),) if one.kind == "promise" else ()
    return Due(_kind(one), one.cause, one.cause_ns, tuple(sorted(one.accept)), one.window, last_window, plain)


def _kind(one: Expected) -> Kind:
    if one.kind == "answer":
        return "okay" if one.cause in AWAITED else "question"
    return _KINDS[one.kind]


_KINDS: Final[dict[str, Kind]] = {"remark": "scene", "promise": "standing", "sound": "sound"}
