"""The 8-bit and 4-bit linear layers of bitsandbytes in the step.

Nothing here imports bitsandbytes for a model that is not quantised. Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tuoling.kernels.forwards import put_back, replace_forward


def settle(model: nn.Module, *, for_training: bool) -> None:
    """Keep the layers of a model that was loaded quantised from what they do on a CPU in eval mode.

    4 bits: the first forward in eval mode repacks the weights for inference and never back; afterwards gradients
    are exactly zero (layers without bias) or raise (with bias). The repacked kernel is left to models that are only
    asked for answers, where it fits: it computes in bf16, for whole blocks of 32 outputs and of 64 inputs, and stops
    at an assertion elsewhere. (One token through 4,096 x 1,024 weights: 0.2 ms instead of 1.6.)

    8 bits: in eval mode the inputs are rounded to int8 as well, so that a row comes out otherwise in other company;
    in training mode the weights are multiplied out, in float32 steps. A model in training multiplies them out our
    way in both modes.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu &= not for_training and _repackable(module)
    if for_training:
        for layer in _int8_layers(model):
            if layer.weight.device.type == "cpu":
                replace_forward(layer, _forward)


@contextmanager
def multiplied_out(model: nn.Module) -> Iterator[None]:
    """Inside, 8-bit layers do not round their inputs: what a row gives does not depend on the rest of the batch.

    LLM.int8 sets input columns apart by the largest value in the batch and rounds the rest. Over 24 random layers a
    row is up to 13 % apart from the same row in another batch, which would hide whatever is to be examined.
    """
    layers = [layer for layer in _int8_layers(model) if "forward" not in layer.__dict__]
    for layer in layers:
        replace_forward(layer, _forward)
    try:
        yield
    finally:
        put_back(layers)


def int8_linear(x: Tensor, weight_OI: Tensor, largest_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """`F.linear` with frozen int8 weights, where ±127 stands for ±largest_O: [..., O]. Keeps the int8 weights alone."""
    y: Tensor = _Int8Linear.apply(x, weight_OI, largest_O, bias_O)
    return y


def _repackable(module: Any) -> bool:
    whole = module.out_features % 32 == 0 and module.in_features % module.weight.blocksize == 0
    return whole and module.compute_dtype is torch.bfloat16


def _int8_layers(model: nn.Module) -> list[Any]:
    """By name: bitsandbytes is slow to import. PEFT's layer of the same name is no nn.Linear."""
    return [m for m in model.modules() if type(m).__name__ == "Linear8bitLt" and isinstance(m, nn.Linear)]


def _forward(self: Any, x: Tensor) -> Tensor:
    largest_O = (
        self.weight.SCB if self.state.SCB is None else self.state.SCB
    )  # moved there by its own forward
    return int8_linear(x, self.weight.data, largest_O, self.bias)


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, largest_O: Tensor, bias_O: Tensor | None) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            y = F.linear(x.to(dtype), weight_OI.to(dtype)).mul_(largest_O / 127.0)
            if bias_O is not None:
                y.add_(bias_O)
        ctx.save_for_backward(weight_OI, largest_O)
        ctx.dtype, ctx.x_dtype = dtype, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight_OI, largest_O = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            scaled = (grad * (largest_O / 127.0)).to(ctx.dtype)
            return (scaled @ weight_OI.to(ctx.dtype)).to(ctx.x_dtype), None, None, None
