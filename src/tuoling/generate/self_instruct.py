"""Seed tasks → new tasks with their answers, a few in one request (Self-Instruct as BELLE does it in Chinese)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from tuoling.generate import filters
from tuoling.generate.parse import labelled
from tuoling.generate.request import Answer, Candidate, Request, ask, request_key
from tuoling.generate.seeds import Seed

DRAWN = 3
"""Seed tasks shown in a request."""

_LABELS = {"instruction": ("指令", "Instruction"), "input": ("输入", "Input"), "output": ("输出", "Output")}
_PROMPT = """你在为中文大语言模型编写训练任务。请接着下面的例子，再写 {count} 条新任务（编号 {first} 到 {last}）。

要求：
- 每条任务的动词、话题、句式都不要和例子或彼此雷同；问答、写作、改写、分类、抽取、推理、数学、代码、翻译等类型都要有。
- 只靠文字就能完成，不需要看图、听声音、打开文件或网址，也不要求做出动作。
- 指令为一两句中文，可以是祈使句或问句。
- 需要材料的任务，把真实具体的材料写在“输入”里，不超过 100 字；不需要材料的写 <无输入>。
- 输出要正确、完整，直接回答，不要客套。
- 严格沿用例子的格式，各条之间用单独一行 ### 隔开，不要写别的话。

{examples}
###
"""


class SelfInstruct:
    """Each request shows DRAWN seeds, drawn by its number, and asks for `per_call` new tasks."""

    name = "self-instruct"
    limit = 0.7

    def __init__(
        self,
        seeds: Sequence[Seed],
        *,
        per_call: int,
        seed: int,
        options: dict[str, Any],
        known: Iterable[str] = (),
    ) -> None:
        self._seeds = seeds
        self._per_call = per_call
        self._seed = seed
        self._options = options
        self._known = tuple(known)
        self._number = 0

    def next(self) -> Request:
        number, self._number = self._number, self._number + 1
        drawn = random.Random(f"{self._seed}:{number}").sample(self._seeds, min(DRAWN, len(self._seeds)))
        examples = "\n".join(_example(place, seed) for place, seed in enumerate(drawn, 1))
        first = len(drawn) + 1
        prompt = _PROMPT.format(
            count=self._per_call, first=first, last=first + self._per_call - 1, examples=examples
        )
        about = {"seeds": [seed.id for seed in drawn]}
        return ask(request_key(self.name, self._seed, number), "tasks", prompt, about=about, **self._options)

    def read(self, request: Request, answer: Answer) -> list[Candidate]:
        """Of an answer that was cut, the last task goes: nobody knows what it lacks."""
        items = labelled(answer.text, _LABELS)
        found = []
        for place, item in enumerate(items):
            row = {**item, "instruction": filters.without_gpt(item["instruction"])}
            about = {"seeds": request.about["seeds"]}
            if answer.cut and place == len(items) - 1:
                about["cut"] = True
            found.append(Candidate(row, row["instruction"], about))
        return found

    def verdict(self, candidate: Candidate) -> str | None:
        row = candidate.row
        if candidate.about.get("cut"):
            return "cut"
        return filters.of_task(row["instruction"], row["input"]) or filters.of_answer(
            row["instruction"], row["output"]
        )

    def accepted(self, candidate: Candidate) -> None: ...

    def nominal(self, stage: str) -> float:
        return float(self._per_call)

    def known(self) -> Iterable[str]:
        yield from (seed.instruction for seed in self._seeds)
        yield from self._known


def _example(place: int, seed: Seed) -> str:
    return f"###\n{place}. 指令：{seed.instruction}\n{place}. 输入：{seed.context or '<无输入>'}\n{place}. 输出：{seed.answer}"
