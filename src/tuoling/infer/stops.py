"""Where a reply ends. Stop strings on growing text: nothing of one is ever shown, and nothing else is held back for long."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence

from tuoling.infer.engine import FinishReason, Reply
from tuoling.text.tokenizer import TextTokenizer


def reply_of(
    ids: list[int],
    prompt_tokens: int,
    tokenizer: TextTokenizer,
    end_ids: Collection[int],
    stops: Sequence[str],
    *,
    cancelled: bool,
) -> Reply:
    """Cut generated ids at the end token, at a stop string, and say why they end."""
    reason: FinishReason = "length"
    end = next((index for index, token in enumerate(ids) if token in end_ids), None)
    if end is not None:
        ids, reason = ids[:end], "stop"
    text = tokenizer.decode(ids)
    before = cut_at_stop(text, stops)
    if before is not None:
        # the fewest tokens whose text holds the stop
        count = bisect_left(
            range(len(ids)), True, key=lambda n: cut_at_stop(tokenizer.decode(ids[:n]), stops) is not None
        )
        ids, text, reason = ids[:count], before, "stop"
    if reason == "length" and cancelled:
        reason = "cancelled"
    return Reply(text, tuple(ids), reason, prompt_tokens, len(ids))


def cut_at_stop(text: str, stops: Sequence[str]) -> str | None:
    """The text before the earliest stop string; None where there is none."""
    found = [position for position in (text.find(stop) for stop in stops if stop) if position >= 0]
    return text[: min(found)] if found else None


class StopFilter:
    """Passes text on, holding back a tail that may become a stop string. Once stopped it passes nothing."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    def fork(self) -> StopFilter:
        """A filter that has been given the same text and goes its own way."""
        twin = StopFilter(self._stops)
        twin._held, twin.stopped = self._held, self.stopped
        return twin

    def push(self, text: str) -> str:
        """Text that is certain to be shown now."""
        if self.stopped:
            return ""
        self._held += text
        before = cut_at_stop(self._held, self._stops)
        if before is not None:
            self.stopped, self._held = True, ""
            return before
        keep = self._possible_stop()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, at the end of an answer that did not stop."""
        rest, self._held = self._held, ""
        return "" if self.stopped else rest

    def _possible_stop(self) -> int:
        """Length of the longest tail that begins some stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
