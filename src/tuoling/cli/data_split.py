"""tuoling data split"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from tuoling import console
from tuoling.cli.data_check import Columns, Files, Format
from tuoling.language import tr

HELP = tr(
    """Split rows into train and test without leaks: rows that repeat each other, or ask the same, stay together.

    Writes train.jsonl and test.jsonl; the records stay as they are.""",
    """把数据切成训练集和测试集，不泄漏：互相重复或问题相同的行总在同一边。

    写出 train.jsonl 和 test.jsonl；记录内容保持原样。""",
)


def command(
    files: Files,
    out: Annotated[Path, typer.Option("--out", help=tr("folder for the two files", "两个文件所在的文件夹"))],
    test: Annotated[
        str,
        typer.Option("--test", help=tr("share (10%) or number of test rows", "测试集的比例（10%）或行数")),
    ] = "10%",
    seed: Annotated[int, typer.Option("--seed", help=tr("another seed, another draw", "随机种子"))] = 42,
    format: Format = None,
    columns: Columns = None,
    force: Annotated[
        bool, typer.Option("--force", help=tr("replace files that are there", "覆盖已有文件"))
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help=tr("print one JSON object", "打印一个 JSON 对象"))
    ] = False,
) -> None:
    from tuoling.data.sources import parse_columns, resolve_sources
    from tuoling.data.split import parse_test_size, split

    size = parse_test_size(test)
    sources = resolve_sources(files, format=format, columns=parse_columns(columns))
    report = split(sources, test=size, out=out, seed=seed, force=force)
    if as_json:
        print(json.dumps(dataclasses.asdict(report), ensure_ascii=False, default=str))  # noqa: T201
        return
    console.out.print(f"{report.train}: {report.train_rows}", markup=False)
    console.out.print(f"{report.test}: {report.test_rows}", markup=False)
    console.note(
        tr(
            f"{report.grouped_rows} rows in {report.groups} groups that repeat each other or ask the same, each kept on "
            f"one side; seed {report.seed}",
            f"{report.grouped_rows} 行分属 {report.groups} 组重复或同问的数据，每组都在同一边；随机种子 {report.seed}",
        )
    )
    if report.bad:
        console.warn(
            tr(
                f"{report.bad} bad rows are in neither file: see `tuoling data check`",
                f"{report.bad} 行不合格，两边都没有写入：请看 tuoling data check",
            )
        )
