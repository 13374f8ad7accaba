"""BELLE and ShareGPT: `{"conversations": [{"from", "value"}, ...]}`, speakers in any case."""

from __future__ import annotations

from tuoling.data.row import Record, RowFormat
from tuoling.data.turns import turns_of_messages, with_system
from tuoling.text.conversation import Conversation


def _matches(record: Record) -> bool:
    return "conversations" in record


def _parse(record: Record) -> Conversation:
    return Conversation(with_system(record, turns_of_messages(record, "conversations")))


FORMAT = RowFormat(
    name="conversations",
    matches=_matches,
    parse=_parse,
    question_field="conversations",
    answer_field="conversations",
    turns_field="conversations",
    rank=20,
)
