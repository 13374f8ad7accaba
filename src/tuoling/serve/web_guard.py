"""What stands between the network and the web page: who may ask, for what, how much, and where the page may ask.

gradio opens some sixty routes (uploads, files, a proxy, an editor); the page needs a dozen. The others are not there.
"""

from __future__ import annotations

import re
from base64 import b64decode
from binascii import Error as NotBase64
from collections.abc import Awaitable, Callable, MutableMapping
from hmac import compare_digest
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

NEEDED = re.compile(
    r"/|/(config|theme\.css|manifest\.json|favicon\.ico|robots\.txt)"
    r"|/(assets|static|svelte)/[\w./@-]+"
    r"|/gradio_api/(queue/(join|data)|run/predict/?|startup-events|heartbeat/\w+|cancel|reset/?|app_id|info|theme\.css)"
)
"""Paths that the page asks for."""

LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")

BODY_LIMIT_BYTES = 8 << 20
"""Of one request: a talk of four million Chinese characters would not fit, no model's context holds a tenth."""

HEADERS = {
    # the page's own scripts are inline and gradio makes functions from text; everything else stays at home
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """ASGI: refuses what the page does not need, before gradio sees it."""

    def __init__(self, app: Any, *, auth: tuple[str, str] | None, local: bool) -> None:
        """auth: user and password that every request must bring. local: only names of this machine are answered,
        so that a page elsewhere cannot reach this one through a name of its own (DNS rebinding)."""
        self._app = app
        self._auth = ":".join(auth).encode() if auth else None
        self._local = local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(send, *refusal)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        await self._app(scope, _Bounded(receive), with_headers)

    def _refusal(self, scope: Scope, headers: dict[str, bytes]) -> tuple[int, str, dict[str, str]] | None:
        host = headers.get("host", b"").decode("latin-1")
        if self._local and host.rsplit(":", 1)[0] not in LOCAL_HOSTS and host not in LOCAL_HOSTS:
            return 421, "this page answers only to the names of this machine", {}
        if self._auth is not None and not self._knows(headers.get("authorization", b"")):
            return (
                401,
                "user and password, please",
                {"WWW-Authenticate": 'Basic realm="tuoling", charset="UTF-8"'},
            )
        if scope["method"] == "POST" and headers.get("sec-fetch-site") in (b"cross-site", b"same-site"):
            return 403, "this page answers only to itself", {}
        if not NEEDED.fullmatch(scope["path"]):
            return 404, "not here", {}
        if int(headers.get("content-length", b"0") or 0) > BODY_LIMIT_BYTES:
            return 413, f"more than {BODY_LIMIT_BYTES} bytes", {}
        return None

    def _knows(self, given: bytes) -> bool:
        kind, _, encoded = given.partition(b" ")
        try:
            return kind.lower() == b"basic" and compare_digest(b64decode(encoded), self._auth or b"")
        except (NotBase64, ValueError):
            return False


class _Bounded:
    """A request's body, which ends early where it says nothing of its length and is too long."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._left_bytes = BODY_LIMIT_BYTES

    async def __call__(self) -> Message:
        message = await self._receive()
        self._left_bytes -= len(message.get("body", b""))
        return message if self._left_bytes >= 0 else {"type": "http.disconnect"}


async def _answer(send: Send, code: int, said: str, headers: dict[str, str]) -> None:
    body = said.encode()
    own = {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(body)), **headers}
    pairs = [(name.lower().encode(), value.encode()) for name, value in own.items()]
    await send({"type": "http.response.start", "status": code, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
