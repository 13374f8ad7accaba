"""Rows that begin another row, found by their tokens, so that one sequence can be trained for both.

A causal model gives a token the same state whatever follows it. So row A can be learned inside row B, exactly, where
B begins with all of A's tokens up to the one before A's last learned token: that last token is predicted, never read,
and may be another one in B (many formats end a reply with the end token only where the dialogue ends).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tuoling.data.sampler import splitmix64
from tuoling.data.token_store import Example, TokenStore

_CHUNK_TOKENS = 1 << 19
"""Tokens hashed at once: 4 MB for each of the few arrays of that length."""


@dataclass(frozen=True)
class SharedPrefixes:
    """hosts: int64 [H], store rows that are trained, ascending. Host h also learns `members[offsets[h]:offsets[h+1]]`.

    Every row that was asked about is a host or a member of exactly one.
    """

    hosts: np.ndarray
    offsets: np.ndarray
    members: np.ndarray

    def members_of(self, position: int) -> np.ndarray:
        """Store rows learned inside host number `position`."""
        return self.members[self.offsets[position] : self.offsets[position + 1]]

    def example(self, store: TokenStore, position: int) -> Example:
        """Host number `position`, its members' learned tokens added."""
        host = store[int(self.hosts[position])]
        targets = [_targets(store[int(row)]) for row in self.members_of(position)]
        if not targets:
            return host
        return Example(host.input_ids, host.spans, host.row, np.concatenate(targets))

    def learned(self, store: TokenStore) -> np.ndarray:
        """int64 [H]: learned tokens of each host with its members; a token learned by two rows counts twice."""
        own = store.learned[self.hosts].astype(np.int64)
        sums = np.concatenate([[0], np.cumsum(store.learned[self.members], dtype=np.int64)])
        return own + sums[self.offsets[1:]] - sums[self.offsets[:-1]]


def _targets(example: Example) -> np.ndarray:
    """int64 [E, 2]: place and id of every learned token."""
    places = np.concatenate([np.arange(begin, end) for begin, end in example.spans.tolist()])
    return np.stack([places, example.input_ids[places].astype(np.int64)], axis=1)


def share_prefixes(store: TokenStore, rows: np.ndarray) -> SharedPrefixes:
    """Which of these store rows (int64, ascending) begin another of them; a row goes to the longest that it begins.

    Equal rows share too. Two passes over the tokens and some 100 bytes a row. What the hashes find is compared token
    by token before it counts.
    """
    if not len(rows):
        return SharedPrefixes(rows, np.zeros(1, dtype=np.int64), rows)
    reads = store.learned_ends[rows] - 1  # the tokens a row must share: all before its last learned one
    keys = np.zeros(len(rows), dtype=np.uint64)
    for chosen, hashes, starts in _prefix_hashes(store, rows):
        keys[chosen] = hashes[starts + reads[chosen] - 1]
    order = np.lexsort((rows, -reads))  # the longest first, then the first in the store
    host = order[_longest_with(store, rows, keys, order)]
    for member in np.flatnonzero(host != np.arange(len(rows))).tolist():
        ours, theirs = store[int(rows[member])].input_ids, store[int(rows[host[member]])].input_ids
        if not np.array_equal(ours[: reads[member]], theirs[: reads[member]]):
            host[member] = member
    return _grouped(rows, host)


def _longest_with(store: TokenStore, rows: np.ndarray, keys: np.ndarray, order: np.ndarray) -> np.ndarray:
    """int64 [rows]: for each row, where in `order` the first row stands that begins with the tokens behind its key.

    That row is never learned inside another one: the other would hold the same tokens and stand earlier.
    """
    distinct, group = np.unique(keys, return_inverse=True)
    rank = np.empty(len(rows), dtype=np.int64)
    rank[order] = np.arange(len(rows))
    first = np.full(len(distinct), len(rows), dtype=np.int64)
    # Searching a hash among 100,000 keys takes 112 ns; a look into a table takes 6 and sends 1 in 16 there.
    bits = min(27, (16 * len(distinct)).bit_length())
    table = np.zeros(1 << bits, dtype=bool)
    low = np.uint64((1 << bits) - 1)
    table[distinct & low] = True
    for chosen, hashes, starts in _prefix_hashes(store, rows):
        maybe = np.flatnonzero(table[hashes & low])
        place = np.searchsorted(distinct, hashes[maybe]).clip(max=len(distinct) - 1)
        found = distinct[place] == hashes[maybe]
        of_row = chosen[np.searchsorted(starts, maybe[found], side="right") - 1]
        np.minimum.at(first, place[found], rank[of_row])
    return first[group]


def _prefix_hashes(
    store: TokenStore, rows: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Chunks of rows: (which of `rows`, for each of their tokens the hash of its row up to it, where rows start).

    A prefix's hash is the sum of its (place, id) pairs' hashes, so one running sum serves every prefix.
    """
    lengths = store.lengths[rows].astype(np.int64)
    chunk = np.cumsum(lengths) // _CHUNK_TOKENS
    for chosen in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(chunk)) + 1):
        ids = np.concatenate([store[int(row)].input_ids for row in rows[chosen]])
        starts = np.cumsum(lengths[chosen]) - lengths[chosen]
        place = np.arange(len(ids)) - np.repeat(starts, lengths[chosen])
        pairs = splitmix64(ids.astype(np.uint64) | (place.astype(np.uint64) << np.uint64(32)))
        with np.errstate(over="ignore"):
            running = np.cumsum(pairs, dtype=np.uint64)
            before = running[starts] - pairs[starts]
            yield chosen, running - np.repeat(before, lengths[chosen]), starts


def _grouped(rows: np.ndarray, host: np.ndarray) -> SharedPrefixes:
    """From host[i] = which of `rows` learns row i."""
    alone = host == np.arange(len(rows))
    hosts = np.flatnonzero(alone)
    members = np.flatnonzero(~alone)
    members = members[np.argsort(host[members], kind="stable")]
    counts = np.bincount(np.searchsorted(hosts, host[members]), minlength=len(hosts))
    return SharedPrefixes(rows[hosts], np.concatenate([[0], np.cumsum(counts)]), rows[members])
