"""Counts for Prometheus, in its text format (version 0.0.4)."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict

Labels = tuple[tuple[str, str], ...]

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper bounds of the buckets of times."""

_HELP = {
    "tuoling_requests_total": ("counter", "Requests by endpoint and HTTP status."),
    "tuoling_cancelled_total": ("counter", "Requests whose caller left before the answer was whole."),
    "tuoling_prompt_tokens_total": ("counter", "Tokens of prompts that were answered."),
    "tuoling_completion_tokens_total": ("counter", "Tokens that were generated in whole answers."),
    "tuoling_request_seconds": ("histogram", "From a request's arrival to its last byte."),
    "tuoling_first_token_seconds": ("histogram", "From a request's arrival to its first text."),
    "tuoling_running": ("gauge", "Answers that grow now."),
    "tuoling_waiting": ("gauge", "Prompts that wait for a place."),
    "tuoling_resident_bytes": ("gauge", "Resident memory of the server."),
}


class Metrics:
    """Counters and times; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, Labels], float] = defaultdict(float)
        self._times: dict[tuple[str, Labels], list[int]] = {}
        self._sums: dict[tuple[str, Labels], float] = defaultdict(float)

    def count(self, name: str, by: float = 1, **labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[name, tuple(sorted(labels.items()))] += by

    def time(self, name: str, seconds: float, **labels: str) -> None:
        """Put a time into its bucket."""
        key = name, tuple(sorted(labels.items()))
        with self._lock:
            buckets = self._times.setdefault(key, [0] * (len(SECONDS) + 1))
            buckets[bisect_left(SECONDS, seconds)] += 1
            self._sums[key] += seconds

    def text(self, gauges: dict[str, float]) -> str:
        """Everything, and what is measured at this moment."""
        with self._lock:
            series = dict(self._counts) | {(name, ()): value for name, value in gauges.items()}
            times = {key: list(buckets) for key, buckets in self._times.items()}
            sums = dict(self._sums)
        lines: list[str] = []
        for name, (kind, help_text) in _HELP.items():
            lines += [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{_labels(key[1])} {value:g}" for key, value in series.items() if key[0] == name]
            for key, buckets in times.items():
                if key[0] == name:
                    lines += _histogram(name, key[1], buckets, sums[key])
        return "\n".join(lines) + "\n"


def _histogram(name: str, labels: Labels, buckets: list[int], total: float) -> list[str]:
    lines, below = [], 0
    for bound, count in zip([*map(str, SECONDS), "+Inf"], buckets, strict=True):
        below += count
        lines.append(f"{name}_bucket{_labels((*labels, ('le', bound)))} {below}")
    return [*lines, f"{name}_sum{_labels(labels)} {total:g}", f"{name}_count{_labels(labels)} {below}"]


def _labels(labels: Labels) -> str:
    def quoted(value: str) -> str:
        return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    inside = ",".join(f'{name}="{quoted(value)}"' for name, value in labels)
    return "{" + inside + "}" if inside else ""
