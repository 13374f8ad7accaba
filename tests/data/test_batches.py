"""Rows that share a forward: each one once, within the budget, the same whenever and from wherever they are asked for."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.real_tokenizers import load

from tuoling.data import batches
from tuoling.data.batches import PackedOrder, best_fit, largest_micro_batch_tokens, lay, split_over_ranks
from tuoling.data.source import Source
from tuoling.data.store import StoreSettings, compile_store
from tuoling.text.templates import get_template

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60).map(np.array)
STONE = [[6, 9, 2], [3, 8], [0, 4], [7, 5], [1], [1], [3, 8], [7, 5], [9, 6, 2], [4, 0], [6, 2, 9], [1]]


def some_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Lengths as instruction rows have them: many short ones, a long tail."""
    drawn = np.random.Generator(np.random.PCG64(seed)).lognormal(5, 0.7, count)
    return np.clip(drawn, 8, 1024).astype(np.int32)


def plainly(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Best-fit decreasing as one would say it, over all packs for every row."""
    packs: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        rooms = [max_tokens - sum(lengths[other] for other in pack) for pack in packs]
        fitting = [number for number, room in enumerate(rooms) if room >= lengths[row]]
        if fitting:
            packs[min(fitting, key=lambda number: rooms[number])].append(row)
        else:
            packs.append([row])
    return packs


@pytest.mark.slow
@given(LENGTHS, st.integers(1, 100))
def test_best_fit_is_best_fit_decreasing(lengths: np.ndarray, max_tokens: int) -> None:
    packs = best_fit(lengths, max_tokens)
    expected = [sorted(pack) for pack in plainly(lengths.tolist(), max_tokens)]
    assert [np.flatnonzero(packs == number).tolist() for number in range(len(expected))] == expected


@pytest.mark.slow
@given(LENGTHS, st.integers(1, 100), st.integers(1, 70))
def test_micro_batches_hold_every_row_once_within_the_budget(
    lengths: np.ndarray, max_tokens: int, rows_at_once: int
) -> None:
    laid = lay(lengths, rows_at_once=rows_at_once, max_tokens=max_tokens)
    assert sorted(position for part in laid for position in part) == list(range(len(lengths)))
    most = largest_micro_batch_tokens(lengths, rows_at_once=rows_at_once, max_tokens=max_tokens)
    for part in laid:
        tokens = int(lengths[part].sum())
        assert part == sorted(part) and len(part) <= rows_at_once and tokens <= most
        assert tokens <= max_tokens or len(part) == 1


@pytest.mark.slow
@given(LENGTHS, st.integers(1, 70))
def test_without_a_budget_rows_are_counted(lengths: np.ndarray, rows_at_once: int) -> None:
    laid = lay(lengths, rows_at_once=rows_at_once, max_tokens=None)
    assert [position for part in laid for position in part] == list(range(len(lengths)))
    assert [len(part) for part in laid[:-1]] == [rows_at_once] * (len(laid) - 1)
    longest = sorted(lengths.tolist(), reverse=True)[:rows_at_once]
    assert largest_micro_batch_tokens(lengths, rows_at_once=rows_at_once, max_tokens=None) == sum(longest)


def test_the_largest_micro_batch_is_the_budget_or_the_longest_row() -> None:
    lengths = np.array([5, 7, 30, 6], dtype=np.int32)

    def largest(rows: int, budget: int | None) -> int:
        return largest_micro_batch_tokens(lengths, rows_at_once=rows, max_tokens=budget)

    assert [largest(4, None), largest(2, None), largest(9, None)] == [48, 37, 48]
    assert [largest(4, 40), largest(4, 20), largest(4, 1000)] == [40, 30, 48]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@given(lengths=st.lists(st.integers(1, 2048), max_size=40))
def test_ranks_share_the_rows_and_differ_by_one_row_at_most(world_size: int, lengths: list[int]) -> None:
    shares = split_over_ranks(lengths, world_size)
    assert len(shares) == world_size
    assert sorted(position for share in shares for position in share) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(lengths[position] for position in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_ranks_of_real_steps_are_nearly_equal() -> None:
    lengths = some_lengths(128)
    loads = [int(lengths[share].sum()) for share in split_over_ranks(lengths, 8)]
    assert max(loads) - min(loads) < 0.02 * max(loads)  # dealt out in order they differ by 30 %


@pytest.mark.slow
@given(st.integers(1, 700), st.integers(0, 2**40), st.integers(1, 4000))
def test_an_epoch_of_packs_takes_every_row_once(rows: int, seed: int, max_tokens: int) -> None:
    lengths = some_lengths(rows, seed % 1000)
    order = PackedOrder(lengths, seed, max_tokens)
    for epoch in range(2):
        taken, ends = order.epoch(epoch)
        assert sorted(taken.tolist()) == list(range(rows)) and int(ends[-1]) == rows
        tokens = np.add.reduceat(lengths[taken], [0, *ends[:-1]])
        assert np.all((tokens <= max_tokens) | (np.diff([0, *ends]) == 1))


def test_a_pack_depends_on_its_position_alone() -> None:
    lengths = some_lengths(900)
    order = PackedOrder(lengths, 7, 2048)
    in_turn = [order.pack(index) for index in range(300)]
    for index in (299, 0, 150, 75, 298):
        assert PackedOrder(lengths, 7, 2048).pack(index) == in_turn[index]
    assert order.pack(3) == in_turn[3]  # back to an earlier epoch
    before = np.cumsum([0, *map(len, in_turn)])
    for index in range(301):
        assert order.rows_before(index) == before[index]


def test_rows_are_counted_into_packs_exactly() -> None:
    lengths = some_lengths(700)
    order = PackedOrder(lengths, 3, 1024)
    for rows in (0, 1, 2, 699, 700, 701, 1050, 1399, 1400, 2100):
        packs = order.packs_of(rows)
        assert order.rows_before(packs) >= rows
        assert packs == 0 or order.rows_before(packs - 1) < rows
    assert [order.rows_before(order.packs_of(epoch * 700)) for epoch in range(4)] == [0, 700, 1400, 2100]


def test_packs_are_written_in_stone() -> None:
    order = PackedOrder(np.array([3, 9, 4, 2, 3, 5, 2, 5, 8, 4]), 42, 10)
    assert [
        order.pack(index) for index in range(12)
    ] == STONE  # a saved run resumes into the same packs for ever


def test_packs_differ_between_epochs_and_do_not_run_from_long_rows_to_short() -> None:
    lengths = some_lengths(6000)
    order = PackedOrder(lengths, 42, 2048)
    mates = []
    for epoch in range(2):
        rows, ends = order.epoch(epoch)
        packs = np.split(rows, ends[:-1])
        mates.append({(a, b) for pack in packs for a in pack.tolist() for b in pack.tolist() if a < b})
        longest = np.array([lengths[pack].max() for pack in packs])
        first_half = longest[: len(longest) // 2].mean() / longest[len(longest) // 2 :].mean()
        assert 0.9 < first_half < 1.1
        for window in np.array_split(longest, len(longest) // 40):  # about a window's packs
            assert abs(np.corrcoef(np.arange(len(window)), window)[0, 1]) < 0.6
    assert len(mates[0] & mates[1]) < 0.05 * len(mates[0])


def test_windows_are_at_least_as_large_as_they_say() -> None:
    sizes: list[int] = []
    whole = batches.best_fit

    def watch(lengths: np.ndarray, max_tokens: int) -> np.ndarray:
        sizes.append(len(lengths))
        return whole(lengths, max_tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "best_fit", watch)
        PackedOrder(some_lengths(5000), 1, 64).epoch(0)
        PackedOrder(some_lengths(5000), 1, 8192).epoch(0)
    assert sum(sizes) == 10_000 and min(sizes) >= batches.WINDOW_ROWS
    large = sizes[-(5000 // math.floor(batches.WINDOW_PACKS * 8192 / some_lengths(5000).mean())) :]
    assert min(large) * some_lengths(5000).mean() >= 0.95 * batches.WINDOW_PACKS * 8192


@pytest.mark.slow
@pytest.mark.parametrize("file", ["alpaca/alpaca_zh_demo.json", "domain/domain.train.json"])
def test_packs_of_real_rows_are_nearly_full(
    tmp_path: Path, request: pytest.FixtureRequest, shared_data: Path, file: str
) -> None:
    tokenizer = load("neox", request)
    store, _ = compile_store(
        [Source(str(shared_data / file))],
        tokenizer=tokenizer,
        template=get_template("alpaca", tokenizer),
        settings=StoreSettings(max_seq_len=2048),
        cache_dir=tmp_path / "cache",
    )
    order = PackedOrder(store.lengths, 42, 2048)
    packs = order.packs_of(3 * len(store))
    assert 3 * int(store.lengths.sum()) / (packs * 2048) >= 0.96
