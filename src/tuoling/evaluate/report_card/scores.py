"""Scores of the report card: bars and tables by class, rates, groups, leaks, the judge, examples."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tuoling.evaluate.labels import METRICS, SIDES, SUITES, class_names, figure
from tuoling.evaluate.report_card.charts import Bar, bar_chart, colour_of
from tuoling.evaluate.report_card.contents import Example, Report, Suite
from tuoling.evaluate.report_card.html import both, in_both, number, section, table, verdict_cell

WHY: Mapping[str, tuple[str, str, str]] = {
    "best": ("最好", "best", "better"),
    "worst": ("最差", "worst", "worse"),
    "random": ("随机", "by chance", "cannot"),
}
"""Why an example is shown, and its colour."""


_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
"""What an untrained model may say and HTML may not hold."""


def suite_section(suite: Suite) -> str:
    """Scores by class with intervals, rates, groups, notes."""
    scores = suite.scores
    metric, sides = str(scores["headline"]), list(scores["sides"])
    zh, en = METRICS.get(metric, (metric, metric))
    kind_zh, kind_en = SUITES.get(str(scores["suite"]).partition(":")[0], (str(scores["suite"]),) * 2)
    body = f'<p class="lead">{escape(str(scores.get("file") or ""))} · {number(scores["items"])} {both("题", "questions")} · {both(zh, en)}</p>'
    if not scores.get("complete", True):
        body += f'<div class="note">{both("结果不完整。", "Not complete.")}</div>'
    body += _bars(scores, metric, sides) + _scores_table(scores, metric, sides)
    others = [name for name in scores["overall"] if name != metric]
    if others:
        body += f"<h3>{both('其他指标（全部题目）', 'Other metrics, all questions')}</h3>"
        body += table(
            ("", *_head(sides)),
            [(in_both(METRICS, name), *_cells(scores["overall"][name], name, sides)) for name in others],
        )
    body += _rates(scores, sides) + _groups(scores, sides) + _leaks(scores)
    judge = scores.get("judge")
    if judge:
        body += _judge(judge)
    body += "".join(
        f'<div class="note">{both(note["zh"], note["en"])}</div>' for note in scores.get("notes", ())
    )
    return section(
        f"suite-{escape(suite.name)}", f"{kind_zh} · {suite.name}", f"{kind_en} · {suite.name}", body
    )


def _bars(scores: Mapping[str, Any], metric: str, sides: Sequence[str]) -> str:
    """Only for scores from 0 to 1."""
    bars = []
    for name, entry in scores["classes"].items():
        found = entry["metrics"].get(metric, {})
        values = [
            (
                found[side]["mean"],
                found[side].get("low", found[side]["mean"]),
                found[side].get("high", found[side]["mean"]),
            )
            if side in found
            else None
            for side in sides
        ]
        if any(value is not None and not 0 <= value[0] <= 1 for value in values):
            return ""
        if any(value is not None for value in values):
            bars.append(Bar(both(*class_names(name, str(scores["suite"]))), values))
    if not bars:
        return ""
    names = "".join(
        f'<i style="background:var(--{colour_of(number, len(sides))})"></i>{in_both(SIDES, side)}'
        for number, side in enumerate(sides)
    )
    legend = f'<p class="legend">{names}'
    return (
        f"{legend} · {both('横线为 95% 区间，竖线为 0、25、50、75、100', 'whiskers: 95 % intervals; lines at 0, 25, 50, 75, 100')}</p>"
        + bar_chart(bars)
    )


def _head(sides: Sequence[str]) -> list[str]:
    level = f"<span class=interval>{both('（95% 区间）', ' (95 %)')}</span>"
    more = [both("差值", "difference") + level, ""] if len(sides) == 2 else []
    return [*(in_both(SIDES, side) for side in sides), *more]


def _cells(found: Mapping[str, Any], metric: str, sides: Sequence[str]) -> list[str]:
    cells = []
    for side in sides:
        value = found.get(side)
        interval = (
            f" <small class=interval>[{figure(metric, value['low'])}, {figure(metric, value['high'])}]</small>"
            if value and "low" in value
            else ""
        )
        cells.append(figure(metric, value["mean"]) + interval if value else "–")
    if len(sides) == 2:
        gap = found.get("difference")
        if gap is None:
            return [*cells, "–", ""]
        low, high, mean = (figure(metric, gap[key]) for key in ("low", "high", "mean"))
        cells += [
            f"{'' if mean.startswith('-') else '+'}{mean} <span class=interval>[{low}, {high}]</span>",
            verdict_cell(gap["verdict"]),
        ]
    return cells


def _scores_table(scores: Mapping[str, Any], metric: str, sides: Sequence[str]) -> str:
    rows = [
        (
            both(*class_names(name, str(scores["suite"]))),
            number(entry["items"]),
            *_cells(entry["metrics"].get(metric, {}), metric, sides),
        )
        for name, entry in scores["classes"].items()
    ]
    overall = scores["overall"].get(metric)
    if overall and len(rows) > 1:
        rows.append(
            (f"<b>{both('全部', 'all')}</b>", number(scores["items"]), *_cells(overall, metric, sides))
        )
    return table((both("类别", "class"), both("题数", "rows"), *_head(sides)), rows)


def _rates(scores: Mapping[str, Any], sides: Sequence[str]) -> str:
    rows = []
    for side in sides:
        found = scores["sides"][side].get("rates")
        if found:
            shares = (f"{100 * found[name]:.1f} %" for name in ("repetition", "stop_rate", "empty"))
            rows.append((in_both(SIDES, side), f"{found['characters']:.0f}", *shares))
    if not rows:
        return ""
    head = (
        "",
        both("平均字数", "characters"),
        both("重复率", "repetition"),
        both("自行停止", "stopped by itself"),
        both("空回答", "empty"),
    )
    return f"<h3>{both('回答的样子', 'What the answers look like')}</h3>" + table(head, rows)


def _groups(scores: Mapping[str, Any], sides: Sequence[str]) -> str:
    groups = scores.get("groups")
    if not groups:
        return ""
    rows = [
        (escape(name), number(found["subjects"]), *(f"{100 * found[side]:.1f}" for side in sides))
        for name, found in groups.items()
    ]
    head = (both("学科组", "group"), both("科目", "subjects"), *(in_both(SIDES, side) for side in sides))
    return f"<h3>{both('按学科组（科目平均）', 'By group (mean of subjects)')}</h3>" + table(head, rows)


def _leaks(scores: Mapping[str, Any]) -> str:
    found = scores.get("leaks")
    if not found:
        return ""
    count = found["exact"] + found["near"]
    if found["missing_files"] and not found["trained_rows"]:
        return f'<div class="note">{both("训练数据不在本机，未检查测试题是否训练过。", "The training rows are not here: leaks were not looked for.")}</div>'
    zh = f"与训练数据重合：{count} 题（原样 {found['exact']}，近似 {found['near']}），对照 {found['trained_rows']:,} 行。"
    en = f"Also in the training rows: {count} ({found['exact']} word for word, {found['near']} nearly), of {found['trained_rows']:,} rows compared."
    return f"<p>{both(zh, en)}</p>"


def _judge(judge: Mapping[str, Any]) -> str:
    agreed = judge.get("agreement")
    zh = f"裁判 {judge['model']}（{judge['endpoint']}）"
    en = f"Judge {judge['model']} ({judge['endpoint']})"
    if agreed:
        share = f"{100 * agreed['within_0.1']:.0f} %"
        zh += f"；对 {agreed['pairs']:.0f} 个回答重复评分，{share} 相差不超过 0.1"
        en += f"; asked twice about {agreed['pairs']:.0f} answers it agrees within 0.1 on {share}"
    return f"<p>{both(zh + '。', en + '.')}</p>"


def examples_section(report: Report) -> str:
    """Questions with the answers side by side."""
    blocks = [_example(one, suite) for suite in report.suites for one in suite.examples]
    return (
        section("examples", "示例：最好、最差、随机", "Examples: best, worst, by chance", "".join(blocks))
        if blocks
        else ""
    )


def _example(one: Example, suite: Suite) -> str:
    row, metric = one.row, str(suite.scores["headline"])
    zh, en, style = WHY[one.why]
    columns = []
    for side in suite.scores["sides"]:
        said = row.get(side, {})
        if "answer" in said:
            value = one.values[side]
            score = "" if value is None else f" · {figure(metric, value)}"
            columns.append(
                f'<div><span class="who">{in_both(SIDES, side)}{score}</span>{escape(_short(said["answer"])) or "∅"}</div>'
            )
    if row.get("target"):
        columns.append(
            f'<div><span class="who">{both("参考答案", "reference")}</span>{escape(_short(row["target"]))}</div>'
        )
    tag = f'<span class="why {style}">{both(zh, en)}</span><small>{both(*class_names(row["class"], str(suite.scores["suite"])))}</small>\n'
    return f'<div class="example"><div class="question">{tag}{escape(_short(row["question"]))}</div><div class="said">{"".join(columns)}</div></div>'


def _short(text: str, most: int = 600) -> str:
    text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    return text if len(text) <= most else text[:most] + f" … (+{len(text) - most})"
