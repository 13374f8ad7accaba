"""Answers in OpenAI's shapes: whole, or as the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tuoling.infer.engine import Reply
from tuoling.serve.jobs import Delta, Finished, TokenLog
from tuoling.serve.requests import Wanted


@dataclass(eq=False)
class Gathered:
    """What one choice has said so far."""

    text: str = ""
    tokens: list[TokenLog] = field(default_factory=list)
    reply: Reply | None = None


class Shape:
    """One request's answer as it comes. `chat` or plain completion."""

    def __init__(self, wanted: Wanted, *, chat: bool) -> None:
        self.chat = chat
        self._wanted = wanted
        order = wanted.order
        self.choices = [Gathered() for _ in range(len(order.prompts) * order.choices)]
        kind = "chat.completion" if chat else "text_completion"
        self._head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "object": kind,
            "created": int(time.time()),
            "model": wanted.model,
            "system_fingerprint": f"fp_{order.engine.fingerprint[:12]}",
        }

    def take(self, event: Delta | Finished) -> dict[str, Any]:
        """Remember an event, and return its choice for a stream's chunk."""
        mine = self.choices[event.choice]
        if isinstance(event, Finished):
            mine.reply = event.reply
            return self._piece(event.choice, "", (), event.reply.finish_reason)
        offset = len(mine.text)
        mine.text += event.text
        mine.tokens += event.tokens
        return self._piece(event.choice, event.text, event.tokens, None, offset)

    def first_chunks(self) -> list[dict[str, Any]]:
        """What a chat's stream begins with: each choice's role."""
        if not self.chat:
            return []
        return [
            self.chunk(
                [{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
            )
            for index in range(len(self.choices))
        ]

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """One chunk of a stream; with usage asked for, all but the last have null there."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        usage = {"usage": None} if self._wanted.usage else {}
        return {**self._head, "object": kind, "choices": choices, **usage}

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk where usage was asked for."""
        return {**self.chunk([]), "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Prompts are counted once, however many choices are made of them."""
        replies = [choice.reply for choice in self.choices if choice.reply is not None]
        prompt = sum(reply.prompt_tokens for reply in replies[:: self._wanted.order.choices])
        completion = sum(reply.completion_tokens for reply in replies)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def whole(self) -> dict[str, Any]:
        """The answer at once."""
        choices = []
        for index, one in enumerate(self.choices):
            assert one.reply is not None
            reason = one.reply.finish_reason
            if self.chat:
                message = {"role": "assistant", "content": one.reply.text, "refusal": None}
                choices.append(
                    {
                        "index": index,
                        "message": message,
                        "logprobs": self._logs(one.tokens, 0),
                        "finish_reason": reason,
                    }
                )
            else:
                choices.append(
                    {
                        "index": index,
                        "text": one.reply.text,
                        "logprobs": self._logs(one.tokens, 0),
                        "finish_reason": reason,
                    }
                )
        return {**self._head, "choices": choices, "usage": self.usage()}

    def _piece(
        self, index: int, text: str, tokens: Sequence[TokenLog], reason: str | None, offset: int = 0
    ) -> dict[str, Any]:
        logs = self._logs(tokens, offset)
        if self.chat:
            delta = {"content": text} if reason is None else {}
            return {"index": index, "delta": delta, "logprobs": logs, "finish_reason": reason}
        return {"index": index, "text": text, "logprobs": logs, "finish_reason": reason}

    def _logs(self, tokens: Sequence[TokenLog], offset: int) -> dict[str, Any] | None:
        if self._wanted.order.logprobs is None:
            return None
        if self.chat:
            return {
                "content": [
                    {
                        **self._named(log.token, log.logprob),
                        "top_logprobs": [self._named(*one) for one in log.best],
                    }
                    for log in tokens
                ],
                "refusal": None,
            }
        spelled = [self._spell(log.token) for log in tokens]
        offsets = [offset + sum(map(len, spelled[:at])) for at in range(len(spelled))]
        return {
            "tokens": spelled,
            "token_logprobs": [log.logprob for log in tokens],
            "top_logprobs": [{self._spell(token): value for token, value in log.best} for log in tokens],
            "text_offset": offsets,
        }

    def _spell(self, token: int) -> str:
        """A token's own text."""
        tokenizer: Any = self._wanted.order.engine.tokenizer  # type: ignore[attr-defined]
        text: str = tokenizer.raw_decode([token], keep_special=True)
        return text

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._spell(token)
        known = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": known}
