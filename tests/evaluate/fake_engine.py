"""An engine that answers from a table, and the places to put it in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from tuoling.infer.engine import GenerationSettings, PromptTooLong, Reply, Score
from tuoling.text.conversation import Conversation


class FakeEngine:
    """Answers with `answer(question)`; counts what it was asked. A question over 1,000 characters does not fit."""

    name = "fake"
    template = SimpleNamespace(id="plain", stops=())
    defaults = GenerationSettings()
    system = None
    context_tokens = 1000

    def __init__(self, name: str, answer: Callable[[str], str]) -> None:
        self.fingerprint = name
        self.answer = answer
        self.asked: list[str] = []

    def prompt_text(self, conversation: Conversation) -> str:
        return conversation.turns[-1].full_text

    def count_tokens(self, conversation: Conversation) -> int:
        return len(self.prompt_text(conversation))

    def generate(self, conversations: Sequence[Conversation], settings: Any, **_: Any) -> list[Reply]:
        questions = [self.prompt_text(conversation) for conversation in conversations]
        if any(len(question) > 1000 for question in questions):
            raise PromptTooLong(1001, 1000)
        self.asked += questions
        return [Reply(text := self.answer(q), (), "stop", len(q), len(text)) for q in questions]

    def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        """A nat a token, more for the model named base."""
        each = 2.0 if self.fingerprint == "base" else 1.0
        return [Score(each * len(one.answer or ""), len(one.answer or "")) for one in conversations]

    def close(self) -> None: ...
