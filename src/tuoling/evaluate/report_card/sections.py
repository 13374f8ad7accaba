"""Sections of the report card, each from plain values to HTML."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from tuoling.console import seconds_words
from tuoling.evaluate.labels import METRICS, SUITES, figure
from tuoling.evaluate.report_card.charts import Line, histogram, line_chart
from tuoling.evaluate.report_card.contents import Report, Suite
from tuoling.evaluate.report_card.html import (
    both,
    bytes_words,
    facts,
    number,
    section,
    table,
    verdict_cell,
)
from tuoling.models.licence_answer import kind_word, permission, said_word, sentences, word
from tuoling.plots import smooth


def summary(report: Report) -> str:
    """What a reader sees first: the verdict, the loss, the size, the time, the licence."""
    results, tiles = report.results, []
    for suite in report.suites:
        tile = _score_tile(suite)
        if tile:
            tiles.append(tile)
    if "train_loss_first" in results:
        value = f"{results['train_loss_first']:.3f} → {results['train_loss_last']:.3f}"
        tiles.append(_tile("训练损失", "training loss", value))
    if results.get("eval_loss") is not None:
        tiles.append(_tile("验证损失", "held-out loss", f"{results['eval_loss']:.3f}"))
    if results.get("rows"):
        tiles.append(_tile("训练条数", "rows trained on", number(results["rows"])))
    if results.get("seconds"):
        tiles.append(_tile("训练用时", "training time", seconds_words(results["seconds"])))
    allowed = report.licences.commercial
    tiles.append(
        _tile(
            "能否商用",
            "commercial use",
            f'<span class="{allowed}">{both(word(allowed, "zh"), word(allowed, "en"))}</span>',
        )
    )
    status = str(report.record.get("status", "?"))
    said = {"finished": "已完成", "interrupted": "已中断", "failed": "失败", "running": "进行中"}.get(
        status, status
    )
    base = str((report.record.get("base") or {}).get("named", "?"))
    started = str(report.record.get("started", ""))[:16].replace("T", " ")
    lead = both(f"基座 {base} · {said} · {started} UTC", f"base {base} · {status} · {started} UTC")
    return (
        f'<section id="summary"><h1>{escape(report.name)}</h1><p class="lead">{lead}</p>'
        f'<div class="tiles">{"".join(tiles)}</div></section>'
    )


def _tile(zh: str, en: str, value: str, note: str = "") -> str:
    small = f"<small>{note}</small>" if note else ""
    return f'<div class="tile"><span class="label">{both(zh, en)}</span><b>{value}</b>{small}</div>'


def _score_tile(suite: Suite) -> str | None:
    metric = str(suite.scores["headline"])
    overall = suite.scores["overall"].get(metric)
    if not overall:
        return None
    values = [figure(metric, overall[side]["mean"]) for side in suite.scores["sides"] if side in overall]
    difference = overall.get("difference")
    note = verdict_cell(difference["verdict"]) if difference else ""
    kind = str(suite.scores["suite"]).partition(":")[0]
    zh, en = SUITES.get(kind, (kind, kind))
    if kind != "general":
        metric_zh, metric_en = METRICS.get(metric, (metric, metric))
        zh, en = f"{zh}：{metric_zh}", f"{en}: {metric_en}"
    return _tile(zh, en, " → ".join(values), note)


def _machine(found: Mapping[str, Any]) -> str:
    """System, processor, cores, memory."""
    cores, memory = found.get("cores", "?"), f"{found.get('memory_gib', '?')} GiB"
    system = f"{found.get('system', '')} {found.get('processor', '')}"
    return both(f"{system}，{cores} 核，{memory}", f"{system}, {cores} cores, {memory}")


def what_was_trained(report: Report) -> str:
    """Base, rows, method, template, machine."""
    config, record, plan = report.config, report.record, report.plan
    base, template = record.get("base") or {}, record.get("template") or {}
    method = (
        f"LoRA r={config.get('lora_rank')} α={config.get('lora_alpha')} dropout={config.get('lora_dropout')}"
        if config.get("finetuning_type") == "lora"
        else str(config.get("finetuning_type"))
    )
    bits = f", {config['quantization_bit']} bit" if config.get("quantization_bit") else ""
    versions = record.get("versions") or {}
    share = 100 * (plan.get("trainable") or 0) / max(1, plan.get("parameters") or 1)
    data = ", ".join(map(str, [*(config.get("data") or []), *(config.get("dataset") or [])]))
    schedule = f"{config.get('learning_rate'):g} · {config.get('lr_scheduler_type')} · warm-up {plan.get('warmup_steps')}"
    rows = [
        (both("基座", "base"), f"{escape(str(base.get('named')))} ({escape(str(base.get('family')))})"),
        (both("数据", "data"), escape(data)),
        (both("方法", "method"), escape(f"{method}, {config.get('stage')}{bits}")),
        (
            both("参数", "parameters"),
            f"{number(plan.get('parameters'))}, {number(plan.get('trainable'))} ({share:.1f} %) "
            + both("可训练", "trained"),
        ),
        (both("模板", "template"), escape(str(template.get("id")))),
        (both("优化器", "optimizer"), escape(str(config.get("optim")))),
        (both("学习率", "learning rate"), escape(schedule)),
        (both("随机种子", "seed"), number(record.get("seed"))),
        (
            both("设备与精度", "device and precision"),
            escape(f"{record.get('device')}, {record.get('dtype')}, {record.get('processes', 1)} ×"),
        ),
        (both("机器", "machine"), _machine(record.get("machine") or {})),
        (both("版本", "versions"), escape(", ".join(f"{name} {value}" for name, value in versions.items()))),
    ]
    return section("trained", "训练了什么", "What was trained on what", facts(rows))


def plan_and_fact(report: Report) -> str:
    """What was foreseen beside what came, and what it cost."""
    plan, done = report.plan, report.results
    if not plan:
        return ""
    forecast = report.record.get("forecast") or {}
    times = (forecast.get("seconds"), done.get("seconds"))
    peak = done.get("peak_cuda_gib") or done.get("peak_rss_gib")
    planned_tokens = round((plan.get("tokens") or 0) * (plan.get("epochs") or 0))
    if plan.get("epochs") is None:  # its rows were still being made
        planned_tokens = round((plan.get("tokens_per_step") or 0) * (plan.get("total_steps") or 0))
    rows = [
        (both("步数", "steps"), number(plan.get("total_steps")), number(done.get("steps"))),
        (both("轮数", "epochs"), number(plan.get("epochs")), number(done.get("epochs"))),
        ("token", number(planned_tokens), number(done.get("tokens"))),
        (both("最长一条", "longest row"), number(plan.get("longest_row")), "–"),
        (
            both("内存", "memory"),
            bytes_words(plan.get("memory_bytes")),
            bytes_words(peak * 2**30 if peak else None),
        ),
        (both("训练用时", "training time"), *map(seconds_words, times)),
        (both("速度", "throughput"), _speed(forecast), _speed(done)),
    ]
    price = report.price_per_hour
    if price is not None and done.get("seconds"):
        costs = ("–" if time is None else f"{price * time / 3600:,.4g}" for time in times)
        rows.append((both(f"费用（每小时 {price:g}）", f"cost ({price:g} an hour)"), *costs))
    head = ("", both("计划", "plan"), both("实际", "fact"))
    body = table(head, rows)
    if forecast:
        step, timed = forecast["at_step"], forecast["timed_steps"]
        zh = f"用时与速度无法在开始前得知：这里的计划是第 {step} 步时由已计时的 {timed} 步推算的。"
        en = f"Time and speed are not known before the start: what is planned here was foreseen at step {step}, from {timed} timed steps."
        body += f"<p><small>{both(zh, en)}</small></p>"
    return section(
        "plan", "计划与实际、用时与费用", "Plan against fact, time and cost", body + _resumptions(report)
    )


def _speed(found: Mapping[str, Any]) -> str:
    rate = found.get("tokens_per_s")
    return f"{number(rate)} tokens/s" if rate else "–"


def _resumptions(report: Report) -> str:
    """When the run was interrupted or crashed, and from which step it went on."""
    found = report.record.get("resumed") or []
    if not found:
        return ""
    rows = [
        (
            escape(str(one.get("at", ""))[:16].replace("T", " ")),
            number(one.get("step")),
            escape("; ".join(map(str, one.get("changed") or [])) or "–"),
        )
        for one in found
    ]
    head = (
        both("时间（UTC）", "at (UTC)"),
        both("从此步之后继续", "went on after step"),
        both("改动", "changed"),
    )
    return f"<h3>{both('中断后继续', 'Interrupted and resumed')}</h3>" + table(head, rows)


def curves(report: Report) -> str:
    """Loss and learning rate; tokens a second."""
    found = report.history
    if not found.loss and not found.eval_loss:
        return ""
    lines = []
    if len(found.loss) >= 12:
        smoothed = list(
            zip((step for step, _ in found.loss), smooth([value for _, value in found.loss]), strict=True)
        )
        lines += [Line(found.loss, "raw"), Line(smoothed, "loss")]
    else:
        lines.append(Line(found.loss, "loss"))
    lines.append(Line(found.eval_loss, "eval", dots=True))
    lines.append(Line(found.learning_rate, "rate", right=True))
    legend = (
        '<p class="legend"><i class="line" style="border-color:var(--after)"></i>'
        + both("训练损失", "training loss")
        + (
            '<i class="line" style="border-color:#24547a"></i>' + both("验证损失", "held-out loss")
            if found.eval_loss
            else ""
        )
        + '<i class="line dashed" style="border-color:#9aa3ae"></i>'
        + both("学习率（右轴）", "learning rate (right)")
        + "</p>"
    )
    body = legend + line_chart(lines, right_label=lambda value: f"{value:.2g}")
    if len(report.throughput) > 1:
        body += f"<h3>{both('速度：每秒 token', 'throughput: tokens a second')}</h3>"
        body += line_chart(
            [Line(report.throughput, "speed")], height=150, left_label=lambda value: f"{value:,.0f}"
        )
    return section("curves", "损失与速度", "Loss and throughput", body)


def no_scores(report: Report) -> str:
    """What to type where nothing was evaluated yet."""
    if report.suites:
        return ""
    text = both("还没有评测。运行：", "Not evaluated yet. Run:")
    return section(
        "scores",
        "分数",
        "Scores",
        f"<p>{text}</p><pre>tuoling evaluate {escape(str(report.run))} rows.json</pre>",
    )


def data_section(report: Report) -> str:
    """What the rows are: counts, formats, duplicates, lengths."""
    said = report.record.get("data") or {}
    rows = [
        (both("条数", "rows"), number(said.get("rows"))),
        (both("有问题未用", "bad, not used"), number(said.get("bad"))),
        (
            both("超长丢弃 / 截断", "over-long: dropped / cut"),
            f"{number(said.get('dropped_overlong'))} / {number(said.get('cut'))}",
        ),
        (
            "token",
            f"{number(said.get('tokens'))}, {number(said.get('learned_tokens'))} "
            + both("参与学习", "learned"),
        ),
        (
            both("格式", "formats"),
            escape(", ".join(f"{name} {count:,}" for name, count in (said.get("formats") or {}).items())),
        ),
    ]
    body = ""
    if report.data is not None:
        found = report.data
        rows += [
            (both("重复", "duplicates"), number(found["duplicates"])),
            (both("近似重复", "near duplicates"), number(found["near_duplicates"])),
        ]
        lengths = found["lengths"]
        if lengths.get("histogram"):
            rows.append(
                (
                    both("长度（字）", "length (characters)"),
                    both(
                        f"中位 {lengths['median']}，95% 不超过 {lengths['p95']}，最长 {lengths['max']}",
                        f"median {lengths['median']}, 95 % up to {lengths['p95']}, longest {lengths['max']}",
                    ),
                )
            )
            if len(lengths["histogram"]) > 1:
                body = f"<h3>{both('每条的字数', 'characters a row')}</h3>" + histogram(
                    [(f"≥{bin['from']}", bin["rows"]) for bin in lengths["histogram"]]
                )
    elif report.missing:
        names = ", ".join(report.missing)
        body = f'<div class="note">{both(f"数据文件已不在：{names}", f"Data files are not here any more: {names}")}</div>'
    return section("data", "数据", "Data", facts(rows) + body)


def licence_section(report: Report) -> str:
    """What went in, under which licence, and what that allows."""
    rows = []
    for part in report.licences.parts:
        cells = [both(kind_word(part.kind, "zh"), kind_word(part.kind, "en")), escape(part.named)]
        cells.append(
            escape(" + ".join(part.licences)) or f'<span class="unknown">{both("未知", "unknown")}</span>'
        )
        cells.append(
            both(said_word(part.said_by, "zh"), said_word(part.said_by, "en"))
            + (f" <small>{escape(part.where)}</small>" if part.where else "")
        )
        for question in ("commercial", "publish"):
            allowed = permission(part, question)
            cells.append(f'<span class="{allowed}">{both(word(allowed, "zh"), word(allowed, "en"))}</span>')
        rows.append(cells)
    head = (
        "",
        both("名称", "name"),
        both("许可", "licence"),
        both("由谁说明", "said by"),
        both("商用", "commercial"),
        both("发布权重", "publish weights"),
    )
    zh, en = sentences(report.licences, "zh"), sentences(report.licences, "en")
    lines = "".join(f"<p class='zh'>{escape(line)}</p>" for line in zh) + "".join(
        f"<p class='en'>{escape(line)}</p>" for line in en
    )
    return section("licences", "许可", "Licences", table(head, rows, style="wide") + lines)


def reproduce(report: Report) -> str:
    """The command, and what the model is not for."""
    zh = "模型会编造内容，也会重复训练数据里的错误；请勿不加核实地用于医疗、法律、财务等决定。分数只说明这些题目上的表现。"
    en = (
        "The model makes things up and repeats the mistakes of its rows; do not use it unchecked for medical, legal or "
        "financial decisions. Scores speak of these questions only."
    )
    body = f"<pre>{escape(report.command)}</pre><h3>{both('局限', 'Limits')}</h3><p>{both(zh, en)}</p>"
    return section("reproduce", "重现这次训练", "The command that reproduces it", body)
