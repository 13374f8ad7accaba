"""The rows of every optimizer step, and which of them share a forward: a function of config, lengths and step.

A step is a number of rows, or, where only `max_tokens_per_batch` is asked for, as many rows as fill packs of so many
tokens. Nothing is kept between steps: step 1,000 can be asked for first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tuoling.data.batches import PackedOrder, lay, split_over_ranks
from tuoling.data.growing_store import POLL_S
from tuoling.data.mix import Mix, order_of
from tuoling.data.sampler import SampleOrder, ShardOrder

if TYPE_CHECKING:
    from tuoling.config import RunConfig
    from tuoling.data.token_store import TokenStore
    from tuoling.train.ranks import Ranks

LOOKED_AT_ROWS = 200_000


@dataclass(frozen=True, slots=True)
class Offset:
    """Where a run begins that goes on along another run's schedule, on rows of its own.

    step: the first one is the one after it. row: of its own rows, those passed over before. total_steps: of the
    schedule; stop: the step the run ends at, where that is sooner.
    """

    step: int = 0
    row: int = 0
    total_steps: int | None = None
    stop: int | None = None


FROM_THE_BEGINNING = Offset()


class RowSteps:
    """Steps of so many rows, over all ranks. Only the last one may hold fewer.

    store: of a run that begins before all of its rows are there. How long an epoch is does not matter to it then: it
    takes `max_steps` steps, and what is done at the end of each epoch is done at the end of the run.
    """

    def __init__(
        self,
        config: RunConfig,
        lengths: np.ndarray,
        rows_per_step: int,
        order: SampleOrder,
        *,
        world_size: int,
        offset: Offset,
        store: TokenStore | None = None,
    ) -> None:
        rows = order.num_rows
        self._size = rows_per_step if store is not None else min(rows, rows_per_step)
        self.rows_per_step: int | None = self._size
        self.max_tokens = config.max_tokens_per_batch
        # with a budget, tokens alone decide how many rows share a forward
        self.rows_at_once = self._size
        if self.max_tokens is None and config.per_device_train_batch_size is not None:
            self.rows_at_once = min(self._size, config.per_device_train_batch_size)
        self.per_epoch = config.max_steps if store is not None else math.ceil(rows / self._size)
        self.total_rows = config.max_steps * self._size if config.max_steps > 0 else whole_rows(config, rows)
        self.total = math.ceil(self.total_rows / self._size)
        self.first, self._row = offset.step, offset.row
        if offset.total_steps is not None:
            self.total = offset.stop or offset.total_steps
            self.total_rows = (self.total - self.first) * self._size
        self._lengths, self.world_size, self._order, self._store = lengths, world_size, order, store

    def ready(self, step: int) -> bool:
        """Whether the rows of `step` (from 0) are there."""
        return self._store is None or self._store.ready(self._row + (step + 1 - self.first) * self._size)

    def micro_batches(self, step: int, rank: int = 0) -> list[list[int]]:
        """The rows of each micro-batch that `rank` computes in `step` (from 0)."""
        begin = (step - self.first) * self._size
        end = min(begin + self._size, self.total_rows)
        rows = self._order.rows(self._row + begin, self._row + end)
        lengths = self._lengths if self._store is None else self._store.lengths
        share = split_over_ranks(lengths[rows], self.world_size)[rank]
        mine = [rows[position] for position in share]
        laid = lay(lengths[mine], rows_at_once=self.rows_at_once, max_tokens=self.max_tokens)
        return [[mine[position] for position in positions] for positions in laid]


class PackSteps:
    """Steps of so many packs of up to `max_tokens_per_batch` tokens, over all ranks.

    Every row of an epoch is in one pack of it. A fraction of an epoch is the fewest packs that hold so many rows.
    """

    def __init__(
        self,
        config: RunConfig,
        lengths: np.ndarray,
        order: SampleOrder,
        *,
        world_size: int,
        laid_for: int,
        offset: Offset,
    ) -> None:
        assert config.max_tokens_per_batch is not None
        self.rows_per_step: int | None = None
        self.rows_at_once = len(lengths)
        self.max_tokens: int | None = config.max_tokens_per_batch
        self._packs = PackedOrder(lengths, config.seed, config.max_tokens_per_batch, order)
        in_epoch = self._packs.packs_of(order.num_rows)
        self._size = min(in_epoch, config.gradient_accumulation_steps * laid_for)
        self.per_epoch = math.ceil(in_epoch / self._size)
        self.first = offset.step
        self._begin = self._packs.packs_of(offset.row)
        if offset.total_steps is not None:
            self.total = offset.stop or offset.total_steps
            self._end = self._begin + (self.total - self.first) * self._size
        else:
            if config.max_steps > 0:
                self._end = config.max_steps * self._size
            else:
                self._end = self._packs.packs_of(whole_rows(config, order.num_rows))
            self.total = math.ceil(self._end / self._size)
        self.total_rows = self._packs.rows_before(self._end) - self._packs.rows_before(self._begin)
        self._lengths, self.world_size = lengths, world_size

    def ready(self, step: int) -> bool:
        """Whether the rows of `step` (from 0) are there."""
        return True

    def micro_batches(self, step: int, rank: int = 0) -> list[list[int]]:
        """The rows of each micro-batch that `rank` computes in `step` (from 0)."""
        begin = self._begin + (step - self.first) * self._size
        packs = [self._packs.pack(index) for index in range(begin, min(begin + self._size, self._end))]
        tokens = [int(self._lengths[rows].sum()) for rows in packs]
        return [packs[position] for position in split_over_ranks(tokens, self.world_size)[rank]]


Steps = RowSteps | PackSteps


def make_steps(
    config: RunConfig,
    lengths: np.ndarray,
    world_size: int = 1,
    laid_for: int | None = None,
    offset: Offset = FROM_THE_BEGINNING,
    mix: Mix | None = None,
    store: TokenStore | None = None,
) -> Steps:
    """The steps of a run over rows of these lengths, or over those of `store` as they come.

    laid_for: processes whose batches make a step, where a run goes on with another number than it began with: its
    steps, their rows and the schedule stay what they were.
    """
    laid_for = world_size if laid_for is None else laid_for
    rows_per_step = config.rows_per_step(laid_for)
    if store is not None:
        assert rows_per_step is not None and config.max_steps > 0
        shards = ShardOrder(store, config.seed)
        return RowSteps(
            config, lengths, rows_per_step, shards, world_size=world_size, offset=offset, store=store
        )
    order = order_of(len(lengths), config.seed, mix)
    if rows_per_step is None:
        return PackSteps(config, lengths, order, world_size=world_size, laid_for=laid_for, offset=offset)
    return RowSteps(config, lengths, rows_per_step, order, world_size=world_size, offset=offset)


def rows_come(steps: Steps, step: int, ranks: Ranks, stop: Callable[[], bool]) -> bool:
    """Wait until every rank has the rows of a step. False where the user stops it meanwhile."""
    while ranks.any(not steps.ready(step)):
        if stop():
            return False
        time.sleep(POLL_S)
    return True


def whole_rows(config: RunConfig, rows: int) -> int:
    """Rows that are seen in `num_train_epochs` epochs, each as often as they are seen."""
    return max(1, round(rows * config.num_train_epochs))


@dataclass(frozen=True, slots=True)
class StepFigures:
    """What steps are like: tokens (mean), micro-batches of a rank (mean and most), and how full the budget is."""

    tokens: float
    micro_batches: float
    most_micro_batches: int
    fill: float | None


def look_at(steps: Steps, lengths: np.ndarray, store: TokenStore | None = None) -> StepFigures:
    """Lay the steps of a run and count, up to LOOKED_AT_ROWS rows. Rows longer than the budget are not in the fill.

    store: of rows that are still being made. Only steps whose rows are there are looked at, and one in any case.
    """
    tokens: list[int] = []
    counts: list[int] = []
    rows = 0
    while len(counts) < steps.total - steps.first and rows < LOOKED_AT_ROWS:
        if counts and not steps.ready(steps.first + len(counts)):
            break
        shares = [steps.micro_batches(steps.first + len(counts), rank) for rank in range(steps.world_size)]
        lengths = lengths if store is None else store.lengths
        counts.append(max(map(len, shares)))
        laid = [batch for share in shares for batch in share]
        tokens.extend(int(lengths[batch].sum()) for batch in laid)
        rows += sum(len(batch) for batch in laid)
    fitting = [count for count in tokens if steps.max_tokens and count <= steps.max_tokens]
    return StepFigures(
        tokens=sum(tokens) / len(counts),
        micro_batches=sum(counts) / len(counts),
        most_micro_batches=max(counts),
        fill=sum(fitting) / (len(fitting) * steps.max_tokens) if fitting and steps.max_tokens else None,
    )
