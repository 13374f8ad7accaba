"""tuoling convert"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

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
    allow_nan: Annotated[
        bool, typer.Option("--allow-nan", help=tr("write NaN as it is", "允许含 NaN 的权重"))
    ] = False,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help=tr("go on when a checksum is wrong", "校验和不符时仍继续"))
    ] = False,
    no_verify: Annotated[
        bool,
        typer.Option("--no-verify", help=tr("do not prove the result; recorded", "不验证结果；会留下记录")),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help=tr("print one JSON object", "打印一个 JSON 对象"))
    ] = False,
) -> None:
    from tuoling import console
    from tuoling.weights.convert import ConvertOptions, convert

    options = ConvertOptions(
        outtype=outtype,
        shards=shards,
        verify=not no_verify,
        allow_nan=allow_nan,
        unchecked=unchecked,
        lora_alpha=lora_alpha,
        base=base,
        pre_tokenizer=pre_tokenizer,
    )
    report = convert(source, out, to=to, options=options)
    if as_json:
        print(json.dumps(vars(report), ensure_ascii=False, default=str))  # noqa: T201
        return
    for line in report.notes:
        console.note(line)
    size = f"{report.size_bytes / 1e6:,.1f} MB"
    console.note(
        tr(
            f"{report.kind} → {report.to}: {report.tensors} tensors, {size}",
            f"{report.kind} → {report.to}：{report.tensors} 个张量，{size}",
        )
    )
    console.out.print(str(report.out), markup=False)
