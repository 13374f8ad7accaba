"""Any row format to Alpaca, messages or conversations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuoling.data.json_stream import json_line
from tuoling.data.read import read_rows
from tuoling.data.row import Problem
from tuoling.data.sources import Source
from tuoling.errors import DataError, UsageError
from tuoling.files import atomic_write
from tuoling.language import tr
from tuoling.text.conversation import Conversation


class _CannotSay(Exception):
    """The target format has no place for this conversation."""


@dataclass
class ConvertReport:
    """rows = written + bad + unsaid. unsaid: good rows the target format has no place for; first_bad: one of them."""

    out: Path
    rows: int = 0
    written: int = 0
    bad: int = 0
    unsaid: int = 0
    unanswered: int = 0
    """Written, but questions alone: to predict from, not to train on."""
    formats: Counter[str] = field(default_factory=Counter)
    first_bad: str | None = None


def to_alpaca(conversation: Conversation) -> dict[str, Any]:
    """Instruction, input, output; earlier turns as `history` pairs, the system text as `system`."""
    turns = conversation.exchanges
    if conversation.is_plain_text:
        raise _CannotSay
    answered = turns[-1].role == "assistant"
    question = turns[-2 if answered else -1]
    past = turns[: -2 if answered else -1]
    record: dict[str, Any] = {
        "instruction": question.text,
        "input": question.context,
        "output": turns[-1].text if answered else "",
    }
    if conversation.system is not None:
        record["system"] = conversation.system
    if past:
        record["history"] = [[past[i].full_text, past[i + 1].text] for i in range(0, len(past), 2)]
    return record


def to_messages(conversation: Conversation) -> dict[str, Any]:
    """OpenAI's shape; instruction and input become one message."""
    if conversation.is_plain_text:
        raise _CannotSay
    return {"messages": [{"role": turn.role, "content": turn.full_text} for turn in conversation.turns]}


def to_conversations(conversation: Conversation) -> dict[str, Any]:
    """BELLE's and ShareGPT's shape, with `human` and `gpt`, which every reader of it knows."""
    if conversation.is_plain_text:
        raise _CannotSay
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {
        "conversations": [{"from": names[turn.role], "value": turn.full_text} for turn in conversation.turns]
    }


TARGETS: dict[str, Callable[[Conversation], dict[str, Any]]] = {
    "alpaca": to_alpaca,
    "messages": to_messages,
    "conversations": to_conversations,
}


def convert(
    sources: Sequence[Source], *, to: str, out: Path, array: bool | None = None, force: bool = False
) -> ConvertReport:
    """Write the good rows as format `to`, UTF-8 as it is; bad rows are counted, not written.

    array: one JSON array instead of JSON lines; None: an array where `out` ends in .json (other tools expect it).
    Raises UsageError for an unknown target or a file that is there already; DataError where no row can be written
    (then nothing is).
    """
    if to not in TARGETS:
        raise UsageError(
            tr(f"cannot convert to {to!r}", f"不能转换为 {to!r}"),
            remedy=tr("one of: ", "可选：") + ", ".join(TARGETS),
        )
    if out.exists() and not force:
        raise UsageError(
            tr("the file is there already", "文件已经存在"),
            where=str(out),
            remedy=tr("choose another --out, or --force", "换一个 --out，或用 --force"),
        )
    as_array = out.suffix == ".json" if array is None else array
    report = ConvertReport(out)
    with atomic_write(out) as file:
        if as_array:
            file.write("[")
        for source in sources:
            for row in read_rows(source):
                report.rows += 1
                report.formats[row.format] += 1
                if row.conversation is None or row.problems:
                    report.bad += 1
                    report.first_bad = report.first_bad or _said(str(row.place), row.problems)
                    continue
                try:
                    record = TARGETS[to](row.conversation)
                except _CannotSay:
                    report.unsaid += 1
                    continue
                text = json_line(record)
                file.write((",\n" if report.written else "\n") + text.rstrip("\n") if as_array else text)
                report.written += 1
                report.unanswered += row.conversation.answer is None
        if as_array:
            file.write("\n]\n")
        if not report.written:
            raise DataError(
                tr(
                    f"none of {report.rows} rows can be written as {to}",
                    f"{report.rows} 行中没有一行能写成 {to}",
                ),
                where=report.first_bad or ", ".join(source.path for source in sources),
                remedy=tr(
                    "see `tuoling data check`; plain text has no questions",
                    "请看 tuoling data check；纯文本没有问答",
                ),
            )
    return report


def _said(place: str, problems: Sequence[Problem]) -> str:
    return f"{place}: {problems[0].message}" if problems else place
