"""What a scripted generator says: good items for the most part, and the faults that models have."""

from __future__ import annotations

import hashlib
import random
import re

from tests.openai_server import Body, Fault, last_user_text

VERBS = ("解释", "改写", "总结", "翻译", "列举", "续写", "比较", "评价", "归纳", "推断")
SIGNS = "".join(chr(code) for code in range(0x4E00, 0x9FA5, 7))
"""Nearly 3,000 characters: two draws of 12 have next to nothing in common."""


def chance_of(body: Body) -> random.Random:
    """The same draw for the same question."""
    return random.Random(hashlib.sha256(last_user_text(body).encode()).digest())


def words(chance: random.Random, count: int) -> str:
    return "".join(chance.choice(SIGNS) for _ in range(count))


def items(body: Body) -> str:
    """As many tasks as are asked for; about one in six is one that has to go."""
    chance = chance_of(body)
    asked = re.search(r"再写 (\d+) 条新任务（编号 (\d+)", last_user_text(body))
    if asked is None:
        return "？"
    written = []
    for number in range(int(asked[2]), int(asked[2]) + int(asked[1])):
        instruction = f"{chance.choice(VERBS)}{words(chance, 12)}"
        draw = chance.random()
        if draw < 0.04:
            instruction = "看图片说话，" + instruction
        elif draw < 0.08:
            instruction = "请GPT模型" + instruction
        elif draw < 0.12:
            instruction = "请以下面词语为主题写一首诗歌"  # a seed says nearly this
        output = "" if 0.12 < draw < 0.16 else f"答：{words(chance, 20)}。"
        context = words(chance, 8) if chance.random() < 0.3 else "<无输入>"
        written.append(f"{number}. 指令：{instruction}\n{number}. 输入：{context}\n{number}. 输出：{output}")
    return "\n###\n".join(written)


def faults(number: int, body: Body) -> Fault | None:
    """By the number of the request: errors, half bodies, pages of HTML, and answers that mean nothing."""
    if number % 11 == 3:
        return Fault("status", 500)
    if number % 17 == 5:
        return Fault("cut")
    if number % 19 == 7:
        return Fault("page")
    if number % 13 == 6:
        return Fault("nonsense", text="当然可以！以下是您要的内容：%$#@")
    return None
