"""tuoling prune-vocab"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuoling import console
from tuoling.cli.chat import RemoteCode
from tuoling.cli.convert import AllowNan, AsJson, NoVerify, print_json
from tuoling.errors import UsageError
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.weights.prune_corpus import Base
    from tuoling.weights.prune_report import PruneReport
    from tuoling.weights.prune_restore import RestoreReport

HELP = tr(
    """Make a model smaller by the words it does not need.

    tuoling prune-vocab MODEL OUT --keep ROWS…

    Kept is what the rows need, rendered through the model's template, and a base for any text; the same text then
    gives the same tokens (renumbered) and the same logits, and this is proven before OUT appears.

    tuoling prune-vocab --restore PRUNED FULL OUT

    puts an adapter or model that was trained small back on the full one.""",
    """按词表裁剪模型：去掉用不到的词。

    tuoling prune-vocab 模型 输出 --keep 数据…

    保留数据（按模型的模板渲染）所需的词和一份通用部分；相同文本切分不变（编号改变），logits 不变，验证通过后才写出。

    tuoling prune-vocab --restore 裁剪后的模型或适配器 完整模型 输出

    把在小词表上训练的适配器或模型放回完整模型。""",
)


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|PRUNED", help=tr("folder or hub id", "目录或模型库编号"))
    ],
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT|FULL",
            help=tr(
                "must not exist yet; with --restore the full model", "不能已存在；用 --restore 时为完整模型"
            ),
        ),
    ],
    more: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ROWS|OUT",
            help=tr(
                "more rows to keep; with --restore the place to write",
                "更多要保留的数据；用 --restore 时为输出位置",
            ),
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", help=tr("rows or .txt whose words are kept", "要保留其用词的数据或 .txt")),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            "--held-out",
            help=tr(
                "rows that choose nothing: what new text meets is measured on them",
                "不参与选词的数据：用来测新文本的情况",
            ),
        ),
    ] = None,
    base: Annotated[
        str,
        typer.Option(
            "--base",
            help=tr(
                "kept for any text besides bytes, ASCII, punctuation and the template: ascii (nothing), common (3,755 "
                "Chinese characters), gb2312 (6,763)",
                "除字节、ASCII、标点和模板外的通用部分：ascii（无）、common（3,755 个常用汉字）、gb2312（6,763 个）",
            ),
        ),
    ] = "common",
    min_count: Annotated[
        int,
        typer.Option(
            "--min-count", min=1, help=tr("leave out words rarer than this", "去掉出现次数更少的词")
        ),
    ] = 1,
    size: Annotated[
        int | None,
        typer.Option(
            "--size", min=1, help=tr("so many words, the most frequent first", "词表大小，优先保留高频词")
        ),
    ] = None,
    template: Annotated[
        str | None, typer.Option("--template", help=tr("render rows with this template", "渲染数据用的模板"))
    ] = None,
    data_format: Annotated[
        str | None,
        typer.Option("--format", help=tr("read rows as this format", "按此格式读取数据")),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            "--columns", help=tr("our names for columns: instruction=ask", "列名对应：instruction=ask")
        ),
    ] = None,
    restore: Annotated[
        bool,
        typer.Option("--restore", help=tr("back onto the full model", "放回完整模型")),
    ] = False,
    allow_remote_code: RemoteCode = False,
    allow_nan: AllowNan = False,
    no_verify: NoVerify = False,
    as_json: AsJson = False,
) -> None:
    if restore:
        from tuoling.weights.prune_restore import restore_vocab

        restored = restore_vocab(
            model,
            out,
            _third_place(more or []),
            held_out=held_out or [],
            verify=not no_verify,
            allow_remote_code=allow_remote_code,
        )
        print_json(restored.to_json()) if as_json else _show_restored(restored)
        return
    from tuoling.data.sources import parse_columns
    from tuoling.weights.prune import prune_vocab
    from tuoling.weights.prune_report import PruneOptions

    report = prune_vocab(
        model,
        Path(out),
        PruneOptions(
            keep=[*(keep or []), *(more or [])],
            held_out=held_out or [],
            base=_base(base),
            min_count=min_count,
            size=size,
            template=template,
            data_format=data_format,
            columns=parse_columns(columns),
            verify=not no_verify,
            allow_nan=allow_nan,
            allow_remote_code=allow_remote_code,
        ),
    )
    if as_json:
        print_json(report.to_json())
        return
    _show(report)


def _base(text: str) -> Base:
    from tuoling.weights.prune_corpus import BASES

    for base in BASES:
        if base == text:
            return base
    raise UsageError(
        tr(f"--base {text}: no such base", f"--base {text}：没有这种通用部分"), remedy=" | ".join(BASES)
    )


def _show(report: PruneReport) -> None:
    smaller = 1 - report.size_bytes_after / report.size_bytes_before
    console.out.print(
        tr(
            f"{report.out}: {report.rows_before:,} → {report.rows_after:,} words, "
            f"{report.size_bytes_before / 1e6:,.1f} → {report.size_bytes_after / 1e6:,.1f} MB ({smaller:.1%} smaller)",
            f"{report.out}：词表 {report.rows_before:,} → {report.rows_after:,}，"
            f"{report.size_bytes_before / 1e6:,.1f} → {report.size_bytes_after / 1e6:,.1f} MB（减小 {smaller:.1%}）",
        ),
        markup=False,
    )


def _third_place(more: list[str]) -> Path:
    if len(more) != 1:
        raise UsageError(
            tr("--restore takes three places", "--restore 需要三个位置"),
            remedy="tuoling prune-vocab --restore PRUNED FULL OUT",
        )
    return Path(more[0])


def _show_restored(report: RestoreReport) -> None:
    console.out.print(
        tr(
            f"{report.out}: {report.kind} for {report.full_rows:,} words, {report.trained_rows:,} of them trained",
            f"{report.out}：{'适配器' if report.kind == 'adapter' else '模型'}，"
            f"词表 {report.full_rows:,}，其中 {report.trained_rows:,} 个词经过训练",
        ),
        markup=False,
    )
