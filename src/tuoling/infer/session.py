"""One person's talk with an engine: history, settings, and what can be done to them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from threading import Event

from tuoling.errors import OutputError, UsageError
from tuoling.files import append_jsonl
from tuoling.infer.engine import Engine, GenerationSettings, Piece
from tuoling.infer.memory import fit_conversation
from tuoling.language import tr
from tuoling.text.conversation import Conversation, Turn

_CONTEXT_WITHOUT_LIMIT = 4096
"""Tokens of memory for models that name no limit (ALiBi): longer talks only get slower and worse."""


class ChatSession:
    """A conversation that grows. The turns are the user's own even where only the newest still fit the model."""

    def __init__(
        self,
        engine: Engine,
        settings: GenerationSettings,
        *,
        system: str | None = None,
        memory_tokens: int | None = None,
        exchanges: Iterable[tuple[str, str]] = (),
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        """memory_tokens: limit of prompt and answer; the model's own context by default. exchanges: questions and
        answers so far. say: takes notes."""
        self.engine = engine
        self.settings = settings
        self.system = system if system is not None else engine.system
        self._memory_tokens = memory_tokens
        self._say = say
        self._exchanges = list(exchanges)
        self._said_dropped = 0

    @property
    def turns(self) -> int:
        """Finished exchanges."""
        return len(self._exchanges)

    def conversation(self) -> Conversation:
        """The whole talk so far, the system text first."""
        turns = [Turn("system", self.system)] if self.system else []
        for question, answer in self._exchanges:
            turns += [Turn("user", question), Turn("assistant", answer)]
        return Conversation(tuple(turns))

    def ask(self, question: str, *, cancel: Event | None = None) -> Generator[Piece]:
        """Stream the answer; it joins the history when the stream ends, or as far as it came when it is left.

        Raises PromptTooLong where the question alone does not fit.
        """
        asked, dropped = fit_conversation(
            self.conversation().asked(question), self._budget(), self.engine.count_tokens
        )
        if dropped > self._said_dropped:
            self._say(
                tr(
                    f"the context is full: the oldest {dropped} exchanges are no longer seen by the model",
                    f"上下文已满：模型不再看到最早的 {dropped} 轮对话",
                )
            )
        self._said_dropped = dropped
        parts: list[str] = []
        try:
            for piece in self.engine.stream(asked, self.settings, cancel=cancel):
                parts.append(piece.text)
                yield piece
        finally:
            if "".join(parts):
                self._exchanges.append((question, "".join(parts)))

    @property
    def limit_tokens(self) -> int:
        """The most that prompt and answer may have together."""
        limit = self._memory_tokens or self.engine.context_tokens or _CONTEXT_WITHOUT_LIMIT
        if self.engine.context_tokens is not None:
            limit = min(limit, self.engine.context_tokens)
        return limit

    def _budget(self) -> int:
        """Tokens of a prompt that leave room for an answer."""
        return self.limit_tokens - min(self.settings.max_new_tokens, self.limit_tokens // 2)

    def retry(self) -> str | None:
        """Take back the last exchange and return its question; None where there is none."""
        return self._exchanges.pop()[0] if self._exchanges else None

    def undo(self) -> bool:
        """Take back the last exchange."""
        return self.retry() is not None

    def new(self) -> None:
        """Forget the exchanges; the system text stays."""
        self._exchanges.clear()
        self._said_dropped = 0

    def set(self, assignment: str) -> None:
        """`key=value`. Raises UsageError for an unknown key or a bad value."""
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(
                tr(f"{assignment!r} is not key=value", f"{assignment!r} 不是 键=值"),
                remedy="/set temperature=0.7",
            )
        self.settings = self.settings.with_values({key.strip(): value.strip()})

    def save(self, path: Path) -> None:
        """Append the talk to a JSONL file as one row that can be trained on (OpenAI's `messages`)."""
        if not self._exchanges:
            raise UsageError(tr("there is nothing to save yet", "还没有可保存的对话"))
        messages = [{"role": turn.role, "content": turn.text} for turn in self.conversation().turns]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                append_jsonl(file, {"messages": messages})
        except OSError as error:
            raise OutputError(
                tr(f"cannot write: {error.strerror}", f"无法写入：{error.strerror}"), where=str(path)
            ) from error
