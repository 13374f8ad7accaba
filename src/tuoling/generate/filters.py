"""Why a row is not kept: short codes, and what they mean in both languages."""

from __future__ import annotations

import re

REASONS: dict[str, tuple[str, str]] = {
    "near_duplicate": ("repeats an earlier one", "与已有的重复"),
    "same_text": ("the same as what it was made from", "与原文相同"),
    "short_instruction": ("an instruction of 3 characters or fewer", "指令不超过 3 个字"),
    "long_instruction": ("a long instruction beside an input", "带输入的指令过长"),
    "banned_word": ("speaks of pictures, files, links or a vendor", "涉及图片、文件、链接或厂商名"),
    "asks_gpt": ("speaks of GPT", "提到 GPT"),
    "no_answer": ("no answer", "没有回答"),
    "refusal": ("the generator refuses", "生成模型拒绝回答"),
    "repetitive": ("the answer repeats itself", "回答自我重复"),
    "echo": ("the answer is the question", "回答只是重复问题"),
    "cut": ("cut off by its length", "因长度被截断"),
    "placeholder": ("a placeholder is not filled in", "占位符没有填写"),
    "span_not_found": ("what it quotes is not in the document", "引用的原文不在文档中"),
    "no_question": ("not a question", "不是问题"),
}
"""Code → (en, zh)."""

SHORTEST = 4
LONGEST, LONGEST_WITH_EXAMPLE = 100, 150
"""Characters of an instruction that has an input, as in BELLE's generator."""

BANNED = (
    "图像", "图片", "照片", "文件", "图表", "图层", "曲线图", "折线图", "直线图", "柱形图", "饼状图", "链接", "http",
    "openai", "chatgpt", "gpt-3", "gpt-3.5", "gpt-4",
)  # fmt: skip
"""BELLE's 18: what a language model that sees text alone cannot do, and vendors."""

_EXAMPLE = re.compile(r"例如|比如|举例|示例|例子|样例|example", re.IGNORECASE)
_TO_GPT = re.compile(
    r"^(?:请?(?:向|让|使用|用|要求|请求|需要)|请)?\s*(?:chat)?gpt(?:-?\d(?:\.\d)?)?\s*(?:语言)?(?:模型)?\s*(?:来|去|能够|可以|应该|应|回答)*[，,：:\s]*",
    re.IGNORECASE,
)
_GPT = re.compile(r"(?<![a-z])(?:chat)?gpt", re.IGNORECASE)
_REFUSAL = re.compile(
    r"作为(?:一个|一名|一款)?(?:AI|人工智能|大?语言)(?:语言)?(?:模型|助手|机器人)?，?我?(?:无法|不能|没有能力)"
    r"|^(?:很?抱歉|对不起)，?(?:但是?)?我?(?:还?无法|不能|没有办法)"
    r"|^(?:I'm|I am) sorry,? but|^As an AI(?: language model)?\b|^I (?:cannot|can't) ",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]{1,8}代号\]|\{\{ ?(?:name|author) ?\}\}|<(?:NAME|AUTHOR|名字|公司)>")
_SHINGLE = 8
_LEAST_REPETITIVE = 80


def without_gpt(instruction: str) -> str:
    """`请让GPT模型写一首诗` → `写一首诗`: a task, not a report of what was asked of somebody."""
    rest = _TO_GPT.sub("", instruction, count=1)
    return rest or instruction


def of_task(instruction: str, context: str) -> str | None:
    """BELLE's filters on a generated task."""
    folded = f"{instruction}\n{context}".casefold()
    if any(word in folded for word in BANNED):
        return "banned_word"
    if _GPT.search(instruction):
        return "asks_gpt"
    if len(instruction) < SHORTEST:
        return "short_instruction"
    longest = LONGEST_WITH_EXAMPLE if _EXAMPLE.search(instruction) else LONGEST
    return "long_instruction" if context and len(instruction) >= longest else None


def of_answer(question: str, answer: str) -> str | None:
    """What no answer may be."""
    plain = answer.strip()
    if not plain:
        return "no_answer"
    if _REFUSAL.search(plain[:200]):
        return "refusal"
    if placeholder(question) or placeholder(plain):
        return "placeholder"
    if plain == question.strip():
        return "echo"
    return "repetitive" if repetitive(plain) else None


def placeholder(text: str) -> bool:
    """Something that should have been filled in: `[名字代号]`, `{{name}}`, `<NAME>`."""
    return _PLACEHOLDER.search(text) is not None


def repetitive(text: str) -> bool:
    """More than half of the runs of 8 characters of a longer text have been there before."""
    count = len(text) - _SHINGLE + 1
    if len(text) < _LEAST_REPETITIVE:
        return False
    return len({text[place : place + _SHINGLE] for place in range(count)}) < count / 2
