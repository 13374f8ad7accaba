"""Chinese-Vicuna chat: `{"input": [q1..qn], "output": [a1..an]}`, lists of equal length."""

from __future__ import annotations

from tuoling.data.row import Record, RowError, RowFormat, wrong_type
from tuoling.data.turns import with_system
from tuoling.language import tr
from tuoling.text.conversation import Conversation, Turn


def _matches(record: Record) -> bool:
    return (
        "input" in record
        and "output" in record
        and "instruction" not in record
        and isinstance(record["input"], list)
    )


def _parse(record: Record) -> Conversation:
    for field in ("input", "output"):
        texts = record.get(field)
        if not isinstance(texts, list):
            raise wrong_type(field, texts, tr("a list of texts", "文本列表"))
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise wrong_type(f"{field}[{index}]", text)
    questions, answers = record["input"], record["output"]
    if len(questions) != len(answers):
        raise RowError(
            "output",
            "roles_out_of_order",
            tr(
                f"{len(questions)} questions in `input`, {len(answers)} answers in `output`",
                f"`input` 有 {len(questions)} 个问题，`output` 有 {len(answers)} 个回答",
            ),
        )
    turns: list[Turn] = []
    for question, answer in zip(questions, answers, strict=True):
        turns += [Turn("user", question), Turn("assistant", answer)]
    return Conversation(with_system(record, tuple(turns)))


FORMAT = RowFormat(
    name="vicuna_chat", matches=_matches, parse=_parse, question_field="input", answer_field="output", rank=20
)
