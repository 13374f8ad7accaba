from __future__ import annotations

from torch import nn

from tuoling.train.optim import make_optimizer


class Settings:
    learning_rate = 1e-3
    weight_decay = 0.1
    adam_beta1 = 0.9
    adam_beta2 = 0.999
    adam_epsilon = 1e-8


def test_only_matrices_are_decayed() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model[0].bias.requires_grad_(False)
    groups = make_optimizer(model, Settings()).param_groups  # type: ignore[arg-type]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert groups[0]["params"] == [model[0].weight]
    assert {id(p) for p in groups[1]["params"]} == {id(model[1].weight), id(model[1].bias)}
