"""Several LoRA adapters in one forward: every token passes through the adapter of its own answer.

PEFT chooses one adapter for a whole call (or one for each row of a padded batch). Here the tokens of all answers
share one row, so each of its layers adds, token by token, what the answer's own adapter says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tuoling.kernels.forwards import put_back, replace_forward

BASE = ""
"""The name of an answer that asks for the base without any adapter."""


class LoraRows:
    """The adapters of a PeftModel. `mixed`: answers of different adapters may share a step.

    names:  the adapters that are loaded; none on a plain model.
    first:  the adapter that PEFT has active, what an answer gets that names none.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        configs = getattr(model, "peft_config", None) or {}
        self.names = tuple(configs)
        active: list[str] = list(getattr(model, "active_adapters", None) or ())
        self.first: str | None = active[0] if configs and len(active) == 1 else None
        self._layers: list[nn.Module] = []
        self._groups: list[tuple[str, Tensor | None]] | None = None
        self.mixed = bool(configs) and all(_plain(module) for module in _tuned(model))
        if self.mixed:
            for module in _tuned(model):
                replace_forward(module, self._forward_of(module.forward))
                self._layers.append(module)

    def remove(self) -> None:
        """Put PEFT's own forward back."""
        put_back(self._layers)
        self._layers = []

    @contextmanager
    def of_tokens(self, owners: Sequence[str | None], device: torch.device) -> Iterator[None]:
        """Inside, token t goes through the adapter `owners[t]`; "" is the base alone, None the active one.

        Where adapters cannot be mixed all owners are the same: PEFT is told which.
        """
        names = [self.first if owner is None else owner for owner in owners]
        if not self.names:
            yield
        elif self.mixed:
            self._groups = _groups(names, device)
            try:
                yield
            finally:
                self._groups = None
        elif names[0] == BASE:
            with self._model.disable_adapter():
                yield
        else:
            if names[0] != self.first:
                self._model.set_adapter(names[0])
                self._model.requires_grad_(False)
            try:
                yield
            finally:
                if names[0] != self.first and self.first is not None:
                    self._model.set_adapter(self.first)
                    self._model.requires_grad_(False)

    def _forward_of(self, original: Any) -> Any:
        def forward(module: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
            if self._groups is None:
                plain: Tensor = original(x, *args, **options)
                return plain
            out: Tensor = module.base_layer(x, *args, **options)
            for name, where in self._groups:
                if name not in module.lora_A:
                    continue
                down, up = module.lora_A[name], module.lora_B[name]
                mine = x if where is None else x[:, where]
                change = up(down(mine.to(down.weight.dtype))) * module.scaling[name]
                if where is None:
                    out = out + change.to(out.dtype)
                else:
                    out[:, where] += change.to(out.dtype)
            return out

        return forward


def _groups(names: Sequence[str | None], device: torch.device) -> list[tuple[str, Tensor | None]]:
    """Adapter → places of its tokens; None where all are its own. The base has no group."""
    wanted = sorted({name for name in names if name})
    if len(wanted) == 1 and all(names):
        return [(wanted[0], None)]
    return [
        (name, torch.tensor([at for at, owner in enumerate(names) if owner == name], device=device))
        for name in wanted
    ]


def _tuned(model: nn.Module) -> list[Any]:
    """Every module that an adapter has changed."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [
        module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]


def _plain(module: Any) -> bool:
    """A LoRA layer over a linear one that adds B(A(x)) and does nothing else."""
    from peft.tuners.lora.layer import LoraLayer

    return (
        isinstance(module, LoraLayer)
        and not module.merged
        and not getattr(module, "lora_variant", None)
        and not any(getattr(module, "lora_bias", {}).values())
        and not len(module.lora_embedding_A)
        and all(isinstance(part, nn.Linear) for part in module.lora_A.values())
    )
