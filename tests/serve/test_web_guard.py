"""Who may ask the page's server for what, without a browser."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from typing import Any

import pytest

from tuoling.errors import UsageError
from tuoling.serve.web import choose_auth
from tuoling.serve.web_guard import BODY_LIMIT_BYTES, Guard, Message


async def inner(scope: Any, receive: Any, send: Any) -> None:
    """What is behind the guard: reads the whole body, and answers with its length."""
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if message["type"] == "http.disconnect":
            return
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


def ask(
    path: str,
    *,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    body: bytes = b"",
    auth: tuple[str, str] | None = None,
    local: bool = True,
) -> tuple[int | None, dict[str, str], bytes]:
    """Status, headers and body of the answer; no status where there is none."""
    given = {"host": "127.0.0.1:7860", **(headers or {})}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }
    parts = [body[start : start + (1 << 20)] for start in range(0, len(body), 1 << 20)] or [b""]
    messages = [
        {"type": "http.request", "body": part, "more_body": number < len(parts)}
        for number, part in enumerate(parts, 1)
    ]
    sent: list[Message] = []

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(Guard(inner, auth=auth, local=local)(scope, receive, send))
    if not sent:
        return None, {}, b""
    return (
        sent[0]["status"],
        {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]},
        sent[1]["body"],
    )


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/config",
        "/theme.css",
        "/assets/index-1.js",
        "/gradio_api/queue/join",
        "/gradio_api/heartbeat/ab12",
    ],
)
def test_what_the_page_needs_is_there(path: str) -> None:
    status, headers, _ = ask(path)
    assert status == 200
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/upload",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/proxy=https://example.com/",
        "/gradio_api/stream/x/y/z/playlist.m3u8",
        "/gradio_api/call/ask",
        "/gradio_api/component_server",
        "/docs",
        "/openapi.json",
        "/login",
        "/monitoring",
        "/assets/../../../etc/passwd\n",
        "/config/",
    ],
)
def test_everything_else_is_not(path: str) -> None:
    assert ask(path)[0] == 404


def test_only_names_of_this_machine_are_answered() -> None:
    assert ask("/", headers={"host": "evil.example:7860"})[0] == 421
    assert ask("/", headers={"host": "127.0.0.1.evil.example"})[0] == 421
    assert (
        ask("/", headers={"host": "localhost:7860"})[0] == ask("/", headers={"host": "[::1]:7860"})[0] == 200
    )
    assert ask("/", headers={"host": "box.lan:7860"}, local=False)[0] == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_page_elsewhere_cannot_ask_in_its_readers_name(site: str) -> None:
    join = "/gradio_api/queue/join"
    assert ask(join, method="POST", headers={"sec-fetch-site": site})[0] == 403
    assert ask(join, method="POST", headers={"sec-fetch-site": "same-origin"})[0] == 200
    assert ask("/", headers={"sec-fetch-site": site})[0] == 200  # a link may lead here


def basic(text: str) -> dict[str, str]:
    return {"authorization": "Basic " + b64encode(text.encode()).decode()}


def test_user_and_password_where_there_are_some() -> None:
    key = ("驼铃", "pass:word")
    assert ask("/", auth=key, headers=basic("驼铃:pass:word"))[0] == 200
    status, headers, _ = ask("/", auth=key)
    assert status == 401 and headers["www-authenticate"].startswith("Basic")
    for wrong in (
        basic("驼铃:pass"),
        basic(""),
        {"authorization": "Basic %%%"},
        {"authorization": "Bearer x"},
    ):
        assert ask("/config", auth=key, headers=wrong)[0] == 401


def test_a_body_too_long_is_refused_before_it_is_read() -> None:
    join = "/gradio_api/queue/join"
    long = {"content-length": str(BODY_LIMIT_BYTES + 1)}
    assert ask(join, method="POST", headers=long)[0] == 413
    whole = b"x" * BODY_LIMIT_BYTES
    assert ask(join, method="POST", body=whole)[2] == str(BODY_LIMIT_BYTES).encode()
    assert (
        ask(join, method="POST", body=whole + b"x")[0] is None
    )  # it said nothing of its length, and is cut off


def test_other_machines_need_a_password() -> None:
    assert choose_auth(None, local=True, asked=False) == (None, False)
    assert choose_auth("me:secret", local=True, asked=False) == (("me", "secret"), False)
    for local, asked in ((False, False), (True, True)):
        key, made = choose_auth(None, local=local, asked=asked)
        assert made and key is not None and len(key[1]) >= 16
    assert choose_auth(None, local=False, asked=False) != choose_auth(None, local=False, asked=False)
    with pytest.raises(UsageError, match="USER:PASSWORD"):
        choose_auth("nocolon", local=False, asked=False)
