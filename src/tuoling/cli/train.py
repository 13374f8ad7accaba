"""tuoling train"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuoling import console, environment
from tuoling.errors import UsageError
from tuoling.language import tr
from tuoling.train.asked import Asked, launching

if TYPE_CHECKING:
    from tuoling.config import Loaded
    from tuoling.train.loop import RunResult
    from tuoling.train.prepare import Setup

HELP = tr(
    """Fine-tune a model on your rows and leave a run folder.

    tuoling train --model MODEL --data rows.json [--out RUN] [key=value …]

    tuoling train config.yaml [key=value …]

    CONFIG may also be a LLaMA-Factory SFT YAML, domain-bloom's two JSON files, or BELLE's of April 2023.
    Every key of the config can be given as key=value; `recipe=domain-bloom` starts from a packaged recipe.

    --nproc 2 (or --devices 0,1) starts that many processes, which share every step; parallel=fsdp, zero2 or zero3
    cuts the model into parts. Several machines: this command on each, with --nnodes, --node-rank and --master; or on
    the first one only, with --hostfile. Under torchrun or srun a process joins the others by itself.""",
    """用你的数据微调模型，结果放在一个运行目录里。

    tuoling train --model 模型 --data rows.json [--out 目录] [键=值 …]

    tuoling train config.yaml [键=值 …]

    配置文件也可以是 LLaMA-Factory 的 SFT YAML、domain-bloom 的两个 JSON，或 BELLE 2023 年 4 月的 JSON。
    配置中的每个键都可以写成 键=值；recipe=domain-bloom 表示从内置配方开始。

    --nproc 2（或 --devices 0,1）启动多个进程分担每一步；parallel=fsdp、zero2 或 zero3 会切分模型。
    多台机器：在每台上运行本命令，加 --nnodes、--node-rank、--master；或只在第一台上运行，加 --hostfile。
    在 torchrun 或 srun 下，各进程会自动汇合。""",
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

Processes = Annotated[
    int | None,
    typer.Option(
        "--nproc", min=1, help=tr("processes to start here", "在本机启动的进程数"), show_default=False
    ),
]
Devices = Annotated[
    str | None,
    typer.Option("--devices", help=tr("cards, one a process: 0,1,3", "使用的显卡，每张一个进程：0,1,3")),
]
Machines = Annotated[
    int, typer.Option("--nnodes", min=1, help=tr("machines that train together", "一起训练的机器数"))
]
MachineNumber = Annotated[
    int, typer.Option("--node-rank", min=0, help=tr("which of them this one is", "本机的编号，从 0 开始"))
]
Master = Annotated[
    str | None,
    typer.Option("--master", help=tr("address of machine 0, host[:port]", "0 号机器的地址，host[:端口]")),
]
Hostfile = Annotated[
    Path | None,
    typer.Option(
        "--hostfile",
        help=tr(
            "machines to start from here, `name slots=N` a line, this one first",
            "由本机启动的机器列表，每行 `主机名 slots=进程数`，本机写在第一行",
        ),
    ),
]
RemoteShell = Annotated[
    str | None,
    typer.Option(
        "--remote-shell",
        help=tr("how the others are reached; ssh if unset", "连接其他机器的命令，默认 ssh"),
        show_default=False,
    ),
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
    nproc: Processes = None,
    devices: Devices = None,
    nnodes: Machines = 1,
    node_rank: MachineNumber = 0,
    master: Master = None,
    hostfile: Hostfile = None,
    remote_shell: RemoteShell = None,
    supervise: Annotated[
        bool,
        typer.Option(
            "--supervise",
            help=tr("begin again from the last checkpoint after a crash", "崩溃后自动从最近的检查点继续"),
        ),
    ] = False,
    restarts: Annotated[
        int,
        typer.Option(
            "--restarts",
            min=0,
            help=tr("with --supervise: at most so many", "与 --supervise 同用：最多重启次数"),
        ),
    ] = 5,
) -> None:
    loaded = load(words, model=model, data=data, out=out, recipe=recipe)
    from tuoling.api import train

    asked = Asked(nproc, devices, nnodes, node_rank, master, hostfile, remote_shell)
    if loaded.config.data_shares:
        console.note(
            tr(
                "data_shares is for `tuoling study`: all rows are trained on",
                "data_shares 只用于 tuoling study：这里训练全部数据",
            )
        )
    if supervise:
        from tuoling.train.run_folder import folder_of
        from tuoling.train.supervise import supervise as watch

        folder = folder_of(loaded.config)
        begin = [*_again(words, model=model, data=data, recipe=recipe), "--out", str(folder)]
        shared = asked.words() + (["--json"] if as_json else [])
        again = ["resume", str(folder), "--skip-damaged", *shared]
        raise typer.Exit(watch(folder, [*begin, *shared], again, restarts=restarts, say=console.note))
    with launching(asked, say=console.note) as launch:
        result = train(loaded, say=console.note, show_plan=show_plan, launch=launch)
    tell(result, as_json=as_json)


def _again(
    words: list[str] | None, *, model: str | None, data: list[str] | None, recipe: str | None
) -> list[str]:
    """The words of this command for a process of its own."""
    given = [("--model", model), ("--recipe", recipe), *(("--data", each) for each in data or [])]
    return ["train", *(words or []), *(part for name, value in given if value for part in (name, value))]


def tell(result: RunResult, *, as_json: bool) -> None:
    """What came out of a run, and where it lies."""
    if environment.place().rank != 0:  # under torchrun the first one reports
        return
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
    verb = "chat" if result.status == "finished" else "resume"
    console.out.print(
        tr(f"next        tuoling {verb} {result.path}", f"下一步    tuoling {verb} {result.path}"),
        markup=False,
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
