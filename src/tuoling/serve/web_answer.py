"""A question from the web page answered: wait for the engine, stream, and say what happened. Knows nothing of gradio."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from threading import Event, Thread

from tuoling import console
from tuoling.errors import TuolingError
from tuoling.infer.engine import Engine, GenerationSettings, Piece
from tuoling.infer.session import ChatSession
from tuoling.language import tr
from tuoling.serve.engine_queue import EngineQueue
from tuoling.serve.web_talk import Answer, Talk

FRAME_S = 0.04
"""Time between two pictures of a growing answer: 25 a second are read as typing, more only cost."""


@dataclass(frozen=True)
class WebModels:
    """The models of a page by the names they are chosen by, and the line before the one engine that runs them."""

    engines: Mapping[str, Engine]
    queue: EngineQueue = field(default_factory=EngineQueue)

    @property
    def names(self) -> list[str]:
        """In the order they were given; the first one answers unless another is chosen."""
        return list(self.engines)

    @property
    def first(self) -> Engine:
        """The model that answers unless another is chosen."""
        return self.engines[self.names[0]]


@dataclass(frozen=True, slots=True)
class Wish:
    """Who is to answer, and how. system: "" for none."""

    models: tuple[str, ...]
    settings: GenerationSettings
    system: str = ""
    memory_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Frame:
    """The page at one moment of an answer."""

    talk: Talk
    said: str
    answering: int | None
    """The column that grows; None while waiting, and at the end."""
    done: bool = False


def answer(models: WebModels, talk: Talk, question: str, wish: Wish, cancel: Event) -> Generator[Frame]:
    """Frames from the question's arrival to the end of its last answer. Errors become part of the answers."""
    before = talk
    talk = talk.asked(question, [Answer(name) for name in wish.models])
    yield Frame(talk, "", None)
    with models.queue.join() as ticket:
        said = None
        while not cancel.is_set() and (ahead := ticket.ahead(wait_s=0.2)):
            if ahead != said:
                said = ahead
                yield Frame(
                    talk, tr(f"waiting: {ahead} before you", f"排队中：前面还有 {ahead} 个请求"), None
                )
        for column, name in enumerate(wish.models):
            if cancel.is_set():
                talk = talk.with_answer(column, Answer(name, finish="cancelled"))
                continue
            for part in _stream(models.engines[name], name, before.history(column), question, wish, cancel):
                talk = talk.with_answer(column, part)
                yield Frame(talk, tr("answering…", "正在回答……"), column)
    yield Frame(talk, summary(talk), None, done=True)


class _Growing:
    """An answer made in a thread of its own: the model never waits for a page to be drawn.

    A page takes a tenth of a second to a picture on a slow machine. Drawn token by token, that would be the speed of
    the model.
    """

    def __init__(
        self, name: str, session: ChatSession, notes: list[str], question: str, cancel: Event
    ) -> None:
        self.now = Answer(name)
        self._session = session
        self._notes = notes
        self._question = question
        self._cancel = cancel
        self._ended = Event()
        context = copy_context()  # the reader's language
        self._worker = Thread(target=lambda: context.run(self._work), name="tuoling-web-answer", daemon=True)
        self._worker.start()

    def ended(self, wait_s: float) -> bool:
        """Whether `now` is the last word; waits a moment for that."""
        return self._ended.wait(wait_s)

    def leave(self) -> None:
        """Stop within a token if it grows still, and wait for that: the engine is the next one's then."""
        if not self._ended.is_set():
            self._cancel.set()
        self._worker.join()

    def _work(self) -> None:
        try:
            with closing(self._session.ask(self._question, cancel=self._cancel)) as pieces:
                for piece in pieces:
                    self._take(piece)
        except TuolingError as error:
            self.now = replace(self.now, finish="error", note=str(error))
        except (
            Exception
        ) as error:  # a card out of memory, a defect: said where it is seen, and the page goes on
            console.warn(f"{type(error).__name__}: {error}")
            self.now = replace(self.now, finish="error", note=f"{type(error).__name__}: {error}")
        finally:
            self._ended.set()

    def _take(self, piece: Piece) -> None:
        text = self.now.text[: len(self.now.text) - piece.back] + piece.text
        now = replace(self.now, text=text, beams=piece.beams[1:], note="\n".join(self._notes))
        stats = self._session.stats
        if piece.reply is not None and stats is not None:
            now = replace(
                now,
                finish=piece.reply.finish_reason,
                tokens=stats.completion_tokens,
                context_tokens=stats.context_tokens,
                tokens_per_s=stats.tokens_per_s,
                beams=piece.reply.beams[1:],
            )
        self.now = now


def _stream(
    engine: Engine, name: str, history: list[tuple[str, str]], question: str, wish: Wish, cancel: Event
) -> Iterator[Answer]:
    """An answer as it grows; the last one says how it ended."""
    notes: list[str] = []
    session = ChatSession(
        engine,
        wish.settings,
        system=wish.system,
        memory_tokens=wish.memory_tokens,
        exchanges=history,
        say=notes.append,
    )
    growing = _Growing(name, session, notes, question, cancel)
    try:
        shown = None
        while not growing.ended(FRAME_S):
            if growing.now is not shown:
                shown = growing.now
                yield shown
        yield growing.now
    finally:
        growing.leave()


def summary(talk: Talk) -> str:
    """One line about the newest answers: how long, how fast, why they ended."""
    if not talk.exchanges:
        return ""
    return "  |  ".join(_summary_of(answer) for answer in talk.exchanges[-1].answers)


def _summary_of(answer: Answer) -> str:
    if answer.finish == "error":
        return tr("failed", "出错")
    if not answer.finish:
        return tr("broken off: retry answers it again", "回答中断，可点“重答”")
    parts = []
    if answer.tokens:
        parts.append(f"{answer.tokens:,} tokens · {answer.tokens_per_s:,.1f} tokens/s")
    if answer.finish == "cancelled":
        parts.append(tr("stopped", "已停止"))
    if answer.finish == "length":
        parts.append(tr("cut at the longest length", "已到长度上限"))
    return " · ".join(parts)


def context_used(talk: Talk) -> int:
    """Tokens that the newest exchange took of the context, the fuller column's."""
    for exchange in reversed(talk.exchanges):
        used = max((answer.context_tokens for answer in exchange.answers), default=0)
        if used:
            return used
    return 0
