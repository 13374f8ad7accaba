"""Steps by rows and by tokens: no row lost or doubled, whatever the budget, the ranks and where a run goes on."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from tuoling.config import RunConfig
from tuoling.data.sampler import SampleOrder
from tuoling.train.steps import PackSteps, RowSteps, Steps, look_at, make_steps

LENGTHS = np.clip(np.random.Generator(np.random.PCG64(1)).lognormal(5, 0.7, 700), 8, 900).astype(np.int32)


def steps_of(world_size: int = 1, lengths: np.ndarray = LENGTHS, **keys: Any) -> Steps:
    return make_steps(RunConfig(**keys), lengths, world_size)


def rows_in(steps: Steps, step: int, rank: int = 0) -> list[int]:
    return [row for rows in steps.micro_batches(step, rank) for row in rows]


def all_rows(steps: Steps) -> list[int]:
    return [row for step in range(steps.total) for row in rows_in(steps, step)]


@pytest.mark.parametrize("budget", [1, 300, 1024, 4096, 10**6])
def test_a_budget_changes_no_steps_rows(budget: int) -> None:
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3, "num_train_epochs": 1.5}
    plain, within = steps_of(**sizes), steps_of(**sizes, max_tokens_per_batch=budget)
    assert (plain.total, plain.total_rows) == (within.total, within.total_rows) == (44, 1050)
    order = SampleOrder(len(LENGTHS), 42)
    for step in range(44):
        asked = order.rows(step * 24, min(step * 24 + 24, 1050))
        assert rows_in(plain, step) == asked
        assert sorted(rows_in(within, step)) == sorted(asked)
        for rows in within.micro_batches(step):
            assert LENGTHS[rows].sum() <= budget or len(rows) == 1


def test_a_budget_makes_few_forwards() -> None:
    steps = steps_of(batch_size=64, max_tokens_per_batch=2048, num_train_epochs=1)
    for step in range(steps.total):
        least = -(-int(LENGTHS[rows_in(steps, step)].sum()) // 2048)
        assert len(steps.micro_batches(step)) <= least + 1


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(("epochs", "whole"), [(1, True), (3, True), (0.3, False), (1.5, False)])
def test_steps_of_tokens_see_every_row_once_an_epoch(accumulation: int, epochs: float, whole: bool) -> None:
    steps = steps_of(
        max_tokens_per_batch=1024, gradient_accumulation_steps=accumulation, num_train_epochs=epochs
    )
    seen = all_rows(steps)
    times = Counter(seen)
    assert len(seen) == steps.total_rows and steps.micro_batches(steps.total) == []
    asked = round(epochs * len(LENGTHS))
    last_pack = steps.micro_batches(steps.total - 1)[-1]
    assert asked <= len(seen) < asked + len(last_pack)
    assert max(times.values()) - min(times[row] for row in range(len(LENGTHS))) == (0 if whole else 1)
    counts = [len(steps.micro_batches(step)) for step in range(steps.total)]
    assert counts[:-1] == [accumulation] * (steps.total - 1) and 1 <= counts[-1] <= accumulation


def test_max_steps_counts_steps_of_tokens() -> None:
    steps = steps_of(max_tokens_per_batch=1024, gradient_accumulation_steps=2, max_steps=200)
    seen = all_rows(steps)
    assert steps.total == 200 and len(seen) == steps.total_rows > 2 * len(LENGTHS)
    assert all(len(steps.micro_batches(step)) == 2 for step in range(200))
    times = Counter(seen)
    assert set(times.values()) <= {len(seen) // 700, len(seen) // 700 + 1}


def test_a_step_is_never_more_than_an_epoch() -> None:
    few = np.array([5, 6, 7])
    by_tokens = steps_of(
        lengths=few, max_tokens_per_batch=100, gradient_accumulation_steps=8, num_train_epochs=4
    )
    assert by_tokens.total == 4 and all(sorted(rows_in(by_tokens, step)) == [0, 1, 2] for step in range(4))
    by_rows = steps_of(lengths=few, batch_size=8, num_train_epochs=4)
    assert by_rows.total == 4 and all(sorted(rows_in(by_rows, step)) == [0, 1, 2] for step in range(4))


@pytest.mark.parametrize("keys", [{"batch_size": 12}, {}])
def test_a_step_is_a_function_of_seed_and_number(keys: dict[str, Any]) -> None:
    keys = {**keys, "max_tokens_per_batch": 700, "num_train_epochs": 3}
    steps = steps_of(**keys)
    for step in (steps.total - 1, 0, 101, steps.total // 2):
        assert steps_of(**keys).micro_batches(step) == steps.micro_batches(step)
        assert steps_of(**keys, seed=43).micro_batches(step) != steps.micro_batches(step)


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("budget", [None, 900])
def test_ranks_share_a_step_of_rows(world_size: int, budget: int | None) -> None:
    steps = steps_of(
        world_size, batch_size=48, per_device_train_batch_size=2, max_tokens_per_batch=budget, max_steps=20
    )
    alone = steps_of(batch_size=48, max_steps=20)
    for step in range(20):
        shares = [rows_in(steps, step, rank) for rank in range(world_size)]
        assert sorted(row for share in shares for row in share) == sorted(rows_in(alone, step))
        loads = [int(LENGTHS[share].sum()) for share in shares]
        assert max(loads) - min(loads) <= LENGTHS.max()


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_share_a_step_of_tokens(world_size: int) -> None:
    steps = steps_of(world_size, max_tokens_per_batch=1024, gradient_accumulation_steps=2, num_train_epochs=2)
    for step in range(steps.total - 1):
        assert [len(steps.micro_batches(step, rank)) for rank in range(world_size)] == [2] * world_size
    shares = [rows_in(steps, step, rank) for step in range(steps.total) for rank in range(world_size)]
    assert sorted(row for share in shares for row in share) == sorted([*range(700), *range(700)])


def test_which_kind_of_step() -> None:
    assert isinstance(steps_of(), RowSteps) and isinstance(steps_of(max_tokens_per_batch=99), PackSteps)
    assert isinstance(steps_of(max_tokens_per_batch=99, batch_size=4), RowSteps)


@pytest.mark.parametrize("keys", [{"batch_size": 12}, {"gradient_accumulation_steps": 3}])
def test_figures_are_those_of_the_steps(keys: dict[str, Any]) -> None:
    steps = steps_of(**keys, max_tokens_per_batch=700, num_train_epochs=2)
    figures = look_at(steps, LENGTHS)
    laid = [[int(LENGTHS[rows].sum()) for rows in steps.micro_batches(step)] for step in range(steps.total)]
    fitting = [tokens for step in laid for tokens in step if tokens <= 700]
    assert figures.tokens == pytest.approx(2 * int(LENGTHS.sum()) / steps.total)
    assert figures.micro_batches == pytest.approx(sum(map(len, laid)) / steps.total)
    assert figures.most_micro_batches == max(map(len, laid))
    assert figures.fill == pytest.approx(sum(fitting) / len(fitting) / 700)
    assert any(tokens > 700 for step in laid for tokens in step)  # rows over the budget were among them
    assert look_at(steps_of(), LENGTHS).fill is None
