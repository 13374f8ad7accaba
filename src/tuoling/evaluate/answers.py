"""Answers of a model to a suite's items: in batches, kept one by one, resumed after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuoling.errors import TemplateError
from tuoling.evaluate.items import Item
from tuoling.evaluate.labels import Note
from tuoling.files import append_jsonl, cut_torn_line, read_jsonl, require_writable, sha256_text
from tuoling.infer.engine import Engine, GenerationSettings, PromptTooLong, Reply


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said. finish_reason: "stop", "length", or "refused" where the prompt did not fit (text "")."""

    text: str
    finish_reason: str
    tokens: int


class Log:
    """Rows appended one by one to a JSONL file and found again by their key; a torn last line is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        require_writable(path.parent)
        if path.is_file():
            cut_torn_line(path)
            self.rows = {row["key"]: row for _, row in read_jsonl(path)}
        self._file = path.open("a", encoding="utf-8")

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keep one row, on disk before this returns."""
        self.rows[key] = row
        append_jsonl(self._file, {"key": key, **row})

    def close(self) -> None:
        """The rows stay for the next time."""
        self._file.close()


def answer_items(
    engine: Engine,
    items: Sequence[Item],
    settings: GenerationSettings,
    log: Log,
    *,
    batch_size: int = 8,
    step: Callable[[int], None] = lambda done: None,
) -> tuple[list[Answer], int]:
    """(answers in the order of the items, how many of them were there from before). Batches hold prompts of like
    length; a prompt that leaves no room is answered with "" and `refused`."""
    keys = [_key(engine, item, settings) for item in items]
    waiting = [index for index, key in enumerate(keys) if key not in log.rows]
    waiting.sort(key=lambda index: -engine.count_tokens(items[index].conversation))
    reused = len(items) - len(waiting)
    step(reused)
    for begin in range(0, len(waiting), batch_size):
        batch = waiting[begin : begin + batch_size]
        for index, answer in _answer(engine, items, batch, settings):
            log.add(keys[index], asdict(answer))
        step(len(batch))
    return [
        Answer(row["text"], row["finish_reason"], row["tokens"]) for row in map(log.rows.__getitem__, keys)
    ], reused


def _key(engine: Engine, item: Item, settings: GenerationSettings) -> str:
    try:
        prompt = engine.prompt_text(item.conversation)
    except TemplateError as error:
        raise TemplateError(error.problem, where=item.place, remedy=error.remedy) from error
    return sha256_text(json.dumps([prompt, asdict(settings), engine.fingerprint], ensure_ascii=False))


def _answer(
    engine: Engine, items: Sequence[Item], batch: list[int], settings: GenerationSettings
) -> list[tuple[int, Answer]]:
    try:
        replies = engine.generate([items[index].conversation for index in batch], settings)
    except PromptTooLong:
        if len(batch) == 1:
            return [(batch[0], Answer("", "refused", 0))]
        return [pair for index in batch for pair in _answer(engine, items, [index], settings)]
    return [(index, _of(reply)) for index, reply in zip(batch, replies, strict=True)]


def _of(reply: Reply) -> Answer:
    return Answer(reply.text, reply.finish_reason, reply.completion_tokens)


def empty_words(answers: Sequence[Answer], side: str) -> list[Note]:
    """What to say of answers that hold nothing."""
    refused = sum(answer.finish_reason == "refused" for answer in answers)
    empty = sum(not answer.text.strip() for answer in answers) - refused
    total = len(answers)
    said: list[Note] = []
    if refused:
        said.append(
            Note(
                f"{side}: {refused} of {total} questions do not fit the model's context: they count as empty answers",
                f"{side}：{total} 题中有 {refused} 题超出模型上下文，按空回答计",
            )
        )
    if empty:
        said.append(
            Note(
                f"{side}: {empty} of {total} answers are empty", f"{side}：{total} 个回答中有 {empty} 个为空"
            )
        )
    return said
