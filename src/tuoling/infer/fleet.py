"""Several servers with one model, asked as one: every row goes to a server that is free, and to another one when its
server dies."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event

from tuoling import console
from tuoling.errors import EndpointError, TuolingError
from tuoling.files import sha256_text
from tuoling.infer.client import RETRIED
from tuoling.infer.engine import Engine, GenerationSettings, OneModel, Piece, Reply, Score
from tuoling.infer.vllm_engine import ChatEngine, RemoteEngine, VllmEngine
from tuoling.language import tr
from tuoling.text.conversation import Conversation

FAILURES_IN_A_ROW = 3
"""Requests without a success between them, each retried by its client, after which a server counts as dead."""

TRIES = 3
"""Times that servers, all that are alive among them, fail on a row before it is the row's fault."""

Asked = tuple[Conversation, GenerationSettings]


@dataclass(eq=False)
class _Server:
    engine: VllmEngine | ChatEngine
    failures: int = 0
    dead: bool = False


@dataclass(eq=False)
class _Question:
    """Its place, and the servers that failed on it, one by one."""

    place: int
    failed: list[_Server] = field(default_factory=list)


@dataclass(eq=False)
class _Work:
    """What is still to be asked. `changed` guards all of it, and the servers' states."""

    waiting: deque[_Question]
    unanswered: int
    servers: Sequence[_Server]
    asking: int = 0
    """Requests under way."""
    left: bool = False
    last_error: EndpointError | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)
    inbox: SimpleQueue[tuple[int, Reply | TuolingError] | Exception] = field(default_factory=SimpleQueue)

    def take(self, server: _Server) -> _Question | None:
        """The next question for a server; waits, since another one may die and give its questions back. None: no more.

        A server that failed on a question gets it again only where all living ones have.
        """
        with self.changed:
            while not (self.left or server.dead or not self.unanswered):
                for question in self.waiting:
                    if server not in question.failed or self._all_failed(question):
                        self.waiting.remove(question)
                        self.asking += 1
                        return question
                self.changed.wait()
            return None

    def _all_failed(self, question: _Question) -> bool:
        return all(one.dead or one in question.failed for one in self.servers)

    def settle(self, server: _Server, question: _Question, result: Reply | TuolingError) -> None:
        """The question is done with, and its server is well."""
        with self.changed:
            server.failures = 0
            self._put(question, result)
            self._came_back(None)

    def fail(self, server: _Server, question: _Question, error: EndpointError) -> None:
        """The server could not answer: the question goes back to the front of the queue, for whoever is next."""
        with self.changed:
            server.failures += 1
            if error.lasting or server.failures >= FAILURES_IN_A_ROW:
                self._bury(server, error)
            question.failed.append(server)
            if server.dead or len(question.failed) < TRIES or not self._all_failed(question):
                self.waiting.appendleft(question)
            else:
                self._put(question, error)
            self._came_back(error)

    def _put(self, question: _Question, result: Reply | TuolingError) -> None:
        self.unanswered -= 1
        self.inbox.put((question.place, result))

    def _came_back(self, error: EndpointError | None) -> None:
        """A request is over. With the last one of the last server, so is the work."""
        self.asking -= 1
        self.last_error = error or self.last_error
        if self.unanswered and not self.asking and self.last_error and all(one.dead for one in self.servers):
            self.inbox.put(self.last_error)
        self.changed.notify_all()

    def _bury(self, server: _Server, error: EndpointError) -> None:
        if not server.dead and len(self.servers) > 1:
            console.warn(
                tr(
                    f"{error.where}: {error.problem}; its questions go to the other servers",
                    f"{error.where}：{error.problem}；其问题转给其他服务器",
                )
            )
        server.dead = True

    def leave(self) -> None:
        """Nobody reads the answers any more: no further question is asked."""
        with self.changed:
            self.left = True
            self.changed.notify_all()


class Fleet(OneModel):
    """Implements `Engine` over servers that have the same model; `answers` is what they are for."""

    name = "vllm"

    def __init__(self, engines: Sequence[VllmEngine | ChatEngine]) -> None:
        self._servers = [_Server(engine) for engine in engines]
        first = engines[0]
        self.template, self.defaults, self.system = first.template, first.defaults, first.system
        limits = [one.context_tokens for one in engines if one.context_tokens is not None]
        self.context_tokens = min(limits, default=None)
        self.fingerprint = sha256_text("\n".join(sorted({_model_of(engine) for engine in engines})))

    def prompt_text(self, conversation: Conversation) -> str:
        """The prompt as text, as far as it is known here."""
        return self._servers[0].engine.prompt_text(conversation)

    def count_tokens(self, conversation: Conversation) -> int:
        """Tokens of the prompt."""
        return self._servers[0].engine.count_tokens(conversation)

    def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        """Not over HTTP. Raises UsageError."""
        return self._servers[0].engine.score(conversations)

    def close(self) -> None:
        """Free the connections."""
        for server in self._servers:
            server.engine.close()

    def stream(
        self, conversation: Conversation, settings: GenerationSettings, *, cancel: Event | None = None
    ) -> Generator[Piece]:
        """Answer piece by piece, from the first server that begins to."""
        alive = [server for server in self._servers if not server.dead] or self._servers
        for server in alive:
            pieces = server.engine.stream(conversation, settings, cancel=cancel)
            try:
                first = next(pieces)
            except EndpointError as error:
                server.dead = error.lasting
                if server is alive[-1] or not _is_the_servers(error):
                    raise
                continue
            yield first
            yield from pieces
            return

    def generate(
        self,
        conversations: Sequence[Conversation],
        settings: GenerationSettings,
        *,
        cancel: Event | None = None,
    ) -> list[Reply]:
        """Ask for all, in order. Raises the first error."""
        replies: dict[int, Reply] = {}
        for place, reply in self.answers(
            [(conversation, settings) for conversation in conversations], cancel=cancel
        ):
            if isinstance(reply, TuolingError):
                raise reply
            replies[place] = reply
        return [replies[place] for place in range(len(conversations))]

    def answers(
        self, asked: Sequence[Asked], *, cancel: Event | None = None
    ) -> Iterator[tuple[int, Reply | TuolingError]]:
        """(place, reply or why there is none) as they come, each server's `concurrency` at once.

        A server that cannot be reached, or fails FAILURES_IN_A_ROW times, is not asked again in this call, and what it
        was asked goes to the others. Raises its EndpointError when the last server is gone.
        """
        for server in self._servers:
            server.failures, server.dead = 0, False
            for settings in dict.fromkeys(settings for _, settings in asked):
                server.engine.require_known(settings)
        work = _Work(deque(map(_Question, range(len(asked)))), len(asked), self._servers)
        for server in self._servers:
            for _ in range(min(server.engine.client.endpoint.concurrency, len(asked))):
                threading.Thread(
                    target=_ask, args=(work, server, asked, cancel), name="tuoling-ask", daemon=True
                ).start()
        try:
            for _ in asked:
                item = work.inbox.get()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            work.leave()


def spread(engine: Engine) -> Engine:
    """A single server as a fleet of one, so that its rows come and go one by one; any other engine as it is."""
    return Fleet([engine]) if isinstance(engine, VllmEngine | ChatEngine) else engine


def _ask(work: _Work, server: _Server, asked: Sequence[Asked], cancel: Event | None) -> None:
    """One of a server's threads."""
    while (question := work.take(server)) is not None:
        conversation, settings = asked[question.place]
        try:
            if cancel is not None and cancel.is_set():
                reply = Reply("", (), "cancelled", 0, 0)
            else:
                reply = server.engine.answer(conversation, settings)
        except EndpointError as error:
            if _is_the_servers(error):
                work.fail(server, question, error)
            else:
                work.settle(server, question, error)
        except TuolingError as error:
            work.settle(server, question, error)
        except Exception as error:
            work.inbox.put(error)
            return
        else:
            work.settle(server, question, reply)


def _is_the_servers(error: EndpointError) -> bool:
    """Whether another server may do better; else the request itself was refused."""
    return error.lasting or error.status is None or error.status in RETRIED


def _model_of(engine: RemoteEngine) -> str:
    """What answers, wherever it stands: an answer is kept when its server moves to another address."""
    return engine.fingerprint if isinstance(engine, VllmEngine) else engine.client.endpoint.model
