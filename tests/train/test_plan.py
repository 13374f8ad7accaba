from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import tiny_model
from torch import nn
from transformers import get_scheduler

from tuoling.config import RunConfig
from tuoling.errors import TrainingError
from tuoling.models.load import find_model, load_model
from tuoling.models.quantization import Quantization
from tuoling.models.shape import linear_weights, meta_model
from tuoling.train.memory import MemoryEstimate, ModelSize, weight_bytes
from tuoling.train.plan import Plan
from tuoling.train.planning import make_plan
from tuoling.train.progress import Progress, forecast

SIZE = ModelSize(parameters=1_000_000, trainable=10_000, layers=2, hidden=64)


def plan(rows: int = 10, **keys: Any) -> Plan:
    lengths = np.arange(1, rows + 1)
    return make_plan(
        RunConfig(**keys),
        lengths=lengths,
        learned=lengths // 2,
        eval_rows=0,
        size=SIZE,
        memory=MemoryEstimate(),
        device="cpu",
    )


def test_every_row_is_planned_exactly_epochs_times() -> None:
    made = plan(10, per_device_train_batch_size=4, num_train_epochs=3)
    assert (made.total_rows, made.total_steps, made.rows_per_step) == (30, 8, 4)
    assert made.tokens == 55 and made.longest_row == 10


def test_half_an_epoch_is_half_the_rows() -> None:
    assert plan(10, num_train_epochs=0.5, per_device_train_batch_size=1).total_steps == 5


def test_max_steps_decides() -> None:
    made = plan(10, per_device_train_batch_size=4, max_steps=7)
    assert (made.total_steps, made.total_rows, made.epochs) == (7, 28, 2.8)


@pytest.mark.parametrize(
    ("keys", "warmup"),
    [({"warmup_ratio": 0.1}, 3), ({"warmup_steps": 5}, 5), ({"warmup_ratio": 0.0}, 0)],
)
def test_warmup_in_steps_or_as_a_share_rounded_up(keys: dict[str, Any], warmup: int) -> None:
    assert plan(100, per_device_train_batch_size=4, num_train_epochs=1, **keys).warmup_steps == warmup


@pytest.mark.parametrize(("asked", "every"), [(None, 3), (0, 5), (2, 2)])
def test_intervals_by_number_by_epoch_or_only_at_the_end(asked: int | None, every: int) -> None:
    made = plan(10, per_device_train_batch_size=4, num_train_epochs=2, save_steps=asked, eval_steps=asked)
    assert (made.total_steps, made.save_steps, made.eval_steps) == (5, every, every)


def test_a_short_run_says_that_it_has_no_checkpoint_on_the_way() -> None:
    assert any("save_steps=500" in warning for warning in plan(10).warnings())
    assert not any("save_steps" in warning for warning in plan(10, save_steps=2).warnings())


def test_a_warmup_longer_than_the_run_is_said() -> None:
    assert any("warm-up of 100" in warning for warning in plan(10, warmup_steps=100).warnings())


@pytest.mark.parametrize(
    ("steps", "made_at", "foreseen_s"),
    [(9, None, None), (10, 2, 9 * 0.5), (100, 11, 99 * 0.5), (1000, 21, 999 * 0.5)],
)
def test_the_time_is_foreseen_once_from_the_first_tenth_of_the_steps(
    steps: int, made_at: int | None, foreseen_s: float | None
) -> None:
    """Half a second and 40 tokens a step; the first step, which is slower, counts nowhere."""
    made = plan(steps, per_device_train_batch_size=1, num_train_epochs=1)
    found = {}
    for step in range(1, steps + 1):
        done = Progress(step=step, timed_tokens=40 * (step - 1), seconds=0.5 * (step - 1))
        if (said := forecast(done, made)) is not None:
            found[step] = said
    assert list(found) == ([made_at] if made_at else [])
    if made_at:
        assert found[made_at] == {
            "at_step": made_at,
            "timed_steps": made_at - 1,
            "seconds": foreseen_s,
            "tokens_per_s": 80.0,
        }


def test_no_rows_is_an_error() -> None:
    with pytest.raises(TrainingError, match="no row"):
        plan(0)


def test_a_token_budget_keeps_the_steps_and_is_told() -> None:
    made = plan(10, batch_size=5, max_tokens_per_batch=12, num_train_epochs=3)
    rows = plan(10, batch_size=5, num_train_epochs=3)
    assert (made.total_steps, made.total_rows, made.rows_per_step) == (6, 30, 5)
    assert made.tokens_per_step == rows.tokens_per_step == 27.5
    assert made.most_micro_batches >= made.micro_batches_per_step >= 27.5 / 12
    assert made.fill is not None and 0.5 < made.fill <= 1 and rows.fill is None
    assert (rows.micro_batches_per_step, made.largest_micro_batch, rows.largest_micro_batch) == (5, 12, 10)
    told = dict(made.lines())["each step"]
    assert told.startswith("5 rows, about 28 tokens, micro-batches: ")
    assert told.endswith(f"each up to 12 tokens, {made.fill:.1%} full")


def test_steps_of_tokens_are_counted_exactly() -> None:
    made = plan(10, max_tokens_per_batch=11, num_train_epochs=2)  # 10, 9+1, 8+2 … or better: 5 x 11 tokens
    assert (made.total_steps, made.total_rows, made.rows_per_step, made.epochs) == (10, 20, None, 2)
    assert (made.tokens_per_step, made.micro_batches_per_step, made.fill) == (11, 1, 1)
    assert dict(made.lines())["each step"] == (
        "about 11 tokens, 2.0 rows, micro-batches: 1, each up to 11 tokens, 100.0% full"
    )
    once_an_epoch = plan(10, max_tokens_per_batch=11, num_train_epochs=2, eval_steps=None)
    assert once_an_epoch.eval_steps == 5


def test_rows_longer_than_the_budget_are_told_and_planned_for() -> None:
    made = plan(10, max_tokens_per_batch=7, num_train_epochs=1)
    assert (made.rows_over_budget, made.longest_row, made.largest_micro_batch, made.total_rows) == (
        3,
        10,
        10,
        10,
    )
    (warning,) = [text for text in made.warnings() if "max_tokens_per_batch=7" in text]
    assert "3 of 10, the longest 10 tokens" in warning and "each runs alone" in warning
    assert not any("max_tokens" in text for text in plan(10, max_tokens_per_batch=10).warnings())


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_learning_rate_is_transformers_own(schedule: str, warmup: int) -> None:
    name = {"constant": "constant_with_warmup"}.get(schedule, schedule)
    config = RunConfig(learning_rate=3e-4, lr_scheduler_type=schedule)
    made = plan(50, per_device_train_batch_size=1, num_train_epochs=1, warmup_steps=warmup)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=50)
    for step in range(50):
        ours = made.learning_rate(step, config)
        assert ours == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("bits", "linear_bytes"), [(0, 2.0), (8, 1.0), (4, 0.5 + 1 / 64 + 4 / 64 / 256)])
def test_quantised_linear_layers_weigh_less(bits: int, linear_bytes: float) -> None:
    size = ModelSize(parameters=1_000_000, trainable=10_000, layers=2, hidden=64, linear=640_000)
    found = weight_bytes(RunConfig(quantization_bit=bits), size, "bf16")
    assert found == pytest.approx(10_000 * 4 + 350_000 * 2 + 640_000 * linear_bytes, abs=1)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_linear_weights_are_what_is_quantised(tmp_path: Path, family: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    folder = tiny_model(tmp_path / "m", family, hidden=64)
    model = load_model(find_model(folder), dtype="fp32", device="cpu", quantization=Quantization(8))
    held = [m.weight.numel() for m in model.modules() if isinstance(m, bnb.nn.Linear8bitLt)]
    assert linear_weights(meta_model(folder)) == sum(held) > 0
