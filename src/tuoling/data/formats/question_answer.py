"""A question and its answer under any of the names people give them; domain-self-instruct's pairs among them."""

from __future__ import annotations

from tuoling.data.row import Record, RowError, RowFormat, text_of
from tuoling.data.turns import turns_of_pairs, with_system
from tuoling.language import tr
from tuoling.text.conversation import Conversation, Turn

PAIRS = (
    ("question", "answer"),
    ("question", "response"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("prompt", "answer"),
    ("prompt", "output"),
    ("query", "response"),
    ("query", "answer"),
    ("instruction", "response"),
    ("instruction", "answer"),
    ("ask", "answer"),
    ("input", "output"),
    ("problem", "solution"),
    ("q", "a"),
    ("问题", "回答"),
    ("问题", "答案"),
    ("提问", "回答"),
    ("问", "答"),
)


def _pair(record: Record) -> tuple[str, str] | None:
    for question, answer in PAIRS:
        if question in record and answer in record:
            return question, answer
    return None


def _matches(record: Record) -> bool:
    return _pair(record) is not None


def _reads(record: Record) -> tuple[str, ...]:
    return _pair(record) or PAIRS[0]


def _parse(record: Record) -> Conversation:
    pair = _pair(record)
    if pair is None:
        raise RowError(
            "question",
            "missing_field",
            tr("no question and answer column", "没有问题和回答这两列"),
        )
    context = record.get("context")  # Dolly's material under `instruction`, `response`
    user = Turn("user", text_of(record, pair[0]), context if isinstance(context, str) else "")
    answer = Turn("assistant", text_of(record, pair[1]))
    past = turns_of_pairs(record.get("history")) if "history" in record else ()
    return Conversation(with_system(record, (*past, user, answer)))


FORMAT = RowFormat(
    name="question_answer",
    matches=_matches,
    parse=_parse,
    question_field="question",
    answer_field="answer",
    rank=60,
    reads=_reads,
)
