"""What is asked and what comes of it: requests, candidate rows, verdicts. The words of this folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tuoling.files import sha256_text


@dataclass(frozen=True, slots=True)
class Request:
    """One question to the generator.

    key:   the same for the same question in every run of a job: nothing is asked twice under it.
    stage: which step of the flow. about: what the answer will be read with (ids of seeds, a span, a row).
    """

    key: str
    stage: str
    messages: tuple[dict[str, str], ...]
    options: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "stage": self.stage,
            "messages": list(self.messages),
            "options": self.options,
            "about": self.about,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Request:
        return cls(
            value["key"],
            value["stage"],
            tuple(value["messages"]),
            dict(value["options"]),
            dict(value["about"]),
        )


def request_key(*parts: Any) -> str:
    """A short name of what is asked."""
    return sha256_text("\x1f".join(map(str, parts)))[:24]


def ask(
    key: str,
    stage: str,
    prompt: str,
    *,
    system: str = "",
    about: Mapping[str, Any] | None = None,
    **options: Any,
) -> Request:
    """A request of one question, with or without a system text."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    return Request(key, stage, tuple(messages), options, dict(about or {}))


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. Token counts are the server's, or an estimate where it does not count."""

    text: str
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    model: str = ""

    @property
    def cut(self) -> bool:
        """It ended because it grew too long: its last item may be half."""
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row that an answer offers.

    row: as it would be written, without provenance. text: what is compared for near duplicates; None: nothing is.
    about: goes into the provenance. kept: whether it becomes a row (a question that only leads to an answer does not).
    """

    row: dict[str, Any]
    text: str | None
    about: dict[str, Any] = field(default_factory=dict)
    kept: bool = True


class Unparsable(Exception):
    """An answer that does not hold what was asked for; it is kept aside. str(): why."""


class Task(Protocol):
    """A flow: what to ask next, and how an answer is read. It keeps no files; replaying the log rebuilds its state."""

    name: str
    limit: float
    """ROUGE-L above which a text repeats an earlier one."""

    def next(self) -> Request | None:
        """The next thing to ask; None: nothing now, and nothing at all once no answer is awaited.

        After a restart the same requests come again under the same keys: those that were asked are passed over.
        """
        ...

    def read(self, request: Request, answer: Answer) -> Sequence[Candidate]:
        """What an answer offers. Raises Unparsable."""
        ...

    def verdict(self, candidate: Candidate) -> str | None:
        """Why a candidate is not good enough, a code of `filters.REASONS`; None where it is."""
        ...

    def accepted(self, candidate: Candidate) -> None:
        """A candidate passed every filter."""
        ...

    def nominal(self, stage: str) -> float:
        """Rows that one request of a stage gives at most, so that not many more are asked than wanted."""
        ...

    def known(self) -> Iterable[str]:
        """Texts that rows must not repeat."""
        ...
