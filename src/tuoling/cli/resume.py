"""tuoling resume"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuoling import console
from tuoling.cli.train import (
    Devices,
    Hostfile,
    MachineNumber,
    Machines,
    Master,
    RemoteShell,
    show_plan,
    tell,
)
from tuoling.errors import ConfigError
from tuoling.language import tr
from tuoling.train.asked import Asked, launching

HELP = tr(
    """Go on with a run that was stopped or killed, exactly where it was.

    tuoling resume RUN [--from checkpoint-400] [key=value …]

    Its newest checkpoint is taken. First it is made sure that the checkpoint is whole, that rows, template, base and
    config are still the run's own, and that the last batch gives the loss it gave. Every row is seen as often as
    without the stop, on another number of processes (--nproc) too; in one process on a CPU the rest of the run is the
    same bit for bit. Without a checkpoint yet it begins again. Keys that do not change what is learned, such as
    disk_reserve_mib or save_total_limit, may be given new values.""",
    """从中断处继续一次训练，与没有中断时完全一样。

    tuoling resume 运行目录 [--from checkpoint-400] [键=值 …]

    使用最新的检查点。开始前会核对：检查点完好无损；数据、模板、基座和配置与当初一致；最后一批的损失与当时相同。
    不会重复或漏掉任何一条数据，换进程数（--nproc）也一样；单进程 CPU 上，后续训练逐位相同。还没有检查点时从头开始。
    不影响学习结果的键（如 disk_reserve_mib、save_total_limit）可以改。""",
)


def command(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help=tr("run folder", "运行目录"), show_default=False)
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help=tr("keys to give a new value", "要改的键"), show_default=False
        ),
    ] = None,
    from_checkpoint: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="CHECKPOINT", help=tr("not from the newest one", "不从最新的检查点开始")
        ),
    ] = None,
    skip_damaged: Annotated[
        bool,
        typer.Option(
            "--skip-damaged",
            help=tr(
                "from the newest whole one where the last is damaged", "最新的检查点损坏时，用前一个完好的"
            ),
        ),
    ] = False,
    accept_changes: Annotated[
        bool,
        typer.Option(
            "--accept-changes",
            help=tr(
                "also on changed rows, template, base or config; run.json says so",
                "数据、模板、基座或配置有改动也继续，并记入 run.json",
            ),
        ),
    ] = False,
    nproc: Annotated[
        int | None,
        typer.Option(
            "--nproc",
            min=1,
            help=tr("processes to start here; as before if unset", "在本机启动的进程数，默认与原来相同"),
        ),
    ] = None,
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
    from tuoling.config_files import parse_value
    from tuoling.train.entry import resume

    keys = {}
    for word in words or []:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(
                tr(f"not key=value: {word}", f"不是 key=value 的写法：{word}"),
                remedy=tr("for example disk_reserve_mib=64", "例如 disk_reserve_mib=64"),
            )
        keys[key.strip()] = parse_value(text, where=word)
    asked = Asked(nproc, devices, nnodes, node_rank, master, hostfile, remote_shell)
    with launching(asked, say=console.note) as launch:
        result = resume(
            run,
            from_checkpoint=from_checkpoint,
            skip_damaged=skip_damaged,
            accept_changes=accept_changes,
            say=console.note,
            show_plan=show_plan,
            launch=None if asked == Asked() else launch,
            **keys,
        )
    tell(result, as_json=as_json)
