"""tuoling data convert"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tuoling import console
from tuoling.cli.data_check import Columns, Files, Format
from tuoling.language import tr

HELP = tr(
    """Write rows of any format as alpaca, messages or conversations.

    A name that ends in .json gets a JSON array, any other JSON lines. Bad rows are counted, not written.""",
    """把任意格式的数据写成 alpaca、messages 或 conversations。

    文件名以 .json 结尾时写 JSON 数组，否则每行一个 JSON。不合格的行只计数，不写入。""",
)


def command(
    files: Files,
    to: Annotated[str, typer.Option("--to", help="alpaca | messages | conversations")],
    out: Annotated[Path, typer.Option("--out", help=tr("the file to write", "输出文件"))],
    format: Format = None,
    columns: Columns = None,
    force: Annotated[
        bool, typer.Option("--force", help=tr("replace a file that is there", "覆盖已有文件"))
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help=tr("print one JSON object", "打印一个 JSON 对象"))
    ] = False,
) -> None:
    from tuoling.data.convert import convert
    from tuoling.data.sources import parse_columns, resolve_sources

    sources = resolve_sources(files, format=format, columns=parse_columns(columns))
    report = convert(sources, to=to, out=out, force=force)
    if as_json:
        print(json.dumps(vars(report), ensure_ascii=False, default=str))  # noqa: T201
        return
    console.out.print(f"{report.out}: {report.written}", markup=False)
    formats = ", ".join(f"{name} {count}" for name, count in report.formats.items())
    console.note(tr(f"read {report.rows} rows ({formats})", f"读入 {report.rows} 行（{formats}）"))
    if report.unanswered:
        console.note(
            tr(
                f"{report.unanswered} of them are questions without an answer: to predict from, not to train on",
                f"其中 {report.unanswered} 行只有问题、没有回答：可用于预测，不能训练",
            )
        )
    if report.bad:
        console.warn(
            tr(
                f"{report.bad} bad rows are not written; the first: {report.first_bad}",
                f"{report.bad} 行不合格，没有写入；第一处：{report.first_bad}",
            )
        )
    if report.unsaid:
        console.warn(
            tr(
                f"{report.unsaid} rows of plain text have no place in {to} and are not written",
                f"{report.unsaid} 行纯文本无法写成 {to}，没有写入",
            )
        )
