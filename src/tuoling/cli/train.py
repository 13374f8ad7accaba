"""tuoling train"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuoling import console
from tuoling.errors import UsageError
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.config import Loaded
    from tuoling.train.prepare import Setup

HELP = tr(
    """Fine-tune a model on your rows and leave a run folder.

    tuoling train --model MODEL --data rows.json [--out RUN] [key=value …]

    tuoling train config.yaml [key=value …]

    CONFIG may also be a LLaMA-Factory SFT YAML, domain-bloom's two JSON files, or BELLE's of April 2023.
    Every key of the config can be given as key=value; `recipe=domain-bloom` starts from a packaged recipe.""",
    """用你的数据微调模型，结果放在一个运行目录里。

    tuoling train --model 模型 --data rows.json [--out 目录] [键=值 …]

    tuoling train config.yaml [键=值 …]

    配置文件也可以是 LLaMA-Factory 的 SFT YAML、domain-bloom 的两个 JSON，或 BELLE 2023 年 4 月的 JSON。
    配置中的每个键都可以写成 键=值；recipe=domain-bloom 表示从内置配方开始。""",
)

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG|KEY=VALUE",
        help=tr("config files, and keys to set", "配置文件，以及要设置的键"),
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help=tr("base model: folder or hub id", "基座模型：目录或模型库编号")),
]
Data = Annotated[
    list[str] | None, typer.Option("--data", "-d", help=tr("rows: files or folders", "数据：文件或目录"))
]
Out = Annotated[str | None, typer.Option("--out", "-o", help=tr("run folder to make", "要建立的运行目录"))]
Recipe = Annotated[
    str | None, typer.Option("--recipe", help=tr("packaged recipe or YAML", "内置配方或 YAML"))
]


def command(
    words: Words = None,
    model: Model = None,
    data: Data = None,
    out: Out = None,
    recipe: Recipe = None,
    as_json: Annotated[
        bool, typer.Option("--json", help=tr("print the results as JSON", "以 JSON 输出结果"))
    ] = False,
) -> None:
    loaded = load(words, model=model, data=data, out=out, recipe=recipe)
    from tuoling.api import train

    result = train(loaded, say=console.note, show_plan=show_plan)
    if as_json:
        print(json.dumps({"run": str(result.path), "status": result.status, **result.results}))  # noqa: T201
        return
    done = result.results
    speed = f"{done['tokens_per_s']:,.0f} tokens/s" if done["tokens_per_s"] else ""  # one step is not timed
    console.out.print(
        tr(
            f"{result.status}: loss {done['train_loss_first']:.4f} → {done['train_loss_last']:.4f}, "
            f"{done['steps']} steps, {speed and speed + ', '}peak {done['peak_rss_gib']:.2f} GiB",
            f"{'完成' if result.status == 'finished' else '已中断'}：损失 {done['train_loss_first']:.4f} → "
            f"{done['train_loss_last']:.4f}，{done['steps']} 步，{speed and speed + '，'}"
            f"内存峰值 {done['peak_rss_gib']:.2f} GiB",
        )
    )
    console.out.print(tr(f"run folder  {result.path}", f"运行目录  {result.path}"), markup=False)
    console.out.print(
        tr(f"next        tuoling chat {result.path}", f"下一步    tuoling chat {result.path}"), markup=False
    )


def load(
    words: list[str] | None,
    *,
    model: str | None,
    data: list[str] | None,
    out: str | None,
    recipe: str | None,
) -> Loaded:
    """Config files, key=value words and flags → one validated config, its notes shown on stderr."""
    from tuoling.config import load_config, sort_words

    paths, overrides = sort_words(words or [])
    given: dict[str, Any] = {"model_name_or_path": model, "data": data, "output_dir": out, "recipe": recipe}
    flags = {key: value for key, value in given.items() if value}
    if not paths and not overrides and not flags:
        raise UsageError(
            tr("nothing to train: no config and no model", "没有配置，也没有模型"),
            remedy="tuoling train --model MODEL --data rows.json",
        )
    loaded = load_config(paths, overrides, flags)
    for line in loaded.notes:
        console.note(line)
    return loaded


def show_plan(setup: Setup) -> None:
    """The plan as a table on stderr, then its warnings."""
    from rich.table import Table

    from tuoling.train.memory import quantization_of

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    quantization = quantization_of(setup.config)
    base = tr(f", base in {quantization}", f"，基座 {quantization}") if quantization else ""
    table.add_row(
        tr("model", "模型"),
        f"{setup.source.name} ({setup.source.family.name}, {setup.device}, {setup.dtype}{base})",
    )
    table.add_row(tr("template", "模板"), f"{setup.template.id} ({setup.template_reason})")
    for label, value in setup.plan.lines():
        table.add_row(label, value)
    console.err.print(table)
    for warning in setup.plan.warnings():
        console.warn(warning)
