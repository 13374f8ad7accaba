"""The HTTP side: OpenAI's paths, the plain question-and-answer ones, health and metrics."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from tuoling import console
from tuoling.language import tr
from tuoling.serve.answers import Shape
from tuoling.serve.fields import read_json_body
from tuoling.serve.guard import Guard, GuardSettings
from tuoling.serve.jobs import Backend, Closing, Delta, Finished
from tuoling.serve.listener import CallerGone, Listener
from tuoling.serve.metrics import Metrics
from tuoling.serve.refusals import Refusal, bad, refusal_of
from tuoling.serve.requests import Reader, Wanted

NEWLINE = "<FN>"
"""A line break within a line of the plain stream."""


@dataclass(eq=False)
class Service:
    """What the routes answer with. log_prompts: write questions and answers to the log."""

    backend: Backend
    reader: Reader
    metrics: Metrics = field(default_factory=Metrics)
    log_prompts: bool = False
    closing: bool = False
    started_at: int = field(default_factory=lambda: int(time.time()))

    def understand(
        self, read: Callable[[Mapping[str, Any], str], Wanted], body: bytes, caller: str
    ) -> Wanted:
        """The request, or a Refusal."""
        if self.closing:
            raise refusal_of(Closing())
        wanted = read(read_json_body(body), caller)
        if wanted.order.logprobs is not None and not self.backend.logprobs:
            raise bad(tr("this engine tells no logprobs", "该引擎不提供 logprobs"), "logprobs", "unsupported")
        if self.log_prompts:
            console.note(body.decode("utf-8", "replace"))
        return wanted

    def gauges(self) -> dict[str, float]:
        """What is measured when it is asked for."""
        import psutil

        running, waiting = self.backend.load()
        return {
            "tuoling_running": running,
            "tuoling_waiting": waiting,
            "tuoling_resident_bytes": psutil.Process().memory_info().rss,
        }


class _Exchange:
    """One request that the model answers."""

    def __init__(self, service: Service, request: Request, wanted: Wanted) -> None:
        self._service = service
        self._request = request
        self._note: dict[str, Any] = request.scope["state"]["note"]
        self._begun = time.monotonic()
        self.wanted = wanted
        self.listener = Listener(service.backend, wanted.order)

    async def events(self) -> AsyncIterator[Delta | Finished | None]:
        """The listener's, counted."""
        first, prompt, completion = True, 0, 0
        order = self.wanted.order
        try:
            async for event in self.listener.events(self._request.receive):
                if isinstance(event, Delta) and first and event.text:
                    first = False
                    self._service.metrics.time("tuoling_first_token_seconds", time.monotonic() - self._begun)
                if isinstance(event, Finished):
                    completion += event.reply.completion_tokens
                    if event.choice % order.choices == 0:
                        prompt += event.reply.prompt_tokens
                    if self._service.log_prompts:
                        console.note(event.reply.text)
                yield event
        except (CallerGone, asyncio.CancelledError, GeneratorExit):
            self._note["gone"] = True
            raise
        self._note["tokens"] = prompt, completion
        self._service.metrics.count("tuoling_prompt_tokens_total", prompt)
        self._service.metrics.count("tuoling_completion_tokens_total", completion)

    async def whole(self, shape: Shape) -> dict[str, Any]:
        """The answer at once."""
        async for event in self.events():
            if event is not None:
                shape.take(event)
        return shape.whole()

    async def chunks(self, shape: Shape) -> AsyncIterator[str]:
        """The answer as server-sent events. An error after the first byte is an event of its own."""
        for chunk in shape.first_chunks():
            yield _event(chunk)
        try:
            async for event in self.events():
                yield ": still here\n\n" if event is None else _event(shape.chunk([shape.take(event)]))
        except CallerGone:
            return
        except Exception as error:
            yield _event(refusal_of(error).body())
            return
        if self.wanted.usage:
            yield _event(shape.usage_chunk())
        yield "data: [DONE]\n\n"

    async def lines(self) -> AsyncIterator[str]:
        """The answer as lines of plain text, a piece a line, its line breaks written as <FN>."""
        try:
            async for event in self.events():
                if isinstance(event, Delta) and event.text:
                    yield event.text.replace("\n", NEWLINE) + "\n"
        except CallerGone:
            return


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def make_app(service: Service, guard: GuardSettings) -> Guard:
    """The ASGI app. No docs pages (they load scripts from elsewhere), no CORS headers."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(app)
    _add_openai(app, service)
    _add_plain(app, service)
    _add_state(app, service)
    return Guard(app, guard, service.metrics)


def _add_errors(app: Any) -> None:
    def shown(refusal: Refusal) -> JSONResponse:
        return JSONResponse(refusal.body(), refusal.status, refusal.headers)

    async def refused(request: Request, error: Exception) -> Response:
        return shown(refusal_of(error))

    async def missing(request: Request, error: Any) -> Response:
        path = f"{request.method} {request.url.path}"
        texts = {
            404: tr(f"there is no {path}", f"没有 {path}"),
            405: tr(f"{path} is not offered", f"不支持 {path}"),
        }
        message = texts.get(error.status_code, str(error.detail))
        return shown(Refusal(error.status_code, message, headers=dict(error.headers or {})))

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(HTTPException, missing)


def _add_openai(app: Any, service: Service) -> None:
    async def answer(request: Request, *, chat: bool) -> Response:
        read = service.reader.chat if chat else service.reader.completion
        wanted = service.understand(read, await request.body(), request.state.caller)
        exchange = _Exchange(service, request, wanted)
        await _submitted(exchange)
        shape = Shape(wanted, chat=chat)
        if wanted.stream:
            return StreamingResponse(
                exchange.chunks(shape), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        return await _or_gone(exchange.whole(shape), JSONResponse)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, chat=True)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, chat=False)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        raise Refusal(
            501,
            tr(
                "this model writes text and makes no embeddings; use an embedding model's server",
                "该模型只生成文本，不提供向量；请使用嵌入模型的服务",
            ),
            code="unsupported",
            headers={"x-should-retry": "false"},
        )

    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": service.started_at, "owned_by": "tuoling"}

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        data = [card(name) for name in service.reader.names.engines]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        service.reader.names.engine(name)
        return JSONResponse(card(name))


def _add_plain(app: Any, service: Service) -> None:
    async def exchange(request: Request) -> _Exchange:
        body = await request.body()
        made = _Exchange(
            service, request, service.understand(service.reader.question, body, request.state.caller)
        )
        await _submitted(made)
        return made

    def stream(asked: _Exchange) -> Response:
        return StreamingResponse(asked.lines(), media_type="text/plain; charset=utf-8")

    @app.post("/")
    @app.post("/generate")
    async def once(request: Request) -> Response:
        asked = await exchange(request)
        if asked.wanted.stream:
            return stream(asked)

        async def text() -> dict[str, str]:
            answer = ""
            async for event in asked.events():
                if isinstance(event, Finished) and event.choice == 0:
                    answer = event.reply.text
            return {"answer": answer}

        return await _or_gone(text(), JSONResponse)

    @app.post("/stream")
    @app.post("/generate/stream")
    async def streamed(request: Request) -> Response:
        return stream(await exchange(request))


def _add_state(app: Any, service: Service) -> None:
    @app.get("/health")
    async def health(request: Request) -> Response:
        state = "closing" if service.closing else "ok"
        return JSONResponse({"status": state}, 503 if service.closing else 200)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        text = service.metrics.text(service.gauges())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def _submitted(exchange: _Exchange) -> None:
    """Queue the job while a status can still be sent."""
    try:
        await exchange.listener.submit()
    except Exception as error:
        raise refusal_of(error) from error


async def _or_gone(answer: Awaitable[dict[str, Any]], response: Any) -> Response:
    """A response, or none that anybody reads."""
    try:
        made: Response = response(await answer)
    except CallerGone:
        return response({}, 499)
    except Exception as error:
        raise refusal_of(error) from error
    return made
