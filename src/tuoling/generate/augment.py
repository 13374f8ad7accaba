"""More out of rows that are there: the same question in other words, and conversations that go on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from tuoling.data.rouge_l import Tokens, rouge_l
from tuoling.errors import DataError
from tuoling.generate import filters
from tuoling.generate.parse import labelled, numbered
from tuoling.generate.request import Answer, Candidate, Request, ask, request_key
from tuoling.generate.seeds import Seed
from tuoling.language import tr
from tuoling.text.conversation import Conversation

How = Literal["paraphrase", "multi-turn"]

_NEXT = {"question": ("用户", "User"), "answer": ("助手", "Assistant")}
_SAID = {"user": "用户", "assistant": "助手"}
_PARAPHRASE = """请把下面这个问题换 {count} 种说法。意思、要求和其中的数字、名称都不变，用词和句式要明显不同。
只按“编号. 说法”的格式逐行输出，不要回答问题，不要写别的话。

问题：{question}
"""
_GO_ON = """下面是用户与助手的对话。请续写一轮：先写用户接下来会追问的一句话（与前文有关，不重复），再写助手正确、完整的回答。
严格用下面的格式，不要写别的话：
用户：……
助手：……

{dialogue}
"""


class Augment:
    """One request a row. paraphrase: `per_call` other questions with the row's own answer. multi-turn: one turn more."""

    name = "augment"
    limit = 0.95

    def __init__(
        self, seeds: Sequence[Seed], how: How, *, per_call: int, options: dict[str, Any] | None = None
    ) -> None:
        if unfit := next((one for one in seeds if one.conversation.is_plain_text or not one.answer), None):
            raise DataError(tr("a row without question and answer", "没有问答的数据行"), where=unfit.id)
        self._seeds = seeds
        self._how = how
        self._per_call = per_call
        self._options = options or {}
        self._number = 0

    def next(self) -> Request | None:
        if self._number == len(self._seeds):
            return None
        place, self._number = self._number, self._number + 1
        seed = self._seeds[place]
        if self._how == "paraphrase":
            prompt = _PARAPHRASE.format(count=self._per_call, question=seed.instruction)
        else:
            turns = seed.conversation.exchanges
            said = "\n".join(f"{_SAID[turn.role]}：{turn.full_text}" for turn in turns)
            prompt = _GO_ON.format(dialogue=said)
        key = request_key(self.name, self._how, place, prompt)
        about = {"row": place, "from": seed.id}
        return ask(key, self._how, prompt, about=about, **self._options)

    def read(self, request: Request, answer: Answer) -> list[Candidate]:
        seed = self._seeds[request.about["row"]]
        about: dict[str, Any] = {"from": seed.id, **({"cut": True} if answer.cut else {})}
        if self._how == "multi-turn":
            item = labelled(answer.text, _NEXT)[0]
            whole = seed.conversation.asked(item["question"]).answered(item["answer"])
            return [Candidate(messages_row(whole), None, about)]
        lines = numbered(answer.text)
        lines = lines[:-1] if answer.cut else lines
        first, *rest = seed.conversation.exchanges
        found = []
        for line in lines:
            if len(rest) == 1:
                row = {"instruction": line, "input": first.context, "output": rest[0].text}
                row |= {"system": seed.conversation.system} if seed.conversation.system else {}
            else:
                system = seed.conversation.turns[: len(seed.conversation.turns) - len(rest) - 1]
                asked = Conversation(system).asked(line, first.context)
                row = messages_row(Conversation((*asked.turns, *rest)))
            found.append(Candidate(row, line, {"from": seed.id, "question": seed.instruction}))
        return found

    def verdict(self, candidate: Candidate) -> str | None:
        if candidate.about.get("cut"):
            return "cut"
        if self._how == "multi-turn":
            *_, question, answer = (message["content"] for message in candidate.row["messages"])
            return filters.of_answer(question, answer) if question.strip() else "no_question"
        tokens = Tokens()
        one, other = tokens.of(candidate.text or "").tolist(), tokens.of(candidate.about["question"]).tolist()
        if not one:
            return "no_question"
        return "same_text" if rouge_l(one, other) > self.limit else None

    def accepted(self, candidate: Candidate) -> None: ...

    def nominal(self, stage: str) -> float:
        return float(self._per_call) if stage == "paraphrase" else 1.0

    def known(self) -> Iterable[str]:
        return () if self._how == "multi-turn" else (seed.instruction for seed in self._seeds)


def messages_row(conversation: Conversation) -> dict[str, Any]:
    """A conversation as OpenAI writes it."""
    return {"messages": [{"role": turn.role, "content": turn.full_text} for turn in conversation.turns]}
