"""Metrics that nobody scrapes: all calls are taken, nothing is counted."""

from __future__ import annotations

from typing import Any


class CollectorRegistry:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def collect(self) -> list[Any]:
        return []


class _Metric:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def labels(self, *_: Any, **__: Any) -> _Metric:
        return self

    def _nothing(self, *_: Any, **__: Any) -> None: ...

    inc = dec = set = observe = remove = remove_by_labels = clear = _nothing


Counter = Gauge = Histogram = _Metric
