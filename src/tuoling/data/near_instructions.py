"""Instructions that nearly repeat an earlier one, among a million: ROUGE-L above a limit, every removal verified.

Two texts with ROUGE-L above 0.7 share at least 54 % of their different tokens (|A∩B| / |A∪B| ≥ 0.7 / 1.3 where none
repeats). MinHash over single tokens, BANDS bands of ROWS permutations, brings such texts together; bags and then the
exact longest common subsequence, of thousands of pairs at once in 64-bit words, decide. Fixed seeds: the same texts
give the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tuoling.data.duplicates import first_of_equal
from tuoling.data.rouge_l import Tokens, bags, common

ABOVE = 0.7
"""Self-instruct's limit."""

BANDS, ROWS = 56, 5
_BEFORE = 3
"""Texts of the same bucket that each is compared with: the first, and so many right before it."""
_PAIRS = 1 << 14
_WORD = 64
_MOST_PASSES = 8
_LITTLE = 1000
"""Another pass is made only where the last one took more than 1 in so many of the texts that stayed: of 200,000 texts
the second took 6 %, the third 0.8 %."""
_BLOCK_TEXTS = 100_000

Index = NDArray[np.int64]


@dataclass
class NearReport:
    """kept: [N] bool. like: [N], for a text that goes the kept earlier one it repeats, else its own place."""

    kept: NDArray[np.bool_]
    like: Index
    exact: int = 0
    near: int = 0
    compared: int = 0
    passes: int = 0
    notes: list[str] = field(default_factory=list)


def near_duplicates(
    texts: Sequence[str],
    *,
    above: float = ABOVE,
    threads: int = 2,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> NearReport:
    """Which texts to keep, so that each that goes has an earlier kept one with ROUGE-L above the limit.

    Of texts with the same tokens the first stays; a text without any stays. threads: for the permutations.
    """
    return Search(texts, above).greedy(threads, step)


class Search:
    """Tokens, bags and band keys of all texts, and the comparisons made with them."""

    def __init__(self, texts: Sequence[str], above: float = ABOVE) -> None:
        tokens = Tokens()
        flat, self.starts = tokens.read(texts)
        self.flat: NDArray[np.uint16] | NDArray[np.uint32] = (
            flat.astype(np.uint16) if tokens.count < 65536 else flat
        )
        self.above = above
        self.vocabulary = tokens.count
        self.sizes: Index = np.diff(self.starts)
        self.bags = bags(flat, self.starts)
        self.compared = 0

    # -- band keys ------------------------------------------------------------------------------------------------

    def keys(self, band: int) -> NDArray[np.uint32]:
        """One number a text for a band; texts whose smallest tokens under ROWS permutations agree have the same. [N]"""
        mixed = np.zeros(len(self.sizes), np.uint64)
        filled = np.flatnonzero(self.sizes)
        if not len(filled):
            return mixed.astype(np.uint32)
        for row in range(ROWS):
            random = np.random.default_rng([20230401, band, row])
            ranks = random.permutation(self.vocabulary).astype(self.flat.dtype)
            smallest = np.minimum.reduceat(ranks[self.flat], self.starts[filled])
            mixed[filled] = (mixed[filled] ^ smallest) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
        return (mixed >> np.uint64(32)).astype(np.uint32)

    # -- which texts stay ----------------------------------------------------------------------------------------

    def greedy(self, threads: int, step: Callable[[int, int], None]) -> NearReport:
        """Passes over all bands until every text that goes has one that stays."""
        like = first_of_equal(self._whole())
        exact = int((like != np.arange(len(like))).sum())
        with ThreadPoolExecutor(threads) as pool:
            keys = []
            for band, found in enumerate(pool.map(self.keys, range(BANDS))):
                keys.append(found)
                step(band + 1, 2 * BANDS)
        passes, taken = 0, len(like)
        while passes < _MOST_PASSES and taken * _LITTLE > len(like):
            passes += 1
            before = _staying(like)
            for band in range(BANDS):
                self._pass(keys[band], like)
                if passes == 1:
                    step(BANDS + band + 1, 2 * BANDS)
            self._settle(like)
            taken = before - _staying(like)
        kept = like == np.arange(len(like))
        return NearReport(kept, like, exact, int((~kept).sum()) - exact, self.compared, passes)

    def _whole(self) -> NDArray[np.uint64]:
        """64 bits of a text's tokens; a text without tokens is like no other. [N]"""
        own = np.arange(len(self.sizes), dtype=np.uint64) | np.uint64(1 << 63)
        for begin in range(0, len(own), _BLOCK_TEXTS):
            filled = begin + np.flatnonzero(self.sizes[begin : begin + _BLOCK_TEXTS])
            if not len(filled):
                continue
            starts, sizes = self.starts[filled], self.sizes[filled]
            first, end = starts[0], self.starts[filled[-1] + 1]
            inside = np.arange(first, end) - np.repeat(starts, sizes)
            powers = np.uint64(0x100000001B3) ** (inside.astype(np.uint64) + np.uint64(1))
            mixed = (self.flat[first:end].astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)) * powers
            mixed ^= mixed >> np.uint64(32)
            hashes = np.add.reduceat(mixed * np.uint64(0xC2B2AE3D27D4EB4F), starts - first)
            own[filled] = hashes >> np.uint64(1)
        return own

    def _pass(self, keys: NDArray[np.uint32], like: Index) -> None:
        """Compare texts of a bucket that stay so far; of two that are alike the later one goes."""
        staying = np.flatnonzero((like == np.arange(len(like))) & (self.sizes > 0))
        later, earlier = neighbours(keys[staying], _BEFORE)
        later, earlier = staying[later], staying[earlier]
        alike = self.alike(later, earlier)
        later, earlier = later[alike], earlier[alike]
        order = np.lexsort((earlier, later))
        for index in order:  # in order of the texts: one that goes here takes no other with it
            one, other = int(later[index]), int(earlier[index])
            if like[one] == one and like[other] == other:
                like[one] = other

    def _settle(self, like: Index) -> None:
        """Texts whose like has gone since: they go with what that one repeats, or stay again."""
        gone = np.flatnonzero(like != np.arange(len(like)))
        lost = gone[like[like[gone]] != like[gone]]
        if not len(lost):
            return
        root = like[like[lost]]
        while (like[root] != root).any():
            root = like[root]
        alike = self.alike(lost, root)
        like[lost] = np.where(alike, root, lost)

    # -- comparing ------------------------------------------------------------------------------------------------

    def alike(self, one: Index, other: Index) -> NDArray[np.bool_]:
        """Whether ROUGE-L of each pair is above the limit. [P], [P] -> [P]"""
        result = np.zeros(len(one), bool)
        for begin in range(0, len(one), 1 << 20):
            part = slice(begin, begin + (1 << 20))
            result[part] = self._alike(one[part], other[part])
        return result

    def _alike(self, one: Index, other: Index) -> NDArray[np.bool_]:
        both = self.sizes[one] + self.sizes[other]
        shorter = np.minimum(self.sizes[one], self.sizes[other])
        places = np.flatnonzero(2 * shorter > self.above * both)
        shared = np.concatenate(
            [
                np.minimum(self.bags[one[part]], self.bags[other[part]]).sum(axis=1, dtype=np.int64)
                for part in np.array_split(places, len(places) // 200_000 + 1)
            ]
        )
        places = places[(2 * shared > self.above * both[places]) | (shorter[places] > 255)]
        self.compared += len(places)
        scores = 2 * self._common(one[places], other[places])
        result = np.zeros(len(one), bool)
        result[places] = scores > self.above * both[places]
        return result

    def _common(self, one: Index, other: Index) -> Index:
        """Longest common subsequences. [P]"""
        swap = self.sizes[one] > self.sizes[other]
        short, long = np.where(swap, other, one), np.where(swap, one, other)
        result = np.zeros(len(one), np.int64)
        order = np.lexsort((self.sizes[long], self.sizes[short]))
        fits = self.sizes[short[order]] <= _WORD
        for place in order[~fits]:
            result[place] = common(self.tokens_of(short[place]), self.tokens_of(long[place]))
        order = order[fits]
        for begin in range(0, len(order), _PAIRS):
            part = order[begin : begin + _PAIRS]
            result[part] = self._common_words(short[part], long[part])
        return result

    def tokens_of(self, text: int) -> list[int]:
        found: list[int] = self.flat[self.starts[text] : self.starts[text + 1]].tolist()
        return found

    def _common_words(self, short: Index, long: Index) -> Index:
        """Hyyrö's row of bits for each pair in one 64-bit word, all pairs a token of the longer text at a time."""
        short_PT, long_PT = self._padded(short, 0), self._padded(long, 1)
        width = short_PT.shape[1]
        row: NDArray[np.uint64] = np.full(len(short), ~np.uint64(0))
        bits = np.zeros((len(short), _WORD // 8), np.uint8)
        for place in range(long_PT.shape[1]):
            packed = np.packbits(short_PT == long_PT[:, place, None], axis=1, bitorder="little")
            bits[:, : packed.shape[1]] = packed
            met: NDArray[np.uint64] = row & bits.view(np.uint64)[:, 0]
            row = (row + met) | (row - met)
        inside = np.uint64((1 << width) - 1) if width < _WORD else ~np.uint64(0)
        return np.bitwise_count(~row & inside).astype(np.int64)

    def _padded(self, texts: Index, side: int) -> NDArray[np.uint32]:
        """Tokens in rows of the longest one's length; what is padded equals nothing of the other side. [P, L]"""
        sizes = self.sizes[texts]
        width = int(sizes.max())
        inside = np.arange(width) < sizes[:, None]
        places = self.starts[texts][:, None] + np.arange(width)
        rows = self.flat[np.minimum(places, len(self.flat) - 1)].astype(np.uint32)
        rows[~inside] = np.uint32(0xFFFFFFFF - side)
        return rows


def _staying(like: Index) -> int:
    return int((like == np.arange(len(like))).sum())


def neighbours(keys: NDArray[np.uint32], before: int) -> tuple[Index, Index]:
    """(later, earlier) places with the same key: each with the first, and with up to `before` right before it."""
    order = np.argsort(keys, kind="stable")
    ranked = keys[order]
    new = np.r_[True, ranked[1:] != ranked[:-1]] if len(keys) else np.zeros(0, bool)
    start = (
        np.maximum.accumulate(np.where(new, np.arange(len(keys)), 0)) if len(keys) else np.zeros(0, np.int64)
    )
    inside = np.arange(len(keys)) - start
    pairs = []
    for back in range(1, before + 1):
        places = np.flatnonzero(inside >= back)
        pairs.append((places, places - back))
    places = np.flatnonzero(inside > before)
    pairs.append((places, start[places]))
    later = np.concatenate([one for one, _ in pairs])
    earlier = np.concatenate([other for _, other in pairs])
    return order[later], order[earlier]
