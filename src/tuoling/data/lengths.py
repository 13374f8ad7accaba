"""How long rows are: histogram, percentiles, and the share that a limit keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

LIMITS = (512, 1024, 2048)
_EDGES = (0, 64, 128, 256, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384, 32768)


def length_report(lengths: Sequence[int], unit: str) -> dict[str, Any]:
    """What is said of lengths, which are counted in `unit` (tokens or characters). Bins are half-open."""
    values = np.asarray(lengths, np.int64)
    if not len(values):
        return {"unit": unit, "rows": 0, "histogram": []}
    counts, _ = np.histogram(values, bins=[*_EDGES, max(int(values.max()), _EDGES[-1]) + 1])
    last = int(np.flatnonzero(counts)[-1])
    bins = [
        {"from": low, "to": high, "rows": int(count)}
        for low, high, count in zip(_EDGES, [*_EDGES[1:], None], counts, strict=True)
    ]
    return {
        "unit": unit,
        "rows": len(values),
        "min": int(values.min()),
        "mean": round(float(values.mean()), 1),
        "median": int(np.percentile(values, 50, method="inverted_cdf")),
        "p95": int(np.percentile(values, 95, method="inverted_cdf")),
        "p99": int(np.percentile(values, 99, method="inverted_cdf")),
        "max": int(values.max()),
        "histogram": bins[: last + 1],
    }


def kept_shares(lengths: Sequence[int]) -> dict[str, float]:
    """Share of rows that are not over-long at each usual limit, in tokens."""
    values = np.asarray(lengths, np.int64)
    return {str(limit): round(float((values <= limit).mean()), 4) if len(values) else 1.0 for limit in LIMITS}
