"""Runs side by side: the score of each class against the number of rows trained on, as BELLE's data-size study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuoling import files, plots
from tuoling.errors import DataError, UsageError
from tuoling.evaluate.labels import METRICS, VERDICTS, class_names, figure
from tuoling.evaluate.outcome import all_scores, item_rows
from tuoling.evaluate.statistics import paired
from tuoling.language import tr

if TYPE_CHECKING:
    from rich.table import Table

PICTURE = "score_by_rows.png"
COMPARISON = "comparison.json"


@dataclass(frozen=True, slots=True)
class Entry:
    """One run, or the base (0 rows), with its scores. side: which side of them is meant."""

    name: str
    rows: int
    folder: Path
    scores: Mapping[str, Any]
    side: str

    def mean(self, group: str, metric: str) -> float | None:
        """Of a class, or of everything for group ""."""
        found = self.scores["classes"][group]["metrics"] if group else self.scores["overall"]
        value = found.get(metric, {}).get(self.side)
        return None if value is None else float(value["mean"])

    def questions(self) -> list[str]:
        """In the file's order."""
        return [str(row["question"]) for row in item_rows(self.folder)]

    def values(self, metric: str) -> dict[int, tuple[str, float]]:
        """Number of the question → (class, score). The last question of a dialogue may stand there many times."""
        return {
            number: (str(row["class"]), float(row[self.side][metric]))
            for number, row in enumerate(item_rows(self.folder))
            if row.get(self.side, {}).get(metric) is not None
        }


@dataclass(slots=True)
class Comparison:
    """entries: fewest rows first. gains: class → difference of the last run to the first, with its verdict."""

    metric: str
    suite: str
    file: str
    entries: list[Entry]
    gains: dict[str, Any]
    picture: Path | None = None

    @property
    def classes(self) -> list[str]:
        """In the file's order."""
        return list(self.entries[0].scores["classes"])

    def to_json(self) -> dict[str, Any]:
        """comparison.json."""
        return {
            "metric": self.metric,
            "suite": self.suite,
            "file": self.file,
            "runs": [
                {
                    "name": entry.name,
                    "rows": entry.rows,
                    "overall": entry.mean("", self.metric),
                    "classes": {group: entry.mean(group, self.metric) for group in self.classes},
                }
                for entry in self.entries
            ],
            "gains": self.gains,
            "picture": str(self.picture) if self.picture else None,
        }

    def table(self) -> Table:
        """Classes down, runs across, then what more rows brought."""
        from rich.table import Table

        zh, en = METRICS.get(self.metric, (self.metric, self.metric))
        table = Table(box=None, pad_edge=False, title=tr(en, zh), title_justify="left")
        table.add_column(tr("class", "类别"))
        for entry in self.entries:
            table.add_column(f"{entry.name}\n{entry.rows:,}", justify="right")
        table.add_column(tr("last − first (95 %)", "末 − 首（95%）"), justify="right")
        table.add_column("")
        for group in [*self.classes, *([""] if len(self.classes) > 1 else [])]:
            names = class_names(group, self.suite) if group else ("全部", "all")
            means = [entry.mean(group, self.metric) for entry in self.entries]
            cells = ["–" if mean is None else figure(self.metric, mean) for mean in means]
            table.add_row(tr(names[1], names[0]), *cells, *self._gain(group), style="" if group else "bold")
        return table

    def _gain(self, group: str) -> tuple[str, str]:
        found = self.gains.get(group)
        if found is None:
            return "–", ""
        mean, low, high = (figure(self.metric, found[key]) for key in ("mean", "low", "high"))
        zh, en = VERDICTS[found["verdict"]]
        return f"{'' if mean.startswith('-') else '+'}{mean} \\[{low}, {high}]", tr(en, zh)


def compare(runs: Sequence[Path], *, suite: str = "", out: Path | None = None) -> Comparison:
    """Read what every run was evaluated with, and draw score against rows.

    suite: the results to compare (`mine-test`, or their beginning), where runs have several in common; the base
    counts as 0 rows. Raises UsageError for fewer than two runs, DataError where they were not asked the same.
    """
    if len(runs) < 2:
        raise UsageError(
            tr("two runs at least are compared", "至少要两次训练才能比较"),
            remedy="tuoling evaluate --compare RUN1 RUN2 …",
        )
    folder = _common(runs, suite)
    entries = sorted((_entry(run, folder) for run in runs), key=lambda entry: entry.rows)
    _require_same(entries)
    base = _base(entries)
    scores = entries[0].scores
    metric = str(scores["headline"])
    found = Comparison(
        metric, str(scores["suite"]), str(scores.get("file")), [*base, *entries], _gains(entries, metric)
    )
    out = out or Path("evaluation") / "comparison"
    found.picture = _draw(found, out / PICTURE)
    files.write_json(out / COMPARISON, found.to_json())
    return found


def _common(runs: Sequence[Path], suite: str) -> str:
    """The name of the results all runs have."""
    names: list[str] | None = None
    for run in runs:
        here = [folder.name for folder, scores in all_scores(run) if scores["suite"] != "general"]
        if not here:
            raise DataError(
                tr("not evaluated yet", "还没有评测"),
                where=str(run),
                remedy=f"tuoling evaluate {run} rows.json",
            )
        names = here if names is None else [name for name in names if name in here]
    wanted = [name for name in names or () if name == suite] or [
        name for name in names or () if name.startswith(suite)
    ]
    if len(wanted) == 1:
        return wanted[0]
    if not wanted:
        raise DataError(
            tr("these runs were not evaluated with the same file", "这些训练没有用同一个文件评测过"),
            where=", ".join(map(str, runs)),
            remedy="tuoling evaluate RUN rows.json",
        )
    raise UsageError(
        tr(f"several results can be compared: {', '.join(wanted)}", f"有多个结果可比：{'、'.join(wanted)}"),
        remedy=f"--suite {wanted[0]}",
    )


def _entry(run: Path, folder: str) -> Entry:
    place = run / "evaluation" / folder
    scores = files.read_json(place / "scores.json")
    record = files.read_json(run / "run.json") if (run / "run.json").is_file() else {}
    rows = (record.get("results") or {}).get("rows") or (record.get("plan") or {}).get("rows")
    if not isinstance(rows, int):
        raise DataError(
            tr("run.json does not say how many rows it was trained on", "run.json 没有记录训练条数"),
            where=str(run),
        )
    return Entry(run.name, rows, place, scores, list(scores["sides"])[-1])


def _require_same(entries: Sequence[Entry]) -> None:
    """Raise DataError where two runs were not scored on the same questions in the same way."""
    first = entries[0]
    for other in entries[1:]:
        for what, zh in (("headline", "指标"), ("items", "题数")):
            if first.scores[what] != other.scores[what]:
                raise DataError(
                    tr(
                        f"not comparable: {what} {first.scores[what]} and {other.scores[what]}",
                        f"不可比：{zh}为 {first.scores[what]} 与 {other.scores[what]}",
                    ),
                    where=f"{first.folder}, {other.folder}",
                    remedy=tr("evaluate both in the same way", "请用同样的方式评测"),
                )
        if first.questions() != other.questions():
            raise DataError(
                tr("not comparable: other questions", "不可比：题目不同"),
                where=f"{first.folder}, {other.folder}",
                remedy=tr("evaluate both on the same file", "请用同一个文件评测"),
            )


def _base(entries: Sequence[Entry]) -> list[Entry]:
    """The base as a run on 0 rows, where all runs stand beside the same one."""
    first = entries[0]
    models = {str(entry.scores["sides"].get("base", {}).get("model")) for entry in entries}
    if "base" not in first.scores["sides"] or len(models) != 1:
        return []
    return [Entry(tr("base", "基座"), 0, first.folder, first.scores, "base")]


def _gains(entries: Sequence[Entry], metric: str) -> dict[str, Any]:
    """The last run less the first on the questions both answered, by class and ("") overall."""
    first, last = entries[0].values(metric), entries[-1].values(metric)
    shared = [question for question in first if question in last]
    found = {}
    for group in ["", *dict.fromkeys(first[question][0] for question in shared)]:
        asked = [question for question in shared if group in ("", first[question][0])]
        if asked:
            interval, said = paired([first[one][1] for one in asked], [last[one][1] for one in asked])
            found[group] = {**interval.to_json(), "verdict": said}
    return found


def _draw(found: Comparison, path: Path) -> Path:
    share = found.metric != "log_likelihood"
    curves = {}
    for group in [*found.classes, ""]:
        if group == "" and len(found.classes) == 1:
            continue
        names = class_names(group, found.suite) if group else ("全部", "all")
        points = [(entry.rows, entry.mean(group, found.metric)) for entry in found.entries]
        curves[names] = [(rows, 100 * mean if share else mean) for rows, mean in points if mean is not None]
    zh, en = METRICS.get(found.metric, (found.metric, found.metric))
    unit = ("（%）", ", %") if share else ("", "")
    return plots.score_plot(curves, path, label=(zh + unit[0], en + unit[1]), strong=("全部", "all"))
