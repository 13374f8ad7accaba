"""OpenAI: `{"messages": [{"role", "content"}, ...]}`; content may be a list of text parts."""

from __future__ import annotations

from tuoling.data.row import Record, RowFormat
from tuoling.data.turns import turns_of_messages, with_system
from tuoling.text.conversation import Conversation


def _matches(record: Record) -> bool:
    return "messages" in record


def _parse(record: Record) -> Conversation:
    return Conversation(with_system(record, turns_of_messages(record, "messages")))


FORMAT = RowFormat(
    name="messages",
    matches=_matches,
    parse=_parse,
    question_field="messages",
    answer_field="messages",
    turns_field="messages",
    rank=20,
)
