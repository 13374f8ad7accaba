"""Preference pairs: `chosen` and `rejected` (BELLE once writes `reject`), with a prompt, turns, or an instruction.

Read and checked; trained (on the chosen answer) only when the format is asked for by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuoling.data.row import Record, RowError, RowFormat, text_of, wrong_type
from tuoling.data.turns import turns_of_dialogue, turns_of_messages, turns_of_pairs, with_system
from tuoling.language import tr
from tuoling.text.conversation import Conversation, Turn


def _matches(record: Record) -> bool:
    return "chosen" in record and ("rejected" in record or "reject" in record)


def _reply(value: Any, field: str) -> tuple[Turn, ...]:
    """The turns of one side: text, one message, or a list of messages."""
    if isinstance(value, str):
        return (Turn("assistant", value),)
    if isinstance(value, Mapping):
        return turns_of_messages({field: [value]}, field)
    if isinstance(value, list):
        return turns_of_messages({field: value}, field)
    raise wrong_type(field, value)


def _question(record: Record) -> tuple[Turn, ...]:
    """The turns before the two answers, in whichever shape they are given."""
    for field in ("conversations", "messages"):
        if field in record:
            return turns_of_messages(record, field)
    if isinstance(record.get("prompt"), list):
        return turns_of_messages(record, "prompt")
    for field, context in (("instruction", "input"), ("prompt", ""), ("question", ""), ("query", "")):
        if field in record:
            text = text_of(record, field)
            material = record.get(context) if context else ""
            past = turns_of_pairs(record.get("history"))
            return (*past, Turn("user", text, material if isinstance(material, str) else ""))
    return ()


def _reads(record: Record) -> tuple[str, ...]:
    names = ("conversations", "messages", "instruction", "prompt", "question", "query")
    return next((name for name in names if name in record), "chosen"), "chosen"


def _parse(record: Record) -> Conversation:
    rejected_field = "rejected" if "rejected" in record else "reject"
    if "chosen" not in record or rejected_field not in record:
        missing = "chosen" if "chosen" not in record else "rejected"
        raise RowError(missing, "missing_field", tr(f"`{missing}` is not there", f"缺少字段 `{missing}`"))
    chosen = _reply(record["chosen"], "chosen")
    rejected = _reply(record[rejected_field], rejected_field)
    for field, side in (("chosen", chosen), (rejected_field, rejected)):
        if not side or not side[-1].text.strip():
            raise RowError(field, "empty_answer", tr(f"`{field}` is empty", f"`{field}` 为空"))
    if [turn.text for turn in chosen] == [turn.text for turn in rejected]:
        message = tr(f"`{rejected_field}` says the same as `chosen`", f"`{rejected_field}` 与 `chosen` 相同")
        raise RowError(rejected_field, "same_answers", message)
    question = _question(record)
    if not question and len(chosen) == 1:  # BELLE's reward rows: the template is already applied
        return _templated(chosen[0].text)
    return Conversation(with_system(record, (*question, *chosen) if len(chosen) == 1 else chosen))


def _templated(text: str) -> Conversation:
    """A dialogue written as text, its last reply split off; plain text where it is none."""
    start = max(text.rfind("\nAssistant:"), text.rfind("\n\nAssistant:"))
    if start >= 0:
        head_end = start + len("\nAssistant:") + (text[start : start + 2] == "\n\n")
        turns = turns_of_dialogue(text[:head_end])
        if turns is not None:
            return Conversation((*turns, Turn("assistant", text[head_end:].strip())))
    return Conversation((Turn("text", text),))


FORMAT = RowFormat(
    name="preference",
    matches=_matches,
    parse=_parse,
    question_field="prompt",
    answer_field="chosen",
    trainable=False,
    rank=5,
    reads=_reads,
)
