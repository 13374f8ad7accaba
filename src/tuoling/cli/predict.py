"""tuoling predict"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuoling.cli.chat import (
    Base,
    Beams,
    Device,
    Dtype,
    Endpoint,
    Engine,
    LoraAlpha,
    MaxMemory,
    MaxNewTokens,
    Merge,
    MinNewTokens,
    NoRepeat,
    Penalty,
    QuantizationBit,
    RemoteCode,
    Revision,
    RunOrModel,
    Sample,
    Seed,
    Temperature,
    Template,
    TopK,
    TopP,
)
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.infer.predict import PredictReport

HELP = tr(
    """Answer the rows of a test file: predictions.json with input, predict and target.

    Any row format. Cut off midway, the same call goes on where it was. Greedy unless sampling is asked for. With
    --endpoint URL,URL the rows are spread over servers; when one dies, the others answer its rows.""",
    """回答测试文件中的每条数据：生成 predictions.json，含 input、predict、target。

    支持所有数据格式。中途被打断后，再次运行同一命令会接着做。默认贪心解码，除非要求采样。
    用 --endpoint URL,URL 可把数据分给多台服务器；某台停机时，其余服务器接手它的数据。""",
)


def command(
    run_or_model: RunOrModel,
    data: Annotated[list[str], typer.Option("--data", "-d", help=tr("test rows", "测试数据"))],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help=tr("RUN/predictions.json, else ./predictions.json", "默认写入运行目录或当前目录"),
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            min=1,
            help=tr("rows at once, at each server; default 16", "同时处理的条数（每台服务器）；默认 16"),
        ),
    ] = None,
    n: Annotated[
        int,
        typer.Option(
            "--n",
            min=1,
            help=tr("answers a row: drawn, or the best beams", "每条的回答数：采样得到，或取最优的几束"),
        ),
    ] = 1,
    format: Annotated[
        str | None,
        typer.Option("--format", help=tr("row format, instead of the guess", "数据格式，代替自动判断")),
    ] = None,
    columns: Annotated[str | None, typer.Option("--columns", help="instruction=ask,output=answer")] = None,
    template: Template = None,
    base: Base = None,
    lora_alpha: LoraAlpha = None,
    max_new_tokens: MaxNewTokens = None,
    min_new_tokens: MinNewTokens = None,
    do_sample: Sample = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    num_beams: Beams = None,
    repetition_penalty: Penalty = None,
    no_repeat_ngram_size: NoRepeat = None,
    seed: Seed = None,
    merge: Merge = False,
    engine: Engine = None,
    endpoint: Endpoint = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantization_bit: QuantizationBit = None,
    max_memory: MaxMemory = None,
    allow_remote_code: RemoteCode = False,
    as_json: Annotated[
        bool, typer.Option("--json", help=tr("print the report as JSON", "以 JSON 输出报告"))
    ] = False,
) -> None:
    from tuoling.api import load
    from tuoling.data.sources import parse_columns, resolve_sources
    from tuoling.files import require_writable
    from tuoling.infer.engine import GenerationSettings
    from tuoling.infer.predict import BATCH_ROWS, settings_of_answers
    from tuoling.infer.terminal import warn_idle

    values = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "do_sample": do_sample,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "num_beams": num_beams,
        "repetition_penalty": repetition_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "seed": seed,
    }
    settings_of_answers(
        GenerationSettings().with_values(values), n
    )  # a bad value is said before a model is loaded
    place = out or _beside(run_or_model)
    renamed = parse_columns(columns)
    resolve_sources(data, format=format, columns=renamed)  # what is missing is said before a model is loaded
    require_writable(place.absolute().parent)
    with load(
        run_or_model,
        template=template,
        base=base,
        lora_alpha=lora_alpha,
        revision=revision,
        dtype=dtype,
        device=device,
        quantization_bit=quantization_bit,
        max_memory=max_memory,
        allow_remote_code=allow_remote_code,
        merge=merge,
        engine=engine,
        endpoint=endpoint,
        concurrency=batch_size,
    ) as model:
        warn_idle(model.settings_of_prediction(**values))
        report = model.predict_file(
            data,
            place,
            batch_size=batch_size or BATCH_ROWS,
            n=n,
            format=format,
            columns=renamed,
            **values,
        )
    _tell(report, place)
    if as_json:
        print(json.dumps({"predictions": str(place), **report.to_json()}, ensure_ascii=False))  # noqa: T201
    raise typer.Exit(1 if report.too_long or report.unusable or report.failed else 0)


def _beside(run_or_model: str) -> Path:
    folder = Path(run_or_model).expanduser()
    return (folder if (folder / "run.json").is_file() else Path()) / "predictions.json"


def _tell(report: PredictReport, out: Path) -> None:
    """Counts and speed, and every row that has no prediction."""
    from tuoling import console

    for place in report.unusable[:20]:
        console.warn(tr(f"left out: {place}", f"未处理：{place}"))
    for place in [*report.too_long[:20], *report.failed[:20]]:
        console.warn(tr(f"no prediction: {place}", f"没有预测：{place}"))
    bad = len(report.unusable) + len(report.too_long) + len(report.failed)
    if bad:
        console.warn(
            tr(f"{bad} of {report.rows} rows have no prediction", f"{report.rows} 条中有 {bad} 条没有预测")
        )
    if report.failed:
        console.note(
            tr(
                "the same call asks again for the rows that the servers refused",
                "再次运行同一命令，只重新请求服务器拒绝的数据",
            )
        )
    console.note(
        tr(
            f"{out}: {report.predicted} predicted, {report.reused} kept from before, "
            f"{report.tokens} tokens in {report.seconds:.1f} s ({report.tokens_per_s:,.0f} tokens/s)",
            f"{out}：新预测 {report.predicted} 条，沿用之前的 {report.reused} 条，"
            f"{report.tokens} 个 token，用时 {report.seconds:.1f} 秒（{report.tokens_per_s:,.0f} token/秒）",
        )
    )
