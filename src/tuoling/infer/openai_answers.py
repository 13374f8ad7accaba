"""What an OpenAI-speaking server sends back: answers, pieces, waits; read tolerantly, told plainly."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any

from tuoling.errors import EndpointError
from tuoling.language import tr

LONGEST_RETRY_AFTER_S = 600.0


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. The token counts are the server's; None where it does not count. tries: 1 without a retry."""

    text: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    model: str
    tries: int = 1


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of a streamed answer; the last one carries the whole completion as well."""

    text: str
    completion: Completion | None = None


class StreamBroken(EndpointError):
    """A stream ended before its end mark. text: what had come."""

    def __init__(self, text: str, why: str, where: str) -> None:
        self.text = text
        super().__init__(tr(f"the stream broke off: {why}", f"流式输出中断：{why}"), where=where)


class Again(Exception):
    """A try that failed in a way another may not; after_s: when the server wants it, None for our own backoff."""

    def __init__(self, error: EndpointError, *, after_s: float | None = None, pause: bool = False) -> None:
        self.error = error
        self.after_s = after_s
        self.pause = pause
        super().__init__(error.problem)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds a server asks to wait: `retry-after-ms`, or `Retry-After` in seconds or as a date."""
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        elif "retry-after" not in headers:
            return None
        elif headers["retry-after"].strip().replace(".", "", 1).isdigit():
            seconds = float(headers["retry-after"])
        else:
            seconds = parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time()
    except ValueError:
        return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S)


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message, a delta or an old-style choice; content may be a list of parts."""
    content = message.get("content", message.get("text"))
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def estimate_tokens(what: Mapping[str, Any], options: Mapping[str, Any]) -> int:
    """Tokens a request may use before the server has counted: a token a Chinese character, one for 4 bytes of the
    rest, and the longest answer asked for."""
    longest = options.get("max_tokens") or options.get("max_completion_tokens") or 512
    text = what.get("prompt") or "".join(text_of(message) for message in what.get("messages", ()))
    if not isinstance(text, str):  # token ids
        return len(text) + int(longest)
    return text_tokens(text) + 8 + int(longest)


def text_tokens(text: str) -> int:
    """An estimate for any tokenizer: a token a Chinese character, one for 4 bytes of the rest."""
    wide = sum(1 for char in text if ord(char) > 0x2E7F)
    return wide + (len(text) - wide) // 4


def with_tries(completion: Completion, tries: int) -> Completion:
    return completion if tries == 1 else replace(completion, tries=tries)
