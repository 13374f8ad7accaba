"""Several sources by share: which rows an epoch takes from each, a function of shares, row counts and seed alone.

An epoch ends where the first source would have to repeat a row: of 1,000 domain rows at 70 % and 100,000 general ones
at 30 % it is 1,000 of the former and 428 of the latter. The next epoch takes the same domain rows in another order and
the next 428 general ones. Nothing is drawn with replacement: a source is gone through to its end, in a shuffled order,
before any of its rows comes again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tuoling.data.sampler import SampleOrder, shuffled
from tuoling.errors import DataError
from tuoling.language import tr


@dataclass(frozen=True)
class Mix:
    """names: of the sources. shares: of the rows of an epoch, 1 together. group: int64 [rows], the source of each row."""

    names: tuple[str, ...]
    shares: tuple[float, ...]
    group: np.ndarray

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of each source."""
        return tuple(np.bincount(self.group, minlength=len(self.names)).tolist())

    def taken(self) -> tuple[int, ...]:
        """Rows an epoch takes from each source. Raises DataError where a source has none, or a share is under one row."""
        rows = self.rows
        empty = next((name for name, count in zip(self.names, rows, strict=True) if not count), None)
        if empty is not None:
            raise DataError(
                tr("no row of this source is left to train on", "这个数据源没有可训练的数据"),
                where=f"mix: {empty}",
                remedy=tr("take it out of mix and data", "把它从 mix 和 data 中去掉"),
            )
        together = min(count / share for count, share in zip(rows, self.shares, strict=True))
        wanted = np.array(self.shares) * int(together + 1e-9)
        found = np.floor(wanted + 1e-9).astype(int)
        left = int(together + 1e-9) - int(found.sum())
        found[np.argsort(found - wanted, kind="stable")[:left]] += 1  # the largest remainders
        for name, count, share in zip(self.names, found.tolist(), self.shares, strict=True):
            if not count:
                raise DataError(
                    tr(
                        f"{share:.2%} is less than one row: an epoch has {int(together)} rows in all",
                        f"{share:.2%} 不足一条：每轮总共只有 {int(together)} 条",
                    ),
                    where=f"mix: {name}",
                    remedy=tr("a larger share, or more rows of the others", "调大比例，或增加其他数据源"),
                )
        return tuple(found.tolist())


def make_mix(weights: Sequence[tuple[str, float]], group: np.ndarray) -> Mix:
    """weights: of each source, in any unit. group: int64 [rows]."""
    total = sum(weight for _, weight in weights)
    return Mix(tuple(name for name, _ in weights), tuple(weight / total for _, weight in weights), group)


class MixedOrder(SampleOrder):
    """As SampleOrder, with rows of each source by share. num_rows: of an epoch."""

    def __init__(self, mix: Mix, seed: int) -> None:
        self._taken = mix.taken()
        super().__init__(sum(self._taken), seed)
        self._members = [np.flatnonzero(mix.group == source) for source in range(len(mix.names))]
        self._source_of_slot = np.repeat(np.arange(len(self._taken)), self._taken)

    def permutation(self, epoch: int) -> np.ndarray:
        """int64 [num_rows], the rows of this epoch in their order."""
        if epoch != self._epoch:
            sources = self._source_of_slot[shuffled(self.num_rows, self.seed, epoch)]
            order = np.empty(self.num_rows, dtype=np.int64)
            for source, count in enumerate(self._taken):
                order[sources == source] = self._of_source(source, epoch * count, (epoch + 1) * count)
            self._order, self._epoch = order, epoch
        return self._order

    def _of_source(self, source: int, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a source that is gone through again and again, each time in another order."""
        members = self._members[source]
        parts = []
        while start < stop:
            time, at = divmod(start, len(members))
            part = members[shuffled(len(members), self.seed, time, source + 1)][at : at + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)


def order_of(num_rows: int, seed: int, mix: Mix | None) -> SampleOrder:
    """The order of a run's rows."""
    return SampleOrder(num_rows, seed) if mix is None else MixedOrder(mix, seed)
