"""tuoling continue"""

from __future__ import annotations

from typing import Annotated

import typer

from tuoling import console
from tuoling.cli.train import (
    Devices,
    Hostfile,
    MachineNumber,
    Machines,
    Master,
    Processes,
    RemoteShell,
    show_plan,
    tell,
)
from tuoling.errors import UsageError
from tuoling.language import tr
from tuoling.train.asked import Asked, launching

HELP = tr(
    """Begin a new run from old weights, on rows of its own.

    tuoling continue RUN_OR_ADAPTER --data NEW.json [--out RUN2] [key=value …]

    From a run of ours (its settings are taken over), a checkpoint, anybody's adapter or model, by folder or hub id.
    The optimizer and the schedule begin anew.

    --keep-schedule: the optimizer's state is kept and the learning-rate line goes on as if the new rows had been
    appended to the old ones, also from a checkpoint of transformers' Trainer (optimizer.pt, trainer_state.json). How
    many passes over the new rows that makes is said first, and asked for where it is more than num_train_epochs.

    Processes, cards and machines as with `tuoling train`.""",
    """用旧的权重、新的数据开始一次新的训练。

    tuoling continue 运行目录或适配器 --data 新数据.json [--out 新目录] [键=值 …]

    起点可以是我们的一次训练（沿用它的设置）、一个检查点，或任何人的适配器、模型（目录或模型库编号）。
    优化器和学习率计划从头开始。

    --keep-schedule：保留优化器状态，学习率曲线接着走，就像新数据接在旧数据后面；也支持 transformers Trainer 的检查点
    （optimizer.pt、trainer_state.json）。会先说明在新数据上要训练多少轮；超过 num_train_epochs 时会询问。

    进程、显卡、机器的写法与 tuoling train 相同。""",
)


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_ADAPTER",
            help=tr(
                "run, checkpoint, adapter or model: folder or hub id",
                "运行目录、检查点、适配器或模型：目录或模型库编号",
            ),
            show_default=False,
        ),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help=tr("keys to set", "要设置的键"), show_default=False),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", "-d", help=tr("new rows: files or folders", "新数据：文件或目录")),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help=tr("run folder to make", "要建立的运行目录"))
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help=tr("where an adapter's base lies now", "适配器的基座现在的位置")),
    ] = None,
    keep_schedule: Annotated[
        bool,
        typer.Option(
            "--keep-schedule", help=tr("the old learning-rate line goes on", "学习率曲线接着原来的走")
        ),
    ] = False,
    from_data_beginning: Annotated[
        bool | None,
        typer.Option(
            "--from-data-beginning/--no-from-data-beginning",
            help=tr(
                "with --keep-schedule: from the first row, or pass over as many as were seen; unset: from the first "
                "row, unless these are the same rows",
                "与 --keep-schedule 同用：从第一条数据开始，或跳过已看过的条数；不写则从头开始，数据相同时跳过",
            ),
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            "--epochs",
            help=tr(
                "with --keep-schedule: stop after so many passes over the new rows",
                "与 --keep-schedule 同用：在新数据上训练这么多轮后停止",
            ),
        ),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help=tr("do not ask about the passes", "不询问轮数"))
    ] = False,
    nproc: Processes = None,
    devices: Devices = None,
    nnodes: Machines = 1,
    node_rank: MachineNumber = 0,
    master: Master = None,
    hostfile: Hostfile = None,
    remote_shell: RemoteShell = None,
    as_json: Annotated[
        bool, typer.Option("--json", help=tr("print the results as JSON", "以 JSON 输出结果"))
    ] = False,
) -> None:
    if not keep_schedule and (from_data_beginning is not None or epochs is not None):
        name = "--from-data-beginning" if epochs is None else "--epochs"
        raise UsageError(
            tr(
                f"{name} is for --keep-schedule: a new schedule begins at the first row",
                f"{name} 要与 --keep-schedule 同用：新的计划总是从第一条数据开始",
            ),
            remedy=tr(
                "--keep-schedule, or num_train_epochs=N", "加上 --keep-schedule，或用 num_train_epochs=N"
            ),
        )
    if not data and not any(word.startswith(("data=", "dataset=")) for word in words or []):
        raise UsageError(
            tr("which rows? --data is missing", "缺少 --data：用哪些数据？"),
            remedy=tr(
                "the same rows to their end: tuoling resume RUN",
                "接着训练原来的数据：tuoling resume 运行目录",
            ),
        )
    from tuoling.train.entry import continue_from

    asked = Asked(nproc, devices, nnodes, node_rank, master, hostfile, remote_shell)
    with launching(asked, say=console.note) as launch:
        result = continue_from(
            source,
            words or [],
            {"data": data, "output_dir": out},
            base=base,
            keep_schedule=keep_schedule,
            from_data_beginning=from_data_beginning,
            epochs=epochs,
            agreed=lambda said: yes or _ask(),
            say=console.note,
            show_plan=show_plan,
            launch=launch,
        )
    tell(result, as_json=as_json)


def _ask() -> bool:
    """Whether the user means it; no where nobody can be asked."""
    import sys

    return sys.stdin.isatty() and typer.confirm(tr("So many passes?", "确定要这么多轮吗？"), err=True)
