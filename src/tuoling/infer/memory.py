"""Which turns still fit: a token budget, whole turns, the system text and the newest question always kept."""

from __future__ import annotations

from collections.abc import Callable

from tuoling.infer.engine import PromptTooLong
from tuoling.text.conversation import Conversation


def fit_conversation(
    conversation: Conversation, budget_tokens: int | None, count_tokens: Callable[[Conversation], int]
) -> tuple[Conversation, int]:
    """The conversation with its oldest exchanges left out until its prompt fits, and how many were left out.

    conversation ends with a user turn. Raises PromptTooLong where even the newest question alone does not fit.
    """
    if budget_tokens is None:
        return conversation, 0
    head = conversation.turns[:1] if conversation.system is not None else ()
    turns = conversation.exchanges
    dropped = 0
    while True:
        kept = Conversation((*head, *turns[2 * dropped :]))
        tokens = count_tokens(kept)
        if tokens <= budget_tokens:
            return kept, dropped
        if 2 * (dropped + 1) >= len(turns):
            raise PromptTooLong(tokens, budget_tokens)
        dropped += 1
