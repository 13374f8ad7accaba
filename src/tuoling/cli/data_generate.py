"""tuoling data generate"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuoling import console
from tuoling.errors import EndpointError, UsageError
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.generate.job import Job
    from tuoling.generate.start import Order
    from tuoling.generate.tally import Limits, Tally

HELP = tr(
    """Make rows: from seed tasks, a field's questions, rows or documents, by a model that answers.

    tuoling data generate self-instruct --seeds zh_seed_tasks.json --endpoint URL --model NAME --out DIR

    self-instruct, domain, self-cognition (nobody is asked), augment, from-text. DIR/rows.jsonl is for `tuoling train`;
    cut off, the same call goes on and asks nothing again that was answered. The key: TUOLING_API_KEY.""",
    """生成数据：用种子任务、领域问题、已有数据或文档，由一个模型来回答。

    tuoling data generate self-instruct --seeds zh_seed_tasks.json --endpoint 地址 --model 模型名 --out 目录

    self-instruct、domain、self-cognition（不需要模型）、augment、from-text。目录/rows.jsonl 可直接用于 tuoling train；
    中断后用同一命令接着做，已得到回答的不会再问。密钥放在环境变量 TUOLING_API_KEY。""",
)
_NOTE_EVERY = 50
"""Answers between two lines where stderr is no terminal."""


def command(
    kind: Annotated[
        str,
        typer.Argument(metavar="KIND", help="self-instruct | domain | self-cognition | augment | from-text"),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help=tr("folder of the job", "任务目录"))],
    seeds: Annotated[
        list[str] | None,
        typer.Option(
            "--seeds", help=tr("seed tasks, questions, rows, documents", "种子任务、问题、数据或文档")
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option("--rows", min=1, help=tr("rows wanted: 100 where not given", "想要的条数，默认 100")),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option("--endpoint", metavar="URL", help=tr("an OpenAI-speaking address", "OpenAI 接口地址")),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help=tr("the model's name there", "接口上的模型名"))
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            metavar="RUN_OR_MODEL",
            help=tr("or a run, model or GGUF file here", "或本机的运行目录、模型、GGUF"),
        ),
    ] = None,
    questions: Annotated[
        list[str] | None,
        typer.Option("--questions", help=tr("domain: questions to answer", "domain：要回答的现成问题")),
    ] = None,
    answered: Annotated[
        list[str] | None,
        typer.Option("--answered", help=tr("domain: pairs that are there", "domain：已有的问答，不再重复")),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against", help=tr("rows not to repeat, such as a test set", "不可重复的数据，例如测试集")
        ),
    ] = None,
    persona: Annotated[
        str | None, typer.Option("--persona", help=tr("domain: who answers", "domain：由谁来回答"))
    ] = None,
    how: Annotated[str, typer.Option("--how", help="augment: paraphrase | multi-turn")] = "paraphrase",
    name: Annotated[
        str | None, typer.Option("--name", help=tr("self-cognition: its name", "自我认知：名字"))
    ] = None,
    maker: Annotated[
        str | None, typer.Option("--maker", help=tr("self-cognition: its maker", "自我认知：开发者"))
    ] = None,
    year: Annotated[
        str | None, typer.Option("--year", help=tr("self-cognition: its year", "自我认知：年份"))
    ] = None,
    per_call: Annotated[
        int | None, typer.Option("--per-call", min=1, max=50, help=tr("items of a request", "每个请求要几条"))
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, max=2.0)] = 1.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0)] = 1.0,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=16, help=tr("of one answer", "每个回答的 token 上限"))
    ] = 2048,
    seed: Annotated[int, typer.Option("--seed", help=tr("of what is drawn", "抽样的随机种子"))] = 0,
    concurrency: Annotated[
        int, typer.Option("--concurrency", min=1, help=tr("requests at once", "同时发出的请求数"))
    ] = 4,
    requests_per_minute: Annotated[int | None, typer.Option("--requests-per-minute", min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option("--tokens-per-minute", min=1)] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", help=tr("seconds without a byte", "多少秒无响应算超时"))
    ] = 120.0,
    max_retries: Annotated[int, typer.Option("--max-retries", min=0)] = 5,
    key_variable: Annotated[
        str | None,
        typer.Option(
            "--key-variable",
            help=tr("environment variable with the key", "存放密钥的环境变量，默认 TUOLING_API_KEY"),
        ),
    ] = None,
    budget_tokens: Annotated[
        int | None,
        typer.Option(
            "--budget-tokens", min=1, help=tr("never more, all runs together", "所有运行合计的上限")
        ),
    ] = None,
    budget_cost: Annotated[
        float | None,
        typer.Option("--budget-cost", min=0.0, help=tr("as --budget-tokens, in money", "费用上限")),
    ] = None,
    price_in: Annotated[
        float,
        typer.Option(
            "--price-in", min=0.0, help=tr("for a million prompt tokens", "每百万输入 token 的价格")
        ),
    ] = 0.0,
    price_out: Annotated[
        float,
        typer.Option(
            "--price-out", min=0.0, help=tr("for a million answer tokens", "每百万输出 token 的价格")
        ),
    ] = 0.0,
    give_up_after: Annotated[
        int,
        typer.Option(
            "--give-up-after", min=1, help=tr("answers without a row", "连续多少个回答没有产出就停止")
        ),
    ] = 50,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help=tr("leave bad seeds out", "跳过不合格的种子"))
    ] = False,
    again_lost: Annotated[
        bool,
        typer.Option(
            "--again-lost",
            help=tr(
                "ask again what was under way at a kill: may be paid for twice",
                "重问被强行中断时在途的请求，可能重复付费",
            ),
        ),
    ] = False,
    licence: Annotated[
        list[str] | None,
        typer.Option(
            "--licence",
            metavar="NAME=ID",
            help=tr("your word: generator=apache-2.0", "由你声明：generator=apache-2.0"),
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help=tr("print one JSON object", "打印一个 JSON 对象"))
    ] = False,
) -> None:
    from tuoling.cli.licence import pairs_of
    from tuoling.generate.domain import PERSONA
    from tuoling.generate.start import Order
    from tuoling.generate.tally import Limits

    values = {"name": name, "maker": maker, "year": year}
    order = Order(
        kind,
        seeds=tuple(seeds or ()),
        questions=tuple(questions or ()),
        answered=tuple(answered or ()),
        against=tuple(against or ()),
        persona=PERSONA if persona is None else persona,
        how=how,  # type: ignore[arg-type]
        per_call=per_call,
        new=rows is not None or not questions,
        seed=seed,
        skip_bad=skip_bad,
        options={"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens},
        values={key: text for key, text in values.items() if text is not None},
    )
    said = pairs_of(licence or [])
    if kind == "self-cognition":
        _fill_in(order, out, said, as_json)
        return
    wanted = 100 if rows is None and order.new and kind in ("self-instruct", "domain") else rows
    limits = Limits(wanted, budget_tokens, budget_cost, price_in, price_out, give_up_after)
    if budget_cost is not None and not (price_in or price_out):
        raise UsageError(
            tr("--budget-cost without a price", "有 --budget-cost 却没有价格"),
            remedy="--price-in 1 --price-out 2",
        )
    if (endpoint is None) == (engine is None):
        raise UsageError(
            tr(
                "who answers? --endpoint URL or --engine MODEL",
                "由谁回答？请给出 --endpoint 地址 或 --engine 模型",
            ),
            remedy="--endpoint http://127.0.0.1:8000/v1 --model NAME",
        )
    asked = {
        "key_variable": key_variable,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrency": concurrency,
        "timeout_s": timeout,
        "max_retries": max_retries,
    }
    _generate(
        order, limits, out, (endpoint, model, asked) if endpoint else engine or "", said, again_lost, as_json
    )


def _generate(
    order: Order,
    limits: Limits,
    out: Path,
    who: tuple[str, str | None, dict[str, Any]] | str,
    said: dict[str, str],
    *flags: bool,
) -> None:
    from tuoling.generate.job import Job
    from tuoling.generate.start import claim, licence_words, lineage, make_task, opener_of, record
    from tuoling.generate.tell import before, say_resumed, tell
    from tuoling.models.licence import write_lineage

    again_lost, as_json = flags
    opener, generator = opener_of(who)  # what is wrong with the call is said before anything is made
    parts = lineage(order, generator, said)
    task, bad = make_task(order)
    resumed = claim(out, order)
    write_lineage(out, parts)
    before(bad, parts)
    stamp = {"task": order.task, "licence": licence_words(parts)}
    with Job(out, task, limits, stamp, again_lost=again_lost) as job:
        if resumed:
            say_resumed(job.tally, again_lost)
        problem = None
        try:
            _run(job, opener)
        except EndpointError as error:
            problem = error
            job.tally.stopped = error.problem
        finally:
            record(out, order, job.tally.to_json())
    tell(job.tally, out, as_json)
    if problem is not None:
        raise EndpointError(
            problem.problem,
            where=problem.where,
            remedy="\n".join(
                filter(
                    None, (problem.remedy, tr("the same call goes on where it was", "用同一命令即可接着做"))
                )
            ),
        )
    raise typer.Exit(0 if job.tally.whole else 1)


def _run(job: Job, opener: Any) -> None:
    """Ask and show how far it is."""
    from tuoling.generate.tell import line

    with console.progress() as bar:
        shown = bar.add_task(tr("rows", "条数"), total=job.tally.limits.rows, detail="")

        def step(tally: Tally) -> None:
            bar.update(shown, completed=tally.rows, detail=line(tally))
            if not console.err.is_terminal and tally.answered and tally.answered % _NOTE_EVERY == 0:
                console.note(tr(f"{tally.rows} rows; {line(tally)}", f"{tally.rows} 条；{line(tally)}"))

        job.step = step
        if job.tally.done:
            return
        asker = opener(job)
        try:
            job.run(asker)
        finally:
            asker.close()


def _fill_in(order: Order, out: Path, said: dict[str, str], as_json: bool) -> None:
    """Nobody is asked: the whole file at once."""
    from tuoling.files import atomic_write
    from tuoling.generate.book import ROWS
    from tuoling.generate.start import claim, fill_in, lineage, record
    from tuoling.generate.tell import before
    from tuoling.models.licence import write_lineage

    rows, rejected, bad = fill_in(order)
    parts = lineage(order, (), said)
    claim(out, order)
    write_lineage(out, parts)
    before(bad, parts)
    with atomic_write(out / ROWS) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    result = {"rows": len(rows), "rejected": rejected}
    record(out, order, result)
    if as_json:
        print(json.dumps({"out": str(out / ROWS), **result}, ensure_ascii=False))  # noqa: T201
    else:
        console.out.print(f"{out / ROWS}: {len(rows)}", markup=False)
    if rejected:
        console.warn(
            tr(
                f"{sum(rejected.values())} rows still hold a placeholder and are not written: --name, --maker, --year",
                f"{sum(rejected.values())} 条仍有占位符，没有写入：请给出 --name、--maker、--year",
            )
        )
    raise typer.Exit(0 if rows else 1)
