"""Decoding as a stream: text comes out as soon as it is certain, and never half a character."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuoling.text.tokenizer import TextTokenizer


class StreamDecoder:
    """Text of a growing list of ids, never half a character. Each push decodes a few ids, not all of them."""

    # A character has at most four bytes, so more tokens than this that end in "\ufffd" hold invalid bytes
    _LONGEST = 8

    def __init__(self, tokenizer: TextTokenizer, *, keep_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._keep_special = keep_special
        self._window: list[int] = []
        self._settled = 0
        """How many ids of the window have been said; they stay as context for the next ones."""
        self._said = ""

    def fork(self) -> StreamDecoder:
        """A decoder that has been given the same ids and goes its own way."""
        twin = StreamDecoder(self._tokenizer, keep_special=self._keep_special)
        twin._window, twin._settled, twin._said = list(self._window), self._settled, self._said
        return twin

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.raw_decode(ids, keep_special=self._keep_special)

    def push(self, token_id: int) -> str:
        """The text that became certain with this id; "" while a character is incomplete."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith("\ufffd") and len(self._window) - self._settled < self._LONGEST:
            return ""
        return self._say(text)

    def flush(self) -> str:
        """The rest at the end: "\ufffd" for a character that never became whole."""
        if len(self._window) == self._settled:
            return ""
        return self._say(self._decode(self._window))

    def _say(self, text: str) -> str:
        # An incomplete byte at the end can turn the whole run of byte tokens before it into "\ufffd"
        new = text[len(self._said) :] if text.startswith(self._said) else "\ufffd"
        if not new:
            return ""
        self._window = self._window[self._settled :]
        self._settled = len(self._window)
        self._said = self._decode(self._window)
        return new
