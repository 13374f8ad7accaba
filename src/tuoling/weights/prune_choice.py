"""Which tokens a smaller vocabulary keeps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tuoling.errors import UsageError
from tuoling.language import tr
from tuoling.weights.prune_tokenizer import TokenizerState, closed


@dataclass(frozen=True)
class Choice:
    """old_ids: int64, ascending. base: how many any corpus would have kept; dropped: corpus tokens left out."""

    old_ids: np.ndarray
    base: int
    corpus: int
    dropped: int


def choose(
    state: TokenizerState,
    counts: np.ndarray,
    base_ids: Iterable[int],
    *,
    min_count: int = 1,
    size: int | None = None,
) -> Choice:
    """The base, then what stands at least `min_count` times in the corpus, each with all that it needs.

    size: exactly so many tokens (or one or two fewer, where what is left needs more room than there is): the most
    frequent of the corpus first, then, if there is room, the vocabulary's own first ones. Raises UsageError where the
    base alone has more.
    """
    kept, _ = closed(state, [*state.always(), *base_ids])
    base = len(kept)
    seen = np.flatnonzero(counts >= min_count)
    seen = seen[np.argsort(-counts[seen], kind="stable")]
    if size is not None and base > size:
        raise UsageError(
            tr(f"the base alone has {base} tokens", f"仅基础部分就有 {base} 个词元"),
            where="--size",
            remedy=tr(f"a size of {base} or more, or a smaller --base", f"取 {base} 以上，或选更小的 --base"),
        )
    _fill(state, kept, (int(index) for index in seen), size)
    if size is not None:
        _fill(state, kept, (index for index in sorted(state.tokens) if index not in state.added), size)
    old_ids = np.array(sorted(kept), dtype=np.int64)
    dropped = int((counts > 0).sum()) - int((counts[old_ids] > 0).sum())
    return Choice(old_ids, base, len(seen), dropped)


def _fill(state: TokenizerState, kept: set[int], ids: Iterable[int], size: int | None) -> None:
    """Add ids with all they need, as long as there is room for them."""
    for index in ids:
        if size is not None and len(kept) >= size:
            return
        if index in kept:
            continue
        needed = state.needs(index)
        if needed is not None and (size is None or len(kept) + len(needed - kept) <= size):
            kept |= needed
