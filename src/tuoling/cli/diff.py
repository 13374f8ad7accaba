"""tuoling diff"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuoling.cli.convert import AllowNan, AsJson, print_json
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.weights.diff_options import DiffReport

HELP = tr(
    """Write what turns BASE into TARGET, to publish a model without its base. `tuoling patch` applies it.

    tuoling: one safetensors file, exact and small, with hashes of base, diff and result.
    xor: the .enc files of point-alpaca and BELLE; BASE is one file, Meta's consolidated.00.pth.
    additive: a folder of differences in float32, as Stanford's weight_diff.py makes and reads them.""",
    """写出把 BASE 变为 TARGET 的差分，用于在不公开基础模型的情况下发布模型。用 tuoling patch 还原。

    tuoling：一个 safetensors 文件，精确且小，记有基础模型、差分和结果的哈希。
    xor：point-alpaca 与 BELLE 的 .enc 文件；BASE 是一个文件，即 Meta 的 consolidated.00.pth。
    additive：存放 float32 差值的目录，与斯坦福的 weight_diff.py 互通。""",
)

Base = Annotated[
    Path, typer.Argument(metavar="BASE", help=tr("the model that everybody has", "大家都有的基础模型"))
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help=tr("where to write", "输出位置"))]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", min=1, help=tr("threads (default: one per processor)", "线程数（默认每个处理器一个）")
    ),
]
BaseHash = Annotated[
    str | None,
    typer.Option(
        "--base-hash", help=tr("MD5 or SHA-256 that BASE should have", "BASE 应有的 MD5 或 SHA-256")
    ),
]
NoBaseCheck = Annotated[
    bool,
    typer.Option(
        "--no-base-check",
        help=tr(
            "do not compare BASE with --base-hash, a list, or the checklist.chk beside it",
            "不拿 BASE 与 --base-hash、校验和列表或同目录的 checklist.chk 比对",
        ),
    ),
]
Force = Annotated[bool, typer.Option("--force", help=tr("replace files that are there", "覆盖已有文件"))]


def command(
    base: Base,
    target: Annotated[
        Path,
        typer.Argument(
            metavar="TARGET", help=tr("the model to publish: file or folder", "要发布的模型：文件或目录")
        ),
    ],
    out: Out,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help=tr(
                "tuoling, xor or additive (default: what fits)", "tuoling、xor 或 additive（默认按情况选择）"
            ),
        ),
    ] = None,
    checksums: Annotated[
        Path | None,
        typer.Option(
            "--checksums",
            help=tr(
                "write the MD5 of all files into this list (md5sum's format)",
                "把所有文件的 MD5 写入此列表（md5sum 格式）",
            ),
        ),
    ] = None,
    base_hash: BaseHash = None,
    no_base_check: NoBaseCheck = False,
    allow_nan: AllowNan = False,
    workers: Workers = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    from tuoling import environment
    from tuoling.weights.checksums import parse_digest
    from tuoling.weights.diff import make_diff
    from tuoling.weights.diff_options import DiffOptions

    options = DiffOptions(
        workers=workers or environment.cpu_count(),
        replace=force,
        checksums_out=checksums,
        base_hash=parse_digest(base_hash, "--base-hash") if base_hash else None,
        check_base=not no_base_check,
        allow_nan=allow_nan,
    )
    show(make_diff(base, target, out, options, format), as_json=as_json)


def show(report: DiffReport, *, as_json: bool) -> None:
    """Say what was made."""
    from tuoling import console

    if as_json:
        print_json(dataclasses.asdict(report))
        return
    console.out.print(str(report.out), markup=False)
    size = sum(one.size_bytes for one in report.files) / 2**20
    count = len(report.files)
    console.note(
        tr(
            f"{report.kind}: {count} files, {size:,.1f} MiB",
            f"{report.kind}：{count} 个文件，{size:,.1f} MiB",
        )
    )
    if report.base_checked_by:
        console.note(
            tr(f"the base is right ({report.base_checked_by})", f"基础文件正确（{report.base_checked_by}）")
        )
    if report.proof:
        console.note(tr(f"the result is right ({report.proof})", f"结果正确（{report.proof}）"))
    if report.left_out:
        names = ", ".join(report.left_out[:5]) + (" …" if len(report.left_out) > 5 else "")
        console.note(tr(f"left out: {names}", f"未处理：{names}"))
    for text in report.notes:
        console.warn(text)
