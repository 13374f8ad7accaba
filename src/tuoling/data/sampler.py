"""The order of rows: a function of (seed, epoch) and nothing else.

Batch size, number of processes and where a run was interrupted do not enter, so that another world size repeats
and skips no row. The state of a run's data is one number: how many rows it has taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tuoling.data.token_store import TokenStore


class SampleOrder:
    """Row of every global index: index `epoch * num_rows + position` is the epoch's permutation at `position`."""

    def __init__(self, num_rows: int, seed: int) -> None:
        if num_rows <= 0:
            raise ValueError(f"num_rows={num_rows} must be positive")
        self.num_rows = num_rows
        self.seed = seed
        self._epoch = -1
        self._order: np.ndarray = np.empty(0, dtype=np.int64)

    def epoch(self, global_index: int) -> int:
        """The epoch, from 0, of a global index."""
        return global_index // self.num_rows

    def row(self, global_index: int) -> int:
        """The row at a global index."""
        epoch, position = divmod(global_index, self.num_rows)
        return int(self.permutation(epoch)[position])

    def rows(self, start: int, stop: int) -> list[int]:
        """The rows of global indices [start, stop)."""
        return [self.row(index) for index in range(start, stop)]

    def batches(self, start: int, rows_per_step: int, stop: int | None = None) -> Iterator[list[int]]:
        """Rows of one step after another from global index `start`; without `stop`, without end.

        The last batch before `stop` may be shorter. A batch may reach over the end of an epoch.
        """
        while stop is None or start < stop:
            end = start + rows_per_step if stop is None else min(start + rows_per_step, stop)
            yield self.rows(start, end)
            start = end

    def permutation(self, epoch: int) -> np.ndarray:
        """int64 [num_rows], the rows in the order of this epoch."""
        if epoch != self._epoch:
            self._order, self._epoch = shuffled(self.num_rows, self.seed, epoch), epoch
        return self._order


class ShardOrder(SampleOrder):
    """The order of a run that begins before all of its rows are there (`streaming_start`).

    The first epoch goes from shard to shard as they stand in the store, the rows of each shuffled: it asks for no more
    of the store than has been made. From the second on it is SampleOrder's. A function of the store and the seed, not
    of when a shard was finished.
    """

    def __init__(self, store: TokenStore, seed: int) -> None:
        store.wait(1)
        super().__init__(len(store), seed)
        self._store = store
        self._begin, self._shard_order = 0, np.empty(0, dtype=np.int64)

    def row(self, global_index: int) -> int:
        """The row at a global index. Waits where it is not there yet."""
        if not 0 <= global_index - self._begin < len(self._shard_order):
            self._store.wait(global_index + 1)
            self.num_rows = len(self._store)
            if global_index >= self.num_rows:  # then the store is whole
                return super().row(global_index)
            starts = self._store.shard_starts
            shard = int(np.searchsorted(starts, global_index, side="right")) - 1
            self._begin = int(starts[shard])
            end = int(starts[shard + 1]) if shard + 1 < len(starts) else self.num_rows
            self._shard_order = shuffled(end - self._begin, self.seed, 0, shard)
        return self._begin + int(self._shard_order[global_index - self._begin])


def shuffled(count: int, seed: int, *key: int) -> np.ndarray:
    """int64 [count]: the numbers below `count` in an order that is a function of seed and key alone."""
    # sorted by a hash instead of drawn by numpy's generator, whose streams may change between versions
    keys = splitmix64(np.arange(count, dtype=np.uint64) + _start(seed, *key))
    return np.argsort(keys, kind="stable")


def _start(seed: int, *key: int) -> np.uint64:
    """Where a stream of hashes begins: a hash of all these numbers, so that streams do not overlap."""
    mask = (1 << 64) - 1
    state = splitmix64(np.array([seed & mask], dtype=np.uint64))
    for number in key:
        state = splitmix64(state ^ np.array([(number * 0x9E3779B97F4A7C15) & mask], dtype=np.uint64))
    return np.uint64(state[0])


def splitmix64(values: np.ndarray) -> np.ndarray:
    """uint64 → uint64, one to one, every bit depending on every bit."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
