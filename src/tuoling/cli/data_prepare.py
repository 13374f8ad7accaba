"""tuoling data prepare"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tuoling import console
from tuoling.errors import UsageError
from tuoling.language import tr

HELP = tr(
    """Bring published data to local files. `belle`: the first rows of the six BelleGroup sets, one JSON array each.""",
    """把公开数据集整理成本地文件。belle：六个 BelleGroup 数据集各取前若干行，每个一个 JSON 数组。""",
)


def command(
    name: Annotated[str, typer.Argument(help="belle")],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            help=tr("folder for the files; nothing in it is deleted", "输出文件夹；不会删除其中的内容"),
        ),
    ],
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help=tr("folder with local copies [default: the hub]", "本地副本所在文件夹 [默认：从 hub 下载]"),
        ),
    ] = None,
    rows: Annotated[
        int, typer.Option("--rows", min=1, help=tr("rows of each set", "每个数据集取多少行"))
    ] = 20_000,
    force: Annotated[
        bool, typer.Option("--force", help=tr("replace files of these names", "覆盖同名文件"))
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help=tr("print one JSON object", "打印一个 JSON 对象"))
    ] = False,
) -> None:
    from tuoling.data.prepare import prepare_belle

    if name != "belle":
        raise UsageError(
            tr(f"nothing is known of {name!r}", f"不认识 {name!r}"),
            remedy="tuoling data prepare belle --out DIR",
        )
    files = prepare_belle(out, rows=rows, local=source, force=force, say=console.note)
    if as_json:
        listed = [{"name": file.name, "path": str(file.path), "rows": file.rows} for file in files]
        print(json.dumps({"files": listed}, ensure_ascii=False))  # noqa: T201
        return
    for file in files:
        fewer = tr(" (all there are)", "（全部）") if file.rows < file.asked else ""
        console.out.print(f"{file.path}: {file.rows}{fewer}", markup=False)
