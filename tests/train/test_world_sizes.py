"""A run goes on with another number of processes: no row is repeated or left out, and the losses stay."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.train.parallel_runs import apart, curve_of, run, tiny
from tests.train.test_sharded_resume import stopped_at

from tuoling.config import RunConfig
from tuoling.train.entry import resume
from tuoling.train.launch import Launch
from tuoling.train.steps import make_steps


@pytest.mark.parametrize(
    "keys",
    [
        {"batch_size": 12, "per_device_train_batch_size": 2},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
        {"max_tokens_per_batch": 60, "gradient_accumulation_steps": 2},
    ],
    ids=["batch_size", "per process", "tokens"],
)
def test_every_row_is_seen_as_often_whatever_the_processes(keys: dict[str, int]) -> None:
    lengths = np.array([5 + 7 * row % 31 for row in range(50)])
    config = RunConfig(num_train_epochs=2, **keys)
    straight = make_steps(config, lengths, 2, 2)
    taken = [sorted(rows_of(straight, step, 2)) for step in range(straight.total)]
    assert sorted(row for step in taken for row in step) == sorted([*range(50), *range(50)])
    for processes in (1, 3, 4):  # from the fourth step on with another number of them
        other = make_steps(config, lengths, processes, 2)
        assert other.total == straight.total
        for step in range(3, straight.total):
            assert sorted(rows_of(other, step, processes)) == taken[step]


def rows_of(steps: object, step: int, processes: int) -> list[int]:
    """What all processes take in a step."""
    laid = [steps.micro_batches(step, rank) for rank in range(processes)]  # type: ignore[attr-defined]
    return [row for rank in laid for batch in rank for row in batch]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_more_or_fewer_processes(tmp_path: Path, before: int, after: int) -> None:
    model = tiny(tmp_path, "llama")
    keys = {"save_steps": 12, "adam_epsilon": 1e-8, "learning_rate": 1e-3}
    straight = run(tmp_path / "straight", model, before, **keys)
    folder = stopped_at(straight.path, tmp_path / "stopped", 12)
    result = resume(folder, say=lambda _: None, launch=Launch(nproc=after))
    assert result.status == "finished"
    losses, weights = apart(straight, curve_of(folder), model)
    assert losses <= 1e-6 and weights <= 1e-5
    tokens = [
        [json.loads(line)["tokens"] for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (straight.path, folder)
    ]
    assert tokens[0] == tokens[1]
    assert json.loads((folder / "run.json").read_text())["resumed"][0]["processes"] == after
