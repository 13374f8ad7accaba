"""tuoling quantize"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuoling.cli.chat import Base, Device, Dtype, RemoteCode, Revision, RunOrModel, Template
from tuoling.cli.convert import AsJson, NoVerify, print_json
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.weights.gptq_options import QuantizeReport

HELP = tr(
    """Write a model's linear layers in 2, 3, 4 or 8 bits, and tell what that costs.

    GPTQ, calibrated on your own rows: a run's data, or --data. The folder opens in transformers, vLLM and here.
    Interrupted, the same call goes on. For a file that chats on a CPU see tuoling convert MODEL OUT.gguf.""",
    """把模型的线性层量化为 2、3、4 或 8 位，并给出代价。

    采用 GPTQ，用您自己的数据校准：训练目录自带的数据，或 --data。结果可用 transformers、vLLM 和本工具打开。
    中途被打断后，再次运行同一命令会接着做。要在 CPU 上聊天的文件，见 tuoling convert MODEL OUT.gguf。""",
)


def command(
    model: RunOrModel,
    out: Annotated[Path, typer.Argument(metavar="OUT", help=tr("must not exist yet", "不能已经存在"))],
    bits: Annotated[
        int, typer.Option("--bits", metavar="2|3|4|8", help=tr("of a weight", "每个权重的位数"))
    ] = 4,
    group_size: Annotated[
        int,
        typer.Option(
            "--group-size",
            help=tr("inputs that share a scale; -1: all", "共用一个缩放系数的输入数；-1 为全部"),
        ),
    ] = 128,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            help=tr("rows to calibrate on, instead of the run's", "校准用的数据，代替训练目录的数据"),
        ),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help=tr("how many of them", "用多少条校准"))] = 256,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="gptq|awq|rtn",
            help=tr("rtn: rounded to nearest, no rows needed", "rtn：直接取最近值，不需要数据"),
        ),
    ] = "gptq",
    act_order: Annotated[
        bool,
        typer.Option("--act-order", help=tr("large inputs first; slower to run", "先量化大的输入；推理较慢")),
    ] = False,
    no_true_sequential: Annotated[
        bool,
        typer.Option(
            "--no-true-sequential",
            help=tr("a block's layers at once: faster, a little worse", "一个块内各层同时量化：更快，略差"),
        ),
    ] = False,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help=tr("zero points of their own", "使用零点"))
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help=tr("of the choice of rows", "挑选数据的随机种子"))] = 0,
    template: Template = None,
    base: Base = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    allow_remote_code: RemoteCode = False,
    no_verify: NoVerify = False,
    as_json: AsJson = False,
) -> None:
    from tuoling import console
    from tuoling.errors import UsageError
    from tuoling.weights.gptq import quantize
    from tuoling.weights.gptq_options import QuantizeOptions

    if method not in ("gptq", "awq", "rtn"):
        raise UsageError(
            tr(f"--method {method} is not known", f"不认识 --method {method}"), remedy="gptq | awq | rtn"
        )
    options = QuantizeOptions(
        bits=bits,
        group_size=group_size,
        act_order=act_order,
        true_sequential=not no_true_sequential,
        symmetric=not asymmetric,
        method=method,  # type: ignore[arg-type]
        rows=rows,
        seed=seed,
        device=device,
        dtype=dtype,
        verify=not no_verify,
        allow_remote_code=allow_remote_code,
    )
    with console.progress() as bar:
        task = bar.add_task(tr("quantising layers", "量化各层"), total=None, detail="")
        report = quantize(
            model,
            out,
            options,
            data=data or (),
            base=base,
            revision=revision,
            template=template,
            say=console.note,
            step=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        print_json(report.to_json())
        return
    _tell(report)


def _tell(report: QuantizeReport) -> None:
    """What was lost and won, beside the model before and beside rounding to nearest."""
    from rich.table import Table

    from tuoling import console

    for note in report.notes:
        console.note(note)
    if report.after is not None:
        table = Table(box=None, pad_edge=False)
        table.add_column("")
        name = f"{report.options.method} {report.options.bits}"
        for head in (tr("before", "量化前"), f"rtn {report.options.bits}", name):
            table.add_column(head, justify="right")
        table.add_row(
            tr("perplexity of held-out answers", "留出数据回答的困惑度"),
            *(
                f"{value:.4f}" if value is not None else "–"
                for value in (report.before, report.rtn, report.after)
            ),
        )
        sizes = (report.size_before_bytes, None, report.size_bytes)
        table.add_row(
            tr("size of the weights, MB", "权重大小，MB"),
            *(f"{size / 1e6:,.1f}" if size is not None else "–" for size in sizes),
        )
        table.add_row(
            tr("tokens a second, one at a time", "每秒 token（逐个生成）"),
            f"{report.tokens_per_s_before or 0:.1f}",
            "–",
            f"{report.tokens_per_s or 0:.1f}",
        )
        table.add_row(
            tr("memory, GiB", "内存，GiB"),
            f"{report.memory_before_gib or 0:.2f}",
            "–",
            f"{report.memory_gib or 0:.2f}",
        )
        console.out.print(table)
    if report.peak_gib:
        console.note(
            tr(
                f"{report.layers} layers in {report.seconds:.0f} s, peak memory {report.peak_gib:.2f} GiB",
                f"{report.layers} 层用时 {report.seconds:.0f} 秒，峰值内存 {report.peak_gib:.2f} GiB",
            )
        )
    console.out.print(str(report.out), markup=False)
