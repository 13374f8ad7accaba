"""tuoling data check"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuoling import console, environment
from tuoling.errors import UsageError
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.data.check import CheckReport, Tally
    from tuoling.data.sources import Source
    from tuoling.text.templates import Template
    from tuoling.text.tokenizer import TextTokenizer

HELP = tr(
    """Judge every row: what is bad and where, what is there twice, how long rows are.

    Exit code 1 if a row is bad; --allow-bad 1% is the way past. Duplicates stay good. Every verdict goes into a
    ledger (JSONL). With --model or --tokenizer, lengths are tokens.""",
    """检查每一行数据：哪里不对、哪些重复、有多长。

    只要有一行不合格，退出码就是 1；--allow-bad 1% 可以放行。重复的行仍算合格。每条结论都写入台账（JSONL）。
    给出 --model 或 --tokenizer 时，长度以 token 计。""",
)

Files = Annotated[
    list[str],
    typer.Argument(
        metavar="FILES",
        help=tr(
            "files, folders, path#500 (a sample), dataset_info.json, hub ids",
            "文件、文件夹、path#500（抽样）、dataset_info.json、hub 数据集",
        ),
        show_default=False,
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format", help=tr("read rows as this format instead of by content", "按此格式读取，而不按内容判断")
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        "--columns",
        help=tr(
            "our names for columns: instruction=ask,output=answer", "列名对应：instruction=ask,output=answer"
        ),
    ),
]


def command(
    files: Files,
    format: Format = None,
    columns: Columns = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="TEST",
            help=tr(
                "test rows that must not be asked here; repeatable",
                "测试数据，其中的问题不应在此出现；可重复",
            ),
        ),
    ] = None,
    allow_bad: Annotated[
        str, typer.Option("--allow-bad", help=tr("share of bad rows to put up with", "可容忍的不合格比例"))
    ] = "0",
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help=tr("count tokens as this model or run does", "按此模型或运行来数 token")
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help=tr("count tokens with this tokenizer", "按此分词器来数 token")),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option("--template", help=tr("the template rows will be rendered with", "渲染用的模板")),
    ] = None,
    max_seq_len: Annotated[
        int | None,
        typer.Option(
            "--max-seq-len",
            min=1,
            help=tr("rows over this many tokens are bad", "超过这么多 token 的行不合格"),
        ),
    ] = None,
    no_near: Annotated[
        bool, typer.Option("--no-near", help=tr("leave out the search for near duplicates", "不查近似重复"))
    ] = False,
    ledger: Annotated[
        Path | None,
        typer.Option(
            "--ledger",
            help=tr("where the ledger goes [default: the cache folder]", "台账位置 [默认：缓存目录]"),
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help=tr("print one JSON object on stdout", "在标准输出打印一个 JSON 对象")),
    ] = False,
) -> None:
    from tuoling.data.check import check, parse_share
    from tuoling.data.sources import parse_columns, resolve_sources

    if (template or max_seq_len) and not (model or tokenizer):
        option = "--template" if template else "--max-seq-len"
        raise UsageError(
            tr(f"{option} needs a tokenizer to count with", f"{option} 需要有分词器才能计数"),
            remedy=tr("add --model MODEL or --tokenizer FOLDER", "请加上 --model 模型 或 --tokenizer 目录"),
        )
    share = parse_share(allow_bad)
    sources = resolve_sources(files, format=format, columns=parse_columns(columns))
    tests = resolve_sources(against) if against else []
    text_tokenizer, text_template = _measure(model, tokenizer, template)
    with console.progress() as bar:
        task = bar.add_task(tr("checking", "检查"), total=None, detail="")
        report = check(
            sources,
            against=tests,
            tokenizer=text_tokenizer,
            template=text_template,
            max_seq_len=max_seq_len,
            allow_bad=share,
            ledger=ledger or default_ledger(sources),
            near=not no_near,
            progress=lambda rows: bar.advance(task, rows),
        )
    for found in report.guesses:
        console.note(found.words)
    if as_json:
        result = report.to_json()
        if text_template is not None:
            result["template"] = text_template.id
        print(json.dumps(result, ensure_ascii=False))  # noqa: T201
    else:
        _show(report)
    if not report.passed:
        raise typer.Exit(1)


def default_ledger(sources: Sequence[Source]) -> Path:
    """One place per list of sources, in the cache: a second check of them replaces it."""
    names = "\n".join(str(Path(source.path).absolute()) for source in sources)
    stem = Path(sources[0].path).stem[:40]
    return (
        environment.cache_dir() / "ledgers" / f"{stem}-{hashlib.sha256(names.encode()).hexdigest()[:8]}.jsonl"
    )


def _measure(
    model: str | None, tokenizer: str | None, template: str | None
) -> tuple[TextTokenizer | None, Template | None]:
    """The tokenizer and template to count with; both None where none is asked for."""
    if not (model or tokenizer):
        return None, None
    from tuoling.models.source import find_model
    from tuoling.models.tokenizers import load_tokenizer
    from tuoling.text.templates import choose_template

    source = find_model(model) if model else None
    loaded = load_tokenizer(tokenizer if tokenizer else source)  # type: ignore[arg-type]
    chosen, why = choose_template(
        requested=template,
        saved=source.template if source else None,
        tokenizer=loaded,
        family_default=source.family.template if source else None,
    )
    console.note(why)
    return loaded, chosen


def _show(report: CheckReport) -> None:
    """The report for people, on stdout."""
    for place, problem in report.examples:
        where = f"{place}:{problem.field}" if problem.field else str(place)
        console.out.print(f"[red]{_plain(where)}[/red]: {_plain(problem.message)}")
    if report.total.bad > len(report.examples):
        rest = report.total.bad - len(report.examples)
        console.out.print(
            tr(f"… and {rest} more bad rows, all in the ledger", f"……另有 {rest} 行不合格，全部见台账")
        )
    _show_table(report)
    _show_counts(report)
    _show_lengths(report)
    if report.total.bad:
        verdict = (
            tr("within --allow-bad", "在 --allow-bad 之内")
            if report.passed
            else tr("not accepted", "不予通过")
        )
        share = report.total.bad / report.total.rows
        bad = tr(
            f"bad rows: {report.total.bad} ({share:.2%}), {verdict}",
            f"不合格 {report.total.bad} 行（{share:.2%}）：{verdict}",
        )
        console.out.print(bad)
    if report.ledger:
        console.out.print(tr(f"ledger: {report.ledger}", f"台账：{report.ledger}"), markup=False)


def _show_table(report: CheckReport) -> None:
    """A line a file where there are several, and one for all; paths whole, however long."""
    from rich.cells import cell_len

    headings = [
        tr("rows", "行数"), tr("good", "合格"), tr("bad", "不合格"), tr("duplicates", "重复"),
        tr("near", "近似重复"), tr("overlap", "与测试重叠"),
    ]  # fmt: skip
    lines = [["", *headings]]
    if len(report.files) > 1:
        lines += [[path, *_cells(tally, report)] for path, tally in report.files.items()]
    lines.append([tr("all", "合计"), *_cells(report.total, report)])
    widths = [max(cell_len(line[column]) for line in lines) for column in range(len(headings) + 1)]
    for line in lines:
        cells = [line[0] + " " * (widths[0] - cell_len(line[0]))]
        cells += [
            " " * (width - cell_len(cell)) + cell for cell, width in zip(line[1:], widths[1:], strict=True)
        ]
        console.out.print("   ".join(cells), markup=False)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _cells(tally: Tally, report: CheckReport) -> list[str]:
    near = str(tally.near_duplicates) if report.near else "-"
    overlap = str(tally.overlap) if report.against is not None else "-"
    return [str(tally.rows), str(tally.good), str(tally.bad), str(tally.duplicates), near, overlap]


def _show_counts(report: CheckReport) -> None:
    """Formats, problems and flags by kind, and what was found of the test rows."""
    lines: list[tuple[str, dict[str, Any]]] = [
        (tr("formats", "格式"), report.total.formats),
        (tr("problems", "问题"), report.total.problems),
        (tr("flags (rows stay good)", "提醒（仍算合格）"), report.total.flags),
    ]
    for name, counts in lines:
        if counts:
            listed = ", ".join(
                f"{key} {count}" for key, count in sorted(counts.items(), key=lambda kv: -kv[1])
            )
            console.out.print(f"{name}{tr(': ', '：')}{listed}", markup=False)
    for name, count in report.untrained.items():
        console.out.print(
            tr(
                f"{name}: {count} rows are checked, but not trained unless --format {name} asks for it",
                f"{name}：{count} 行只检查、不训练，除非用 --format {name} 指定",
            )
        )
    if report.against is not None:
        found, rows = report.against["found"], report.against["rows"]
        console.out.print(
            tr(
                f"{found} of {rows} test rows are also asked here",
                f"测试数据 {rows} 行中，有 {found} 行的问题也出现在这里",
            )
        )


def _show_lengths(report: CheckReport) -> None:
    lengths = report.total.to_json(report.unit)
    histogram = lengths["lengths"]
    if not histogram["rows"]:
        return
    unit = (
        tr("tokens a row", "每行的 token 数")
        if report.unit == "tokens"
        else tr("characters a row", "每行的字符数")
    )
    console.out.print(
        tr(
            f"{unit}: median {histogram['median']}, 95% {histogram['p95']}, 99% {histogram['p99']}, "
            f"longest {histogram['max']}",
            f"{unit}：中位 {histogram['median']}，95% {histogram['p95']}，99% {histogram['p99']}，"
            f"最长 {histogram['max']}",
        )
    )
    most = max(entry["rows"] for entry in histogram["histogram"])
    for entry in histogram["histogram"]:
        if entry["rows"]:
            end = f"–{entry['to'] - 1}" if entry["to"] else "+"
            bar = "█" * max(1, round(30 * entry["rows"] / most))
            console.out.print(f"  {entry['from']:>6}{end:<7} {bar} {entry['rows']}")
    if lengths["kept"]:
        kept = ", ".join(f"{limit}: {share:.1%}" for limit, share in lengths["kept"].items())
        console.out.print(tr(f"rows kept at {kept}", f"各长度上限下保留的比例：{kept}"))
