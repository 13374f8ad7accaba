"""One person's talk with an engine: history, settings, and what can be done to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from tuoling.errors import OutputError, UsageError
from tuoling.files import append_jsonl
from tuoling.infer.engine import Engine, GenerationSettings, Piece, Reply
from tuoling.infer.memory import Fitted, dropped_note, fit_conversation, prompt_budget
from tuoling.language import tr
from tuoling.text.conversation import Conversation, Turn


@dataclass(frozen=True, slots=True)
class Stats:
    """Of the newest answer. first_s: until its first text. context_tokens: used of limit_tokens, answer included."""

    completion_tokens: int
    first_s: float
    seconds: float
    context_tokens: int
    limit_tokens: int
    dropped: int

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens a second, the reading of the prompt included."""
        return self.completion_tokens / self.seconds if self.seconds else 0.0


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
        history: Path | None = None,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        """memory_tokens: limit of prompt and answer; the model's own context by default. say: takes notes.

        exchanges: questions and answers so far. history: a file that gets every talk as a training row when it is
        over (`finish`, `new`).
        """
        self.engine = engine
        self.settings = settings
        self.system = system if system is not None else engine.system
        self.stats: Stats | None = None
        self.reply: Reply | None = None
        """The newest whole answer, with its beams."""
        self._memory_tokens = memory_tokens
        self._history = history
        self._say = say
        self._exchanges = list(exchanges)
        self._shown = ""
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

    # -- answers -----------------------------------------------------------------------------------------------

    def ask(self, question: str, *, cancel: Event | None = None) -> Generator[Piece]:
        """Stream the answer; it joins the history when the stream ends, or as far as it came when it is left.

        Raises PromptTooLong where the question alone does not fit.
        """
        try:
            yield from self._stream(self.conversation().asked(question), cancel)
        finally:
            if self._shown:
                self._exchanges.append((question, self._shown))

    def go_on(self, *, cancel: Event | None = None) -> Generator[Piece]:
        """Stream more of the last answer, from where it was cut. Raises UsageError where there is none."""
        if not self._exchanges:
            raise UsageError(tr("there is no answer to go on with", "还没有可以续写的回答"))
        question, so_far = self._exchanges[-1]
        try:
            yield from self._stream(self.conversation(), cancel)
        finally:
            self._exchanges[-1] = (question, so_far + self._shown)

    def summarise(self, *, cancel: Event | None = None) -> Generator[Piece]:
        """Stream a summary of the talk, which then stands in its place. A summary cut short or empty changes nothing.

        Raises UsageError where there is nothing to sum up.
        """
        if not self._exchanges:
            raise UsageError(tr("there is nothing to summarise", "还没有可以概括的对话"))
        request = _summary_request(self._exchanges)
        yield from self._stream(self.conversation().asked(request), cancel)
        if self.reply is None or self.reply.finish_reason == "cancelled" or not self._shown.strip():
            self._say(tr("no summary came: the talk stays as it is", "没有得到概括：对话保持不变"))
            return
        self.finish()
        self._exchanges = [(request, self._shown.strip())]
        self._said_dropped = 0

    def _stream(self, asked: Conversation, cancel: Event | None) -> Generator[Piece]:
        """The engine's pieces; meanwhile `_shown` is what stands on the screen, and then come the stats."""
        self._shown = ""
        fitted = self._fit(asked)
        self.stats = self.reply = None  # those of the answer before are not this one's, should it be stopped
        started = time.perf_counter()
        first_s: float | None = None
        with closing(self.engine.stream(fitted.conversation, self.settings, cancel=cancel)) as pieces:
            for piece in pieces:
                if first_s is None and piece.text:
                    first_s = time.perf_counter() - started
                self._shown = self._shown[: len(self._shown) - piece.back] + piece.text
                if piece.reply is not None:
                    self._count(fitted, piece.reply, first_s, time.perf_counter() - started)
                yield piece

    def _fit(self, asked: Conversation) -> Fitted:
        fitted = fit_conversation(asked, self._budget()[0], self.engine.count_tokens)
        if fitted.dropped > self._said_dropped:
            self._say(dropped_note(fitted.dropped))
        self._said_dropped = fitted.dropped
        return fitted

    def _budget(self) -> tuple[int, int]:
        return prompt_budget(self._memory_tokens, self.engine.context_tokens, self.settings.max_new_tokens)

    def _count(self, fitted: Fitted, reply: Reply, first_s: float | None, seconds: float) -> None:
        self.reply = reply
        self.stats = Stats(
            reply.completion_tokens,
            seconds if first_s is None else first_s,
            seconds,
            fitted.tokens + reply.completion_tokens,
            self._budget()[1],
            fitted.dropped,
        )

    # -- what can be done to the talk --------------------------------------------------------------------------

    def retry(self) -> str | None:
        """Take back the last exchange and return its question; None where there is none."""
        return self._exchanges.pop()[0] if self._exchanges else None

    def undo(self) -> bool:
        """Take back the last exchange."""
        return self.retry() is not None

    def new(self) -> None:
        """Forget the exchanges, kept in the history file first; the system text stays."""
        self.finish()
        self._exchanges.clear()
        self.stats = self.reply = None
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

    def use(self, adapter: str) -> None:
        """Go on with another adapter on the same base. Raises UsageError for a name that is not there."""
        self.engine = self.engine.using(adapter)

    def finish(self) -> None:
        """Append the talk to the history file, where there is one and something was said."""
        if self._history is not None and self._exchanges:
            self.save(self._history)

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


def _summary_request(exchanges: list[tuple[str, str]]) -> str:
    """The question for a summary, in the language that the talk is in."""
    text = "".join(question + answer for question, answer in exchanges)
    chinese = sum("\u4e00" <= letter <= "\u9fff" for letter in text)
    if 4 * chinese >= len(text):  # a word of English has about five letters, a word of Chinese one or two
        return "请用三句话概括我们到目前为止的对话。"
    return "Summarise our conversation so far in three sentences."
