"""`tuoling report`: what a run did, as a picture and a few numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuoling import console
from tuoling.errors import DataError
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.plots import History

HELP = tr(
    """Write a run's report card: one HTML file that opens offline, in Chinese and English, and prints.

    What was trained on what, plan against fact, curves, scores by class beside the base, examples, data, licences.
    The same facts go into its README.md, the model card. Also draws the loss, of anybody's trainer_state.json too, and prints its figures.""",
    """为一次训练写成绩单：一个离线可读、可打印的中英文 HTML 文件。

    内容：训练了什么、计划与实际、曲线、与基座对照的各类分数、示例、数据、许可。
    同样的内容也写入模型卡 README.md。同时画出损失曲线并列出数字；任何人的 trainer_state.json 也可以。""",
)


def command(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help=tr(
                "Run folder, metrics.jsonl or trainer_state.json.",
                "训练目录、metrics.jsonl 或 trainer_state.json。",
            ),
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="PNG", help=tr("Where to write the picture.", "图片写到哪里。")),
    ] = None,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            "--price-per-hour", min=0, help=tr("of the machine: tells the cost", "机器每小时价格，用来算费用")
        ),
    ] = None,
    check_data: Annotated[
        bool,
        typer.Option(
            "--check-data/--no-check-data",
            help=tr("read the training rows again", "重新读一遍训练数据做统计"),
        ),
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help=tr("Print one JSON object.", "输出一个 JSON 对象。"))
    ] = False,
) -> None:
    """Read the log, draw it, print first, last and best."""
    from tuoling import plots

    rows = plots.read_history(run)
    target = out or (run if run.is_dir() else run.parent) / "training_loss.png"
    series = plots.history(rows)
    if not series.loss and not series.eval_loss:
        raise DataError(
            tr("no loss in it: no row has a step and a loss", "里面没有损失：没有一行同时有 step 和 loss"),
            where=str(run),
        )
    plots.loss_plot(rows, target)
    found = summary(series)
    found["picture"] = str(target)
    if (run / "run.json").is_file():
        found["report"] = str(_card(run, price_per_hour, check_data=check_data))
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    _show(found)


def _card(run: Path, price_per_hour: float | None, *, check_data: bool) -> Path:
    """report.html in the run folder, and the same facts in its README.md."""
    from tuoling.evaluate.report_card.contents import read_report
    from tuoling.evaluate.report_card.model_card import write_model_card
    from tuoling.evaluate.report_card.page import write_page

    report = read_report(run, price_per_hour=price_per_hour, check_data=check_data)
    write_model_card(report)
    return write_page(report, run / "report.html")


def summary(history: History) -> dict[str, Any]:
    """First, last and lowest of each loss, with their steps."""
    found: dict[str, Any] = {
        "steps": max(step for series in (history.loss, history.eval_loss) for step, _ in series)
    }
    for name, series in (("loss", history.loss), ("eval_loss", history.eval_loss)):
        if series:
            lowest = min(series, key=lambda point: point[1])
            found[name] = {
                "first": series[0][1],
                "last": series[-1][1],
                "lowest": lowest[1],
                "lowest_step": lowest[0],
            }
    if history.learning_rate:
        found["learning_rate_highest"] = max(value for _, value in history.learning_rate)
    return found


def _show(found: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in (tr("first", "最初"), tr("last", "最后"), tr("lowest", "最低"), tr("at step", "所在步数")):
        table.add_column(name, justify="right")
    for key, label in (("loss", tr("train loss", "训练损失")), ("eval_loss", tr("eval loss", "验证损失"))):
        if key in found:
            one = found[key]
            values = [f"{one[name]:.4f}" for name in ("first", "last", "lowest")]
            table.add_row(label, *values, str(one["lowest_step"]))
    console.out.print(table)
    console.out.print(tr(f"steps: {found['steps']}", f"步数：{found['steps']}"))
    console.out.print(tr(f"picture: {found['picture']}", f"图片：{found['picture']}"), markup=False)
    if "report" in found:
        console.out.print(tr(f"report card: {found['report']}", f"成绩单：{found['report']}"), markup=False)
