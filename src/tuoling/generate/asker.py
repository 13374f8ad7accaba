"""Who answers: an OpenAI-speaking endpoint, or one of our own engines. Every answer is in the log before it is used."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from tuoling.errors import EndpointError
from tuoling.generate.log import Failure, ResponseLog
from tuoling.generate.request import Answer, Request
from tuoling.infer.client import RETRIED, Client, Messages
from tuoling.infer.engine import PromptTooLong
from tuoling.infer.openai_answers import Completion, estimate_tokens
from tuoling.text.conversation import Conversation, Role, Turn

if TYPE_CHECKING:
    from tuoling.infer.endpoint import Endpoint
    from tuoling.infer.engine import Engine

_KEY = "log_key"
_SETTINGS = {"max_tokens": "max_new_tokens", "temperature": "temperature", "top_p": "top_p", "stop": "stop"}
_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}


def _turn(message: dict[str, str]) -> Turn:
    return Turn(_ROLES[message["role"]], message["content"])


class Asker(Protocol):
    """Sends requests as it has room for them and yields after each one that ended; what came is in the log."""

    concurrency: int

    def send(self, requests: Iterator[Request]) -> Iterator[None]: ...

    def close(self) -> None: ...


class _LoggingClient(Client):
    """Writes the log in the thread that got the answer: between the two a kill loses an answer that was paid for."""

    def __init__(self, endpoint: Endpoint, log: ResponseLog) -> None:
        super().__init__(endpoint)
        self._log = log

    def chat(self, messages: Messages, **options: Any) -> Completion:
        key = options.pop(_KEY)
        try:
            completion = super().chat(messages, **options)
        except EndpointError as error:
            self._log.failed(key, failure_of(error))
            raise
        self._log.answered(key, answer_of(completion, messages, options))
        return completion


def failure_of(error: EndpointError) -> Failure:
    """Refusals of the request itself (too long, against a policy) are not repeated; everything else may be."""
    about_request = error.status is not None and error.status not in RETRIED and not error.lasting
    return Failure(error.problem, not about_request)


def answer_of(completion: Completion, messages: Messages, options: dict[str, Any]) -> Answer:
    """Tokens as the server counted them, else estimated."""
    prompt, out = completion.prompt_tokens, completion.completion_tokens
    if prompt is None:
        prompt = estimate_tokens({"messages": messages}, {"max_tokens": 1}) - 1
    if out is None:
        out = estimate_tokens({"prompt": completion.text}, {"max_tokens": 1}) - 1
    return Answer(completion.text, completion.finish_reason, prompt, out, completion.model)


def _item(request: Request) -> tuple[Messages, dict[str, Any]]:
    return request.messages, {**request.options, _KEY: request.key}


class EndpointAsker:
    """Behind an address: `concurrency` requests at once, its rate limits and retries."""

    def __init__(self, endpoint: Endpoint, log: ResponseLog) -> None:
        self.concurrency = endpoint.concurrency
        self._client = _LoggingClient(endpoint, log)

    def send(self, requests: Iterator[Request]) -> Iterator[None]:
        """Raises EndpointError where the endpoint is down for good; what came before is in the log."""
        # not a generator: that would be over for good when `requests` has nothing for the moment
        items = map(_item, requests)
        for _ in self._client.map(items):
            yield

    def close(self) -> None:
        self._client.close()


class EngineAsker:
    """One of our own engines, in this process: `batch_size` requests at once."""

    def __init__(self, engine: Engine, log: ResponseLog, batch_size: int = 8) -> None:
        self.concurrency = batch_size
        self._engine = engine
        self._log = log

    def send(self, requests: Iterator[Request]) -> Iterator[None]:
        while batch := list(islice(requests, self.concurrency)):
            groups: dict[str, list[Request]] = {}
            for one in batch:  # settings hold for a whole batch
                groups.setdefault(str(one.options), []).append(one)
            for group in groups.values():
                self._answer(group)
                yield

    def _answer(self, group: list[Request]) -> None:
        options = group[0].options
        known = {_SETTINGS[name]: value for name, value in options.items() if name in _SETTINGS}
        asked = [Conversation(tuple(_turn(message) for message in one.messages)) for one in group]
        try:
            replies = self._engine.generate(asked, self._engine.defaults.with_values(known))
        except PromptTooLong as error:
            if len(group) > 1:
                for one in group:
                    self._answer([one])
            else:
                self._log.failed(group[0].key, Failure(error.problem, False))
            return
        for one, reply in zip(group, replies, strict=True):
            counts = reply.prompt_tokens, reply.completion_tokens
            self._log.answered(one.key, Answer(reply.text, reply.finish_reason, *counts, self._engine.name))

    def close(self) -> None:
        self._engine.close()
