"""tuoling evaluate"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuoling import console
from tuoling.cli.chat import (
    Base,
    Device,
    Dtype,
    LoraAlpha,
    MaxNewTokens,
    QuantizationBit,
    RemoteCode,
    Revision,
    Template,
)
from tuoling.errors import DataError, UsageError
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.evaluate.evaluation import Evaluation

HELP = tr(
    """Say what a model is good at, class by class, its base beside it.

    tuoling evaluate RUN rows.json                               your own rows, any class column

    tuoling evaluate RUN eval_set.json --suite belle --judge URL MODEL

    tuoling evaluate RUN FOLDER --suite choice --shots 5         C-Eval, CMMLU, AGIEval

    tuoling evaluate RUN mgsm_zh.tsv --suite math

    tuoling evaluate RUN --suite lm-eval:TASK

    tuoling evaluate --compare RUN1 RUN2 RUN3                    scores by class against rows trained on

    Results lie in RUN/evaluation. Cut off midway, the same call goes on where it was.""",
    """逐类评测模型，并与其基座对照。

    tuoling evaluate RUN rows.json                               自己的数据，任意类别列

    tuoling evaluate RUN eval_set.json --suite belle --judge URL MODEL

    tuoling evaluate RUN FOLDER --suite choice --shots 5         C-Eval、CMMLU、AGIEval

    tuoling evaluate RUN mgsm_zh.tsv --suite math

    tuoling evaluate RUN --suite lm-eval:TASK

    tuoling evaluate --compare RUN1 RUN2 RUN3                    各类得分随训练条数的变化

    结果写入 RUN/evaluation。中途被打断后，再次运行同一命令会接着做。""",
)

SUITES = "mine | belle | choice | math | lm-eval:TASK"


def command(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_OR_MODEL [FILE]",
            help=tr("the model, then the suite's file or folder", "模型，然后是评测文件或目录"),
        ),
    ],
    suite: Annotated[str | None, typer.Option("--suite", help=SUITES)] = None,
    judge: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--judge",
            metavar="URL MODEL",
            help=tr("a judge behind an OpenAI-speaking address", "裁判模型的 OpenAI 接口地址与模型名"),
        ),
    ] = None,
    judge_prompts: Annotated[
        Path | None,
        typer.Option("--judge-prompts", help=tr("BELLE's eval_prompt.json", "BELLE 的 eval_prompt.json")),
    ] = None,
    key_variable: Annotated[
        str | None,
        typer.Option(
            "--key-variable",
            help=tr(
                "environment variable with the judge's key", "存放裁判密钥的环境变量，默认 TUOLING_API_KEY"
            ),
        ),
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option("--requests-per-minute", min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option("--tokens-per-minute", min=1)] = None,
    concurrency: Annotated[
        int, typer.Option("--concurrency", min=1, help=tr("requests at once", "同时发出的请求数"))
    ] = 4,
    alone: Annotated[bool, typer.Option("--alone", help=tr("without its base", "不评测基座"))] = False,
    arena: Annotated[
        bool,
        typer.Option("--arena", help=tr("the judge compares answers in pairs", "由裁判两两比较回答")),
    ] = False,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", help=tr("another model for --arena", "--arena 的其他对手")),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help=tr("compare evaluated runs", "比较已评测的多次训练"))
    ] = False,
    general: Annotated[
        str | None,
        typer.Option("--general", help=tr("general rows: has it forgotten?", "通用数据，用来检查遗忘")),
    ] = None,
    class_column: Annotated[
        str | None,
        typer.Option("--class-column", help=tr("else: ", "默认依次找：") + "class, category, kind …"),
    ] = None,
    format: Annotated[str | None, typer.Option("--format", help=tr("row format", "数据格式"))] = None,
    columns: Annotated[str | None, typer.Option("--columns", help="instruction=ask,output=answer")] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help=tr("first rows of each class", "每类只取前几题"))
    ] = None,
    shots: Annotated[
        int, typer.Option("--shots", min=0, help=tr("examples before a choice question", "选择题的示例数"))
    ] = 0,
    in_template: Annotated[
        bool,
        typer.Option("--in-template", help=tr("choice questions in the chat template", "选择题套用对话模板")),
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help=tr("rows at once", "每批条数"))] = 8,
    max_new_tokens: MaxNewTokens = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help=tr("folder of the results", "结果目录"))
    ] = None,
    template: Template = None,
    base: Base = None,
    lora_alpha: LoraAlpha = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quantization_bit: QuantizationBit = None,
    allow_remote_code: RemoteCode = False,
    as_json: Annotated[
        bool, typer.Option("--json", help=tr("print scores.json", "输出 scores.json"))
    ] = False,
) -> None:
    from tuoling.data.sources import parse_columns
    from tuoling.evaluate.evaluation import Evaluation
    from tuoling.infer.endpoint import Endpoint

    if compare:
        _compare(words, suite or "", out, as_json=as_json)
        return
    model, file = _named(words)
    load = {
        "template": template,
        "base": base,
        "lora_alpha": lora_alpha,
        "revision": revision,
        "dtype": dtype,
        "device": device,
        "quantization_bit": quantization_bit,
        "allow_remote_code": allow_remote_code,
    }
    asked = Evaluation(
        model,
        suite=suite or "mine",
        file=file,
        judge=Endpoint(
            *judge,
            key_variable=key_variable,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            concurrency=concurrency,
        )
        if judge
        else None,
        judge_prompts=judge_prompts,
        alone=alone,
        arena=arena,
        against=tuple(against or ()),
        general=general,
        class_column=class_column,
        format=format,
        columns=parse_columns(columns),
        limit=limit,
        shots=shots,
        in_template=in_template,
        batch_size=batch_size,
        load=load,
        settings={"max_new_tokens": max_new_tokens},
        out=out,
    )
    raise typer.Exit(_evaluate(asked, as_json=as_json))


def _named(words: list[str]) -> tuple[str, str | None]:
    """The model and the suite's file."""
    if len(words) > 2:
        raise UsageError(
            tr(f"too many words: {' '.join(words[2:])}", f"参数过多：{' '.join(words[2:])}"),
            remedy="tuoling evaluate RUN_OR_MODEL FILE; tuoling evaluate --compare RUN1 RUN2 …",
        )
    file = words[1] if len(words) > 1 else None
    if file is not None and not Path(file.split("#")[0]).expanduser().exists():
        raise DataError(tr("no such file or folder", "没有这个文件或目录"), where=file)
    return words[0], file


def _evaluate(asked: Evaluation, *, as_json: bool) -> int:
    """Evaluate with a progress bar and show the tables; the exit code."""
    from tuoling.evaluate.evaluation import evaluate
    from tuoling.infer.engine import GenerationSettings

    GenerationSettings().with_values(asked.settings)  # a bad value is said before a model is loaded
    with console.progress() as bar:
        tasks: dict[str, Any] = {}

        def step(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total, detail="")
            bar.update(tasks[what], advance=done)

        result = evaluate(asked, progress=step, say=console.note)
    if as_json:
        print(json.dumps(result.scores(), ensure_ascii=False))  # noqa: T201
    else:
        for folder, scores in zip(result.folders, result.scores(), strict=True):
            _show(folder, scores)
    if result.failed is not None:
        console.warn(
            tr("partial: the same call goes on where it stopped", "结果不完整：再次运行同一命令会接着做")
        )
        raise result.failed
    return 0


def _show(folder: Path, scores: dict[str, Any]) -> None:
    from tuoling.evaluate.show import rates_words, score_table

    console.out.print(score_table(scores))
    for line in rates_words(scores):
        console.out.print(line, markup=False)
    console.out.print(tr(f"results  {folder}", f"结果  {folder}"), markup=False)


def _compare(words: list[str], suite: str, out: Path | None, *, as_json: bool) -> None:
    from tuoling.evaluate.compare import compare

    found = compare([Path(word).expanduser() for word in words], suite=suite, out=out)
    if as_json:
        print(json.dumps(found.to_json(), ensure_ascii=False))  # noqa: T201
        return
    console.out.print(found.table())
    console.out.print(tr(f"picture  {found.picture}", f"图片  {found.picture}"), markup=False)
