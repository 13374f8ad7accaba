"""What one person and a model have said to each other, as the web page keeps it: in that person's own browser.

The server holds no talk between two events. Each event brings the talk along and takes the new one away, so that
talks of two people cannot mix, and a reload of the page or of the server loses nothing. What comes from a browser
is read as anything from outside is: what is not a talk is an empty one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

COLUMNS = 2
"""Answers side by side at most."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one model said. finish: a FinishReason, "error", or "" where the answer never ended.

    context_tokens: prompt and answer together. beams: other candidates of a beam search, best first. note: what the
    person should know about it (turns left out, an error).
    """

    model: str
    text: str = ""
    finish: str = ""
    tokens: int = 0
    context_tokens: int = 0
    tokens_per_s: float = 0.0
    beams: tuple[str, ...] = ()
    note: str = ""
    edited: bool = False


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question and its answers: one, or two of two models side by side."""

    question: str
    answers: tuple[Answer, ...] = ()

    def answer(self, column: int) -> Answer | None:
        """The answer that a column shows; a column that was not there yet takes the first one's."""
        if not self.answers:
            return None
        return self.answers[min(column, len(self.answers) - 1)]


@dataclass(frozen=True, slots=True)
class Talk:
    """All exchanges, oldest first."""

    exchanges: tuple[Exchange, ...] = field(default=())

    def history(self, column: int) -> list[tuple[str, str]]:
        """Questions and answers of a column, for the model; questions without an answer are left out."""
        pairs = ((exchange.question, exchange.answer(column)) for exchange in self.exchanges)
        return [(question, answer.text) for question, answer in pairs if answer is not None and answer.text]

    def asked(self, question: str, answers: Sequence[Answer]) -> Talk:
        """One more exchange."""
        return Talk((*self.exchanges, Exchange(question, tuple(answers))))

    def with_answer(self, column: int, answer: Answer) -> Talk:
        """The last exchange's answer in a column replaced."""
        last = self.exchanges[-1]
        answers = (*last.answers[:column], answer, *last.answers[column + 1 :])
        return Talk((*self.exchanges[:-1], replace(last, answers=answers)))

    def taken_back(self) -> tuple[Talk, str | None]:
        """The talk without its last exchange, and that one's question; None where there is none."""
        if not self.exchanges:
            return self, None
        return Talk(self.exchanges[:-1]), self.exchanges[-1].question

    def before(self, index: int) -> Talk:
        """The talk up to exchange `index`, that one left out."""
        return Talk(self.exchanges[:index])

    def corrected(self, index: int, column: int, text: str) -> Talk:
        """An answer's text replaced by what the person wrote."""
        exchange = self.exchanges[index]
        column = min(column, len(exchange.answers) - 1)
        answer = replace(exchange.answers[column], text=text, beams=(), edited=True)
        answers = (*exchange.answers[:column], answer, *exchange.answers[column + 1 :])
        changed = replace(exchange, answers=answers)
        return Talk((*self.exchanges[:index], changed, *self.exchanges[index + 1 :]))

    @property
    def columns(self) -> int:
        """Columns that were ever filled."""
        return max((len(exchange.answers) for exchange in self.exchanges), default=1) or 1

    def rows(self, system: str | None) -> Iterator[dict[str, Any]]:
        """Training rows (OpenAI's `messages`), one a column, with the models that answered."""
        for column in range(self.columns):
            messages = [{"role": "system", "content": system}] if system else []
            for question, answer in self.history(column):
                messages += [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
            models = [exchange.answer(column) for exchange in self.exchanges]
            if any(message["role"] == "assistant" for message in messages):
                names = dict.fromkeys(answer.model for answer in models if answer is not None and answer.text)
                yield {"messages": messages, "model": ", ".join(names)}

    def jsonl(self, system: str | None) -> str:
        """The rows as lines; equal ones once."""
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows(system))
        return "".join(dict.fromkeys(lines))

    # -- to and from the browser ---------------------------------------------------------------------------------

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values. Other beams are not kept: a page of them would fill a browser's five megabytes."""
        return [
            {
                "question": exchange.question,
                "answers": [asdict(replace(answer, beams=())) for answer in exchange.answers],
            }
            for exchange in self.exchanges
        ]

    @classmethod
    def from_json(cls, value: Any) -> Talk:
        """The talk that `to_json` wrote; an empty one where anything about it is wrong."""
        try:
            return cls(tuple(_exchange(part) for part in value or ()))
        except (TypeError, KeyError, ValueError):
            return cls()


_KINDS: Mapping[str, type] = {
    "model": str,
    "text": str,
    "finish": str,
    "tokens": int,
    "context_tokens": int,
    "tokens_per_s": float,
    "note": str,
    "edited": bool,
}


def _exchange(value: Any) -> Exchange:
    answers = value["answers"]
    if not isinstance(value["question"], str) or len(answers) > COLUMNS:
        raise TypeError
    return Exchange(value["question"], tuple(_answer(answer) for answer in answers))


def _answer(value: Any) -> Answer:
    known = {name: value[name] for name in _KINDS if name in value}
    for name, content in known.items():
        number = _KINDS[name] is float and isinstance(content, int)
        if not (isinstance(content, _KINDS[name]) or number):
            raise TypeError
    return Answer(**known)
