"""The order of rows depends on seed and epoch, and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuoling.data.sampler import SampleOrder

STONE = [3, 6, 8, 0, 4, 9, 7, 1, 2, 5, 3, 9, 4, 0, 8, 6, 7, 2, 1, 5]


@pytest.mark.slow
@given(st.integers(1, 50), st.integers(0, 2**40), st.integers(0, 5))
def test_every_epoch_takes_every_row_once(rows: int, seed: int, epoch: int) -> None:
    order = SampleOrder(rows, seed)
    taken = order.rows(epoch * rows, (epoch + 1) * rows)
    assert sorted(taken) == list(range(rows))


@pytest.mark.slow
@given(st.integers(1, 30), st.integers(1, 7), st.integers(1, 7), st.integers(0, 40))
def test_batch_size_and_start_do_not_matter(rows: int, one: int, other: int, start: int) -> None:
    whole = SampleOrder(rows, 7).rows(0, 100)
    for size in (one, other):
        taken = [row for batch in SampleOrder(rows, 7).batches(start, size, 100) for row in batch]
        assert taken == whole[start:]


def test_order_is_written_in_stone() -> None:
    assert SampleOrder(10, 42).rows(0, 20) == STONE  # a saved run resumes into the same order for ever


def test_epochs_and_seeds_differ() -> None:
    order = SampleOrder(1000, 42)
    epochs = [order.permutation(epoch).copy() for epoch in range(3)]
    other = SampleOrder(1000, 43).permutation(0)
    for first, second in ((epochs[0], epochs[1]), (epochs[1], epochs[2]), (epochs[0], other)):
        assert (first == second).mean() < 0.02
    assert abs(np.corrcoef(np.arange(1000), epochs[0])[0, 1]) < 0.1


def test_no_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="num_rows=0"):
        SampleOrder(0, 1)
