"""What a token of a byte-pair vocabulary needs: the tokens on the way to it.

The words of a text are merged lowest rank first. Inside the stretch that becomes a token t, the merges are those of
t's own characters alone: had a pair over its border been better at any moment, t would not have come out. So every
token has one way of being made, wherever it stands. A smaller vocabulary that is closed over these ways gives, for
every text whose tokens are all kept, the same tokens: at each moment fewer pairs compete, and the one that won is
still among them. More merges than those do no harm, so all that join two kept tokens into a kept one are kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping, Sequence


class BytePairs:
    """The merges of a BPE model, and what is needed to make a token."""

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[Sequence[str] | str]) -> None:
        """vocab: token → id. merges: pairs, or "left right" as old files have them; the best comes first."""
        self._vocab = vocab
        self.merges = [_pair(merge) for merge in merges]
        self._rank: dict[tuple[str, str], int] = {}
        for rank, pair in enumerate(self.merges):
            self._rank[pair] = rank

    def needs(self, token: str) -> list[str] | None:
        """All tokens on the way to `token`, its characters and itself among them; None where merges never make it."""
        symbols = list(token)
        if any(symbol not in self._vocab for symbol in symbols):
            return None
        made = set(symbols)
        while len(symbols) > 1:
            ranks = [self._rank.get(pair) for pair in itertools.pairwise(symbols)]
            best = min((rank for rank in ranks if rank is not None), default=None)
            if best is None:
                return None
            at = ranks.index(best)
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
            made.add(symbols[at])
        return sorted(made)

    def among(self, kept: Container[str]) -> list[tuple[str, str]]:
        """The merges that join two kept tokens into a kept one, in their order."""
        return [
            (left, right)
            for left, right in self.merges
            if left in kept and right in kept and left + right in kept
        ]


def _pair(merge: Sequence[str] | str) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right
