"""Questions and answers from the user's own documents, each with the words of the document that it stands on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tuoling.generate import filters
from tuoling.generate.parse import labelled
from tuoling.generate.request import Answer, Candidate, Request, ask, request_key
from tuoling.generate.seeds import Passage

LONGEST_PASSAGE = 800
"""Characters of a passage."""

_LABELS = {
    "question": ("问题", "Question"),
    "answer": ("回答", "答案", "Answer"),
    "quote": ("原文", "依据", "Quote"),
}
_PROMPT = """请根据下面的材料出 {count} 组问答，用来训练问答助手。
要求：
- 问题单独看也能看懂，不要出现“文中”“上述材料”之类的说法；彼此不重复，覆盖不同要点。
- 回答只依据材料，完整准确。
- “原文”逐字抄录材料中能证明回答的一句或几句连续的话。
- 严格用下面的格式，各组之间用单独一行 ### 隔开，不要写别的话：
问题：……
回答：……
原文：……

材料：
{text}
"""


class FromText:
    """One request a passage, `per_call` pairs each. A pair whose quotation is not in its passage is not kept."""

    name = "from-text"
    limit = 0.9

    def __init__(
        self, passages: Sequence[Passage], *, per_call: int, options: dict[str, Any] | None = None
    ) -> None:
        self._passages = passages
        self._per_call = per_call
        self._options = options or {}
        self._number = 0

    def next(self) -> Request | None:
        if self._number == len(self._passages):
            return None
        place, self._number = self._number, self._number + 1
        prompt = _PROMPT.format(count=self._per_call, text=self._passages[place].text)
        key = request_key(self.name, place, prompt)
        return ask(key, "pairs", prompt, about={"passage": place}, **self._options)

    def read(self, request: Request, answer: Answer) -> list[Candidate]:
        passage = self._passages[request.about["passage"]]
        items = labelled(answer.text, _LABELS)
        found = []
        for place, item in enumerate(items):
            span = find_quote(item["quote"], passage.text)
            about: dict[str, Any] = {
                "document": Path(passage.file).name,
                "passage": [passage.start, passage.end],
            }
            if span is not None:
                start, end = passage.start + span[0], passage.start + span[1]
                about |= {"span": [start, end], "quote": passage.text[span[0] : span[1]]}
            if answer.cut and place == len(items) - 1:
                about["cut"] = True
            row = {"instruction": item["question"], "input": "", "output": item["answer"]}
            found.append(Candidate(row, item["question"], about))
        return found

    def verdict(self, candidate: Candidate) -> str | None:
        if candidate.about.get("cut"):
            return "cut"
        if "span" not in candidate.about:
            return "span_not_found"
        return filters.of_answer(candidate.row["instruction"], candidate.row["output"])

    def accepted(self, candidate: Candidate) -> None: ...

    def nominal(self, stage: str) -> float:
        return float(self._per_call)

    def known(self) -> Iterable[str]:
        return ()


def find_quote(quote: str, text: str) -> tuple[int, int] | None:
    """Where a quotation stands, whitespace aside and quotation marks around it taken off; None where it does not."""
    words = re.sub(r"\s+", "", quote.strip().strip("\"'“”‘’「」『』"))
    if not words:
        return None
    places = [place for place, char in enumerate(text) if not char.isspace()]
    start = "".join(text[place] for place in places).find(words)
    return None if start < 0 else (places[start], places[start + len(words) - 1] + 1)
