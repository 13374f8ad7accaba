"""Suites whose questions are answered in words: BELLE's set, the user's own rows, arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuoling.errors import DataError, EndpointError, MissingPackage
from tuoling.evaluate.answers import Answer, Log, answer_items, empty_words
from tuoling.evaluate.arena import Arena
from tuoling.evaluate.classes import BELLE_CLASSES, nearest_class
from tuoling.evaluate.items import Items
from tuoling.evaluate.judge import Judge
from tuoling.evaluate.labels import Note
from tuoling.evaluate.metrics import REFERENCED
from tuoling.evaluate.outcome import Outcome, Side
from tuoling.evaluate.sides import Contender, greedy
from tuoling.language import tr

ANSWERS = "answers.jsonl"
JUDGEMENTS = "judgements.jsonl"
SHORT_TARGET = 20
"""Median length of references, in characters, up to which whole answers are compared: longer ones never match."""

Metrics = Mapping[str, Callable[[str, str], float]]
Progress = Callable[[str, int, int], None]
"""(what, done now, of how many)"""


@dataclass(slots=True)
class Plan:
    """How a suite is run. folder: where logs and results lie. settings: generation settings the user changed.

    metrics: name → (answer, reference) → 0 to 1. judge: asked for a score of every answer, None for offline metrics.
    arena: compares the sides in pairs instead.
    """

    suite: str
    file: str
    items: Items
    contenders: Sequence[Contender]
    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 8
    metrics: Metrics = field(default_factory=lambda: REFERENCED)
    headline: str | None = None
    judge: Judge | None = None
    arena: Arena | None = None
    progress: Progress = lambda what, done, total: None
    say: Callable[[str], None] = lambda text: None


def run(plan: Plan) -> tuple[Outcome, EndpointError | None]:
    """Ask every side everything and score it. What a kill leaves in the logs is used again.

    When the judge's endpoint fails, what is judged by then is kept and scored, `complete` is False, and the error is
    given back beside the outcome.
    """
    items = plan.items.items
    answered = sum(bool(item.target) for item in items)
    if not answered and plan.judge is None and plan.arena is None:
        raise DataError(
            tr(f"none of {len(items)} rows has an answer to compare with", f"{len(items)} 行都没有参考答案"),
            where=plan.file,
            remedy=tr("give a judge: --judge URL MODEL", "请指定裁判：--judge URL MODEL"),
        )
    outcome = Outcome(plan.suite, plan.file, items, [], plan.headline or _headline(plan))
    outcome.notes += _row_notes(plan, answered)
    plan.say(_classes_words(plan.items))
    for contender in plan.contenders:
        outcome.sides.append(_ask(plan, contender, outcome.notes))
    for side in outcome.sides:
        side.values.update(_offline(plan, side.answers, outcome.notes))
    failed: EndpointError | None = None
    if plan.judge is not None:
        failed = _judge(plan, plan.judge, outcome)
    if plan.arena is not None:
        plan.arena.hold(outcome)
        failed = plan.arena.failed
    return outcome, failed


def _ask(plan: Plan, contender: Contender, notes: list[Note]) -> Side:
    """One side's answers; the log is the same for all sides, and its keys know the model."""
    items = plan.items.items
    with contender.opened() as engine:
        settings = greedy(engine, plan.settings)
        log = Log(plan.folder / ANSWERS)
        try:
            answers, reused = answer_items(
                engine,
                items,
                settings,
                log,
                batch_size=plan.batch_size,
                step=lambda done: plan.progress(contender.name, done, len(items)),
            )
        finally:
            log.close()
        facts = {
            "engine": engine.name,
            "template": engine.template.id,
            "fingerprint": engine.fingerprint,
            "max_new_tokens": settings.max_new_tokens,
            "tokens": sum(answer.tokens for answer in answers),
        }
    if reused:
        plan.say(
            tr(
                f"{contender.name}: {reused} answers are there from before",
                f"{contender.name}：沿用之前的 {reused} 个回答",
            )
        )
    notes += empty_words(answers, contender.name)
    return Side(contender.name, contender.path, facts, answers)


def _offline(plan: Plan, answers: Sequence[Answer], notes: list[Note]) -> dict[str, list[float | None]]:
    """Values by metric; None for items without a reference. A metric whose package is missing is left out and told."""
    values: dict[str, list[float | None]] = {}
    for name, metric in plan.metrics.items():
        try:
            values[name] = [
                metric(answer.text, item.target) if item.target else None
                for item, answer in zip(plan.items.items, answers, strict=True)
            ]
        except MissingPackage as error:
            note = Note(*[f"{error.problem}: {error.remedy}"] * 2)
            if note not in notes:
                notes.append(note)
    return values


def _judge(plan: Plan, judge: Judge, outcome: Outcome) -> EndpointError | None:
    log = Log(plan.folder / JUDGEMENTS)
    failed = None
    try:
        for side in outcome.sides:
            judge.score_side(
                plan.items.items,
                side,
                log,
                step=lambda done: plan.progress(
                    tr("judge", "裁判"), done, len(plan.items.items) * len(outcome.sides)
                ),
            )
    except EndpointError as error:
        failed = error
        outcome.complete = False
        outcome.notes.append(Note(f"the judge failed: {error.problem}", f"裁判接口出错：{error.problem}"))
    finally:
        log.close()
    outcome.facts["judge"] = judge.facts()
    outcome.notes += judge.notes()
    if not any(value is not None for side in outcome.sides for value in side.values.get("judge", ())):
        outcome.headline = _headline(plan, judged=False)
    return failed


def _headline(plan: Plan, *, judged: bool = True) -> str:
    """The judge's score; without one whole answers where references are short, else ROUGE-L."""
    if plan.judge is not None and judged:
        return "judge"
    if "exact_match" not in plan.metrics:
        return next(iter(plan.metrics))
    lengths = [len(item.target) for item in plan.items.items if item.target]
    return "exact_match" if lengths and statistics.median(lengths) <= SHORT_TARGET else "rouge_l"


def _row_notes(plan: Plan, answered: int) -> list[Note]:
    """What the file lacks: rows that ask nothing, references, known classes."""
    notes: list[Note] = []
    left = plan.items.left_out
    if left:
        notes.append(
            Note(
                f"{len(left)} rows could not be asked, the first: {left[0]}",
                f"{len(left)} 行无法提问，第一处：{left[0]}",
            )
        )
    missing = len(plan.items.items) - answered
    if missing:
        notes.append(
            Note(
                f"{missing} of {len(plan.items.items)} rows have no reference answer: offline metrics leave them out",
                f"{len(plan.items.items)} 行中有 {missing} 行没有参考答案：离线指标不计这些行",
            )
        )
    if plan.suite == "belle":
        notes += [
            _unknown_words(group, count)
            for group, count in plan.items.counts().items()
            if group not in BELLE_CLASSES
        ]
    return notes


def _unknown_words(group: str, count: int) -> Note:
    near = nearest_class(group)
    meant, meant_zh = (f" (did you mean {near}?)", f"（是不是 {near}？）") if near else ("", "")
    return Note(
        f"class {group!r} is none of BELLE's{meant}: no judge prompt for its {count} rows, the judge leaves them out",
        f"类别 {group!r} 不在 BELLE 的类别中{meant_zh}：没有对应的评分提示，裁判跳过这 {count} 行",
    )


def _classes_words(items: Items) -> str:
    counts = ", ".join(f"{group} {count}" for group, count in items.counts().items())
    return tr(f"{len(items.items)} questions: {counts}", f"{len(items.items)} 题：{counts}")
