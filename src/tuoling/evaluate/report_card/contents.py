"""What a report card shows, read from a run folder: nothing is trained or asked anew."""

from __future__ import annotations

import random
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuoling import files, plots
from tuoling.errors import DataError, TuolingError
from tuoling.evaluate.leaks import training_rows
from tuoling.evaluate.outcome import all_scores, item_rows
from tuoling.language import tr
from tuoling.models import licence
from tuoling.models.licence_answer import Answer, answer

MOST_CHECKED = 200_000
"""Training rows looked at for lengths and duplicates; near ones cost about 150 bytes and 60 µs a row."""
EXAMPLES = 4
_OWN_WORD = ("output_dir", "overwrite_output_dir", "model_name_or_path", "data")


@dataclass(frozen=True, slots=True)
class Example:
    """One question with what each side said, and why it is shown. values: side → its headline score."""

    why: str
    row: Mapping[str, Any]
    values: Mapping[str, float | None]


@dataclass(slots=True)
class Suite:
    """A suite's scores, and examples: those that gained most, those that lost most, some by chance."""

    name: str
    scores: Mapping[str, Any]
    examples: list[Example]


@dataclass(slots=True)
class Report:
    """Everything the page needs. data: `data check`'s counts, None where the rows are not here; missing: their files."""

    run: Path
    record: Mapping[str, Any]
    results: Mapping[str, Any]
    history: plots.History
    throughput: list[tuple[int, float]]
    suites: list[Suite]
    licences: Answer
    data: Mapping[str, Any] | None = None
    missing: list[str] = field(default_factory=list)
    command: str = ""
    price_per_hour: float | None = None

    @property
    def name(self) -> str:
        """The folder's name, with the one above: many are called `run` or `out`."""
        place = self.run.resolve()
        return f"{place.parent.name}/{place.name}" if place.parent.name else place.name

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's settled configuration."""
        found: Mapping[str, Any] = self.record.get("config") or {}
        return found

    @property
    def plan(self) -> Mapping[str, Any]:
        """What was foreseen."""
        found: Mapping[str, Any] = self.record.get("plan") or {}
        return found


def read_report(run: Path, *, price_per_hour: float | None = None, check_data: bool = True) -> Report:
    """Read a run folder and the scores below it. Raises DataError for what is no run."""
    if not (run / "run.json").is_file():
        raise DataError(
            tr("no run: there is no run.json", "不是训练目录：没有 run.json"),
            where=str(run),
            remedy=tr("give the folder that `tuoling train` wrote", "请给出 tuoling train 写出的目录"),
        )
    record = files.read_json(run / "run.json")
    results = files.read_json(run / "all_results.json") if (run / "all_results.json").is_file() else {}
    rows = plots.read_history(run)
    report = Report(
        run,
        record,
        results,
        plots.history(rows),
        _throughput(rows),
        sorted((_suite(folder, scores) for folder, scores in all_scores(run)), key=_order),
        answer(licence.of_folder(run)),
        command=command_of(record),
        price_per_hour=price_per_hour,
    )
    if check_data:
        report.data, report.missing = _data_facts(record)
    return report


def _throughput(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    return [
        (row["step"], float(row["tokens_per_s"]))
        for row in rows
        if isinstance(row.get("step"), int) and isinstance(row.get("tokens_per_s"), int | float)
    ]


def _order(suite: Suite) -> tuple[bool, str]:
    """What was asked for first, forgetting behind it."""
    return suite.scores["suite"] == "general", suite.name


def _suite(folder: Path, scores: Mapping[str, Any]) -> Suite:
    return Suite(folder.name, scores, choose_examples(item_rows(folder), scores))


def choose_examples(rows: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]) -> list[Example]:
    """Those that gained most over the base, those that lost most, and some by chance (always the same ones).

    With one side: the best, the worst and some by chance. Rows without an answer in words are not shown.
    """
    metric, sides = str(scores["headline"]), list(scores["sides"])
    shown = [row for row in rows if any("answer" in row.get(side, {}) for side in sides)]

    def values(row: Mapping[str, Any]) -> dict[str, float | None]:
        return {side: row.get(side, {}).get(metric) for side in sides}

    def gain(row: Mapping[str, Any]) -> float:
        found = values(row)
        first, last = (found[sides[0]] if len(sides) > 1 else 0.0), found[sides[-1]]
        return 0.0 if first is None or last is None else last - first

    pairs = len(sides) > 1
    best = _spread([row for row in shown if gain(row) > 0], lambda row: -gain(row))
    taken = {id(row) for row in best}
    worst = _spread([row for row in shown if (gain(row) < 0 or not pairs) and id(row) not in taken], gain)
    taken = {id(row) for row in (*best, *worst)}
    rest = [row for row in shown if id(row) not in taken]
    chance = random.Random(42).sample(rest, min(EXAMPLES, len(rest)))
    groups = (("best", best), ("worst", worst), ("random", chance))
    return [Example(why, row, values(row)) for why, group in groups for row in group]


def _spread(
    rows: Sequence[Mapping[str, Any]], key: Callable[[Mapping[str, Any]], float]
) -> list[Mapping[str, Any]]:
    """The first EXAMPLES by key; of equal ones those whose class was shown least."""
    waiting, shown = list(rows), Counter[str]()
    chosen: list[Mapping[str, Any]] = []
    while waiting and len(chosen) < EXAMPLES:
        next_one = min(waiting, key=lambda row: (key(row), shown[row["class"]]))
        waiting.remove(next_one)
        shown[next_one["class"]] += 1
        chosen.append(next_one)
    return chosen


def _data_facts(record: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, list[str]]:
    """`data check` over the rows the run was trained on, where they are still here."""
    from tuoling.data.check import check

    sources, missing = training_rows(record)
    trained = int((record.get("data") or {}).get("rows") or 0)
    if not sources or trained > MOST_CHECKED:
        return None, missing
    try:
        return check(sources, allow_bad=1.0).to_json(), missing
    except TuolingError as error:
        return None, [*missing, error.where or error.problem]


def command_of(record: Mapping[str, Any]) -> str:
    """The command that trains the same again: every key that is not its default."""
    from tuoling.config_keys import RunConfig

    config = record.get("config") or {}
    standard = {
        name: field.get_default(call_default_factory=True) for name, field in RunConfig.model_fields.items()
    }
    words = ["tuoling", "train", "--model", str(config.get("model_name_or_path"))]
    for path in config.get("data") or []:
        words += ["--data", str(path)]
    words += ["--out", f"{config.get('output_dir')}-again"]
    for name, value in config.items():
        default = standard.get(name)
        same = value == default or (value in ([], None) and default in ([], None, ()))
        if name in _OWN_WORD or same:
            continue
        if isinstance(value, list):
            value = ",".join(map(str, value))
        words.append(f"{name}={str(value).lower() if isinstance(value, bool) else value}")
    return shlex.join(words)
