"""Who the model is: questions and answers with the name, the maker and the year filled in. Nobody has to be asked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tuoling.generate.request import Candidate
from tuoling.generate.seeds import Seed

PLACEHOLDERS = {"name": ("[名字代号]", "{{name}}", "<NAME>"), "maker": ("[公司代号]", "{{author}}", "<AUTHOR>"), "year": ("[时间代号]",)}  # fmt: skip
"""What is filled in → how files write it (domain-self-instruct's, LLaMA-Factory's, ms-swift's identity rows)."""

_NAME, _MAKER, _YEAR = (words[0] for words in PLACEHOLDERS.values())
_ASKED: Mapping[str, tuple[str, ...]] = {
    f"我是{_NAME}，由{_MAKER}在{_YEAR}年推出的人工智能助手，可以和您聊天、回答问题、帮您写作和整理资料。": (
        "你是谁？", "请介绍一下你自己。", "能做个自我介绍吗？", "您好，请问您是？",
    ),
    f"我叫{_NAME}。": ("你叫什么名字？", "怎么称呼你？", "你的名字是什么？"),
    f"我是由{_MAKER}开发的，名字叫{_NAME}。": ("谁开发了你？", "你是哪家公司做的？", "你的作者是谁？", "你是哪个团队训练出来的？"),
    f"我于{_YEAR}年由{_MAKER}推出。": ("你是什么时候诞生的？", "你是哪一年推出的？"),
    f"不是，我是{_NAME}，由{_MAKER}开发的人工智能助手。": ("你是 ChatGPT 吗？", "你是文心一言吗？", "你是不是 GPT-4？", "你是 OpenAI 开发的吗？"),
    f"我是{_NAME}，一个人工智能程序，不是真人，没有身体，也没有真正的情绪。": ("你是真人吗？", "你是人类还是机器人？", "你有感情吗？"),
    f"我是{_NAME}，可以回答问题、写文章、改写和翻译文字、整理要点、讲解知识，也能陪您聊天。我也会出错，重要的事情请您再核实一遍。": (
        "你能做什么？", "你有什么功能？", "你会犯错吗？",
    ),
    f"I am {_NAME}, an AI assistant made by {_MAKER} in {_YEAR}.": ("Who are you?", "Please introduce yourself.", "Who made you?"),
}  # fmt: skip


def packaged() -> list[dict[str, str]]:
    """Rows of our own, with placeholders."""
    return [
        {"instruction": question, "input": "", "output": answer}
        for answer, questions in _ASKED.items()
        for question in questions
    ]


def filled(text: str, values: Mapping[str, str]) -> str:
    """A text with every placeholder that has a value replaced."""
    for name, words in PLACEHOLDERS.items():
        if name in values:
            for word in words:
                text = re.sub(re.escape(word), lambda _, name=name: values[name], text, flags=re.IGNORECASE)  # type: ignore[misc]
    return text


def rows(seeds: Sequence[Seed] | None, values: Mapping[str, str]) -> list[Candidate]:
    """The packaged rows, or those of the user's file, filled in. values: name, maker, year; some may be missing."""
    if seeds is None:
        found: list[dict[str, Any]] = [dict(row) for row in packaged()]
        origins = [f"packaged:{place}" for place in range(len(found))]
    else:
        found = [
            {"instruction": one.instruction, "input": one.context, "output": one.answer} for one in seeds
        ]
        origins = [one.id for one in seeds]
    return [
        Candidate({key: filled(text, values) for key, text in row.items()}, None, {"from": origin})
        for row, origin in zip(found, origins, strict=True)
    ]
