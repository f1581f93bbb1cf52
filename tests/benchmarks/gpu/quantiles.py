"""What is told of many times. No torch, so that who only waits for others starts at once."""

from __future__ import annotations

import numpy as np


def percentiles(values: list[float], *, digits: int = 3) -> dict[str, float]:
    """p50, p95 and p99."""
    return {f"p{q}": round(float(np.percentile(values, q)), digits) for q in (50, 95, 99)}
