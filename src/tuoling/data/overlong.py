"""Rows longer than `max_seq_len`: what each policy makes of them, and the error that counts them.

cut_prompt  whole oldest turns go first, then the left end of the question's material, then of the question.
split       a dialogue becomes several that fit, cut between turns; plain text is cut between tokens.

An answer that has to be cut is cut at its right end and never gets an end token. By default it is not learned,
and a row without anything else to learn is dropped and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from tuoling.errors import DataError
from tuoling.language import tr
from tuoling.text.conversation import Conversation, Turn
from tuoling.text.render import Segment

Spans = list[tuple[int, int]]
Encoded = tuple[list[int], Spans]
Render = Callable[[Conversation], list[Segment]]
Encode = Callable[[Sequence[Segment]], Encoded]

_EDGES = (128, 256, 512, 1024, 2048, 4096, 8192)


def learnable(spans: Spans) -> Spans:
    """Spans without an example's first token: nothing stands before it to predict it from."""
    return [(max(begin, 1), end) for begin, end in spans if end > max(begin, 1)]


class Fitter:
    """Makes examples of at most `limit` tokens out of a longer conversation."""

    def __init__(
        self, *, limit: int, render: Render, encode: Encode, learn_last: bool, learn_cut_answers: bool
    ) -> None:
        self._limit = limit
        self._render = render
        self._encode = encode
        self._learn_last = learn_last
        self._learn_cut_answers = learn_cut_answers
        self.left_out = 0
        """Questions with answers of split dialogues that were too long even alone."""

    def cut_prompt(self, conversation: Conversation) -> Encoded | None:
        """One example that fits, with its last answer whole; None if there is none."""
        system, turns = conversation.turns[: -len(conversation.exchanges)], conversation.exchanges
        for start in range(2, len(turns), 2):
            encoded = self._fits((*system, *turns[start:]))
            if encoded:
                return encoded
        question, answer = turns[-2:]
        if question.context:
            cut = self._longest(
                len(question.context),
                lambda kept: (*system, replace(question, context=question.context[-kept:]), answer),
            )
            if cut:
                return cut
            question = replace(question, context="")
        cut = self._longest(
            len(question.text), lambda kept: (*system, replace(question, text=question.text[-kept:]), answer)
        )
        return cut or self._cut_answer((*system, question, answer))

    def split(self, conversation: Conversation) -> list[Encoded]:
        """Examples that fit, of consecutive turns. With `learn: last` only the last one has something to learn."""
        system, turns = conversation.turns[: -len(conversation.exchanges)], conversation.exchanges
        if self._learn_last:
            for start in range(0, len(turns), 2):
                encoded = self._fits((*system, *turns[start:]))
                if encoded:
                    return [encoded]
            cut = self._cut_answer((*system, *turns[-2:]))
            return [cut] if cut else []
        out, start = [], 0
        while start < len(turns):
            best, stop = None, start + 2
            for end in range(start + 2, len(turns) + 1, 2):
                encoded = self._fits((*system, *turns[start:end]))
                if encoded is None:
                    break
                best, stop = encoded, end
            best = best or self._cut_answer((*system, *turns[start:stop]))
            if best:
                out.append(best)
            else:
                self.left_out += 1
            start = stop
        return out

    def _fits(self, turns: tuple[Turn, ...]) -> Encoded | None:
        ids, spans = self._encode(self._render(Conversation(turns)))
        return (ids, learnable(spans)) if len(ids) <= self._limit else None

    def _longest(self, length: int, make: Callable[[int], tuple[Turn, ...]]) -> Encoded | None:
        """The example that keeps the most characters (at least one) and fits, found by halving."""
        best, low, high = None, 1, length
        while low <= high:
            middle = (low + high) // 2
            encoded = self._fits(make(middle))
            if encoded:
                best, low = encoded, middle + 1
            else:
                high = middle - 1
        return best

    def _cut_answer(self, turns: tuple[Turn, ...]) -> Encoded | None:
        """The last answer cut at the right, without its end token; None where it is not to be learned."""
        if not self._learn_cut_answers:
            return None
        segments = self._render(Conversation(turns))
        while segments and not (segments[-1].reply and segments[-1].row):
            segments.pop()
        ids, spans = self._encode(segments)
        spans = learnable([(begin, min(end, self._limit)) for begin, end in spans])
        return (ids[: self._limit], spans) if spans else None


def split_text(ids: list[int], limit: int) -> Iterator[Encoded]:
    """Pieces of at most `limit` tokens (2 or more each), all learned but their first token."""
    start = 0
    while start < len(ids):
        size = min(limit, len(ids) - start)
        if len(ids) - start - size == 1 and size > 2:
            size -= 1  # a piece of one token could not be learned
        yield ids[start : start + size], learnable([(0, size)])
        start += size


def smallest_limits(lengths: np.ndarray) -> dict[int, int]:
    """The smallest max_seq_len that keeps 100, 99 and 95 percent of rows of these lengths."""
    ordered = np.sort(lengths)
    return {share: int(ordered[-(-len(ordered) * share // 100) - 1]) for share in (100, 99, 95)}


def histogram(lengths: np.ndarray) -> str:
    """Rows by length in tokens, as lines of text."""
    lines, low = [], 0
    for edge in (*_EDGES, None):
        inside = lengths > low if edge is None else (lengths > low) & (lengths <= edge)
        count = int(inside.sum())
        name = f"> {low}" if edge is None else f"<= {edge}"
        if count:
            lines.append(f"  {name:>8}  {count:>8}  {'#' * max(1, round(40 * count / len(lengths)))}")
        low = edge or low
    return "\n".join(lines)


def overlong_error(lengths: np.ndarray, limit: int) -> DataError:
    """The error for rows that do not fit: how many, how long rows are, what would keep them."""
    over = int((lengths > limit).sum())
    keep = smallest_limits(lengths)
    if over == len(lengths):
        shortest = int(lengths.min())
        problem = tr(
            f"max_seq_len={limit} is shorter than every row: the shortest has {shortest} tokens",
            f"max_seq_len={limit} 比每一条样本都短：最短的也有 {shortest} 个 token",
        )
    else:
        problem = tr(
            f"{over} of {len(lengths)} rows are longer than max_seq_len={limit}",
            f"{len(lengths)} 条样本中有 {over} 条超过 max_seq_len={limit}",
        )
    table = tr("rows by length in tokens:", "按 token 数统计的样本：") + "\n" + histogram(lengths)
    remedy = tr(
        f"max_seq_len={keep[100]} keeps all rows, {keep[99]} keeps 99 %, {keep[95]} keeps 95 %\n"
        "or say what to do with them: overlong=drop | cut_prompt | split",
        f"max_seq_len={keep[100]} 可保留全部样本，{keep[99]} 保留 99 %，{keep[95]} 保留 95 %\n"
        "或说明如何处理：overlong=drop | cut_prompt | split",
    )
    return DataError(f"{problem}\n{table}", remedy=remedy)
