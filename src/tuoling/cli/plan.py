"""tuoling plan"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuoling import console
from tuoling.cli.train import Data, Model, Out, Recipe, Words, load, show_plan
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.config import RunConfig

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
    probe: Annotated[
        bool,
        typer.Option(
            "--probe",
            help=tr(
                "run two steps of the longest batch in a process of their own and measure the memory",
                "在单独的进程里试跑两步最长的批次，实测内存",
            ),
        ),
    ] = False,
) -> None:
    loaded = load(words, model=model, data=data, out=out, recipe=recipe)
    from tuoling.train.prepare import prepare

    setup = prepare(loaded.config, say=console.note, notes=loaded.notes)
    show_plan(setup)
    measured = _probe(loaded.config) if probe else {}
    if as_json:
        shown = {**setup.plan.to_json(), **measured, "warnings": setup.plan.warnings()}
        print(json.dumps(shown, ensure_ascii=False))  # noqa: T201


def _probe(config: RunConfig) -> dict[str, Any]:
    """Measure, and say what came out."""
    from tuoling.train.memory import gib
    from tuoling.train.memory_probe import probe_memory

    found = probe_memory(config)
    if found.peak_bytes is None:
        console.warn(tr(f"it does not fit: {found.why}", f"放不下：{found.why}"))
    else:
        peak = gib(found.peak_bytes)
        console.note(tr(f"measured peak  {peak}", f"实测内存峰值  {peak}"))
    return {"probe": {"peak_bytes": found.peak_bytes, "why": found.why}}
