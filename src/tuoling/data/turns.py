"""Turns out of lists of messages, pairs, and dialogues written as text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tuoling.data.row import Record, RowError, optional_text, wrong_type
from tuoling.language import tr
from tuoling.text.conversation import Role, Turn

ROLES: dict[str, Role] = {
    **dict.fromkeys(("human", "user", "prompter", "用户", "问"), "user"),
    **dict.fromkeys(
        ("gpt", "assistant", "bot", "chatgpt", "bing", "bard", "model", "助手", "答"), "assistant"
    ),
    "system": "system",
}
"""Names of speakers, in any case. Everything else (tools among them) is an unknown role."""

_ROLE_KEYS = ("from", "role")
_TEXT_KEYS = ("value", "content", "text")
_SPEAKER = re.compile(r"(?:^|\n)[ \t]*(Human|User|用户|Assistant|Bot|助手)[ \t]*[:：]", re.IGNORECASE)


def _first_key(entry: Mapping[str, Any], keys: tuple[str, ...], field: str) -> str:
    for key in keys:
        if key in entry:
            return key
    names = "`/`".join(keys)
    raise RowError(
        field,
        "missing_field",
        tr(f"`{field}` has none of `{names}`", f"`{field}` 中没有 `{names}` 任何一个"),
    )


def _message_text(value: Any, field: str) -> str:
    """Text, or OpenAI's list of parts when all of them are text."""
    if type(value) is str:
        return value
    if value is None:
        return ""
    if isinstance(value, list) and all(
        isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in value
    ):
        return "".join(part["text"] for part in value)
    raise wrong_type(field, value)


def turns_of_messages(record: Record, field: str) -> tuple[Turn, ...]:
    """Turns of a list of `{"from","value"}` or `{"role","content"}` entries, in order. Raises RowError."""
    messages = record.get(field)
    if not isinstance(messages, list):
        raise wrong_type(field, messages, tr("a list of turns", "对话轮次的列表"))
    turns = []
    role_key, text_key = "", ""
    for index, entry in enumerate(messages):
        if not isinstance(entry, Mapping):
            raise wrong_type(f"{field}[{index}]", entry, tr("an object", "对象"))
        if role_key not in entry:
            role_key = _first_key(entry, _ROLE_KEYS, f"{field}[{index}]")
        if text_key not in entry:
            text_key = _first_key(entry, _TEXT_KEYS, f"{field}[{index}]")
        name = entry[role_key]
        role = ROLES.get(name) if type(name) is str else None
        if role is None:
            role = ROLES.get(str(name).strip().casefold())
            if role is None:
                where = f"{field}[{index}].{role_key}"
                shown = json.dumps(name, ensure_ascii=False, default=str)[:40]
                raise RowError(
                    where,
                    "unknown_role",
                    tr(f"`{where}` is {shown}, no role known here", f"`{where}` 是 {shown}，不认识的角色"),
                )
        text = entry[text_key]
        if type(text) is not str:
            text = _message_text(text, f"{field}[{index}].{text_key}")
        turns.append(Turn(role, text))
    return tuple(turns)


def with_system(record: Record, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns after the record's own `system` text, where it has one and the turns have none."""
    if "system" not in record:
        return turns
    system = optional_text(record, "system")
    if not system or (turns and turns[0].role == "system"):
        return turns
    return (Turn("system", system), *turns)


def turns_of_pairs(history: Any, field: str = "history") -> tuple[Turn, ...]:
    """Turns of `[[question, answer], ...]` or `[{"input","output"}, ...]`. Raises RowError."""
    if history is None:
        return ()
    if not isinstance(history, list | tuple):
        raise wrong_type(field, history, tr("a list of pairs", "问答对的列表"))
    turns = []
    for index, pair in enumerate(history):
        where = f"{field}[{index}]"
        if isinstance(pair, Mapping) and "input" in pair and "output" in pair:
            pair = (pair["input"], pair["output"])
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise wrong_type(where, pair, tr("a pair of texts", "一对文本"))
        for text in pair:
            if not isinstance(text, str):
                raise wrong_type(where, text)
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return tuple(turns)


def turns_of_dialogue(text: str) -> tuple[Turn, ...] | None:
    """Turns of `Human:..\\nAssistant:..\\nHuman:..\\nAssistant:`, or None where the text is not such a dialogue.

    It must begin with the human, alternate, hold at least one reply slot, and end at an open slot or a human turn.
    """
    marks = list(_SPEAKER.finditer(text))
    if len(marks) < 2 or text[: marks[0].start()].strip():
        return None
    turns = []
    for index, mark in enumerate(marks):
        end = marks[index + 1].start() if index + 1 < len(marks) else len(text)
        role: Role = "assistant" if mark[1].casefold() in ("assistant", "bot", "助手") else "user"
        if role != ("user", "assistant")[index % 2]:
            return None
        turns.append(Turn(role, text[mark.end() : end].strip()))
    if turns[-1].role == "assistant":
        if turns[-1].text:
            return None
        turns.pop()
    return tuple(turns)
