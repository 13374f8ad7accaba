"""tuoling plan"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from tuoling import console
from tuoling.cli.train import Data, Model, Out, Recipe, Words, load, show_plan
from tuoling.language import tr

HELP = tr(
    """Say what `tuoling train` would do: rows, tokens, steps, memory, disk. Nothing is trained.

    The rows are checked and tokenised as for training, and kept for it.""",
    """说明 tuoling train 将会做什么：条数、token、步数、内存、磁盘。不会开始训练。

    数据会像训练时一样检查、分词，结果留给训练使用。""",
)


def command(
    words: Words = None,
    model: Model = None,
    data: Data = None,
    out: Out = None,
    recipe: Recipe = None,
    as_json: Annotated[
        bool, typer.Option("--json", help=tr("print the plan as JSON", "以 JSON 输出计划"))
    ] = False,
) -> None:
    loaded = load(words, model=model, data=data, out=out, recipe=recipe)
    from tuoling.train.prepare import prepare

    setup = prepare(loaded.config, say=console.note, notes=loaded.notes)
    show_plan(setup)
    if as_json:
        print(json.dumps({**setup.plan.to_json(), "warnings": setup.plan.warnings()}, ensure_ascii=False))  # noqa: T201
