"""What a model could do before: how likely general answers are under the base and under the tuned model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tuoling.evaluate.items import Item
from tuoling.evaluate.outcome import Outcome, Side
from tuoling.evaluate.sides import Contender
from tuoling.infer.engine import PromptTooLong
from tuoling.language import tr

METRIC = "log_likelihood"


def forgetting(
    contenders: Sequence[Contender],
    items: Sequence[Item],
    file: str,
    *,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Outcome:
    """Mean log-likelihood a token (nats, higher is better) of the reference answers of general rows, by class.

    "worse" for the tuned side is forgetting. Rows that do not fit a context are left out of both sides.
    """
    asked = [item for item in items if item.target]
    outcome = Outcome("general", file, asked, [], METRIC)
    for contender in contenders:
        values: list[float | None] = []
        with contender.opened() as engine:
            for item in asked:
                try:
                    score = engine.score([item.conversation.answered(item.target)])[0]
                    values.append(-score.nats / score.tokens if score.tokens else None)
                except PromptTooLong:
                    values.append(None)
                progress(tr("general rows", "通用数据"), 1, len(asked) * len(contenders))
        outcome.sides.append(Side(contender.name, contender.path, {}, [], {METRIC: values}))
    return outcome


def words(scores: dict[str, Any]) -> str:
    """One line for people, from the outcome's scores."""
    overall = scores["overall"][METRIC]
    difference = overall.get("difference")
    if difference is None:
        return tr("general rows: one model only", "通用数据：只有一个模型")
    said = {
        "worse": tr("it has forgotten", "有遗忘"),
        "better": tr("it has not forgotten, it has gained", "没有遗忘，反而更好"),
        "cannot tell": tr("no forgetting to be seen", "看不出遗忘"),
    }[difference["verdict"]]
    return tr(
        f"general rows: {overall['base']['mean']:.3f} → {overall['tuned']['mean']:.3f} nats a token, {said}",
        f"通用数据：每 token 对数似然 {overall['base']['mean']:.3f} → {overall['tuned']['mean']:.3f}，{said}",
    )
