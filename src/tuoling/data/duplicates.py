"""Rows that say the same again: exactly (but for whitespace), or nearly.

Near duplicates: MinHash over character 4-grams (80 permutations, 16 bands of 5) finds the candidates, the Jaccard
similarity of the 4-grams themselves decides. A pair at 0.8 is found with probability 0.998. Everything is numpy with
fixed seeds: the same rows give the same answer. Memory: about 150 bytes a row; the texts wait in a temporary file.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
import unicodedata
from array import array

import numpy as np
from numpy.typing import NDArray

from tuoling.text.conversation import Conversation

NEAR = 0.8
"""Jaccard similarity of character 4-grams from which two rows are near duplicates."""

_GRAM = 4
_BANDS, _ROWS = 16, 5
_BLOCK = 4096  # shingles hashed at once: 4096 x 80 x 4 B = 1.3 MB
_IN_MEMORY_BYTES = 64 << 20
_UNHEARD = frozenset("，。！？；：、“”‘’,!?;:\"'`")

_random = np.random.default_rng(20230401)
_FACTORS = _random.integers(1, 2**31, _BANDS * _ROWS, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
_OFFSETS = _random.integers(0, 2**32, _BANDS * _ROWS, dtype=np.uint32)
_FOLD = _random.integers(1, 2**63, (_BANDS, _ROWS), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5], np.uint64)


def spoken(conversation: Conversation) -> tuple[str, str]:
    """(everything that is said, what is asked): speaker by speaker, whitespace run together.

    Rows with the same first text are exact duplicates. What is asked is everything before the last answer; for plain
    text it is the text itself.
    """
    parts = [f"{turn.role[0]}:{' '.join(turn.full_text.split())}" for turn in conversation.exchanges]
    asked = parts[:-1] if conversation.answer is not None else parts
    return "\x1f".join(parts), "\x1f".join(asked)


def key_of(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


def first_of_equal(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each place the index of the first place with the same key. [N] -> [N]"""
    order = np.argsort(keys, kind="stable")
    ranked = keys[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]]) if len(keys) else np.zeros(0, np.int64)
    lengths = np.diff(np.r_[starts, len(keys)])
    firsts = np.empty(len(keys), np.int64)
    firsts[order] = np.repeat(order[starts], lengths)
    return firsts


@functools.cache
def heard() -> NDArray[np.uint32]:
    """Code point → what counts of it: NFKC and case folded where that is one character; 0 for what is not heard."""
    table = np.arange(0x110000, dtype=np.uint32)
    for code in range(0x10000):
        if 0xD800 <= code < 0xE000:
            continue
        folded = unicodedata.normalize("NFKC", chr(code)).casefold()
        if not folded.strip() or folded in _UNHEARD:
            table[code] = 0
        elif len(folded) == 1:
            table[code] = ord(folded)
    return table


def _shingles(text: str) -> NDArray[np.uint64]:
    """Hashes of the text's character 4-grams in order, after full width, case, whitespace and punctuation. [S]"""
    folded = heard()[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)]
    codes: NDArray[np.uint64] = folded[folded != 0].astype(np.uint64)
    if not len(codes):
        return codes
    if len(codes) < _GRAM:  # one shingle: the whole of a short text
        codes = np.concatenate([codes, np.zeros(_GRAM - len(codes), np.uint64)])
    size = len(codes) - _GRAM + 1
    mixed = codes[:size] * _MIX[0]
    for offset in range(1, _GRAM):
        mixed = (mixed ^ (mixed >> np.uint64(29))) + codes[offset : offset + size] * _MIX[offset]
    mixed ^= mixed >> np.uint64(32)
    return mixed * _MIX[0]


def grams(text: str) -> NDArray[np.uint64]:
    """Sorted distinct hashes of the text's character 4-grams."""
    return np.unique(_shingles(text))


def similarity(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> float:
    """Jaccard similarity of two sorted sets."""
    if not len(one) or not len(other):
        return 0.0
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


class NearDuplicates:
    """Collects texts one by one, then says which of them nearly repeat an earlier one."""

    def __init__(self) -> None:
        self._bands = array("Q")
        self._ends = array("Q", [0])
        self._texts = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES)  # noqa: SIM115

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, text: str) -> None:
        """The next text."""
        shingles = _shingles(text)
        if len(shingles):
            self._bands.frombytes(_band_hashes((shingles >> np.uint64(32)).astype(np.uint32)).tobytes())
        else:  # nothing but punctuation: like no other
            own = np.full(_BANDS, len(self) + 1, np.uint64) * _FOLD[:, 0]
            self._bands.frombytes(own.tobytes())
        data = text.encode("utf-8", "surrogatepass")
        self._texts.write(data)
        self._ends.append(self._ends[-1] + len(data))

    def pairs(self, same: NDArray[np.int64]) -> list[tuple[int, int, float]]:
        """(later, earlier, similarity) of verified pairs, by later; at most one pair joins two groups.

        same: for each text the first one exactly equal to it; only those first ones are compared. [N]
        """
        roots = np.arange(len(self))
        found = []
        for later, earlier in self._candidates(same):
            if _root(roots, later) == _root(roots, earlier):
                continue
            score = similarity(grams(self._text(later)), grams(self._text(earlier)))
            if score >= NEAR:
                roots[_root(roots, later)] = _root(roots, earlier)
                found.append((later, earlier, score))
        return found

    def close(self) -> None:
        """Forget the texts."""
        self._texts.close()

    def _text(self, index: int) -> str:
        self._texts.seek(self._ends[index])
        size = self._ends[index + 1] - self._ends[index]
        return self._texts.read(size).decode("utf-8", "surrogatepass")

    def _candidates(self, same: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Pairs that share a band, later first: each text with the bucket's first and with the one before it."""
        firsts = np.flatnonzero(same == np.arange(len(same)))
        if len(firsts) < 2:
            return []
        bands = np.frombuffer(self._bands, np.uint64).reshape(-1, _BANDS)
        codes = []
        for band in range(_BANDS):
            column = bands[firsts, band]
            order = np.argsort(column, kind="stable")
            ranked = column[order]
            repeats = np.flatnonzero(ranked[1:] == ranked[:-1]) + 1
            if not len(repeats):
                continue
            starts = np.maximum.accumulate(
                np.where(np.r_[True, ranked[1:] != ranked[:-1]], np.arange(len(order)), 0)
            )
            later = firsts[order[repeats]].astype(np.int64)
            for other in (starts[repeats], repeats - 1):
                codes.append(later << 32 | firsts[order[other]].astype(np.int64))
        if not codes:
            return []
        return [(int(code) >> 32, int(code) & 0xFFFFFFFF) for code in np.unique(np.concatenate(codes))]


def _band_hashes(shingles: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """MinHash signature folded to one number a band. [S] -> [16]"""
    smallest = np.full(_BANDS * _ROWS, 2**32 - 1, np.uint32)
    for start in range(0, len(shingles), _BLOCK):
        block = shingles[start : start + _BLOCK, None] * _FACTORS + _OFFSETS
        np.minimum(smallest, block.min(axis=0), out=smallest)
    return (smallest.reshape(_BANDS, _ROWS).astype(np.uint64) * _FOLD).sum(axis=1, dtype=np.uint64)


def _root(roots: NDArray[np.int64], index: int) -> int:
    while roots[index] != index:
        roots[index] = roots[roots[index]]
        index = int(roots[index])
    return index


def groups_of(
    size: int, exact: list[NDArray[np.int64]], near: list[tuple[int, int, float]]
) -> NDArray[np.int64]:
    """For each row the first row of its duplicate group. exact: per key, for each row the first of equal ones."""
    roots = np.arange(size)
    for firsts in exact:
        for index in np.flatnonzero(firsts != np.arange(size)):
            _join(roots, int(index), int(firsts[index]))
    for later, earlier, _ in near:
        _join(roots, later, earlier)
    return np.array([_root(roots, index) for index in range(size)], np.int64)


def _join(roots: NDArray[np.int64], one: int, other: int) -> None:
    low, high = sorted((_root(roots, one), _root(roots, other)))
    roots[high] = low
