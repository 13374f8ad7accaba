"""tuoling convert"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from tuoling.cli.chat import RemoteCode
from tuoling.language import tr

HELP = tr(
    """Turn weights of one layout into another: what lies at SRC is recognised.

    Meta's .pth ↔ Hugging Face, another number of shards, pickles → safetensors, another number type; runs, adapters
    and models → GGUF for llama.cpp; GGUF (1, 2, 3) and the first ggml files → folders. The result is proven to
    compute the same, or its price is shown.""",
    """把权重从一种格式转换为另一种：SRC 的格式自动识别。

    Meta 的 .pth 与 Hugging Face 互转、改变分片数、pickle 转 safetensors、改变数值类型；运行、适配器、
    模型 → GGUF（供 llama.cpp 使用）；GGUF（1、2、3）与最早的 ggml 文件 → 目录。转换后验证计算结果一致，或给出代价。""",
)

AllowNan = Annotated[bool, typer.Option("--allow-nan", help=tr("write NaN as it is", "允许含 NaN 的权重"))]
NoVerify = Annotated[
    bool,
    typer.Option("--no-verify", help=tr("do not prove the result; recorded", "不验证结果；会留下记录")),
]
AsJson = Annotated[bool, typer.Option("--json", help=tr("print one JSON object", "打印一个 JSON 对象"))]


def command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help=tr("model folder or file", "模型目录或文件"))],
    out: Annotated[Path, typer.Argument(metavar="OUT", help=tr("must not exist yet", "不能已经存在"))],
    to: Annotated[str | None, typer.Option("--to", help="hf | meta | gguf | gguf-lora | adapter")] = None,
    outtype: Annotated[
        str | None,
        typer.Option(
            "--outtype",
            help=tr(
                "f32, f16, bf16; for GGUF q8_0, q4_k_m, … too; as the source, if not given",
                "f32、f16、bf16；GGUF 还可用 q8_0、q4_k_m 等；默认与源相同",
            ),
        ),
    ] = None,
    shards: Annotated[
        int | None, typer.Option("--shards", min=1, help=tr("number of weight files", "权重文件数"))
    ] = None,
    lora_alpha: Annotated[
        float | None,
        typer.Option("--lora-alpha", help=tr("of an adapter that does not say it", "适配器未写明时的 alpha")),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help=tr("base model of an adapter", "适配器的基座模型"))
    ] = None,
    pre_tokenizer: Annotated[
        str | None,
        typer.Option(
            "--pre-tokenizer",
            metavar="NAME",
            help=tr("for GGUF, where it is not recognised", "写 GGUF 时的分词前处理，无法识别时指定"),
        ),
    ] = None,
    allow_remote_code: RemoteCode = False,
    allow_nan: AllowNan = False,
    unchecked: Annotated[
        bool,
        typer.Option(
            "--unchecked",
            help=tr(
                "go on with a wrong checksum, lost zero points or a vocabulary without bytes; recorded",
                "校验和不符、零点丢失或词表没有字节时仍继续；会留下记录",
            ),
        ),
    ] = False,
    no_verify: NoVerify = False,
    as_json: AsJson = False,
) -> None:
    from tuoling.weights.convert import ConvertOptions, convert
    from tuoling.weights.parity import as_record

    options = ConvertOptions(
        outtype=outtype,
        shards=shards,
        verify=not no_verify,
        allow_nan=allow_nan,
        unchecked=unchecked,
        lora_alpha=lora_alpha,
        base=base,
        pre_tokenizer=pre_tokenizer,
        allow_remote_code=allow_remote_code,
    )
    report = convert(source, out, to=to, options=options)
    if as_json:
        print_json({**vars(report), "parity": report.parity and as_record(report.parity)})
        return
    tell_written(
        report,
        tr(
            f"{report.kind} → {report.to}: {report.tensors} tensors",
            f"{report.kind} → {report.to}：{report.tensors} 个张量",
        ),
    )


class Written(Protocol):
    """What a command left behind. notes: sentences for the user."""

    @property
    def out(self) -> Path: ...
    @property
    def notes(self) -> Sequence[str]: ...
    @property
    def size_bytes(self) -> int: ...


def tell_written(report: Written, done: str) -> None:
    """The notes, what was done and how large it is; the place alone on stdout, for whoever goes on with it."""
    from tuoling import console

    for line in report.notes:
        console.note(line)
    size = f"{report.size_bytes / 1e6:,.1f} MB"
    console.note(tr(f"{done}, {size}", f"{done}，{size}"))
    console.out.print(str(report.out), markup=False)


def print_json(values: dict[str, Any]) -> None:
    """One object on stdout; paths and dtypes as text."""
    print(json.dumps(values, ensure_ascii=False, default=str))  # noqa: T201
