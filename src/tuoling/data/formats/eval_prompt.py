"""BELLE's judge prompts: `{"class", "prompt"}`, one a class."""

from __future__ import annotations

from tuoling.data.row import Record, RowFormat, text_of
from tuoling.text.conversation import Conversation, Turn


def _matches(record: Record) -> bool:
    return set(record) == {"class", "prompt"}


def _parse(record: Record) -> Conversation:
    text_of(record, "class")
    return Conversation((Turn("user", text_of(record, "prompt")),))


FORMAT = RowFormat(
    name="eval_prompt",
    matches=_matches,
    parse=_parse,
    question_field="prompt",
    answer_field="prompt",
    trainable=False,
    answered=False,
    rank=15,
)
