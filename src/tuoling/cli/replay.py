"""tuoling replay"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuoling import console
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.train.replay import Replay

HELP = tr(
    """Run the steps of a run again and say that they are equal, or where they part and the likely reason.

    tuoling replay RUN --steps 20 [--from checkpoint-400]

    Losses, gradients and rates are compared with metrics.jsonl number by number, the weights with a checkpoint of the
    last step where there is one. Nothing is written. Exit code 1 where they part.""",
    """重新执行一次训练的若干步，说明是否完全相同，或从哪一步开始不同、可能的原因。

    tuoling replay 运行目录 --steps 20 [--from checkpoint-400]

    损失、梯度和学习率与 metrics.jsonl 逐个比较；最后一步有检查点时也比较权重。不写任何文件。不同时退出码为 1。""",
)


def command(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help=tr("run folder", "运行目录"), show_default=False)
    ],
    steps: Annotated[int, typer.Option("--steps", min=1, help=tr("how many", "步数"))] = 20,
    from_checkpoint: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="CHECKPOINT", help=tr("from there, not from step 0", "从该检查点开始")
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help=tr("print one JSON object", "输出一个 JSON 对象"))
    ] = False,
) -> None:
    from tuoling import environment

    environment.quiet_libraries()
    from tuoling.train.replay import replay

    found = replay(run, steps=steps, named=from_checkpoint, say=console.note)
    if as_json:
        shown = {name: getattr(found, name) for name in ("equal", *found.__slots__)}
        print(json.dumps(shown, ensure_ascii=False))  # noqa: T201
    else:
        for line in _lines(found):
            console.out.print(line, markup=False)
    if not found.equal:
        raise typer.Exit(1)


def _lines(found: Replay) -> list[str]:
    last = found.first + found.steps - 1
    if found.equal:
        weights = tr(", and the weights", "，权重也相同") if found.weights else ""
        return [
            tr(
                f"equal: steps {found.first} to {last}, every loss, gradient and rate{weights}",
                f"相同：第 {found.first} 到 {last} 步，每个损失、梯度和学习率{weights}",
            )
        ]
    if found.parted is None:
        lines = [
            tr(
                f"the numbers of {found.steps} steps are equal, the weights are not",
                f"{found.steps} 步的数字相同，权重不同",
            )
        ]
    else:
        step, name, then, now = found.parted
        lines = [
            tr(
                f"parts at step {step}: {name} {now!r}, and it was {then!r}",
                f"从第 {step} 步开始不同：{name} 现在是 {now!r}，当时是 {then!r}",
            )
        ]
    nothing = tr("nothing that run.json records has changed", "run.json 记录的内容都没有变")
    return lines + [tr(f"likely: {why}", f"可能的原因：{why}") for why in found.why or (nothing,)]
