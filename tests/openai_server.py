"""A scripted OpenAI-speaking server on localhost: slow, rate-limited, sometimes broken, sometimes nonsense.

    with serve(answer=lambda body: "你好") as server:
        server.faults[2] = Fault("status", 500)          # the third request
        Client(Endpoint(server.url, "test"))

A request's number counts from 0 in the order of arrival. What was answered is in `server.answered`: a client that
pays twice is seen there.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Body = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """What a request meets instead of its answer.

    status: HTTP `code` with `headers` and an error body. page: 200 and HTML. empty: 200 and no choices.
    nonsense: a whole answer with `text` instead of the scripted one. cut: the connection breaks in the middle of
    the body (of a stream: after `code` pieces). stall: no byte until `server.release` is set. null: content is null.
    """

    kind: Literal["status", "page", "empty", "nonsense", "cut", "stall", "null"]
    code: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    text: str = "%$#@ 。。。"
    error: dict[str, Any] | None = None


class FakeOpenAI:
    """What the handler answers and what it saw.

    answer:     request body → text. key: what `Authorization: Bearer` must hold; None: anything.
    fault_of:   (number, body) → Fault | None, for faults by rule; `faults` by number come first.
    per_window: requests let through in `window_s` seconds; more get 429 with Retry-After.
    down_after: after so many requests connections are closed without a word.
    """

    def __init__(self, answer: Callable[[Body], str]) -> None:
        self.answer = answer
        self.faults: dict[int, Fault] = {}
        self.fault_of: Callable[[int, Body], Fault | None] = lambda number, body: None
        self.key: str | None = None
        self.per_window: int | None = None
        self.window_s = 1.0
        self.delay_s = 0.0
        self.down_after: int | None = None
        self.release = threading.Event()
        self.requests: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.answered: list[tuple[Body, str]] = []
        self.refused = 0
        self.at_once = 0
        self.most_at_once = 0
        self.url = ""
        self.lock = threading.Lock()
        self._arrivals: deque[float] = deque()

    def admit(self) -> bool:
        """Whether the limit lets one more through now."""
        if self.per_window is None:
            return True
        now = time.monotonic()
        while self._arrivals and self._arrivals[0] <= now - self.window_s:
            self._arrivals.popleft()
        if len(self._arrivals) >= self.per_window:
            self.refused += 1
            return False
        self._arrivals.append(now)
        return True


class _Handler(BaseHTTPRequestHandler):
    server_state: FakeOpenAI
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None: ...

    def do_GET(self) -> None:
        self._json({"object": "list", "data": [{"id": "test", "object": "model"}]})

    def do_POST(self) -> None:
        state = self.server_state
        body: Body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with state.lock:
            number = len(state.requests)
            state.requests.append(body)
            state.headers.append(dict(self.headers))
            admitted = state.admit()
            state.at_once += 1
            state.most_at_once = max(state.most_at_once, state.at_once)
        try:
            if state.down_after is not None and number >= state.down_after:
                self._break()
            elif state.key is not None and self.headers.get("Authorization") != f"Bearer {state.key}":
                self._error(401, "Incorrect API key provided", "invalid_api_key")
            elif not admitted:
                self._error(
                    429, "Rate limit reached", "rate_limit_exceeded", {"Retry-After": f"{state.window_s:g}"}
                )
            else:
                self._reply(body, state.faults.get(number) or state.fault_of(number, body))
        finally:
            with state.lock:
                state.at_once -= 1

    def _reply(self, body: Body, fault: Fault | None) -> None:
        state = self.server_state
        if state.delay_s:
            time.sleep(state.delay_s)
        kind = fault.kind if fault else None
        if kind == "stall":
            state.release.wait(60)
            self._break()
            return
        if fault and kind == "status":
            error = fault.error or {"message": "something broke", "type": "server_error"}
            self._json({"error": error}, fault.code, fault.headers)
            return
        if kind == "page":
            self._send(b"<html><body>Bad Gateway</body></html>", 200, {"Content-Type": "text/html"})
            return
        if kind == "empty":
            self._json({"id": "x", "object": "chat.completion", "choices": []})
            return
        text = fault.text if fault and kind == "nonsense" else state.answer(body)
        if body.get("stream"):
            self._stream(body, text, fault)
        else:
            self._whole(body, text, fault)

    def _whole(self, body: Body, text: str, fault: Fault | None) -> None:
        content: Any = None if fault and fault.kind == "null" else text
        chat = "messages" in body
        choice = {"message": {"role": "assistant", "content": content}} if chat else {"text": content}
        value = {
            "id": "chatcmpl-1",
            "object": "chat.completion" if chat else "text_completion",
            "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", **choice}],
            "usage": _usage(body, text),
        }
        data = json.dumps(value).encode()
        if fault and fault.kind == "cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self._break()
            return
        with self.server_state.lock:
            self.server_state.answered.append((body, text))
        self._send(data, 200, {"Content-Type": "application/json"})

    def _stream(self, body: Body, text: str, fault: Fault | None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for number, piece in enumerate(re.findall(r".{1,3}", text, re.DOTALL)):
            if fault and fault.kind == "cut" and number >= fault.code:
                self._break()
                return
            self._event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        self._event({"choices": [], "model": body["model"], "usage": _usage(body, text)})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True
        with self.server_state.lock:
            self.server_state.answered.append((body, text))

    def _event(self, value: object) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        self.wfile.flush()

    def _break(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.close()

    def _error(self, status: int, message: str, code: str, headers: dict[str, str] | None = None) -> None:
        self._json({"error": {"message": message, "type": code, "code": code}}, status, headers)

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(
            json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})}
        )

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _usage(body: Body, text: str) -> dict[str, int]:
    """A token a character: easy to add up in a test."""
    prompt = sum(len(message["content"]) for message in body.get("messages", ())) or len(
        body.get("prompt", "")
    )
    return {"prompt_tokens": prompt, "completion_tokens": len(text), "total_tokens": prompt + len(text)}


def last_user_text(body: Body) -> str:
    """The newest question of a request."""
    if "prompt" in body:
        return str(body["prompt"])
    return str([message["content"] for message in body["messages"] if message["role"] == "user"][-1])


def echo(body: Body) -> str:
    """The question given back."""
    return last_user_text(body)


@contextmanager
def serve(answer: Callable[[Body], str] = echo, *, port: int = 0) -> Iterator[FakeOpenAI]:
    """A server that answers with `answer(body)`."""
    state = FakeOpenAI(answer)
    handler = type("Handler", (_Handler,), {"server_state": state})
    server = _Server(("127.0.0.1", port), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield state
    finally:
        state.release.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no news."""
