"""Requests that are wrong: each gets its status in OpenAI's shape, names the field, and the server stays up."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.serve.live import HTTP, Live, live
from tests.tiny import tiny_model

from tuoling.api import load
from tuoling.errors import OutputError, UsageError
from tuoling.infer.torch_engine import TorchEngine
from tuoling.serve.batching import Batcher
from tuoling.serve.guard import GuardSettings
from tuoling.serve.jobs import Closing, Failed, Job, Order
from tuoling.serve.keys import ApiKeys, make_key, read_keys
from tuoling.serve.requests import Limits
from tuoling.serve.server import Address, keys_for, listen
from tuoling.text.conversation import Conversation, Turn

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
ENDLESS = 3000


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchEngine]:
    """A model that never ends by itself, with a context of 4,096 tokens."""
    folder = tiny_model(tmp_path_factory.mktemp("m") / "m", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    with load(folder, template="domain_bloom", device="cpu", dtype="fp32") as model:
        assert isinstance(model.engine, TorchEngine)
        model.engine.end_ids, model.engine.stops = set(), ()
        yield model.engine


@pytest.fixture(scope="module")
def server(engine: TorchEngine) -> Iterator[Live]:
    backend = Batcher(engine, rows=2, waiting=1, memory_tokens=20_000)
    guard = GuardSettings(hosts=frozenset({"127.0.0.1"}), body_bytes=1 << 20, log=False)
    with live(backend, {"m": engine}, limits=Limits(max_tokens=ENDLESS), guard=guard) as running:
        yield running
    backend.close()


def chat_with(**values: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 4, **values}


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": "x"} for role in roles]


BAD: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "negative temperature": (chat_with(temperature=-0.5), 400, "temperature"),
    "temperature as text": (chat_with(temperature="hot"), 400, "temperature"),
    "top_p above 1": (chat_with(top_p=1.5), 400, "top_p"),
    "no tokens": (chat_with(max_tokens=0), 400, "max_tokens"),
    "too many tokens": (chat_with(max_tokens=10**9), 400, "max_tokens"),
    "half a token": (chat_with(max_tokens=1.5), 400, "max_tokens"),
    "n of 0": (chat_with(n=0), 400, "n"),
    "more choices than rows": (chat_with(n=3), 400, None),
    "unknown model": (chat_with(model="gpt-4"), 404, "model"),
    "no model": (chat_with(model=None), 400, "model"),
    "no messages": (chat_with(messages=None), 400, "messages"),
    "empty messages": (chat_with(messages=[]), 400, "messages"),
    "messages as text": (chat_with(messages="hi"), 400, "messages"),
    "message as text": (chat_with(messages=["hi"]), 400, "messages[0]"),
    "assistant first": (chat_with(messages=turns("assistant", "user")), 400, "messages[0].role"),
    "two users": (chat_with(messages=turns("user", "user")), 400, "messages[1].role"),
    "late system": (chat_with(messages=turns("user", "system", "user")), 400, "messages[1]"),
    "ends with assistant": (chat_with(messages=turns("user", "assistant")), 400, "messages"),
    "unknown role": (chat_with(messages=turns("tool")), 400, "messages[0].role"),
    "no content": (chat_with(messages=[{"role": "user"}]), 400, "messages[0].content"),
    "an image": (
        chat_with(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        400,
        "messages[0].content[0]",
    ),
    "half a character": (
        chat_with(messages=[{"role": "user", "content": "\ud83d"}]),
        400,
        "messages[0].content",
    ),
    "misspelt field": (chat_with(temprature=1), 400, "temprature"),
    "tools": (chat_with(tools=[{"type": "function"}]), 400, "tools"),
    "penalty that is not offered": (chat_with(frequency_penalty=0.5), 400, "frequency_penalty"),
    "JSON mode": (chat_with(response_format={"type": "json_object"}), 400, "response_format"),
    "best logs without logs": (chat_with(top_logprobs=3), 400, "top_logprobs"),
    "stream_options without stream": (
        chat_with(stream_options={"include_usage": True}),
        400,
        "stream_options",
    ),
    "stop as number": (chat_with(stop=3), 400, "stop"),
    "context overflow": (chat_with(messages=[{"role": "user", "content": "好" * 4200}]), 400, "messages"),
    "no room for the answer": (
        chat_with(messages=[{"role": "user", "content": "好" * 1500}], max_tokens=ENDLESS),
        400,
        "messages",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_a_wrong_request_is_refused_and_the_field_named(server: Live, name: str) -> None:
    body, status, param = BAD[name]
    got = server.post(CHAT, content=json.dumps(body).encode())
    error = got.json()["error"]
    assert (got.status_code, error["param"]) == (status, param), error
    assert error["message"] and error["type"] in ("invalid_request_error", "not_found_error")
    assert set(error) == {"message", "type", "param", "code"}


def test_overflow_tells_the_numbers(server: Live, engine: TorchEngine) -> None:
    got = server.post(CHAT, chat_with(messages=[{"role": "user", "content": "好" * 4200}]))
    tokens = engine.count_tokens(Conversation((Turn("user", "好" * 4200),)))
    error = got.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert str(tokens) in error["message"] and "4095" in error["message"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"model": ', 400),
        (b"", 400),
        (b"[1]", 400),
        (b'{"model": NaN}', 400),
        (b'{"model": "\xff\xfe"}', 400),
        (b"[" * 100_000, 400),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", 400),
        (b" " * (1 << 20) + b"{}", 413),
        (b"x" * 20_000_000, 413),
    ],
    ids=["cut off", "empty", "a list", "NaN", "not UTF-8", "deep", "a huge number", "1 MB and 2", "20 MB"],
)
def test_bodies_that_cannot_be_read(server: Live, body: bytes, status: int) -> None:
    got = server.post(CHAT, content=body)
    assert got.status_code == status and got.json()["error"]["message"]
    assert HTTP.get(f"{server.url}/health").json() == {"status": "ok"}


@pytest.mark.slow
def test_wrong_paths_methods_and_kinds(server: Live) -> None:
    assert server.post("/v1/nothing", {}).status_code == 404
    assert HTTP.get(server.url + CHAT).status_code == 405
    assert HTTP.get(f"{server.url}/v1/models/gpt-4").status_code == 404
    assert server.post(CHAT, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert server.post("/generate", {}).json()["error"]["param"] == "question"
    for path in ("/docs", "/openapi.json"):
        assert HTTP.get(server.url + path).status_code == 404


def test_another_sites_page_is_not_answered(server: Live) -> None:
    """No CORS, and a name that points here from elsewhere is refused."""
    got = HTTP.get(f"{server.url}/v1/models", headers={"Origin": "http://evil.example"})
    assert not [name for name in got.headers if name.startswith("access-control")]
    assert HTTP.get(f"{server.url}/v1/models", headers={"Host": "evil.example"}).status_code == 403


@pytest.mark.slow
def test_a_full_queue_says_when_to_come_back(server: Live) -> None:
    """Two answers grow, one waits; the next is told 429. Whoever leaves makes room within a token."""
    body = chat_with(max_tokens=ENDLESS, stream=True)
    streams = [HTTP.stream("POST", server.url + CHAT, json=body) for _ in range(3)]
    answers = [stream.__enter__() for stream in streams]
    try:
        lines = [answer.iter_lines() for answer in answers[:2]]
        for each in lines:
            next(each)
        backend = server.service.backend
        until(lambda: backend.load() == (2, 1))
        with held(backend):
            got = server.post(CHAT, chat_with())
        assert got.status_code == 429 and got.json()["error"]["type"] == "rate_limit_error"
        assert int(got.headers["Retry-After"]) >= 1
        gone = server.metric("tuoling_cancelled_total")
    finally:
        for stream in streams:
            stream.__exit__(None, None, None)
    until(lambda: backend.load() == (0, 0))
    assert isinstance(backend, Batcher)
    cache = backend.stepper.cache
    until(lambda: cache.bytes_per_token == 0)  # the memory is free
    until(lambda: server.metric("tuoling_cancelled_total") == gone + 3)
    assert server.post(CHAT, chat_with()).status_code == 200


@pytest.mark.slow
def test_a_caller_that_leaves_a_whole_answer_stops_it(server: Live) -> None:
    backend, gone = server.service.backend, server.metric("tuoling_cancelled_total")
    body = json.dumps(chat_with(max_tokens=ENDLESS)).encode()
    place = httpx.URL(server.url)
    with socket.create_connection((place.host, place.port)) as caller:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {place.host}\r\nContent-Type: application/json\r\n"
        caller.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: backend.load() == (1, 0))
    until(lambda: server.metric("tuoling_cancelled_total") == gone + 1)
    until(lambda: backend.load() == (0, 0))


@contextmanager
def held(backend: Any) -> Iterator[None]:
    """Within, no answer gets a token further."""
    go_on, step = threading.Event(), backend.stepper.step

    def wait(*asked: Any) -> Any:
        go_on.wait()
        return step(*asked)

    backend.stepper.step = wait
    try:
        yield
    finally:
        backend.stepper.step = step
        go_on.set()


def until(true: Any) -> None:
    """Wait for what another thread is about to do."""
    tick = threading.Event()
    for _ in range(3000):
        if true():
            return
        tick.wait(0.01)
    raise AssertionError("it did not happen within 30 s")


@pytest.mark.slow
def test_a_request_that_takes_too_long_is_told_so(engine: TorchEngine) -> None:
    backend = Batcher(engine, rows=1)
    with live(backend, {"m": engine}, limits=Limits(timeout_s=0.2, max_tokens=ENDLESS)) as running:
        got = running.post(CHAT, chat_with(max_tokens=ENDLESS))
        assert got.status_code == 504 and got.json()["error"]["code"] == "timeout"
        streamed = running.post(CHAT, chat_with(max_tokens=ENDLESS, stream=True)).text
        assert json.loads(streamed.strip().splitlines()[-1][6:])["error"]["code"] == "timeout"
        running.service.reader.limits = Limits()
        assert running.post(CHAT, chat_with(max_tokens=1)).status_code == 200
    backend.close()


@pytest.mark.slow
def test_the_end_finishes_what_grows_and_refuses_what_comes(engine: TorchEngine) -> None:
    backend = Batcher(engine, rows=2)
    with live(backend, {"m": engine}, limits=Limits(max_tokens=ENDLESS)) as running:
        body = chat_with(max_tokens=300, stream=True)
        with HTTP.stream("POST", running.url + CHAT, json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.stop()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        running.thread.join(30)
        assert not running.thread.is_alive()
        with pytest.raises(Closing):
            backend.submit(Job(Order(engine, (Conversation((Turn("user", "a"),)),), engine.defaults), print))


@pytest.mark.slow
def test_a_short_end_tells_those_it_cuts(engine: TorchEngine) -> None:
    """Nobody is cut off silently: the stream's last event says why."""
    backend = Batcher(engine, rows=2)
    with live(backend, {"m": engine}, limits=Limits(max_tokens=ENDLESS), drain_s=0.0) as running:
        body = chat_with(max_tokens=ENDLESS, stream=True)
        with HTTP.stream("POST", running.url + CHAT, json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.stop()
            rest = [line for line in lines if line]
        assert json.loads(rest[-1][6:])["error"]["code"] == "shutting_down"


def test_numbers_that_are_not_finite_end_their_own_answer(engine: TorchEngine) -> None:
    import torch

    backend = Batcher(engine, rows=2)
    norm = engine.model.model.norm.weight
    kept = norm.detach().clone()
    said: list[Any] = []
    try:
        with torch.no_grad():
            norm[0] = float("nan")
        done = threading.Event()

        def note(event: Any) -> None:
            said.append(event)
            done.set()

        backend.submit(Job(Order(engine, (Conversation((Turn("user", "a"),)),), engine.defaults), note))
        assert done.wait(30) and isinstance(said[0], Failed)
    finally:
        with torch.no_grad():
            norm.copy_(kept)
        backend.close()


@pytest.mark.slow
def test_keys_are_made_once_and_kept_as_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], engine: TorchEngine
) -> None:
    monkeypatch.delenv("TUOLING_API_KEY", raising=False)
    file = tmp_path / "keys.json"
    assert keys_for(Address("127.0.0.1"), file, required=False) is None and not file.exists()
    keys = keys_for(Address("0.0.0.0"), file, required=False)
    key = next(word for word in capsys.readouterr().err.split() if word.startswith("tuoling-"))
    assert keys is not None and keys.owner(key) == "first" and keys.owner(key + "x") is None
    assert key not in file.read_text() and file.stat().st_mode & 0o077 == 0
    second = make_key(file, "second")
    again = keys_for(Address("::"), file, required=False)
    assert again is not None and again.owner(key) == "first" and again.owner(second) == "second"
    assert key not in capsys.readouterr().err
    monkeypatch.setenv("TUOLING_API_KEY", "mine")
    given = keys_for(Address("127.0.0.1"), tmp_path / "none.json", required=False)
    assert given is not None and given.owner("mine") == "TUOLING_API_KEY"
    file.write_text('{"keys": 3}')
    with pytest.raises(OutputError):
        read_keys(file)


@pytest.mark.slow
def test_a_server_with_keys_lets_only_health_through(engine: TorchEngine) -> None:
    keys = ApiKeys()
    keys.accept("a", "right")
    backend = Batcher(engine, rows=1)
    with live(backend, {"m": engine}, guard=GuardSettings(keys=keys, log=False)) as running:
        assert HTTP.get(f"{running.url}/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}):
            for path in ("/v1/models", "/metrics"):
                got = HTTP.get(running.url + path, headers=headers)
                assert got.status_code == 401 and got.json()["error"]["type"] == "authentication_error"
        assert len(running.client(api_key="right").models.list().data) == 1
    backend.close()


@pytest.mark.slow
def test_a_port_that_is_taken_is_said_before_anything_is_loaded() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UsageError, match="cannot listen") as caught:
            listen(Address("127.0.0.1", other.getsockname()[1]))
    assert "--port" in (caught.value.remedy or "")
