"""tuoling study"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuoling import console
from tuoling.cli.chat import MaxNewTokens
from tuoling.cli.train import Data, Model, Out, Recipe, Words, load, show_plan
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.config import RunConfig

HELP = tr(
    """Say what more rows bring: train on a quarter, a half and all of them, evaluate each run, draw score against rows.

    tuoling study --recipe data_size_study --model MODEL --data rows.json --test test.json --out study

    The shares are the config's data_shares. Runs that are finished are used as they are.""",
    """看更多数据带来什么：用四分之一、一半和全部数据各训练一次，逐一评测，画出得分随条数的变化。

    tuoling study --recipe data_size_study --model MODEL --data rows.json --test test.json --out study

    比例取自配置 data_shares。已完成的训练直接沿用。""",
)


def command(
    test: Annotated[Path, typer.Option("--test", help=tr("rows held out, with answers", "留出的带答案数据"))],
    words: Words = None,
    model: Model = None,
    data: Data = None,
    out: Out = None,
    recipe: Recipe = None,
    suite: Annotated[str, typer.Option("--suite", help="mine | belle | choice | math")] = "mine",
    judge: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--judge",
            metavar="URL MODEL",
            help=tr("a judge behind an OpenAI-speaking address", "裁判模型的 OpenAI 接口地址与模型名"),
        ),
    ] = None,
    class_column: Annotated[
        str | None,
        typer.Option("--class-column", help=tr("else: ", "默认依次找：") + "class, category, kind …"),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    as_json: Annotated[
        bool, typer.Option("--json", help=tr("print comparison.json", "输出 comparison.json"))
    ] = False,
) -> None:
    from tuoling.evaluate.data_size_study import data_size_study
    from tuoling.evaluate.evaluation import Evaluation
    from tuoling.infer.endpoint import Endpoint

    loaded = load(words, model=model, data=data, out=out, recipe=recipe)
    asked = Evaluation(
        "",
        suite=suite,
        file=str(test),
        judge=Endpoint(*judge) if judge else None,
        class_column=class_column,
        settings={"max_new_tokens": max_new_tokens},
    )

    def train(config: RunConfig) -> Any:
        from tuoling.train.loop import train as run

        return run(config, notes=loaded.notes, say=console.note, show_plan=show_plan)

    found = data_size_study(loaded.config, asked, train, say=console.note)
    if as_json:
        print(json.dumps(found.to_json(), ensure_ascii=False))  # noqa: T201
        return
    console.out.print(found.table())
    console.out.print(tr(f"picture  {found.picture}", f"图片  {found.picture}"), markup=False)
