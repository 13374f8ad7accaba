"""Means with intervals, and whether a difference between two models is more than chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

Verdict = Literal["better", "worse", "cannot tell"]

RESAMPLES = 10_000
LEVEL = 0.95
FEWEST = 6
"""Pairs below which nothing is called better: with 5 even a sign test that all agree on has p = 0.06."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean of `count` values and the bootstrap interval around it (95 %)."""

    mean: float
    low: float
    high: float
    count: int

    def to_json(self) -> dict[str, Any]:
        """For scores.json."""
        return asdict(self)


def mean_interval(values: Sequence[float], *, seed: int = 42) -> Interval:
    """Percentile bootstrap of the mean over items. [N] -> interval"""
    data = np.asarray(values, np.float64)
    if not len(data):
        return Interval(math.nan, math.nan, math.nan, 0)
    means = _means(data, seed)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(data.mean()), float(low), float(high), len(data))


def paired(before: Sequence[float], after: Sequence[float], *, seed: int = 42) -> tuple[Interval, Verdict]:
    """Interval of the mean of after - before over the same items, and what it allows to say.

    "better" and "worse" need the whole interval on one side of 0, and FEWEST pairs.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} values before, {len(after)} after")
    interval = mean_interval([new - old for old, new in zip(before, after, strict=True)], seed=seed)
    return interval, verdict(interval)


def verdict(interval: Interval) -> Verdict:
    """What an interval of a difference allows to say."""
    if interval.count < FEWEST:
        return "cannot tell"
    return "better" if interval.low > 0 else "worse" if interval.high < 0 else "cannot tell"


def _means(data: np.ndarray, seed: int) -> np.ndarray:
    """Means of RESAMPLES draws with replacement. [N] -> [RESAMPLES]; at most 8 MB at once."""
    random = np.random.default_rng(seed)
    block = max(1, min(RESAMPLES, 1_000_000 // len(data)))
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, block):
        size = min(block, RESAMPLES - start)
        means[start : start + size] = data[random.integers(0, len(data), (size, len(data)))].mean(axis=1)
    return means
