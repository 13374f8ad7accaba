"""Alpaca: `{"instruction", "input", "output"}`, with `system` and `history` where they are given."""

from __future__ import annotations

from tuoling.data.row import Record, RowFormat, optional_text, text_of
from tuoling.data.turns import turns_of_pairs, with_system
from tuoling.text.conversation import Conversation, Turn

_KEYS = {"instruction", "input", "output", "system", "history", "id"}


def _matches(record: Record) -> bool:
    if "instruction" not in record:
        return False
    return "output" in record or set(record) <= _KEYS


def question_turn(record: Record) -> Turn:
    """Instruction with its input as context; an input alone is the question."""
    instruction = text_of(record, "instruction")
    context = record.get("input") or ""
    if type(context) is not str:
        context = optional_text(record, "input")
    if context and not context.strip():
        context = ""
    return Turn("user", instruction, context) if instruction or not context else Turn("user", context)


def _parse(record: Record) -> Conversation:
    question = question_turn(record)
    turns: tuple[Turn, ...] = (question,)
    if "output" in record:  # without it the row can still be asked; what is missing is said of it
        turns = (question, Turn("assistant", text_of(record, "output")))
    if "history" in record or "system" in record:
        turns = with_system(record, (*turns_of_pairs(record.get("history")), *turns))
    return Conversation(turns)


FORMAT = RowFormat(
    name="alpaca",
    matches=_matches,
    parse=_parse,
    question_field="instruction",
    answer_field="output",
    rank=40,
)
