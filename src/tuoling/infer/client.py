"""A client of any OpenAI-speaking endpoint: concurrent, rate-limited, retried, streaming.

    with Client(Endpoint("http://127.0.0.1:8000/v1", "my-model")) as client:
        client.chat([{"role": "user", "content": "你好"}], temperature=0.0).text

One client serves many threads: the limit, the pauses a server asks for and the connections are shared.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, TypeVar

from tuoling.errors import EndpointError
from tuoling.infer.endpoint import Endpoint
from tuoling.infer.openai_answers import (
    Again,
    Completion,
    Delta,
    StreamBroken,
    estimate_tokens,
    retry_after_s,
    text_of,
    with_tries,
)
from tuoling.infer.rate_limit import RateLimit, Ticket
from tuoling.language import tr

if TYPE_CHECKING:
    import httpx2

Result = TypeVar("Result")
Messages = Sequence[Mapping[str, Any]]
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529)
FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 60.0
FAILURES_IN_A_ROW = 5
"""Requests, each tried to the end, after which an endpoint counts as down."""


class Client:
    """Asks one endpoint. Options of a request are OpenAI's (`temperature`, `top_p`, `max_tokens`, `stop`, `seed`, …).

    sleep(seconds) is called between tries and may be replaced in tests; True from it means: give up.
    """

    def __init__(
        self, endpoint: Endpoint, *, sleep: Callable[[float], bool] | None = None, seed: int | None = None
    ) -> None:
        import httpx2

        self.endpoint = endpoint
        key = endpoint.key()
        self._stop = threading.Event()
        self._sleep = sleep or self._stop.wait
        self._random = random.Random(seed)
        self._limit = RateLimit(endpoint.requests_per_minute, endpoint.tokens_per_minute, stop=self._stop)
        self._length_name = "max_tokens"
        self._http = httpx2.Client(
            base_url=endpoint.base_url + "/",
            params=endpoint.query,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(endpoint.timeout_s, connect=endpoint.connect_timeout_s, pool=None),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=endpoint.concurrency),
            trust_env=not endpoint.is_local,  # a proxy for the world knows no local host
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End waiting requests and free the connections."""
        self._stop.set()
        self._http.close()

    def models(self) -> list[str]:
        """Names the endpoint says it serves. Raises EndpointError."""
        return list(self.contexts())

    def contexts(self) -> dict[str, int | None]:
        """Names the endpoint serves, with the tokens of prompt and answer together where it says them (vLLM does)."""
        body, _ = self._tried(lambda: self._read(self._http.get("models")))
        cards = [card for card in body.get("data") or [] if isinstance(card, dict) and "id" in card]
        limits = [card.get("max_model_len") for card in cards]
        return {
            str(card["id"]): limit if isinstance(limit, int) else None
            for card, limit in zip(cards, limits, strict=True)
        }

    def chat(self, messages: Messages, **options: Any) -> Completion:
        """The answer to a conversation. Raises EndpointError when every try has failed."""
        return self._ask("chat/completions", {"messages": list(messages)}, options)

    def complete(self, prompt: str | Sequence[int], **options: Any) -> Completion:
        """What comes after a text or after token ids, without a template. Raises EndpointError."""
        return self._ask("completions", {"prompt": prompt}, options)

    def _ask(self, route: str, what: Mapping[str, Any], options: Mapping[str, Any]) -> Completion:
        estimate = estimate_tokens(what, options)

        def once() -> Completion:
            ticket = self._limit.take(estimate)
            body = self._body(what, options)
            completion = self._completion(self._read(self._http.post(route, json=body)))
            self._settle(ticket, completion)
            return completion

        completion, tries = self._tried(once)
        return with_tries(completion, tries)

    def stream(self, messages: Messages, **options: Any) -> Generator[Delta]:
        """The answer piece by piece. Tried again only until its first piece; then a break raises StreamBroken."""
        return self._pieces("chat/completions", {"messages": list(messages)}, options)

    def stream_completion(self, prompt: str | Sequence[int], **options: Any) -> Generator[Delta]:
        """As `stream`, of what comes after a text or after token ids."""
        return self._pieces("completions", {"prompt": prompt}, options)

    def _pieces(self, route: str, asked: Mapping[str, Any], options: Mapping[str, Any]) -> Generator[Delta]:
        what = {**asked, "stream": True, "stream_options": {"include_usage": True}}
        estimate = estimate_tokens(what, options)
        ticket: Ticket | None = None

        def opened() -> httpx2.Response:
            nonlocal ticket
            ticket = self._limit.take(estimate)
            request = self._http.build_request("POST", route, json=self._body(what, options))
            response = self._http.send(request, stream=True)
            if response.status_code != 200:
                response.read()
                self._refuse(response)
            return response

        response, tries = self._tried(opened)
        try:
            for delta in self._deltas(response, tries):
                if delta.completion is not None:
                    self._settle(ticket, delta.completion)
                yield delta
        finally:
            response.close()

    def map(
        self, requests: Iterable[tuple[Messages, Mapping[str, Any]]]
    ) -> Iterator[tuple[int, Completion | EndpointError]]:
        """(index, answer or error) of many requests as they finish, `concurrency` at once.

        `requests` is read as workers come free, so it may depend on the answers so far. An error that would meet
        every request (no such model, key refused, nobody there), or the last of FAILURES_IN_A_ROW that were not about
        the request itself, is raised after the answers that were under way.
        """
        lasting: EndpointError | None = None
        in_a_row = 0
        numbered = enumerate(requests)
        with ThreadPoolExecutor(self.endpoint.concurrency) as pool:
            running: dict[Future[Completion], int] = {}
            try:
                while True:
                    while lasting is None and len(running) < self.endpoint.concurrency:
                        if (item := next(numbered, None)) is None:
                            break
                        index, (messages, options) = item
                        running[pool.submit(self.chat, messages, **options)] = index
                    if not running:
                        break
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        index = running.pop(future)
                        error = future.exception()
                        if not isinstance(error, EndpointError):
                            in_a_row = 0
                            yield index, future.result()
                            continue
                        in_a_row += error.status is None or error.status in RETRIED
                        if error.lasting or in_a_row >= FAILURES_IN_A_ROW:
                            lasting = lasting or error
                        else:
                            yield index, error
            except BaseException:  # Ctrl-C, or the reader went away: nobody waits for retries
                self._stop.set()
                raise
        if lasting is not None:
            raise lasting

    # one request ----------------------------------------------------------------------------------------------

    def _body(self, what: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        body = {"model": self.endpoint.model, **what, **self.endpoint.extra, **options}
        body = {name: value for name, value in body.items() if value is not None}
        if self._length_name != "max_tokens" and "max_tokens" in body:
            body[self._length_name] = body.pop("max_tokens")
        return body

    def _read(self, response: httpx2.Response) -> dict[str, Any]:
        """The body of a success. Raises EndpointError, Again where another try may help."""
        if response.status_code != 200:
            self._refuse(response)
        try:
            body = response.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise Again(self._nonsense(response.text))
        if body.get("error"):  # some servers report an error with status 200
            raise Again(self.endpoint.refusal(200, response.text))
        return body

    def _refuse(self, response: httpx2.Response) -> None:
        error = self.endpoint.refusal(response.status_code, response.text)
        if (
            response.status_code == 400
            and "max_completion_tokens" in response.text
            and self._length_name == "max_tokens"
        ):
            self._length_name = "max_completion_tokens"  # newer models at OpenAI take only this name for it
            raise Again(error, after_s=0.0)
        if error.lasting or response.status_code not in RETRIED:
            raise error
        raise Again(error, after_s=retry_after_s(response.headers), pause=response.status_code == 429)

    def _nonsense(self, text: str) -> EndpointError:
        shown = " ".join(text.split())[:120]
        return EndpointError(
            tr(
                f"the endpoint's answer is not what OpenAI's API says: {shown}",
                f"接口的回答不符合 OpenAI 接口格式：{shown}",
            ),
            where=self.endpoint.base_url,
            remedy=tr("is it the address of an OpenAI API (…/v1)?", "请确认地址是 OpenAI 接口（…/v1）"),
        )

    def _completion(self, body: Mapping[str, Any]) -> Completion:
        choices = body.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise Again(self._nonsense(json.dumps(body, ensure_ascii=False)))
        first = choices[0]
        message = first.get("message")
        return self._made(
            text_of(message if isinstance(message, dict) else first), first.get("finish_reason"), body
        )

    def _made(self, text: str, finish_reason: str | None, body: Mapping[str, Any]) -> Completion:
        usage = body.get("usage")
        counts = [
            usage.get(name) if isinstance(usage, dict) else None
            for name in ("prompt_tokens", "completion_tokens")
        ]
        prompt, answer = (count if isinstance(count, int) else None for count in counts)
        return Completion(text, finish_reason, prompt, answer, str(body.get("model") or self.endpoint.model))

    def _deltas(self, response: httpx2.Response, tries: int) -> Iterator[Delta]:
        import httpx2

        text, finish = "", None
        last: dict[str, Any] = {}
        try:
            for event in httpx2.EventSource(response):
                if event.data == "[DONE]":
                    yield Delta("", with_tries(self._made(text, finish, last), tries))
                    return
                body = json.loads(event.data)
                if body.get("error"):
                    raise StreamBroken(text, str(body["error"]), self.endpoint.base_url)
                last = {**last, **{name: value for name, value in body.items() if value}}
                for choice in body.get("choices") or []:
                    finish = choice.get("finish_reason") or finish
                    piece = text_of(choice.get("delta") or choice)
                    if piece:
                        text += piece
                        yield Delta(piece)
        except (httpx2.HTTPError, ValueError) as error:
            raise StreamBroken(text, str(error) or type(error).__name__, self.endpoint.base_url) from error
        if finish is None:
            raise StreamBroken(text, tr("no end mark", "没有结束标记"), self.endpoint.base_url)
        yield Delta("", with_tries(self._made(text, finish, last), tries))

    def _settle(self, ticket: Ticket | None, completion: Completion) -> None:
        if (
            ticket is not None
            and completion.prompt_tokens is not None
            and completion.completion_tokens is not None
        ):
            self._limit.settle(ticket, completion.prompt_tokens + completion.completion_tokens)

    # tries ----------------------------------------------------------------------------------------------------

    def _tried(self, once: Callable[[], Result]) -> tuple[Result, int]:
        """The result and the number of tries. Raises the last try's EndpointError."""
        import httpx2

        for number in range(1, self.endpoint.max_retries + 2):
            try:
                return once(), number
            except Again as again:
                problem, after_s = again.error, again.after_s
                if again.pause:
                    self._limit.pause(after_s if after_s is not None else FIRST_BACKOFF_S)
            except httpx2.HTTPError as error:
                problem, after_s = self._unreachable(error), None
            except InterruptedError:
                raise self._given_up() from None
            if number > self.endpoint.max_retries:
                break
            if self._sleep(after_s if after_s is not None else self._backoff_s(number)):
                raise self._given_up()
        raise problem

    def _backoff_s(self, number: int) -> float:
        """Between half and the whole of 0.5 s · 2^(tries-1): clients that failed together do not return together."""
        longest = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (number - 1))
        return longest * (0.5 + 0.5 * self._random.random())

    def _given_up(self) -> EndpointError:
        return EndpointError(
            tr("stopped while waiting for the endpoint", "等待接口时被中止"), where=self.endpoint.base_url
        )

    def _unreachable(self, error: Exception) -> EndpointError:
        import httpx2

        slow = isinstance(error, httpx2.TimeoutException) and not isinstance(error, httpx2.ConnectTimeout)
        if slow:
            limit = f"{self.endpoint.timeout_s:g}"
            return EndpointError(
                tr(f"no answer within {limit} s", f"{limit} 秒内没有回答"),
                where=self.endpoint.base_url,
                remedy=tr("a longer --timeout, or fewer requests at once", "加大 --timeout，或减少并发"),
            )
        down = isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
        return EndpointError(
            tr(f"the endpoint cannot be reached: {error}", f"无法连接接口：{error}"),
            where=self.endpoint.base_url,
            remedy=tr("is the server running, and is the address right?", "服务是否已启动？地址是否正确？"),
            lasting=down,
        )
