"""tuoling data dedup"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tuoling import console
from tuoling.cli.data_check import Columns, Files, Format
from tuoling.language import tr

HELP = tr(
    """Take out rows whose question nearly repeats an earlier one (ROUGE-L above 0.7), a million and more at once.

    Any row format; the rows that stay are written as they stand. Of rows alike the first stays.""",
    """去掉与前面提问相近的数据（ROUGE-L 大于 0.7），一次可处理百万条以上。

    支持所有数据格式；留下的数据原样写出。相近的几条中保留第一条。""",
)


def command(
    files: Files,
    out: Annotated[Path, typer.Option("--out", help=tr("the file to write", "输出文件"))],
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            help=tr("also what repeats these rows, such as a test set", "也去掉与这些数据（如测试集）相近的"),
        ),
    ] = None,
    above: Annotated[
        float,
        typer.Option(
            "--above", min=0.7, max=1.0, help=tr("ROUGE-L that is too alike", "ROUGE-L 超过多少算相近")
        ),
    ] = 0.7,
    removed: Annotated[
        Path | None,
        typer.Option(
            "--removed", help=tr("write what went, and what it repeats", "写出去掉的数据及其重复对象")
        ),
    ] = None,
    format: Format = None,
    columns: Columns = None,
    force: Annotated[
        bool, typer.Option("--force", help=tr("replace a file that is there", "覆盖已有文件"))
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help=tr("print one JSON object", "打印一个 JSON 对象"))
    ] = False,
) -> None:
    from tuoling.data.dedup import dedup
    from tuoling.data.sources import parse_columns, resolve_sources
    from tuoling.environment import cpu_count

    sources = resolve_sources(files, format=format, columns=parse_columns(columns))
    tests = resolve_sources(against) if against else []
    with console.progress() as bar:
        shown = bar.add_task(tr("comparing", "比较"), total=None, detail="")
        report = dedup(
            sources,
            out,
            against=tests,
            above=above,
            removed=removed,
            force=force,
            threads=min(2, cpu_count()),
            step=lambda done, total: bar.update(shown, completed=done, total=total),
        )
    if as_json:
        print(json.dumps(vars(report), ensure_ascii=False, default=str))  # noqa: T201
        return
    console.out.print(f"{report.out}: {report.written}", markup=False)
    console.note(
        tr(
            f"{report.rows} rows; {report.removed} repeat an earlier one ({report.against} of them one of --against)",
            f"共 {report.rows} 行；{report.removed} 行与前面的相近（其中 {report.against} 行与 --against 相近）",
        )
    )
    if report.bad:
        console.warn(tr(f"{report.bad} bad rows are not written", f"{report.bad} 行不合格，没有写入"))
