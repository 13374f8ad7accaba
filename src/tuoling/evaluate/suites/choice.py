"""Multiple choice by log-likelihood: the answer is the continuation the model finds likeliest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tuoling.errors import UsageError
from tuoling.evaluate.answers import Answer
from tuoling.evaluate.choices import Choice, Choices, read_choices, require_examples
from tuoling.evaluate.items import Item
from tuoling.evaluate.labels import Note
from tuoling.evaluate.likelihood import log_likelihoods
from tuoling.evaluate.outcome import Outcome, Side
from tuoling.evaluate.sides import Contender
from tuoling.evaluate.subjects import group_of, opening
from tuoling.infer.engine import Engine
from tuoling.language import tr
from tuoling.text.conversation import Conversation, Turn

if TYPE_CHECKING:
    from tuoling.evaluate.evaluation import Evaluation
    from tuoling.evaluate.suites.open_answers import Progress


def context_of(choice: Choice, examples: Sequence[Choice]) -> str:
    """Opening line, examples with their answers, the question: what lm-eval shows for the same rows and shots."""
    shown = "".join(f"{one.text}{one.continuations[min(one.gold)]}\n\n" for one in examples)
    return opening(choice.collection, choice.subject) + shown + choice.text


def choice(
    asked: Evaluation,
    sides: Sequence[Contender],
    *,
    progress: Progress,
    say: Callable[[str], None],
) -> Outcome:
    """Ask every side, write the outcome: accuracy by subject, and by the collection's groups.

    `accuracy_by_length` divides a choice's log-likelihood by its characters, where choices are more than letters.
    """
    if asked.file is None:
        raise UsageError(tr("the suite choice needs a file or folder", "choice 评测需要文件或目录"))
    found = read_choices(asked.file, limit=asked.limit)
    require_examples(found, asked.shots)
    items = [_item(one) for one in found.questions]
    outcome = Outcome("choice", asked.file, items, [], "accuracy")
    outcome.facts |= {"shots": asked.shots, "in_template": asked.in_template, "method": "log-likelihood"}
    if found.left_out:
        count, first = len(found.left_out), found.left_out[0]
        outcome.notes.append(
            Note(f"{count} rows were left out, the first: {first}", f"{count} 行未用，第一处：{first}")
        )
    subjects = len({item.group for item in items})
    say(tr(f"{len(items)} questions, {subjects} subjects", f"{len(items)} 题，{subjects} 个科目"))
    for contender in sides:
        with contender.opened() as engine:
            contexts = [_shown(engine, one, found, asked) for one in found.questions]
            likely = log_likelihoods(
                engine,
                list(zip(contexts, (one.continuations for one in found.questions), strict=True)),
                batch_size=asked.batch_size,
                step=lambda done, name=contender.name: progress(name, done, len(items)),  # type: ignore[misc]
            )
            facts = {"engine": engine.name, "template": engine.template.id if asked.in_template else None}
        outcome.sides.append(_side(contender, found.questions, likely, facts))
    outcome.facts["groups"] = _groups(outcome, found.questions)
    outcome.write(asked.folder)
    for note in outcome.notes:
        say(str(note))
    return outcome


def _item(choice: Choice) -> Item:
    letters = " / ".join(choice.continuations[index].strip() for index in sorted(choice.gold))
    return Item(choice.place, choice.subject, Conversation((Turn("user", choice.text),)), letters)


def _shown(engine: Engine, one: Choice, found: Choices, asked: Evaluation) -> str:
    examples = found.examples[one.subject][: asked.shots] if asked.shots else []
    text = context_of(one, examples)
    return engine.prompt_text(Conversation((Turn("user", text),))) if asked.in_template else text


def _side(
    contender: Contender,
    questions: Sequence[Choice],
    likely: Sequence[Sequence[float]],
    facts: dict[str, Any],
) -> Side:
    picked, right, by_length = [], [], []
    for one, values in zip(questions, likely, strict=True):
        best = max(range(len(values)), key=values.__getitem__)  # of equal ones the first, as numpy's argmax
        shares = [
            value / max(1, len(text.strip())) for value, text in zip(values, one.continuations, strict=True)
        ]
        picked.append(Answer(one.continuations[best].strip(), "stop", 0))
        right.append(float(best in one.gold))
        by_length.append(float(max(range(len(shares)), key=shares.__getitem__) in one.gold))
    values_of: dict[str, list[float | None]] = {"accuracy": list(right)}
    if any(len({len(text) for text in one.continuations}) > 1 for one in questions):
        values_of["accuracy_by_length"] = list(by_length)
    return Side(contender.name, contender.path, facts, picked, values_of)


def _groups(outcome: Outcome, questions: Sequence[Choice]) -> dict[str, Any]:
    """Accuracy by group: every subject counts the same, as C-Eval and CMMLU average."""
    groups: dict[str, dict[str, None]] = {}
    for one in questions:
        group = group_of(one.collection, one.subject)
        if group is not None:
            groups.setdefault(group, {})[one.subject] = None
    found = {}
    for group, subjects in groups.items():
        found[group] = {
            "subjects": len(subjects),
            **{side.name: _mean_of_subjects(outcome, side, list(subjects)) for side in outcome.sides},
        }
    return found


def _mean_of_subjects(outcome: Outcome, side: Side, subjects: Sequence[str]) -> float:
    means = []
    for subject in subjects:
        values = [
            value
            for item, value in zip(outcome.items, side.values["accuracy"], strict=True)
            if item.group == subject and value is not None
        ]
        means.append(sum(values) / len(values))
    return sum(means) / len(means)
