"""Callers of soak.py: each asks in every way there is, leaves in the middle, or is wrong, and checks what it gets."""

from __future__ import annotations

import json
import random
import secrets
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
from echo_model import ECHOED_BYTES

from tuoling.text.conversation import Conversation, Turn
from tuoling.text.templates import get_template

KEY = "soak-" + secrets.token_hex(16)
NAME, TEMPLATE = "echo", "domain_bloom"
HUNG_S = 90.0
FILLER = "今天天气很好 please tell me more, 谢谢。0123456789 \n"
TAIL = "".join(
    segment.text for segment in get_template(TEMPLATE).prompt(Conversation((Turn("user", "@"),)))
).split("@")[1]
"""What the template puts behind a question."""


def client(url: str) -> httpx.Client:
    """A connection pool with the key."""
    headers = {"Authorization": f"Bearer {KEY}"}
    limits = httpx.Limits(max_connections=None)
    return httpx.Client(
        base_url=url, headers=headers, timeout=HUNG_S, trust_env=False, verify=False, limits=limits
    )


@dataclass(eq=False)
class Counts:
    """What happened, by name; `wrong` should stay empty."""

    happened: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str, seconds: float | None = None) -> None:
        """Count one."""
        with self.lock:
            self.happened[what] += 1
            if seconds is not None:
                self.seconds.append(seconds)

    def fault(self, what: str) -> None:
        """Something that must not be."""
        with self.lock:
            self.wrong.append(what)


@dataclass(frozen=True)
class Question:
    """A prompt that nobody else sends, and what its answer begins with."""

    text: str
    tokens: int

    @staticmethod
    def make(chance: random.Random, longest: int = 500) -> Question:
        """Random lengths of prompt and answer."""
        filler = "".join(chance.choice(FILLER) for _ in range(chance.randrange(ECHOED_BYTES, longest // 2)))
        return Question(f"{filler}{chance.getrandbits(128):032x}", chance.randrange(1, 121))

    def echo(self, tail: str) -> str:
        """The answer of `tokens` bytes; half a character at its end is not shown."""
        end = (self.text + tail).encode()[-ECHOED_BYTES:]
        return (end * (self.tokens // ECHOED_BYTES + 1))[: self.tokens].decode("utf-8", "ignore")


class Caller:
    """One of the callers; `work` sends requests until the count is reached."""

    def __init__(self, url: str, counts: Counts, seed: int) -> None:
        self.counts = counts
        self.chance = random.Random(seed)
        self.http = client(url)

    def work(self, requests: int) -> None:
        """Any error but a refusal that was asked for is a fault."""
        for _ in range(requests):
            drawn = self.chance.random()
            act = self.leave if drawn < 1 / 3 else self.ask_wrongly if drawn < 11 / 24 else self.ask
            try:
                act()
            except httpx.TimeoutException:
                self.counts.fault(f"hung: {act.__name__}")
            except Exception as error:
                self.counts.fault(f"{act.__name__}: {type(error).__name__}: {error}")

    def ask(self) -> None:
        """A whole answer, in one of the ways there are."""
        question = Question.make(self.chance)
        way = self.chance.choice(
            (self._completion, self._chat, self._streamed_chat, self._plain, self._several)
        )
        begun = time.monotonic()
        way(question)
        self.counts.add(way.__name__.strip("_"), time.monotonic() - begun)

    def leave(self) -> None:
        """A stream, left after some of its pieces."""
        question = Question.make(self.chance)
        body = {"model": NAME, "prompt": question.text, "max_tokens": 400, "temperature": 0, "stream": True}
        pieces, said = self.chance.randrange(0, 30), ""
        with self.http.stream("POST", "/v1/completions", json=body) as answer:
            self._expect(answer.status_code, 200, "stream")
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    said += json.loads(line[6:])["choices"][0]["text"]
                    pieces -= 1
                if pieces <= 0:
                    break
        self.same(said, Question(question.text, len(said.encode())).echo(""))
        self.counts.add("left in the middle")

    def ask_wrongly(self) -> None:
        """One of the ways to be wrong."""
        name, status, request = self.chance.choice(WRONG)
        path, options = request()
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        answer = self.http.post(path, headers=headers, **options)
        self._expect(answer.status_code, status, name)
        if "message" not in answer.json().get("error", {}):
            self.counts.fault(f"{name}: not OpenAI's shape: {answer.text[:200]}")
        self.counts.add(f"refused: {name}")

    # -- ways to ask -------------------------------------------------------------------------------------------

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        answer = self.http.post(path, json=body)
        self._expect(answer.status_code, 200, path)
        return answer.json()

    def _completion(self, question: Question) -> None:
        body = {"model": NAME, "prompt": question.text, "max_tokens": question.tokens, "temperature": 0}
        got = self._post("/v1/completions", body)
        self.same(got["choices"][0]["text"], question.echo(""))

    def _messages(self, question: Question) -> dict[str, Any]:
        messages = [{"role": "user", "content": question.text}]
        return {"model": NAME, "messages": messages, "max_tokens": question.tokens, "temperature": 0}

    def _chat(self, question: Question) -> None:
        got = self._post("/v1/chat/completions", self._messages(question))
        self.same(got["choices"][0]["message"]["content"], question.echo(TAIL))
        if got["usage"]["completion_tokens"] != question.tokens:
            self.counts.fault(f"{got['usage']} for {question.tokens} tokens")

    def _streamed_chat(self, question: Question) -> None:
        body = {**self._messages(question), "stream": True}
        said, ended = "", False
        with self.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            self._expect(answer.status_code, 200, "stream")
            for line in answer.iter_lines():
                ended = ended or line == "data: [DONE]"
                if line.startswith("data: {"):
                    said += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
        self.same(said, question.echo(TAIL))
        if not ended:
            self.counts.fault("a stream without its end")

    def _plain(self, question: Question) -> None:
        body = {"question": question.text, "max_new_tokens": question.tokens, "do_sample": False}
        self.same(self._post("/generate", body)["answer"], question.echo(TAIL))

    def _several(self, question: Question) -> None:
        """Drawn, not greedy: the model leaves no doubt, so that all are the same."""
        body = {**self._messages(question), "n": 3, "temperature": 0.7, "top_p": 0.9, "seed": 5}
        for choice in self._post("/v1/chat/completions", body)["choices"]:
            self.same(choice["message"]["content"], question.echo(TAIL))

    def same(self, said: str, wanted: str) -> None:
        """A fault unless the answer is the caller's own."""
        if said.rstrip("\ufffd") != wanted:
            self.counts.fault(f"another's words: {said[:80]!r} instead of {wanted[:80]!r}")

    def _expect(self, status: int, wanted: int, what: str) -> None:
        if status != wanted:
            raise AssertionError(f"{what}: status {status} instead of {wanted}")


def _chat_with(**values: Any) -> tuple[str, dict[str, Any]]:
    messages = [{"role": "user", "content": "你好"}]
    return "/v1/chat/completions", {"json": {"model": NAME, "messages": messages, "max_tokens": 4, **values}}


def _raw(body: bytes) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {"content": body}


_TURNS = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
WRONG: list[tuple[str, int, Any]] = [
    ("bad JSON", 400, lambda: _raw(b'{"model": "echo", "messages": [')),
    ("not UTF-8", 400, lambda: _raw(b'{"model": "\xff\xfe"}')),
    ("3 MB body", 413, lambda: _raw(b'{"model": "' + b"x" * 3_000_000 + b'"}')),
    ("20 MB body", 413, lambda: _raw(b" " * 20_000_000)),
    (
        "wrong key",
        401,
        lambda: ("/v1/completions", {"content": b"{}", "headers": {"Authorization": "Bearer no"}}),
    ),
    ("negative temperature", 400, lambda: _chat_with(temperature=-1)),
    ("unknown model", 404, lambda: _chat_with(model="gpt-4")),
    ("roles out of order", 400, lambda: _chat_with(messages=_TURNS)),
    ("too long for the context", 400, lambda: _chat_with(messages=[{"role": "user", "content": "好" * 800}])),
    ("unknown field", 400, lambda: _chat_with(temprature=1)),
]
