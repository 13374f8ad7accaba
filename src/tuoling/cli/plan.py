"""tuoling plan"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuoling import console
from tuoling.cli.train import Data, Model, Out, Recipe, Words, load, show_plan
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.config import RunConfig
    from tuoling.train.plan import Plan

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
                "run two steps of the longest batch in a process of their own, measure the memory and foresee the time",
                "在单独的进程里试跑两步最长的批次，实测内存并推算用时",
            ),
        ),
    ] = False,
) -> None:
    loaded = load(words, model=model, data=data, out=out, recipe=recipe)
    from tuoling.train.prepare import prepare

    setup = prepare(loaded.config, say=console.note, notes=loaded.notes)
    show_plan(setup)
    measured = _probe(loaded.config, setup.plan) if probe else {}
    if as_json:
        shown = {**setup.plan.to_json(), **measured, "warnings": setup.plan.warnings()}
        print(json.dumps(shown, ensure_ascii=False))  # noqa: T201


def _probe(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """Measure, and say what came out."""
    from tuoling.train.memory import gib
    from tuoling.train.memory_probe import probe_memory

    found = probe_memory(config)
    if found.peak_bytes is None:
        console.warn(tr(f"it does not fit: {found.why}", f"放不下：{found.why}"))
    else:
        peak = gib(found.peak_bytes)
        console.note(tr(f"measured peak  {peak}", f"实测内存峰值  {peak}"))
    measured = asdict(found)
    if found.tokens_per_s:
        tokens = plan.tokens_per_step * (plan.total_steps - plan.first_step)
        measured["seconds"] = round(tokens / found.tokens_per_s, 1)
        time, rate = console.seconds_words(measured["seconds"]), f"{found.tokens_per_s:,.0f}"
        console.note(
            tr(
                f"expected time  about {time}: {tokens:,.0f} tokens at {rate} tokens/s, as one step of the longest batch ran",
                f"预计用时  约 {time}：{tokens:,.0f} 个 token，每秒 {rate} 个（按最长批次的一步实测）",
            )
        )
    return {"probe": measured}
