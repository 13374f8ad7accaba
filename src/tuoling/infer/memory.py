"""Which turns still fit: a token budget, whole turns, the system text and the newest question always kept."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

from tuoling.infer.engine import PromptTooLong
from tuoling.language import tr
from tuoling.text.conversation import Conversation

CONTEXT_WITHOUT_LIMIT = 4096
"""Tokens of memory for models that name no limit (ALiBi): longer talks only get slower and worse."""


class Fitted(NamedTuple):
    """What is asked in the end. dropped: exchanges left out, the oldest ones. tokens: of the prompt."""

    conversation: Conversation
    dropped: int
    tokens: int


def prompt_budget(
    memory_tokens: int | None, context_tokens: int | None, max_new_tokens: int
) -> tuple[int, int]:
    """Tokens of a prompt that leave room for an answer, and of both together.

    memory_tokens: the user's own limit of both. An answer's room is never more than half of it.
    """
    limit = memory_tokens or context_tokens or CONTEXT_WITHOUT_LIMIT
    if context_tokens is not None:
        limit = min(limit, context_tokens)
    return limit - min(max_new_tokens, limit // 2), limit


def fit_conversation(
    conversation: Conversation, budget_tokens: int | None, count_tokens: Callable[[Conversation], int]
) -> Fitted:
    """The conversation with as few of its oldest exchanges left out as let its prompt fit.

    It ends with a question, or with an answer that is to be gone on with. Raises PromptTooLong where even the newest
    question alone (with the answer so far) does not fit.
    """
    head = conversation.turns[:1] if conversation.system is not None else ()
    turns = conversation.exchanges
    droppable = (len(turns) - 1 - (conversation.answer is not None)) // 2
    tokens: dict[int, int] = {}

    def without(dropped: int) -> Conversation:
        return Conversation((*head, *turns[2 * dropped :]))

    def count(dropped: int) -> int:
        if dropped not in tokens:
            tokens[dropped] = count_tokens(without(dropped))
        return tokens[dropped]

    if budget_tokens is None or count(0) <= budget_tokens:
        return Fitted(conversation, 0, count(0))
    # a prompt gets shorter with every exchange that goes: of 1,000 exchanges ten are tried, not all
    dropped = 1 + bisect_left(
        range(1, droppable + 1), True, key=lambda number: count(number) <= budget_tokens
    )
    if dropped > droppable:
        raise PromptTooLong(count(droppable), budget_tokens)
    return Fitted(without(dropped), dropped, count(dropped))


def dropped_note(dropped: int) -> str:
    """What a user is told when exchanges were left out."""
    return tr(
        f"the context is full: the oldest {dropped} exchanges are no longer seen by the model",
        f"上下文已满：模型不再看到最早的 {dropped} 轮对话",
    )
