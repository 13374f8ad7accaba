"""tuoling data show"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tuoling import console
from tuoling.cli.data_check import Files
from tuoling.errors import UsageError
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.data.row import Row
    from tuoling.data.sources import Source
    from tuoling.text.templates import Template
    from tuoling.text.tokenizer import TextTokenizer

HELP = tr(
    """Show what rows become: the rendered text, learned tokens in colour, counts, and where the end token is.

    With --model or --tokenizer the ids themselves are shown, decoded; without, the template's text.""",
    """查看数据渲染后的样子：完整文本、用颜色标出的学习部分、计数，以及结束符的位置。

    给出 --model 或 --tokenizer 时，显示的是编码后再解码的结果；否则显示模板文本。""",
)


def command(
    files: Files,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help=tr("tokenizer and template of this model or run", "用此模型或运行的分词器与模板")
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help=tr("the tokenizer of this folder", "用此目录中的分词器"))
    ] = None,
    template: Annotated[
        str | None, typer.Option("--template", help=tr("render with this template", "渲染用的模板"))
    ] = None,
    rows: Annotated[
        int, typer.Option("--rows", min=1, help=tr("how many rows, from the first", "显示前几行"))
    ] = 3,
    row: Annotated[
        int | None,
        typer.Option("--row", min=1, help=tr("only this row, counted from 1", "只看第几行，从 1 数起")),
    ] = None,
    learn: Annotated[
        str,
        typer.Option(
            "--learn",
            help=tr("all replies, or the last one: all | last", "学习全部回答或只学最后一个：all | last"),
        ),
    ] = "all",
    train_on_inputs: Annotated[
        bool, typer.Option("--train-on-inputs", help=tr("questions are learned too", "问题也一起学习"))
    ] = False,
    max_seq_len: Annotated[
        int | None, typer.Option("--max-seq-len", min=1, help=tr("say what is over it", "指出超出多少"))
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help=tr("write one HTML file instead", "改为写一个 HTML 文件"))
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help=tr("show the ids too", "同时显示 token 编号"))] = False,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help=tr("read rows as this format instead of by content", "按此格式读取，而不按内容判断"),
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            "--columns",
            help=tr(
                "our names for columns: instruction=ask,output=answer",
                "列名对应：instruction=ask,output=answer",
            ),
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help=tr("print one JSON object on stdout", "在标准输出打印一个 JSON 对象")),
    ] = False,
) -> None:
    from tuoling.data.preview import preview, to_html, to_rich
    from tuoling.data.sources import parse_columns, resolve_sources
    from tuoling.files import atomic_write

    if max_seq_len and not (model or tokenizer):
        raise UsageError(
            tr("--max-seq-len needs a tokenizer to count with", "--max-seq-len 需要有分词器才能计数"),
            remedy=tr("add --model MODEL or --tokenizer FOLDER", "请加上 --model 模型 或 --tokenizer 目录"),
        )
    mode = _learn(learn)
    sources = resolve_sources(files, format=format, columns=parse_columns(columns))
    loaded, chosen = _tools(model, tokenizer, template)
    shown = [
        preview(
            one,
            template=chosen,
            tokenizer=loaded,
            learn=mode,
            train_on_inputs=train_on_inputs,
            max_seq_len=max_seq_len,
        )
        for one in _pick(sources, rows, row)
    ]
    if html is not None:
        with atomic_write(html) as file:
            file.write(to_html(shown, template=chosen.id, ids=ids))
        console.note(tr(f"written: {html}", f"已写入：{html}"))
    if as_json:
        result = {"template": chosen.id, "rows": [one.to_json() for one in shown]}
        print(json.dumps(result, ensure_ascii=False))  # noqa: T201
    elif html is None:
        for one in shown:
            console.out.print(to_rich(one, ids=ids, marks=not console.out.is_terminal))


def _learn(text: str) -> Literal["all", "last"]:
    if text == "all" or text == "last":
        return "all" if text == "all" else "last"
    raise UsageError(
        tr(f"--learn {text}: neither all nor last", f"--learn {text}：只能是 all 或 last"), where="--learn"
    )


def _pick(sources: list[Source], count: int, number: int | None) -> Iterator[Row]:
    """The first rows, or the one of this number, over all sources in order."""
    from tuoling.data.read import read_rows

    every = (row for source in sources for row in read_rows(source))
    if number is None:
        yield from islice(every, count)
        return
    found = next(islice(every, number - 1, number), None)
    if found is None:
        raise UsageError(tr(f"there is no row {number}", f"没有第 {number} 行"), where="--row")
    yield found


def _tools(
    model: str | None, tokenizer: str | None, template: str | None
) -> tuple[TextTokenizer | None, Template]:
    """Tokenizer (None where none is asked for) and template."""
    from tuoling.text.templates import choose_template

    source = loaded = None
    if model or tokenizer:
        from tuoling.models.source import find_model
        from tuoling.models.tokenizers import load_tokenizer

        source = find_model(model) if model else None
        loaded = load_tokenizer(tokenizer if tokenizer else source, for_training=False)  # type: ignore[arg-type]
    chosen, why = choose_template(
        requested=template,
        saved=source.template if source else None,
        tokenizer=loaded,
        family_default=source.family.template if source else None,
    )
    console.note(why)
    return loaded, chosen
