"""What a job says on the terminal: before it starts, as it goes on, at its end."""

from __future__ import annotations

import json
from pathlib import Path

from tuoling import console, environment
from tuoling.generate.book import REJECTED, ROWS, UNPARSABLE
from tuoling.generate.filters import REASONS
from tuoling.generate.tally import Tally
from tuoling.language import tr
from tuoling.models.licence import Part
from tuoling.models.licence_answer import answer, names


def line(tally: Tally) -> str:
    refused = sum(tally.rejected.values()) + tally.unparsable
    cost = f"{tally.cost:.4g}" if tally.limits.price_in or tally.limits.price_out else ""
    return tr(
        f"{refused} rejected, {tally.tokens:,} tokens" + (f", cost {cost}" if cost else ""),
        f"不采用 {refused} 条，{tally.tokens:,} token" + (f"，费用 {cost}" if cost else ""),
    )


def before(bad: tuple[str, ...], parts: tuple[Part, ...]) -> None:
    """Seeds left out, and what the rows' licences will not allow."""
    for line in bad[:20]:
        console.warn(tr(f"left out: {line}", f"已跳过：{line}"))
    if bad:
        console.warn(tr(f"{len(bad)} bad seeds left out", f"共跳过 {len(bad)} 条不合格的种子"))
    found = answer(parts)
    if found.commercial == "no":
        because = names(found.because("commercial"), environment.language())
        console.warn(
            tr(
                f"what is trained on these rows may not be used commercially: {because}",
                f"用这些数据训练的结果不能商用：{because}",
            )
        )
    elif found.unknown:
        unknown = names(found.unknown, environment.language())
        console.note(
            tr(
                f"licence not known: {unknown}; --licence NAME=ID says it",
                f"许可未知：{unknown}；可用 --licence 名字=许可 声明",
            )
        )


def say_resumed(tally: Tally, again_lost: bool) -> None:
    console.note(
        tr(
            f"going on: {tally.rows} rows and {tally.answered} answers are there",
            f"接着做：已有 {tally.rows} 条数据、{tally.answered} 个回答",
        )
    )
    if tally.lost:
        then = tr("not asked again (--again-lost asks them)", "不再询问（--again-lost 可重问）")
        if again_lost:
            then = tr("asked again", "将重新询问")
        console.warn(
            tr(
                f"{tally.lost} requests were under way when it was killed, perhaps paid for: {then}",
                f"上次被强行中断时有 {tally.lost} 个请求在途，可能已计费：{then}",
            )
        )


def tell(tally: Tally, out: Path, as_json: bool) -> None:
    zh = environment.language() == "zh"
    if as_json:
        print(json.dumps({"out": str(out / ROWS), **tally.to_json()}, ensure_ascii=False))  # noqa: T201
    else:
        console.out.print(f"{out / ROWS}: {tally.rows}", markup=False)
    for reason, count in tally.rejected.most_common():
        console.note(f"  {count:>6}  {REASONS[reason][zh]}")
    if tally.unparsable:
        console.note(
            f"  {tally.unparsable:>6}  "
            + tr(f"answers that hold no row ({UNPARSABLE})", f"个回答无法解析（{UNPARSABLE}）")
        )
    if tally.rejected:
        console.note(tr(f"the rejected ones: {out / REJECTED}", f"未采用的见 {out / REJECTED}"))
    if tally.failed:
        console.warn(
            tr(
                f"{tally.failed} requests failed; the same call asks them again",
                f"{tally.failed} 个请求失败；同一命令会重问",
            )
        )
    if tally.lost:
        lost = f"{tally.lost_in + tally.lost_out:,}"
        console.warn(
            tr(
                f"{tally.lost} requests were under way when a run was killed: their answers are lost, and up to {lost} "
                "tokens of the above were spent on them (Ctrl-C waits for answers under way)",
                f"运行被强行终止时有 {tally.lost} 个请求在途：其回答已丢失，以上 token 中至多 {lost} 个花在它们上面"
                "（用 Ctrl-C 停止会等在途的回答）",
            )
        )
    console.note(
        tr(
            f"{tally.asked} requests, {tally.answered} answers, {line(tally)}",
            f"{tally.asked} 个请求，{tally.answered} 个回答，{line(tally)}",
        )
    )
    if tally.stopped:
        console.warn(tr(f"stopped: {tally.stopped}", f"已停止：{tally.stopped}"))
