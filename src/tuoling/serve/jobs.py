"""What callers ask for, what they get piece by piece, and the queue between them and the model."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from tuoling.errors import ModelError, TuolingError
from tuoling.infer.engine import Engine, GenerationSettings, Reply
from tuoling.language import tr
from tuoling.text.conversation import Conversation

Prompt = Conversation | tuple[int, ...]
"""A conversation that ends with a question (or plain text to go on with), or token ids as they are."""


class Busy(TuolingError):
    """The queue is full."""

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(
            tr(f"{waiting} requests are waiting already", f"已有 {waiting} 个请求在排队"),
            remedy=tr(f"try again in {retry_after_s} s", f"请在 {retry_after_s} 秒后重试"),
        )


class Closing(TuolingError):
    """The server is shutting down."""

    def __init__(self) -> None:
        super().__init__(tr("the server is shutting down", "服务器正在关闭"))


class TimedOut(TuolingError):
    """A request took longer than it may."""

    def __init__(self, seconds: float) -> None:
        super().__init__(
            tr(f"no whole answer within {seconds:g} s", f"{seconds:g} 秒内没有完成回答"),
            remedy=tr(
                "ask for fewer tokens, or a longer --request-timeout",
                "减少 max_tokens，或加大 --request-timeout",
            ),
        )


class Impossible(ModelError):
    """This engine, or this server's memory, cannot do what is asked."""


class TooManyTokens(ModelError):
    """Prompt and answer do not fit the context together."""

    def __init__(self, prompt: int, answer: int, context: int) -> None:
        super().__init__(
            tr(
                f"{prompt} tokens of prompt and {answer} of answer do not fit into {context}",
                f"提示 {prompt} 个 token 加回答 {answer} 个，超出上下文 {context} 个",
            ),
            remedy=tr(f"max_tokens can be {context - prompt}", f"max_tokens 最多为 {context - prompt}"),
        )


@dataclass(frozen=True, slots=True)
class Order:
    """One request. logprobs: None for none, else how many of the best tokens beside the chosen one.

    engine: which of the engines on the model answers (`Engine.using`). caller: who shares a turn.
    """

    engine: Engine
    prompts: tuple[Prompt, ...]
    settings: GenerationSettings
    choices: int = 1
    logprobs: int | None = None
    caller: str = ""
    timeout_s: float | None = None
    whole_room: bool = False
    """Whether max_new_tokens was asked for, and less is not what was meant."""


@dataclass(frozen=True, slots=True)
class TokenLog:
    """A chosen token and how likely it was: natural logarithms under the model alone, before any setting."""

    token: int
    logprob: float
    best: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """More text of one choice, and the tokens since the last delta."""

    choice: int
    text: str
    tokens: tuple[TokenLog, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """One choice is whole."""

    choice: int
    reply: Reply


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ends without an answer."""

    error: TuolingError


Event = Delta | Finished | Failed


@dataclass(eq=False)
class Job:
    """An order on its way. `on_event` is called from the model's thread and must return at once."""

    order: Order
    on_event: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    prompt_ids: list[list[int]] = field(default_factory=list)
    started_at: float = field(default_factory=time.monotonic)
    unfinished: int = 0
    failed: bool = False

    def __post_init__(self) -> None:
        self.unfinished = len(self.order.prompts) * self.order.choices

    def finish(self, choice: int, reply: Reply) -> None:
        """One choice is whole."""
        self.unfinished -= 1
        if not self.gone:
            self.on_event(Finished(choice, reply))

    def fail(self, error: TuolingError) -> None:
        """End the whole request, once."""
        if not self.failed and self.unfinished:
            self.failed = True
            self.on_event(Failed(error))

    @property
    def gone(self) -> bool:
        """Nobody waits for more of it."""
        return self.failed or self.cancelled.is_set()

    @property
    def overdue(self) -> bool:
        """It has taken longer than its order allows."""
        limit = self.order.timeout_s
        return limit is not None and time.monotonic() - self.started_at > limit


class Backend(Protocol):
    """What answers jobs: many at once (`Batcher`) or one after the other (`OneByOne`)."""

    rows: int
    """Answers that grow at the same time."""
    logprobs: bool
    """Whether it can tell how likely tokens were."""

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Busy, Closing, PromptTooLong or Impossible."""
        ...

    def cancel(self, job: Job) -> None:
        """Nobody waits for it any more: it stops within one token and its memory is free."""
        ...

    def load(self) -> tuple[int, int]:
        """Answers that grow now, and those that wait."""
        ...

    def close(self, drain_s: float) -> None:
        """Refuse new jobs, let those that are in finish for `drain_s` seconds, fail the rest."""
        ...


@dataclass(eq=False)
class Ask:
    """One prompt of a job, and the choices to be made of it."""

    job: Job
    number: int
    ids: list[int]

    @property
    def choices(self) -> range:
        """Numbers of its choices in the whole request."""
        first = self.number * self.job.order.choices
        return range(first, first + self.job.order.choices)

    @property
    def need_tokens(self) -> int:
        """Tokens of prompt and answer that each choice may take."""
        return len(self.ids) + self.job.order.settings.max_new_tokens


class FairQueue:
    """First in, first out for one caller; callers take turns, so that nobody's hundred requests hold up another's one."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[Ask]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def jobs(self) -> set[Job]:
        """Whose prompts wait."""
        return {ask.job for line in self._lines.values() for ask in line}

    def put(self, ask: Ask) -> None:
        """At the end of its caller's line."""
        self._lines.setdefault(ask.job.order.caller, deque()).append(ask)

    def first(self) -> Ask | None:
        """Whose turn it is."""
        line = next(iter(self._lines.values()), None)
        return line[0] if line else None

    def pop(self) -> Ask:
        """Take the one whose turn it is; its caller goes to the end of the callers."""
        caller, line = next(iter(self._lines.items()))
        ask = line.popleft()
        del self._lines[caller]
        if line:
            self._lines[caller] = line
        return ask

    def keep(self, wanted: Callable[[Ask], bool]) -> None:
        """Drop what is not wanted any more."""
        for caller, line in list(self._lines.items()):
            kept = deque(ask for ask in line if wanted(ask))
            if kept:
                self._lines[caller] = kept
            else:
                del self._lines[caller]
