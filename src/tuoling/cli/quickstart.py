"""`tuoling quickstart`: watch a model learn Chinese instructions, offline, on a CPU."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuoling import console
from tuoling.errors import UsageError
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.demo.full import Forms
    from tuoling.demo.quickstart import Outcome

HELP = tr(
    """Build a small model from nothing and teach it Chinese instructions, offline, on a CPU.

    Writes rows of its own, builds a tokenizer and a blank model, pre-trains it on plain text, tunes it with LoRA,
    and scores it on questions it has not seen, before and after. Nothing is downloaded.""",
    """从零建一个小模型，教会它中文指令：离线，只用 CPU。

    写出自己的数据，建分词器和空白模型，在纯文本上预训练，再用 LoRA 微调，用没见过的题目在微调前后各考一次。不下载任何东西。""",
)

TURNS = ("你叫什么名字？", "李雨明天上午九点在公园跑步。这句话里的地点是什么？", "翻译成英文：三只白色的猫")
"""What is asked at the end, for everybody to see."""


def command(
    out: Annotated[Path, typer.Option("--out", "-o", help=tr("folder to make", "要建立的目录"))] = Path(
        "quickstart"
    ),
    family: Annotated[str, typer.Option("--family", help=tr("bloom or llama", "bloom 或 llama"))] = "bloom",
    seed: Annotated[int, typer.Option("--seed", help=tr("random seed", "随机种子"))] = 42,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help=tr("move an old folder aside", "旧目录改名保留"))
    ] = False,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help=tr(
                "then merge, quantise, write GGUF and chat from it", "再合并、量化、写出 GGUF，并用它对话"
            ),
        ),
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help=tr("chat at the end", "结束后进入对话"))] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help=tr("print one JSON object", "输出一个 JSON 对象"))
    ] = False,
) -> None:
    started = time.perf_counter()
    if family not in ("bloom", "llama"):
        raise UsageError(
            tr(f"no demo for the family {family}", f"没有 {family} 的演示"), remedy="--family bloom | llama"
        )
    from tuoling.demo.quickstart import Course, quickstart

    outcome = quickstart(
        out,
        family=family,  # type: ignore[arg-type]  # checked above
        seed=seed,
        overwrite=overwrite,
        course=replace(Course(), sentencepiece=full),
        started=started,
        say=console.note,
    )
    if not as_json:
        _show(outcome)
    forms = _make_forms(outcome.run) if full else None
    asked = (forms and forms.gguf) or outcome.run
    if as_json:
        found: dict[str, Any] = {"run": str(outcome.run), "before": outcome.before, "after": outcome.after}
        found |= {"forms": [asdict(form) for form in forms.made], "left_out": forms.left_out} if forms else {}
        found |= {"asked": asked, "answers": _answers(asked), "seconds": round(outcome.seconds, 1)}
        typer.echo(json.dumps(found, ensure_ascii=False, default=str))
        return
    if forms:
        _show_forms(outcome, forms)
    for question, answer in _answers(asked).items():
        console.out.print(f"[dim]{tr('you', '你')}[/dim]  {question}")
        console.out.print(f"[dim]{tr('it', '它')}[/dim]  {answer}")
    if chat:
        from tuoling.cli.chat import command as open_chat

        open_chat(str(asked))


def _make_forms(run: Path) -> Forms:
    from tuoling.demo.full import make_forms

    return make_forms(run, say=console.note)


def _show_forms(outcome: Outcome, forms: Forms) -> None:
    """What each form of the weights takes and knows."""
    from rich.table import Table

    from tuoling.demo.quickstart import mean

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(tr("form of the weights", "权重形式"))
    table.add_column(tr("size", "大小"), justify="right")
    table.add_column(tr("right answers", "正确率"), justify="right")
    table.add_row(tr("adapter on its base", "基座加适配器"), "", f"{mean(outcome.after):.0%}")
    for form in forms.made:
        right = tr("not asked", "未测") if form.accuracy is None else f"{form.accuracy:.0%}"
        table.add_row(form.name, f"{form.size_bytes / 1e6:.2f} MB", right)
    console.out.print(table)
    for form in forms.made:
        console.out.print(f"{form.name}  {form.path}", markup=False)
    if forms.gguf:
        console.out.print(
            tr(f"next  tuoling chat {forms.gguf}", f"下一步  tuoling chat {forms.gguf}"), markup=False
        )


def _show(outcome: Outcome) -> None:
    """Accuracy by kind, and where everything lies."""
    from rich.table import Table

    from tuoling.demo.quickstart import mean
    from tuoling.demo.rows import KINDS

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(tr("held-out questions", "没见过的题目"))
    table.add_column(tr("before", "微调前"), justify="right")
    table.add_column(tr("after", "微调后"), justify="right")
    for kind in KINDS:
        table.add_row(kind.label, f"{outcome.before[kind.id]:.0%}", f"{outcome.after[kind.id]:.0%}")
    table.add_row(
        tr("average", "平均"), f"{mean(outcome.before):.0%}", f"{mean(outcome.after):.0%}", style="bold"
    )
    console.out.print(table)
    run = outcome.run
    console.out.print(tr(f"{outcome.seconds:.0f} s in all", f"共 {outcome.seconds:.0f} 秒"))
    for label, path in (
        (tr("run folder", "运行目录"), run),
        (tr("loss", "损失曲线"), run / "training_loss.png"),
        (tr("accuracy", "正确率"), run / "accuracy_by_kind.png"),
        (tr("answers", "全部答案"), run / "predictions.json"),
        (tr("next", "下一步"), f"tuoling chat {run}"),
    ):
        console.out.print(f"{label}  {path}", markup=False)


def _answers(model_path: Path) -> dict[str, str]:
    """What the model, a run or a GGUF file, says to `TURNS`, each asked for itself."""
    from tuoling import api

    with api.load(model_path) as model:
        return {question: model.chat(question, max_new_tokens=48) for question in TURNS}
