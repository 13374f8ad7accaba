"""tuoling merge"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from tuoling.cli.chat import Base, LoraAlpha, RemoteCode, Revision
from tuoling.cli.convert import AsJson, NoVerify, print_json, tell_written
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.weights.merge import MergeReport
    from tuoling.weights.merged import Weighted

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
            metavar="ADAPTER[:WEIGHT][:alpha=A]",
            help=tr(
                "one more, on the same base; again for others. alpha: of this one, before --lora-alpha",
                "再加一个同一基座的适配器；可重复。alpha 只用于它，优先于 --lora-alpha",
            ),
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
    no_verify: NoVerify = False,
    as_json: AsJson = False,
) -> None:
    from tuoling.errors import OutputError
    from tuoling.models.source import find_model
    from tuoling.weights.merge import stored_dtype
    from tuoling.weights.merged import Weighted

    stored = stored_dtype(dtype)
    if out.exists():
        raise OutputError(tr("already exists", "已经存在"), where=str(out))
    named = [Named(adapter, weight), *map(split_adapter, more or [])]
    weighted = [
        Weighted(
            find_model(one.place, base=base, revision=revision, lora_alpha=one.lora_alpha or lora_alpha),
            one.weight,
        )
        for one in named
    ]
    report = _merge(weighted, out, stored, allow_remote_code=allow_remote_code, verify=not no_verify)
    if as_json:
        print_json(_as_json(report))
        return
    tell_written(
        report,
        tr(
            f"{report.changed} of {report.tensors} tensors changed",
            f"共 {report.tensors} 个张量，改动 {report.changed} 个",
        ),
    )


class Named(NamedTuple):
    """An adapter as it is named on the command line."""

    place: str
    weight: float = 1.0
    lora_alpha: float | None = None


def split_adapter(word: str) -> Named:
    """`ADAPTER:0.5:alpha=16`; what follows a colon and is neither a number nor an alpha belongs to the name."""
    place = word
    values: dict[str, float] = {}
    while True:
        head, colon, tail = place.rpartition(":")
        key, text = ("lora_alpha", tail[6:]) if tail.startswith("alpha=") else ("weight", tail)
        try:
            value = float(text)
        except ValueError:
            return Named(place, **values)
        if not (colon and head) or key in values:
            return Named(place, **values)
        place, values[key] = head, value


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
