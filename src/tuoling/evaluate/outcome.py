"""The result of a suite: values of every item for every side, summed up by class, written as scores.json."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuoling import environment, files
from tuoling.evaluate.answers import Answer
from tuoling.evaluate.items import Item
from tuoling.evaluate.labels import Note
from tuoling.evaluate.metrics import rates
from tuoling.evaluate.statistics import mean_interval, paired

SCORES = "scores.json"
ITEMS = "items.jsonl"
FORMAT_VERSION = 1


@dataclass(slots=True)
class Side:
    """One model's part: what it is, its answers, and its values by metric (None where a metric does not apply).

    values: metric → one value an item, in the items' order.
    """

    name: str
    model: str
    facts: dict[str, Any] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    values: dict[str, list[float | None]] = field(default_factory=dict)


@dataclass(slots=True)
class Outcome:
    """Everything a suite found. headline: the metric that classes are compared by. notes: what a reader must know."""

    suite: str
    file: str
    items: list[Item]
    sides: list[Side]
    headline: str
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    complete: bool = True

    def to_json(self) -> dict[str, Any]:
        """scores.json."""
        groups = list(dict.fromkeys(item.group for item in self.items))
        metrics = list(dict.fromkeys(name for side in self.sides for name in side.values))
        everything = range(len(self.items))
        return {
            "format_version": FORMAT_VERSION,
            "suite": self.suite,
            "file": self.file,
            "headline": self.headline,
            "complete": self.complete,
            "items": len(self.items),
            "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": environment.versions(),
            "sides": {
                side.name: {"model": side.model, **side.facts, "rates": _rates(side, everything)}
                for side in self.sides
            },
            "overall": {metric: self._compared(metric, everything) for metric in metrics},
            "classes": {
                group: {
                    "items": len(places),
                    "metrics": {metric: self._compared(metric, places) for metric in metrics},
                    "rates": {side.name: _rates(side, places) for side in self.sides},
                }
                for group, places in ((group, self._places(group)) for group in groups)
            },
            "notes": [note._asdict() for note in self.notes],
            **self.facts,
        }

    def _places(self, group: str) -> list[int]:
        return [place for place, item in enumerate(self.items) if item.group == group]

    def _compared(self, metric: str, places: Sequence[int]) -> dict[str, Any]:
        """Mean and interval a side; with two sides the difference over the items both have, and its verdict."""
        found: dict[str, Any] = {}
        for side in self.sides:
            values = side.values.get(metric)
            own = (
                [] if values is None else [value for place in places if (value := values[place]) is not None]
            )
            if own:
                found[side.name] = mean_interval(own).to_json()
        if len(self.sides) == 2 and len(found) == 2:
            first, second = (side.values[metric] for side in self.sides)
            both = [
                (old, new)
                for place in places
                if (old := first[place]) is not None and (new := second[place]) is not None
            ]
            if both:
                interval, said = paired([old for old, _ in both], [new for _, new in both])
                found["difference"] = {**interval.to_json(), "verdict": said}
        return found

    def write(self, folder: Path) -> Path:
        """scores.json and items.jsonl, whole; returns the first."""
        with files.atomic_write(folder / ITEMS) as file:
            for place in range(len(self.items)):
                files.append_jsonl(file, self._row(place))
        files.write_json(folder / SCORES, self.to_json())
        return folder / SCORES

    def _row(self, place: int) -> dict[str, Any]:
        item = self.items[place]
        row: dict[str, Any] = {
            "place": item.place,
            "class": item.group,
            "question": item.question,
            "target": item.target,
        }
        for side in self.sides:
            row[side.name] = {
                **({"answer": side.answers[place].text} if side.answers else {}),
                **({"finish_reason": side.answers[place].finish_reason} if side.answers else {}),
                **{
                    metric: values[place]
                    for metric, values in side.values.items()
                    if values[place] is not None
                },
            }
        return row


def _rates(side: Side, places: Sequence[int]) -> dict[str, float]:
    if not side.answers:
        return {}
    return rates(
        [side.answers[place].text for place in places],
        [side.answers[place].finish_reason for place in places],
    )


def read_scores(folder: Path) -> dict[str, Any]:
    """A folder's scores.json. Raises DataError."""
    found: dict[str, Any] = files.read_json(folder / SCORES)
    return found


def item_rows(folder: Path) -> list[dict[str, Any]]:
    """A folder's items, for showing examples."""
    path = folder / ITEMS
    return [row for _, row in files.read_jsonl(path)] if path.is_file() else []


def all_scores(run: Path) -> list[tuple[Path, Mapping[str, Any]]]:
    """(folder, scores) of every suite a run was evaluated with, by name."""
    return [(path.parent, files.read_json(path)) for path in sorted((run / "evaluation").glob(f"*/{SCORES}"))]
