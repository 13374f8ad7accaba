"""Seed questions of a field → new questions → answers by somebody who knows it."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from tuoling.generate import filters
from tuoling.generate.parse import numbered
from tuoling.generate.request import Answer, Candidate, Request, Unparsable, ask, request_key
from tuoling.generate.seeds import Seed
from tuoling.language import tr

SEEDS, OWN = 2, 1
"""Questions shown in a request: so many seeds, and so many that were generated before."""

SHORTEST_QUESTION = 5
"""Characters."""

PERSONA = "你是这个领域经验丰富的专家，回答专业、具体、通俗易懂。"
_ASK = """下面是同一领域的用户会提出的问题。请再写 {count} 个同一领域的新问题：内容与它们及彼此都不重复，像真实用户的口吻，每个问题单独成句、信息完整。
只按“编号. 问题”的格式逐行输出，从 {first} 开始编号，不要回答问题，不要写别的话。

{questions}
"""


class Domain:
    """Questions that are there already (`questions`) are answered first; `answered` ones are neither asked nor repeated.

    new: whether new questions are asked for at all.
    """

    name = "domain"
    limit = 0.7

    def __init__(
        self,
        seeds: Sequence[Seed],
        *,
        questions: Sequence[Seed] = (),
        answered: Iterable[str] = (),
        persona: str = PERSONA,
        per_call: int = 2,
        new: bool = True,
        seed: int = 0,
        options: dict[str, Any] | None = None,
    ) -> None:
        self._seeds = seeds
        self._persona = persona
        self._per_call = per_call
        self._seed = seed
        self._options = options or {}
        self._new = new
        self._answered = set(answered)
        self._given = [one for one in questions if one.instruction not in self._answered]
        self._own = [one.instruction for one in questions]
        self._waiting = deque((one.instruction, one.id) for one in self._given)
        self._number = 0

    def next(self) -> Request | None:
        if self._waiting:
            question, origin = self._waiting.popleft()
            about = {"question": question, "from": origin}
            key = request_key(self.name, "answer", question)
            return ask(key, "answer", question, system=self._persona, about=about, **self._options)
        return self._question() if self._new else None

    def _question(self) -> Request:
        number, self._number = self._number, self._number + 1
        chance = random.Random(f"{self._seed}:{number}")
        drawn = [one.instruction for one in chance.sample(self._seeds, min(SEEDS, len(self._seeds)))]
        drawn += chance.sample(self._own, min(OWN, len(self._own)))
        shown = "\n".join(f"{place}. {text}" for place, text in enumerate(drawn, 1))
        prompt = _ASK.format(count=self._per_call, first=len(drawn) + 1, questions=shown)
        key = request_key(self.name, "question", self._seed, number)
        return ask(key, "question", prompt, about={"shown": drawn}, **self._options)

    def read(self, request: Request, answer: Answer) -> list[Candidate]:
        if request.stage == "answer":
            question = request.about["question"]
            about = {"from": request.about["from"], **({"cut": True} if answer.cut else {})}
            row = {"instruction": question, "input": "", "output": answer.text.strip()}
            return [Candidate(row, None, about)]
        lines = numbered(answer.text)
        if answer.cut:
            lines = lines[:-1]
        if not lines:
            raise Unparsable(tr("cut off in its first question", "在第一个问题中就被截断"))
        return [Candidate({"question": line}, line, {"from": request.key}, kept=False) for line in lines]

    def verdict(self, candidate: Candidate) -> str | None:
        row = candidate.row
        if candidate.kept:
            return (
                "cut" if candidate.about.get("cut") else filters.of_answer(row["instruction"], row["output"])
            )
        if len(row["question"]) < SHORTEST_QUESTION:
            return "no_question"
        return "placeholder" if filters.placeholder(row["question"]) else None

    def accepted(self, candidate: Candidate) -> None:
        if not candidate.kept:
            question = candidate.row["question"]
            self._own.append(question)
            self._waiting.append((question, candidate.about["from"]))

    def nominal(self, stage: str) -> float:
        return 1.0 if stage == "answer" else float(self._per_call)

    def known(self) -> Iterable[str]:
        yield from (one.instruction for one in self._seeds)
        yield from self._own
        yield from self._answered
