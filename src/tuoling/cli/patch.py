"""tuoling patch"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuoling.cli.convert import AsJson
from tuoling.cli.diff import Base, BaseHash, Force, NoBaseCheck, Out, Workers, show
from tuoling.language import tr

HELP = tr(
    """Make a model from BASE and a published DIFF. What kind of diff it is, its files tell.

    Every result is checked. Where one is wrong (another base, a file cut short) nothing is left behind.""",
    """用 BASE 和公开发布的差分 DIFF 还原模型。差分的种类由文件本身判断。

    每个结果都会校验；只要有一个不对（基础文件不符、文件被截断），就什么也不留下。""",
)


def command(
    base: Base,
    diff: Annotated[
        Path, typer.Argument(metavar="DIFF", help=tr("the published file or folder", "发布的文件或目录"))
    ],
    out: Out,
    checksums: Annotated[
        Path | None,
        typer.Option(
            "--checksums",
            help=tr(
                "md5sum or sha256sum list of base, diff or result, to compare with",
                "基础文件、差分或结果的 md5sum 或 sha256sum 列表，用于比对",
            ),
        ),
    ] = None,
    base_hash: BaseHash = None,
    no_base_check: NoBaseCheck = False,
    expected_sum: Annotated[
        float | None,
        typer.Option(
            "--sum",
            help=tr(
                "what all weights of an additive diff's result add up to, as published",
                "加法差分还原后全部权重之和的公布值",
            ),
        ),
    ] = None,
    workers: Workers = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    from tuoling import environment
    from tuoling.weights.checksums import parse_digest, read_checksums
    from tuoling.weights.diff import apply_diff
    from tuoling.weights.diff_options import DiffOptions

    options = DiffOptions(
        workers=workers or environment.cpu_count(),
        replace=force,
        lists=read_checksums(checksums) if checksums else None,
        base_hash=parse_digest(base_hash, "--base-hash") if base_hash else None,
        check_base=not no_base_check,
        expected_sum=expected_sum,
    )
    show(apply_diff(base, diff, out, options), as_json=as_json)
