"""BELLE's first hub rows (and Firefly's): `{"input", "target"}`. With `predict` beside them they are predictions."""

from __future__ import annotations

from tuoling.data.row import Record, RowFormat, text_of
from tuoling.text.conversation import Conversation, Turn


def _matches(record: Record) -> bool:
    return "input" in record and "target" in record and "predict" not in record


def _parse(record: Record) -> Conversation:
    return Conversation(
        (Turn("user", text_of(record, "input")), Turn("assistant", text_of(record, "target")))
    )


FORMAT = RowFormat(
    name="old_belle", matches=_matches, parse=_parse, question_field="input", answer_field="target", rank=40
)
