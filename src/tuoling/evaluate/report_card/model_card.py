"""The report card's facts in a run's README.md, between two marks: what a user wrote around them stays."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from tuoling import files
from tuoling.console import seconds_words
from tuoling.evaluate.labels import METRICS, SIDES, SUITES, VERDICTS, class_names, figure
from tuoling.evaluate.report_card.contents import Report, Suite

BEGIN, END = "<!-- tuoling report -->", "<!-- /tuoling report -->"
_SECTION = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}\n?", re.DOTALL)
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def write_model_card(report: Report) -> bool:
    """Put the facts into the run's README.md, scores into its front matter too; False where it has no README.md."""
    path = report.run / "README.md"
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8")
    section = f"{BEGIN}\n{facts_section(report)}{END}\n"
    text = _SECTION.sub(lambda _: section, text) if _SECTION.search(text) else f"{text.rstrip()}\n\n{section}"
    with files.atomic_write(path) as file:
        file.write(_with_results(text, report))
    return True


def facts_section(report: Report) -> str:
    """Scores by class, how the answers look, data, time and cost, the command; in Chinese and English."""
    parts = [_suite(suite) for suite in report.suites]
    data, done = _data(report), report.results
    if data:
        parts.append(f"## 数据 Data\n\n{data}\n")
    if done.get("seconds"):
        line = f"{seconds_words(done['seconds'])}, {done.get('tokens_per_s') or 0:,.0f} tokens/s"
        if report.price_per_hour is not None:
            line += f", 费用 cost {report.price_per_hour * done['seconds'] / 3600:,.4g}"
        parts.append(f"## 用时 Time\n\n{line}\n")
    parts.append(f"## 重现 Reproduce\n\n```\n{report.command}\n```\n")
    return "\n".join(parts)


def _suite(suite: Suite) -> str:
    scores, metric = suite.scores, str(suite.scores["headline"])
    sides, kind = list(scores["sides"]), str(scores["suite"]).partition(":")[0]
    title = " ".join(SUITES.get(kind, (kind, "")))
    pairs = len(sides) == 2
    head = ["类别 class", "题数 rows", *(" ".join(SIDES.get(side, (side,))) for side in sides)]
    head += ["差值 difference (95 %)", ""] if pairs else []
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, entry in scores["classes"].items():
        zh, en = class_names(name, str(scores["suite"]))
        cells = _cells(entry["metrics"].get(metric, {}), metric, sides, pairs=pairs)
        lines.append(f"| {zh if zh == en else f'{zh} {en}'} | {entry['items']} | {' | '.join(cells)} |")
    overall = scores["overall"].get(metric)
    if overall:
        lines.append(
            f"| **全部 all** | {scores['items']} | {' | '.join(_cells(overall, metric, sides, pairs=pairs))} |"
        )
    named = " ".join(METRICS.get(metric, (metric,)))
    notes = [f"- {note['zh']} {note['en']}" for note in scores.get("notes", ())]
    notes += _rates(scores, sides)
    leaks = scores.get("leaks")
    if leaks and leaks["trained_rows"]:
        count = leaks["exact"] + leaks["near"]
        notes.append(f"- 与训练数据重合的题 questions also trained on: {count} / {scores['items']}")
    if not scores.get("complete", True):
        notes.append("- 结果不完整 not complete")
    return f"## {title} · `{scores.get('file')}`\n\n{named}\n\n" + "\n".join([*lines, "", *notes]) + "\n"


def _cells(found: Mapping[str, Any], metric: str, sides: list[str], *, pairs: bool) -> list[str]:
    cells = [figure(metric, found[side]["mean"]) if side in found else "–" for side in sides]
    gap = found.get("difference")
    if not pairs:
        return cells
    if gap is None:
        return [*cells, "–", ""]
    low, high, mean = (figure(metric, gap[key]) for key in ("low", "high", "mean"))
    sign = "" if mean.startswith("-") else "+"
    return [*cells, f"{sign}{mean} [{low}, {high}]", " ".join(VERDICTS[gap["verdict"]])]


def _rates(scores: Mapping[str, Any], sides: list[str]) -> list[str]:
    lines = []
    for side in sides:
        found = scores["sides"][side].get("rates")
        if found:
            repeated, stopped = (f"{100 * found[name]:.1f} %" for name in ("repetition", "stop_rate"))
            name = " ".join(SIDES.get(side, (side,)))
            lines.append(f"- {name}: 重复率 repetition {repeated}, 自行停止 stopped by itself {stopped}")
    return lines


def _data(report: Report) -> str:
    if report.data is None:
        return ""
    found = report.data
    said = f"重复 duplicates {found['duplicates']:,}, 近似重复 near duplicates {found['near_duplicates']:,}"
    lengths = found["lengths"]
    if lengths.get("histogram"):
        said += f"; 字数 characters: 中位 median {lengths['median']:,}, 95 % ≤ {lengths['p95']:,}, "
        said += f"最长 longest {lengths['max']:,}"
    return said


def _with_results(text: str, report: Report) -> str:
    """The hub's `model-index` in the front matter, the tuned side's overall scores."""
    front = _FRONT.match(text)
    results = [entry for suite in report.suites if (entry := _result(suite))]
    if front is None or not results:
        return text
    values = yaml.safe_load(front[1])
    if not isinstance(values, dict):
        return text
    values["model-index"] = [{"name": report.run.resolve().name, "results": results}]
    return f"---\n{yaml.safe_dump(values, allow_unicode=True, sort_keys=False)}---\n{text[front.end() :]}"


def _result(suite: Suite) -> dict[str, Any] | None:
    scores, metric = suite.scores, str(suite.scores["headline"])
    side = list(scores["sides"])[-1]
    found = scores["overall"].get(metric, {}).get(side)
    if found is None:
        return None
    name = str(scores.get("file") or suite.name).replace("\\", "/").rsplit("/", 1)[-1]
    measured = {
        "type": metric,
        "value": round(float(found["mean"]), 4),
        "name": METRICS.get(metric, ("", metric))[1],
    }
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": name, "type": suite.name},
        "metrics": [measured],
    }
