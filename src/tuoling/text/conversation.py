"""What every row becomes before anything else looks at it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant", "text"]

IGNORE_INDEX = -100
"""Label of a position that is not learned (PyTorch's and transformers' convention)."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. `context` is Alpaca's `input`: the material a user's instruction works on."""

    role: Role
    text: str
    context: str = ""

    @property
    def full_text(self) -> str:
        """Instruction and context as one message, for templates that know no context."""
        return f"{self.text}\n{self.context}" if self.context else self.text


@dataclass(frozen=True, slots=True)
class Conversation:
    """An optional system turn, then user and assistant in turn; or one "text" turn of plain text."""

    turns: tuple[Turn, ...]

    @property
    def system(self) -> str | None:
        """The system turn's text, if there is one."""
        return self.turns[0].text if self.turns and self.turns[0].role == "system" else None

    @property
    def is_plain_text(self) -> bool:
        """True for plain text: no template, everything is learned."""
        return len(self.turns) == 1 and self.turns[0].role == "text"

    @property
    def exchanges(self) -> tuple[Turn, ...]:
        """The turns without the system turn."""
        return self.turns[1:] if self.system is not None else self.turns

    @property
    def answer(self) -> str | None:
        """The last assistant turn's text, if the conversation ends with one."""
        return self.turns[-1].text if self.turns and self.turns[-1].role == "assistant" else None

    @property
    def question(self) -> Conversation:
        """The conversation without its last answer: what a model is asked."""
        return Conversation(self.turns[:-1]) if self.answer is not None else self

    def answered(self, text: str) -> Conversation:
        """The conversation with one more assistant turn."""
        return Conversation((*self.turns, Turn("assistant", text)))

    def asked(self, text: str, context: str = "") -> Conversation:
        """The conversation with one more user turn."""
        return Conversation((*self.turns, Turn("user", text, context)))
