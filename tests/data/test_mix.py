"""Sources by share: the shares are exact, no row repeats in an epoch, and nothing decides but shares and the seed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from tuoling.config import RunConfig, load_config
from tuoling.data.batches import PackedOrder
from tuoling.data.mix import Mix, MixedOrder, make_mix, order_of
from tuoling.data.sampler import SampleOrder
from tuoling.errors import ConfigError, DataError
from tuoling.train.steps import make_steps


def mix_of(weights: dict[str, float], *counts: int) -> Mix:
    """Sources of so many rows, their rows shuffled among each other."""
    group = np.repeat(np.arange(len(counts)), counts)
    return make_mix(
        list(weights.items()), group[np.random.Generator(np.random.PCG64(3)).permutation(len(group))]
    )


@pytest.mark.parametrize(
    ("weights", "counts", "taken"),
    [
        ({"domain": 0.7, "general": 0.3}, (1000, 100_000), (1000, 428)),
        ({"domain": 70, "general": 30}, (1000, 100), (233, 100)),
        ({"a": 1, "b": 1, "c": 1}, (10, 20, 30), (10, 10, 10)),
        ({"a": 1, "b": 2, "c": 4}, (9, 9, 9), (2, 4, 9)),
    ],
)
def test_an_epoch_ends_with_the_first_source(
    weights: dict[str, float], counts: tuple[int, ...], taken: tuple[int, ...]
) -> None:
    mix = mix_of(weights, *counts)
    assert mix.taken() == taken
    for part, share, count in zip(taken, mix.shares, counts, strict=True):
        assert abs(part - share * sum(taken)) < 1 and part <= count
    assert any(part == count for part, count in zip(taken, counts, strict=True))


def test_every_epoch_has_the_shares_and_no_row_twice() -> None:
    mix = mix_of({"a": 0.6, "b": 0.4}, 30, 200)
    order = MixedOrder(mix, 42)
    assert order.num_rows == 50
    seen: Counter[int] = Counter()
    for epoch in range(20):
        rows = order.permutation(epoch)
        assert len(set(rows.tolist())) == 50
        assert np.bincount(mix.group[rows]).tolist() == [30, 20]
        seen.update(rows.tolist())
    a, b = (np.flatnonzero(mix.group == source) for source in (0, 1))
    assert [seen[row] for row in a] == [20] * 30
    assert [seen[row] for row in b] == [2] * 200, "10 epochs of 20 go through all 200 before one comes again"


def test_sources_are_spread_over_the_epoch() -> None:
    mix = mix_of({"a": 0.5, "b": 0.5}, 2000, 2000)
    sources = mix.group[MixedOrder(mix, 1).permutation(0)]
    halves = [part.mean() for part in np.array_split(sources, 8)]
    assert all(0.42 < half < 0.58 for half in halves)


def test_the_order_is_a_function_of_seed_and_place() -> None:
    mix = mix_of({"a": 0.6, "b": 0.4}, 30, 200)
    straight = MixedOrder(mix, 7).rows(0, 170)
    assert [row for batch in MixedOrder(mix, 7).batches(60, 8, 170) for row in batch] == straight[60:]
    assert MixedOrder(mix, 8).rows(0, 50) != straight[:50]
    assert straight[:8] == [
        39,
        128,
        165,
        141,
        134,
        176,
        161,
        187,
    ]  # a saved run resumes into the same order for ever
    assert order_of(9, 7, None).rows(0, 30) == SampleOrder(9, 7).rows(0, 30)


@pytest.mark.parametrize("keys", [{"batch_size": 8}, {"max_tokens_per_batch": 256}])
def test_steps_of_a_mix(keys: dict[str, Any]) -> None:
    mix = mix_of({"a": 0.6, "b": 0.4}, 300, 2000)
    lengths = np.random.Generator(np.random.PCG64(5)).integers(5, 60, 2300).astype(np.int32)
    config = RunConfig(num_train_epochs=2, **keys)
    one, two = (make_steps(config, lengths, world, 1, mix=mix) for world in (1, 2))
    assert one.total_rows == 1000 and one.total == two.total
    per_epoch: list[int] = []
    for step in range(one.total):
        mine = sorted(row for rows in one.micro_batches(step) for row in rows)
        assert mine == sorted(
            row for rank in (0, 1) for rows in two.micro_batches(step, rank) for row in rows
        )
        per_epoch += mine
    assert np.bincount(mix.group[per_epoch]).tolist() == [600, 400]
    assert make_steps(RunConfig(num_train_epochs=1, **keys), lengths, mix=mix).total_rows == 500


def test_packs_of_a_mix_hold_each_row_of_the_epoch_once() -> None:
    mix = mix_of({"a": 0.6, "b": 0.4}, 300, 2000)
    lengths = np.full(2300, 20, np.int32)
    order = PackedOrder(lengths, 42, 256, MixedOrder(mix, 42))
    rows, ends = order.epoch(1)
    assert sorted(rows.tolist()) == sorted(MixedOrder(mix, 42).permutation(1).tolist()) and ends[-1] == 500


def test_a_source_without_rows_or_with_too_small_a_share() -> None:
    with pytest.raises(DataError, match="no row of this source") as told:
        Mix(("a", "b"), (0.5, 0.5), np.zeros(4, int)).taken()
    assert told.value.where == "mix: b"
    with pytest.raises(DataError, match="less than one row"):
        mix_of({"a": 0.001, "b": 0.999}, 10, 50).taken()


@pytest.mark.parametrize(
    "given", ["a.json=70%,b.json=30%", "{a.json: 70, b.json: 30}", "a.json=70, b.json=30"]
)
def test_mix_names_the_data_too(given: str) -> None:
    config = load_config((), [f"mix={given}"]).config
    assert config.mix == {"a.json": 70, "b.json": 30} and config.data == ("a.json", "b.json")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["mix=a.json=1"], "at least two sources"),
        (["mix={a.json: 1, b.json: 0}"], "greater than 0"),
        (["mix={a.json: 1, b.json: much}"], "must be a number"),
        (
            ["mix={a.json: 1, b.json: 2}", "data=a.json,c.json"],
            "no share for c.json; b.json is not in the data",
        ),
        (["mix={a.json: 1, b.json: 2}", "share_prefixes=true"], "share_prefixes with mix"),
        (["early_stopping_patience=2"], "none are held out"),
    ],
)
def test_what_does_not_go_with_it(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config((), words)
