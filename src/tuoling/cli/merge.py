"""tuoling merge"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuoling.cli.chat import Base, LoraAlpha, RemoteCode, Revision
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.weights.merge import MergeReport, Weighted

HELP = tr(
    """Merge an adapter, or several with weights, into its base: a model folder that needs no adapter.

    ADAPTER is a run or an adapter of any layout. Written tensor by tensor in little memory, then proven to compute
    what the adapter computes.""",
    """把一个或多个（可带权重）适配器合并进基座，得到无需适配器的模型目录。

    ADAPTER 是运行目录，或任意格式的适配器。逐个张量写出，占用内存很少；写完后验证计算结果与适配器一致。""",
)


def command(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help=tr("run, adapter or hub id", "运行、适配器或模型库编号"))
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help=tr("must not exist yet", "不能已经存在"))],
    more: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="ADAPTER[:WEIGHT]",
            help=tr("one more, on the same base; again for others", "再加一个同一基座的适配器；可重复"),
        ),
    ] = None,
    weight: Annotated[
        float, typer.Option("--weight", help=tr("of the first adapter", "第一个适配器的权重"))
    ] = 1.0,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help=tr("bf16, fp16, fp32; else the base's", "bf16、fp16、fp32；默认与基座相同")
        ),
    ] = None,
    base: Base = None,
    lora_alpha: LoraAlpha = None,
    revision: Revision = None,
    allow_remote_code: RemoteCode = False,
    no_verify: Annotated[
        bool,
        typer.Option("--no-verify", help=tr("do not prove the result; recorded", "不验证结果；会留下记录")),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help=tr("print one JSON object", "输出一个 JSON 对象"))
    ] = False,
) -> None:
    from tuoling.errors import OutputError
    from tuoling.models.source import find_model
    from tuoling.weights.merge import Weighted, stored_dtype

    stored = stored_dtype(dtype)
    if out.exists():
        raise OutputError(tr("already exists", "已经存在"), where=str(out))
    named = [(adapter, weight), *map(split_weight, more or [])]
    weighted = [
        Weighted(find_model(one, base=base, revision=revision, lora_alpha=lora_alpha), share)
        for one, share in named
    ]
    report = _merge(weighted, out, stored, allow_remote_code=allow_remote_code, verify=not no_verify)
    if as_json:
        print(json.dumps(_as_json(report), ensure_ascii=False))  # noqa: T201
        return
    _tell(report)


def split_weight(word: str) -> tuple[str, float]:
    """`ADAPTER:0.5` → (ADAPTER, 0.5); without a number after the last colon the weight is 1."""
    head, colon, tail = word.rpartition(":")
    try:
        return (head, float(tail)) if colon and head else (word, 1.0)
    except ValueError:
        return word, 1.0


def _merge(
    weighted: list[Weighted], out: Path, dtype: Any, *, allow_remote_code: bool, verify: bool
) -> MergeReport:
    from tuoling import console
    from tuoling.weights.merge import merge

    with console.progress() as bar:
        task = bar.add_task(tr("merging", "合并"), total=None, detail="")
        return merge(
            weighted,
            out,
            dtype=dtype,
            allow_remote_code=allow_remote_code,
            verify=verify,
            step=lambda done, total: bar.update(task, completed=done, total=total),
            say=console.note,
        )


def _as_json(report: MergeReport) -> dict[str, Any]:
    return {
        "out": str(report.out),
        "tensors": report.tensors,
        "changed": report.changed,
        "size_bytes": report.size_bytes,
        "notes": list(report.notes),
        **report.checked,
    }


def _tell(report: MergeReport) -> None:
    from tuoling import console

    for line in report.notes:
        console.note(line)
    size = f"{report.size_bytes / 1e6:,.1f} MB"
    console.note(
        tr(
            f"{report.changed} of {report.tensors} tensors changed, {size}",
            f"共 {report.tensors} 个张量，改动 {report.changed} 个，{size}",
        )
    )
    console.out.print(str(report.out), markup=False)
