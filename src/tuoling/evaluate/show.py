"""Scores as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tuoling.evaluate.labels import METRICS, SIDES, VERDICTS, class_names, figure
from tuoling.language import tr

if TYPE_CHECKING:
    from rich.table import Table

COLOURS = {"better": "green", "worse": "red", "cannot tell": "dim"}


def verdict_label(verdict: str) -> str:
    """better, worse or cannot tell in the user's language."""
    zh, en = VERDICTS[verdict]
    return tr(en, zh)


def side_label(name: str) -> str:
    """base, tuned or model in the user's language; another name as it is."""
    zh, en = SIDES.get(name, (name, name))
    return tr(en, zh)


def metric_label(name: str) -> str:
    """A metric's full name; the method stands in it, so that nobody takes it for a judge."""
    zh, en = METRICS.get(name, (name, name))
    return tr(en, zh)


def score_table(scores: Mapping[str, Any], metric: str | None = None) -> Table:
    """Class by class: items, each side with its interval, the difference and what it allows to say."""
    from rich.table import Table

    metric = metric or str(scores["headline"])
    sides = list(scores["sides"])
    table = Table(box=None, pad_edge=False, title=metric_label(metric), title_justify="left")
    table.add_column(tr("class", "类别"))
    table.add_column(tr("rows", "题数"), justify="right")
    for name in sides:
        table.add_column(side_label(name), justify="right")
    if len(sides) == 2:
        table.add_column(tr("difference (95 %)", "差值（95%）"), justify="right")
        table.add_column("")
    for name, entry in scores["classes"].items():
        zh, en = class_names(name, str(scores["suite"]))
        table.add_row(
            tr(en, zh), str(entry["items"]), *_cells(entry["metrics"].get(metric, {}), metric, sides)
        )
    if len(scores["classes"]) > 1:
        cells = _cells(scores["overall"].get(metric, {}), metric, sides)
        table.add_row(tr("all", "全部"), str(scores["items"]), *cells, style="bold")
    return table


def _cells(found: Mapping[str, Any], metric: str, sides: list[str]) -> list[str]:
    cells = []
    for name in sides:
        cells.append(figure(metric, found[name]["mean"]) if name in found else "–")
    if len(sides) == 2:
        difference = found.get("difference")
        if difference is None:
            return [*cells, "–", ""]
        low, high, mean = (figure(metric, difference[key]) for key in ("low", "high", "mean"))
        said = difference["verdict"]
        sign = "" if mean.startswith("-") else "+"
        cells += [
            f"{sign}{mean} [{low}, {high}]".replace("[", "\\["),
            f"[{COLOURS[said]}]{verdict_label(said)}[/]",
        ]
    return cells


def rates_words(scores: Mapping[str, Any]) -> list[str]:
    """Length, repetition and stop rate, a line a side."""
    lines = []
    for name, side in scores["sides"].items():
        found = side.get("rates")
        if not found:
            continue
        label, length = side_label(name), f"{found['characters']:.0f}"
        repeated, stopped = f"{100 * found['repetition']:.1f}", f"{100 * found['stop_rate']:.1f}"
        empty = f"{100 * found['empty']:.1f}"
        lines.append(
            tr(
                f"{label}: {length} characters, repetition {repeated} %, stopped by itself {stopped} %, empty {empty} %",
                f"{label}：平均 {length} 字，重复率 {repeated}%，自行停止 {stopped}%，空回答 {empty}%",
            )
        )
    return lines
