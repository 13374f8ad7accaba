"""BELLE multiturn_chat_0.8M: an Alpaca row whose instruction holds the dialogue so far as text."""

from __future__ import annotations

from tuoling.data.row import Record, RowFormat, optional_text, text_of
from tuoling.data.turns import turns_of_dialogue, with_system
from tuoling.text.conversation import Conversation, Turn


def _matches(record: Record) -> bool:
    instruction = record.get("instruction")
    if type(instruction) is not str or "output" not in record or record.get("input"):
        return False
    head = instruction[:16].lstrip().casefold()
    return head.startswith(("human", "user", "用户")) and turns_of_dialogue(instruction) is not None


def _parse(record: Record) -> Conversation:
    turns = turns_of_dialogue(text_of(record, "instruction"))
    if turns is None:  # asked for by name: then a plain instruction is a dialogue of one turn
        turns = (Turn("user", text_of(record, "instruction"), optional_text(record, "input")),)
    return Conversation(with_system(record, (*turns, Turn("assistant", text_of(record, "output")))))


FORMAT = RowFormat(
    name="belle_multiturn",
    matches=_matches,
    parse=_parse,
    question_field="instruction",
    answer_field="output",
    by_shape=False,
    rank=30,
)
