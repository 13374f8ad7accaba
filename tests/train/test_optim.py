from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from tuoling.train.optim import learning_rate, make_optimizer


class Settings:
    learning_rate = 1e-3
    weight_decay = 0.1
    adam_beta1 = 0.9
    adam_beta2 = 0.999
    adam_epsilon = 1e-8


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_learning_rate_is_transformers_own(schedule: str, warmup: int) -> None:
    name = {"constant": "constant_with_warmup"}.get(schedule, schedule)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=50)
    for step in range(50):
        ours = learning_rate(step, base=3e-4, total_steps=50, warmup_steps=warmup, schedule=schedule)
        assert ours == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimizer.step()
        scheduler.step()


def test_only_matrices_are_decayed() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model[0].bias.requires_grad_(False)
    groups = make_optimizer(model, Settings()).param_groups  # type: ignore[arg-type]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert groups[0]["params"] == [model[0].weight]
    assert {id(p) for p in groups[1]["params"]} == {id(model[1].weight), id(model[1].bias)}
