"""Linear layers of a bf16 model on a CPU, their weights laid out once as oneDNN's kernels want to read them.

A plain `F.linear` lays a weight out anew in every call, which for a few tokens costs as much as the product itself:
24 layers of 1,024 x 4,096 took 40 ms for 16 tokens on one core and 21 ms packed, a head of 250,880 words 81 and 52.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuoling.kernels.forwards import put_back, replace_forward

TOKENS = 16
"""The layout is chosen for about so many tokens a call."""
FEWEST = 3
"""oneDNN's kernels read the weights of one or two tokens slower than those of four: 12 layers of 1,024 x 3,072 took
5.5 and 6.2 ms of one core for one and two tokens, 5.0 for three and 4.9 for four. Fewer are filled up to FILLED."""
FILLED = 4


class PackedLinears:
    """The plain linear layers of `model`, packed. Their own weights are given back to the system, except those that
    something else reads too (a head that is the embedding): packed they are there twice."""

    def __init__(self, model: nn.Module) -> None:
        self._shared = _shared(model)
        self._changed: list[tuple[nn.Linear, Tensor]] = []
        for module in model.modules():
            if _packable(module):
                assert isinstance(module, nn.Linear)
                self._pack(module)

    def __len__(self) -> int:
        return len(self._changed)

    @torch.no_grad()
    def _pack(self, module: nn.Linear) -> None:
        packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), TOKENS)
        self._changed.append((module, packed))
        replace_forward(module, _forward_with(packed))
        if id(module.weight) not in self._shared:
            module.weight.data = torch.empty(0, dtype=module.weight.dtype)

    @torch.no_grad()
    def undo(self) -> None:
        """Plain weights again, bit for bit."""
        put_back(module for module, _ in self._changed)
        for module, packed in self._changed:
            if module.weight.numel() == 0:
                module.weight.data = packed.to_dense()
        self._changed = []


def _forward_with(packed: Tensor) -> Any:
    def forward(module: nn.Linear, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            weight = packed.to_dense() if module.weight.numel() == 0 else module.weight
            return F.linear(x, weight, module.bias)
        rows = x.numel() // x.shape[-1]
        if 0 < rows < FEWEST:
            filled = F.pad(x.reshape(rows, -1), (0, 0, 0, FILLED - rows))
            return _product(filled, packed, module.bias)[:rows].reshape(*x.shape[:-1], -1)
        return _product(x, packed, module.bias)

    return forward


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


def _packable(module: nn.Module) -> bool:
    """A linear layer of torch's own, in bf16 on the CPU, that nothing has changed."""
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and module.weight.device.type == "cpu"
        and module.weight.dtype is torch.bfloat16
        and module.weight.numel() > 0
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def _shared(model: nn.Module) -> set[int]:
    """Parameters that more than one module holds."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
