"""tuoling grow-vocab"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuoling.cli.chat import RemoteCode
from tuoling.cli.convert import AllowNan, AsJson, NoVerify, print_json
from tuoling.language import tr

HELP = tr(
    """Give a LLaMA-like model more words: merge a sentencepiece vocabulary into its own.

    A new row is the mean of the rows that the word was written with, in the head too. What the model computed before
    stays as it was, and this is proven before OUT appears. Train afterwards: new rows know little.""",
    """给 LLaMA 一类的模型扩充词表：并入另一个 sentencepiece 词表。

    新词的向量取原先拼写它的各词片向量的平均，输出层相同。原有的计算结果不变，验证通过后才写出。扩充后需要再训练。""",
)


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=tr("folder or hub id", "目录或模型库编号"))],
    out: Annotated[Path, typer.Argument(metavar="OUT", help=tr("must not exist yet", "不能已经存在"))],
    tokenizer: Annotated[
        Path,
        typer.Option(
            "--tokenizer", help=tr("sentencepiece file with the new words", "含新词的 sentencepiece 文件")
        ),
    ],
    rows: Annotated[
        list[str] | None,
        typer.Option(
            "--rows", help=tr("rows to count tokens on, before and after", "用来比较前后词元数的数据")
        ),
    ] = None,
    allow_remote_code: RemoteCode = False,
    allow_nan: AllowNan = False,
    no_verify: NoVerify = False,
    as_json: AsJson = False,
) -> None:
    from tuoling import console
    from tuoling.weights.grow import grow_vocab

    report = grow_vocab(
        model,
        out,
        tokenizer,
        rows=rows or [],
        verify=not no_verify,
        allow_nan=allow_nan,
        allow_remote_code=allow_remote_code,
    )
    if as_json:
        print_json(report.to_json())
        return
    console.out.print(
        tr(
            f"{report.out}: {report.rows_before:,} → {report.rows_after:,} words; "
            f"the measured text has {report.tokens_before:,} → {report.tokens_after:,} tokens",
            f"{report.out}：词表 {report.rows_before:,} → {report.rows_after:,}；"
            f"所测文本的词元数 {report.tokens_before:,} → {report.tokens_after:,}",
        ),
        markup=False,
    )
