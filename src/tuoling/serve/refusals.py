"""Errors as OpenAI's clients know them: a status, and a body of {"error": {message, type, param, code}}."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tuoling.errors import TuolingError, UsageError
from tuoling.infer.engine import PromptTooLong
from tuoling.language import tr
from tuoling.serve.jobs import Busy, Closing, Impossible, TimedOut, TooManyTokens


@dataclass(eq=False)
class Refusal(Exception):
    """A request that gets no answer. param: the field that is wrong."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        names = {
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            429: "rate_limit_error",
        }
        if self.status in names:
            return names[self.status]
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self) -> dict[str, Any]:
        """What is sent."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def bad(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """400: the request itself is wrong."""
    return Refusal(400, message, param, code)


def refusal_of(error: Exception) -> Refusal:
    """What a caller is told of an error. Of a defect nothing but that there was one."""
    if isinstance(error, Refusal):
        return error
    if not isinstance(error, TuolingError):
        return Refusal(
            500, tr("the server failed at this request", "服务器处理该请求时出错"), code="internal_error"
        )
    message = tr("; ", "；").join(part for part in (error.problem, error.remedy) if part)
    if isinstance(error, PromptTooLong | TooManyTokens):
        return bad(message, "messages", "context_length_exceeded")
    if isinstance(error, UsageError):
        return bad(message, error.where)
    if isinstance(error, Impossible):
        return bad(message)
    if isinstance(error, Busy):
        again = {"Retry-After": str(error.retry_after_s)}
        return Refusal(429, message, code="queue_full", headers=again)
    if isinstance(error, Closing):
        return Refusal(503, message, code="shutting_down", headers={"Retry-After": "5"})
    if isinstance(error, TimedOut):  # asked again it would take as long
        return Refusal(504, message, code="timeout", headers={"x-should-retry": "false"})
    return Refusal(500, message, code="internal_error")
