"""Chinese-Vicuna chitchat: `{"history": [{"input", "output"}, ...], "input", "output"}`."""

from __future__ import annotations

from tuoling.data.row import Record, RowFormat, text_of
from tuoling.data.turns import turns_of_pairs, with_system
from tuoling.text.conversation import Conversation, Turn


def _matches(record: Record) -> bool:
    return "history" in record and "input" in record and "output" in record and "instruction" not in record


def _parse(record: Record) -> Conversation:
    past = turns_of_pairs(record.get("history"))
    last = (Turn("user", text_of(record, "input")), Turn("assistant", text_of(record, "output")))
    return Conversation(with_system(record, (*past, *last)))


FORMAT = RowFormat(
    name="chitchat", matches=_matches, parse=_parse, question_field="input", answer_field="output", rank=10
)
