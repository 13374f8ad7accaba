"""An engine that says what it is told to, at the pace it is told to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from threading import Event
from typing import Any

from tuoling.infer.engine import (
    FinishReason,
    GenerationSettings,
    OneModel,
    Piece,
    PromptTooLong,
    Reply,
    Score,
)
from tuoling.text.conversation import Conversation
from tuoling.text.templates import TEMPLATES

WAIT = "\0"
"""In an answer: nothing more comes until somebody has had enough."""


class ScriptedEngine(OneModel):
    """Follows `Engine`. `say` makes the whole answer from the conversation; a token is a character."""

    name = "scripted"
    template = TEMPLATES["domain_bloom"]
    defaults = GenerationSettings(max_new_tokens=200)
    system: str | None = None

    def __init__(
        self,
        say: Callable[[Conversation], str],
        *,
        fingerprint: str = "scripted",
        context_tokens: int = 1000,
        pace_s: float = 0.0,
    ) -> None:
        self.say = say
        self.fingerprint = fingerprint
        self.context_tokens: int | None = context_tokens
        self.pace_s = pace_s
        self.asked: list[tuple[Conversation, GenerationSettings]] = []
        self.at_once = 0
        self.most_at_once = 0
        self.tokens_made = 0

    def prompt_text(self, conversation: Conversation) -> str:
        return "\n".join(turn.full_text for turn in conversation.turns)

    def count_tokens(self, conversation: Conversation) -> int:
        return len(self.prompt_text(conversation))

    def stream(
        self, conversation: Conversation, settings: GenerationSettings, *, cancel: Event | None = None
    ) -> Iterator[Piece]:
        prompt = self.count_tokens(conversation)
        if self.context_tokens is not None and prompt >= self.context_tokens:
            raise PromptTooLong(prompt, self.context_tokens - 1)
        self.asked.append((conversation, settings))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        cancel = cancel or Event()
        said, reason = "", "stop"
        try:
            for character in self.say(conversation):
                if len(said) >= settings.max_new_tokens:
                    reason = "length"
                    break
                if cancel.wait(self.pace_s) if self.pace_s else cancel.is_set():
                    reason = "cancelled"
                    break
                if character == WAIT:
                    cancel.wait()
                    continue
                said += character
                self.tokens_made += 1
                yield Piece(character, beams=self._beams(said, settings))
            yield Piece("", self._reply(said, prompt, reason, self._beams(said, settings)))  # type: ignore[arg-type]
        finally:
            self.at_once -= 1

    @staticmethod
    def _beams(said: str, settings: GenerationSettings) -> tuple[str, ...]:
        """The answer, and as its rivals the answer with a number behind it."""
        if settings.num_beams == 1:
            return ()
        return tuple(
            said + (str(number) if number > 1 else "") for number in range(1, settings.num_beams + 1)
        )

    def _reply(self, said: str, prompt: int, reason: FinishReason, beams: tuple[str, ...]) -> Reply:
        return Reply(said, tuple(map(ord, said)), reason, prompt, len(said), beams)

    def generate(
        self, conversations: Sequence[Conversation], settings: GenerationSettings, **_: Any
    ) -> list[Reply]:
        replies = []
        for conversation in conversations:
            *_, last = self.stream(conversation, settings)
            assert last.reply is not None
            replies.append(last.reply)
        return replies

    def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is held."""
