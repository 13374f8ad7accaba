"""AdamW with decay groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from tuoling.config import RunConfig


def learning_rate(step: int, *, base: float, total_steps: int, warmup_steps: int, schedule: str) -> float:
    """The rate of optimizer step `step` (from 0), as transformers' schedules give it.

    Linear warm-up from 0 at step 0 to `base` at `warmup_steps`; then `constant`, `linear` to 0 at
    `total_steps`, or half a cosine to 0.
    """
    if step < warmup_steps:
        return base * step / warmup_steps
    if schedule == "constant":
        return base
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return base * max(0.0, 1.0 - done)
    return base * max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))


def make_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that ask for gradients; biases and norms (one dimension) are not decayed."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
