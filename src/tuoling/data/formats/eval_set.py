"""BELLE's evaluation set: `{"question", "class", "std_answer"}`; the reference answer may be empty."""

from __future__ import annotations

from tuoling.data.row import Record, RowFormat, text_of
from tuoling.text.conversation import Conversation, Turn


def _matches(record: Record) -> bool:
    return "question" in record and "std_answer" in record


def _parse(record: Record) -> Conversation:
    question = Conversation((Turn("user", text_of(record, "question")),))
    text_of({"class": "", **record}, "class")
    answer = text_of(record, "std_answer")
    return question.answered(answer) if answer.strip() else question


FORMAT = RowFormat(
    name="eval_set",
    matches=_matches,
    parse=_parse,
    question_field="question",
    answer_field="std_answer",
    trainable=False,
    answered=False,
    rank=15,
)
