"""Plain text for continued pre-training: `{"text"}`, and every non-empty line of a plain text file."""

from __future__ import annotations

from tuoling.data.row import Record, RowFormat, text_of
from tuoling.text.conversation import Conversation, Turn


def _matches(record: Record) -> bool:
    return "text" in record


def _parse(record: Record) -> Conversation:
    return Conversation((Turn("text", text_of(record, "text")),))


FORMAT = RowFormat(
    name="text", matches=_matches, parse=_parse, question_field="text", answer_field="text", rank=80
)
