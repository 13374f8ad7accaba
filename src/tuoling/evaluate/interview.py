"""Questions to a judge whose answers must be read: asked again in plainer words, kept in a log, never paid twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from tuoling.errors import EndpointError
from tuoling.evaluate.answers import Log
from tuoling.evaluate.labels import Note
from tuoling.files import sha256_text
from tuoling.infer.client import Client

MAX_TOKENS = 3000
"""BELLE's; reasons may be long, and a cut one has no score."""
TRIES = 3

Read = TypeVar("Read")
Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Question:
    """index: the asker's own number for it. place: file:line, for people. repeat: which time the same is asked."""

    index: int
    place: str
    messages: Messages
    repeat: int = 0


@dataclass(slots=True)
class Interview(Generic[Read]):
    """Asks a judge. read: its words → what they mean, None where they cannot be read; ask_again: said then."""

    client: Client
    read: Callable[[str], Read | None]
    ask_again: str
    asked: int = 0
    reused: int = 0
    unreadable: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def answers(self, questions: Sequence[Question], log: Log) -> Iterator[tuple[int, Read | None]]:
        """(index, meaning) as they come; None after TRIES answers that cannot be read. A refused question gives none.

        Every answer is in the log before the next is asked for. Raises EndpointError when the endpoint fails for good.
        """
        waiting = list(questions)
        for attempt in range(TRIES):
            unread = []
            for question, said in self._replies(waiting, log, attempt):
                meaning = self.read(said)
                if meaning is not None:
                    yield question.index, meaning
                    continue
                more = [
                    {"role": "assistant", "content": said or "…"},
                    {"role": "user", "content": self.ask_again},
                ]
                unread.append(
                    Question(question.index, question.place, [*question.messages, *more], question.repeat)
                )
            waiting = unread
        for question in waiting:
            self.unreadable.append(question.place)
            yield question.index, None

    def _replies(self, waiting: Sequence[Question], log: Log, attempt: int) -> Iterator[tuple[Question, str]]:
        """What the judge says, from the log where it has said it before."""
        new: list[tuple[str, Question]] = []
        for question in waiting:
            key = self._key(question, attempt)
            if key in log.rows:
                self.reused += 1
                yield question, log.rows[key]["text"]
            else:
                new.append((key, question))
        requests = (
            (question.messages, {"temperature": 0.0, "max_tokens": MAX_TOKENS}) for _, question in new
        )
        for number, found in self.client.map(requests):
            key, question = new[number]
            if isinstance(found, EndpointError):
                self.refused.append(f"{question.place}: {found.problem}")
                continue
            self.asked += 1
            row = {"place": question.place, "text": found.text, "repeat": question.repeat, "attempt": attempt}
            log.add(key, row)
            yield question, found.text

    def _key(self, question: Question, attempt: int) -> str:
        endpoint = self.client.endpoint
        told = [endpoint.base_url, endpoint.model, question.messages, question.repeat, attempt]
        return sha256_text(json.dumps(told))

    def facts(self) -> dict[str, Any]:
        """For scores.json: no key, no address parameters."""
        return {
            "endpoint": self.client.endpoint.base_url,
            "model": self.client.endpoint.model,
            "asked": self.asked,
            "reused": self.reused,
            "unreadable": len(self.unreadable),
            "refused": len(self.refused),
        }

    def notes(self, what: Note) -> list[Note]:
        """What was not answered. what: what an answer should have held."""
        said: list[Note] = []
        if self.unreadable:
            count, first = len(self.unreadable), self.unreadable[0]
            said.append(
                Note(
                    f"{count} of the judge's answers hold no {what.en} after {TRIES} tries (the first: {first}): left out",
                    f"裁判有 {count} 个回答问了 {TRIES} 次仍没有{what.zh}（第一处：{first}），不计入",
                )
            )
        if self.refused:
            said.append(
                Note(
                    f"{len(self.refused)} questions to the judge failed, the first: {self.refused[0]}",
                    f"{len(self.refused)} 次裁判请求失败，第一处：{self.refused[0]}",
                )
            )
        return said
