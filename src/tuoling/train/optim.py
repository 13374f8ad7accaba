"""AdamW with decay groups, in 32 or 8 bits, or Muon for weight matrices."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tuoling.errors import MissingPackage
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.config import RunConfig

MUON_MOMENTUM = 0.95


def require_optimizer(name: str) -> None:
    """Raise MissingPackage where `name` needs a package that is not installed."""
    if name == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackage(
            "bitsandbytes",
            extra="quant",
            purpose=tr("optim=adamw_8bit", "optim=adamw_8bit "),
            otherwise="optim=adamw",
        )


def make_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """The optimizer `config.optim` names, over the parameters that ask for gradients.

    Biases and norms (one dimension) are never decayed. With `muon` the matrices inside the model take Muon's
    steps; embeddings, the output head and everything of one dimension take AdamW's.
    """
    tables = _vocabulary_tables(model)
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if config.optim == "muon" and parameter.ndim == 2 and id(parameter) not in tables:
            matrices.append(parameter)
        else:
            (decayed if parameter.ndim >= 2 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    adamw: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    groups = [group for group in groups if group["params"]]
    if config.optim == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        eight: torch.optim.Optimizer = AdamW8bit(groups, **adamw)
        return eight
    adamw["fused"] = True
    if not matrices:
        return torch.optim.AdamW(groups, **adamw)
    muon = torch.optim.Muon(
        matrices,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        momentum=MUON_MOMENTUM,
        adjust_lr_fn="match_rms_adamw",  # one learning rate then suits both (Moonlight, arXiv:2502.16982)
    )
    return Together(muon, torch.optim.AdamW(groups, **adamw)) if groups else muon


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class Together(torch.optim.Optimizer):
    """Several optimizers, each with parameters of its own, seen as one: their groups and states in a row."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        self._share()

    def _share(self) -> None:
        """The parts work on our groups and states, in whatever objects those now are."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step(closure)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


def _vocabulary_tables(model: Any) -> set[int]:
    """Identities of the weights of one row a word: input and output embeddings."""
    if not hasattr(model, "get_input_embeddings"):
        return set()
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    return {id(parameter) for table in tables if table is not None for parameter in table.parameters()}
