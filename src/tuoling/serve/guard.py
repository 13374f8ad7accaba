"""What every request passes before it is read: host, key, size and time of the body; and what is counted of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from tuoling import console
from tuoling.language import tr
from tuoling.serve.keys import ApiKeys
from tuoling.serve.metrics import Metrics
from tuoling.serve.refusals import Refusal, refusal_of

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN = ("/health",)
"""Paths that need no key."""
DRAINED_BYTES = 64 << 20
"""A body that is too large is read to its end up to this size: a connection closed earlier loses the answer."""


@dataclass(frozen=True, slots=True)
class GuardSettings:
    """keys: None where no key is asked for. hosts: names the Host header may have; None for any."""

    keys: ApiKeys | None = None
    hosts: frozenset[str] | None = None
    body_bytes: int = 2 << 20
    body_timeout_s: float = 30.0
    log: bool = True


class Guard:
    """The outermost layer of the app. It reads the body, so that no route sees more of it than is allowed.

    hosts keeps a page in somebody's browser from reaching a server on the same machine under a name of its own.
    """

    def __init__(self, app: App, settings: GuardSettings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.monotonic(), 0
        scope.setdefault("state", {})["note"] = {}

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
            await send(message)

        try:
            scope["state"]["caller"] = self._caller(scope)
            body = await self._body(scope, receive)
            await self._app(scope, _replay(body, receive), counted)
        except Exception as error:
            if not isinstance(error, Refusal):
                console.warn(f"{scope['method']} {scope['path']}: {type(error).__name__}")
            if not status:
                await send_refusal(counted, refusal_of(error))
        finally:
            self._count(scope, status, time.monotonic() - begun)

    def _caller(self, scope: MutableMapping[str, Any]) -> str:
        """Whose request it is: the key's name, else the address. Raises Refusal."""
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if self._settings.hosts is not None and _name_of(host) not in self._settings.hosts:
            raise Refusal(
                403,
                tr(f"this server does not answer as {host!r}", f"本服务器不以 {host!r} 的名义应答"),
                code="host",
            )
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            if kind != b"application/json":
                raise Refusal(
                    415, tr("Content-Type must be application/json", "Content-Type 必须是 application/json")
                )
        address = scope["client"][0] if scope.get("client") else ""
        keys = self._settings.keys
        if keys is None or scope["path"] in OPEN:
            return address
        scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        name = keys.owner(key.strip()) if scheme.lower() == "bearer" else None
        if name is None:
            problem = tr("no API key that is known", "没有提供有效的 API 密钥")
            remedy = tr("send it as Authorization: Bearer KEY", "请以 Authorization: Bearer 密钥 发送")
            raise Refusal(
                401,
                f"{problem}. {remedy}",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return name

    async def _body(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes:
        limit = self._settings.body_bytes
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                parts, size = [], 0
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return b""
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size <= limit:
                        parts.append(chunk)
                    if not message.get("more_body") or size > DRAINED_BYTES:
                        break
        except TimeoutError as error:
            raise Refusal(408, tr("the body did not come in time", "请求体未按时到达")) from error
        if size > limit:
            raise Refusal(
                413,
                tr(f"the body is larger than {limit} bytes", f"请求体超过 {limit} 字节"),
                code="body_too_large",
                headers={"Connection": "close"},
            )
        return b"".join(parts)

    def _count(self, scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
        """One line in the log and one in the metrics; nothing of what was asked or answered."""
        note = scope["state"]["note"]
        route = scope.get("route")
        endpoint = getattr(route, "path", None) or "other"
        shown = "gone" if note.get("gone") else str(status)
        self._metrics.count("tuoling_requests_total", endpoint=endpoint, status=shown)
        if note.get("gone"):
            self._metrics.count("tuoling_cancelled_total")
        if "tokens" in note:
            self._metrics.time("tuoling_request_seconds", seconds, endpoint=endpoint)
        if self._settings.log and endpoint not in ("/health", "/metrics"):
            tokens = " {}+{} tokens".format(*note["tokens"]) if "tokens" in note else ""
            console.note(f"{scope['method']} {scope['path']} {shown} {seconds:.2f} s{tokens}")


async def send_refusal(send: Send, refusal: Refusal) -> None:
    """A refusal as a whole response."""
    body = json.dumps(refusal.body(), ensure_ascii=False).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **refusal.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once more, then whatever comes after it: the caller's leaving."""
    given = False

    async def again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


def _name_of(host: str) -> str:
    """The Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.rpartition(":")[0] if ":" in host else host
