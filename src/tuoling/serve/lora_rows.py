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


class LoraRows:
    """The adapters of a PeftModel.

    mixed: answers of different adapters may share a step. first: the adapter that PEFT has active.
    """

    def __init__(self, model: nn.Module) -> None:
        adapted: Any = model if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else None
        self.first: str | None = None if adapted is None else adapted.active_adapter
        tuned = [] if adapted is None else _tuned(model)
        self.mixed = all(_plain(module) for module in tuned)
        self._layers: list[nn.Module] = []
        self._groups: list[tuple[str, Tensor | None]] | None = None
        for module in tuned if self.mixed else ():
            replace_forward(module, self._forward_of(module.forward))
            self._layers.append(module)

    def remove(self) -> None:
        """Put PEFT's own forward back."""
        put_back(self._layers)
        self._layers = []

    @contextmanager
    def of_tokens(self, owners: Sequence[str | None], device: torch.device) -> Iterator[None]:
        """Inside, token t goes through the adapter `owners[t]` (None: the base alone), where they can be mixed."""
        if self._layers:
            self._groups = _groups(owners, device)
        try:
            yield
        finally:
            self._groups = None

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
                    out = out.index_add(1, where, change.to(out.dtype))
            return out

        return forward


def _groups(owners: Sequence[str | None], device: torch.device) -> list[tuple[str, Tensor | None]]:
    """Adapter → places of its tokens; None where all are its own. The base has no group."""
    wanted = sorted({name for name in owners if name is not None})
    if len(wanted) == 1 and None not in owners:
        return [(wanted[0], None)]
    return [
        (name, torch.tensor([at for at, owner in enumerate(owners) if owner == name], device=device))
        for name in wanted
    ]


def _tuned(model: nn.Module) -> list[Any]:
    """Every module that an adapter has changed."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = BaseTunerLayer | AuxiliaryTrainingWrapper
    return [module for module in model.modules() if isinstance(module, kinds)]


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
