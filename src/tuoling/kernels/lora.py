"""LoRA in the step: PEFT's modules and files, one forward and backward for a frozen linear layer and its adapter.

Shapes: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tuoling.kernels.forwards import replace_forward


def install(base: nn.Module) -> list[nn.Module]:
    """Give every plain LoRA linear of PEFT in `base` the fused forward. Returns the changed modules.

    Whatever is not plain (several adapters, DoRA, quantised or trainable base weights, hooks on the base layer
    by which a sharded engine gathers it) takes PEFT's own path, asked anew at every call.
    """
    from peft.tuners.lora.layer import Linear

    changed: list[nn.Module] = []
    for module in base.modules():
        if type(module) is Linear and "forward" not in module.__dict__:
            replace_forward(module, _fused(module.forward))
            changed.append(module)
    return changed


def lora_linear(
    x: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    A_RI: Tensor,
    B_OR: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """`F.linear(x, weight, bias) + scaling * dropout(x) @ A.T @ B.T` for frozen weight and bias: [..., O].

    Matmuls run in the dtype `F.linear` would use here (autocast included), A and B may be float32 masters and
    get float32 gradients. Of the size of x nothing is kept but x itself.
    """
    y: Tensor = _LoraLinear.apply(x, weight_OI, bias_O, A_RI, B_OR, scaling, dropout)
    return y


def reference_lora_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, *, scaling: float
) -> Tensor:
    """The same without dropout, plainly and in float64."""
    x = x.double()
    y = F.linear(x, weight_OI.double(), None if bias_O is None else bias_O.double())
    return y + scaling * (x @ A_RI.double().T @ B_OR.double().T)


def _fused(original: Any) -> Any:
    def forward(self: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
        adapter = None if args or options else _plain_adapter(self)
        if adapter is None:
            result: Tensor = original(x, *args, **options)
            return result
        linear, dropout = self.base_layer, self.lora_dropout[adapter]
        return lora_linear(
            x,
            linear.weight,
            linear.bias,
            self.lora_A[adapter].weight,
            self.lora_B[adapter].weight,
            scaling=self.scaling[adapter],
            dropout=dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0,
        )

    return forward


def _plain_adapter(module: Any) -> str | None:
    """Name of the one adapter that is at work, where the fused forward computes what PEFT would."""
    active = module.active_adapters
    if module.disable_adapters or module.merged or len(active) != 1 or active[0] not in module.lora_A:
        return None
    name: str = active[0]
    linear = module.base_layer
    parts = (linear, module.lora_A[name], module.lora_B[name])
    plain = (
        name not in module.lora_variant
        and all(
            type(part) is nn.Linear and "forward" not in part.__dict__ and not _hooked(part) for part in parts
        )
        and parts[1].bias is None
        and parts[2].bias is None
        and linear.weight.is_floating_point()
        and linear.weight.numel() == linear.in_features * linear.out_features
        and not any(parameter.requires_grad for parameter in linear.parameters())
    )
    return name if plain else None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks or module._backward_hooks)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        A_RI: Tensor,
        B_OR: Tensor,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            x_TI = x.reshape(-1, x.shape[-1]).to(dtype)
            dropped = _Dropped.draw(x_TI, dropout)
            factor = scaling / (1.0 - dropout)
            a_RI, b_OR = A_RI.to(dtype), (B_OR * factor).to(dtype)
            h_TR = F.linear(dropped.of(x_TI), a_RI)
            y_TO = F.linear(x_TI, weight_OI.to(dtype), None if bias_O is None else bias_O.to(dtype))
            y_TO.addmm_(h_TR, b_OR.T)
        ctx.save_for_backward(x_TI, weight_OI, a_RI, b_OR, h_TR)
        ctx.dropped, ctx.factor, ctx.shape = dropped, factor, x.shape
        ctx.dtypes = (x.dtype, A_RI.dtype, B_OR.dtype)
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_OI, a_RI, b_OR, h_TR = ctx.saved_tensors
        x_dtype, A_dtype, B_dtype = ctx.dtypes
        needs_x, _, _, needs_A, needs_B = ctx.needs_input_grad[:5]
        grad_x = grad_A = grad_B = None
        with torch.autocast(grad.device.type, enabled=False):
            grad_TO = grad.reshape(-1, grad.shape[-1]).to(x_TI.dtype)
            grad_TR = grad_TO @ b_OR
            if needs_B:
                grad_B = (h_TR.T @ grad_TO).T.to(B_dtype).mul_(ctx.factor)
            if needs_A:
                grad_A = (grad_TR.T @ ctx.dropped.of(x_TI)).to(A_dtype)
            if needs_x:
                grad_TI = grad_TO @ weight_OI.to(grad_TO.dtype)
                if ctx.dropped.places is None:
                    grad_TI.addmm_(grad_TR, a_RI)
                else:
                    grad_TI += ctx.dropped.out_of_(grad_TR @ a_RI)
                grad_x = grad_TI.view(ctx.shape).to(x_dtype)
        return grad_x, None, None, grad_A, grad_B, None, None


class _Dropped:
    """Elements set to zero by dropout. The survivors' factor 1 / (1 - p) belongs to the matmul's scaling.

    On a CPU the places are drawn, not one number an element: the gaps between them are geometric, which is the
    same distribution at a twentieth of the draws for p = 0.05 (torch's own dropout of 800 x 2,048 numbers takes
    longer than the matmul they go into). They are kept for the backward: 4 p bytes an element.
    """

    def __init__(self, places: Tensor | None) -> None:
        self.places = places

    @staticmethod
    def draw(like: Tensor, p: float) -> _Dropped:
        if p == 0.0:
            return _Dropped(None)
        if like.device.type != "cpu":
            return _Dropped((torch.rand_like(like, dtype=torch.float32) < p).view(-1).nonzero().squeeze(1))
        seed = int(torch.randint(2**62, ()))  # torch's generator decides: one state to save and to replay
        return _Dropped(
            torch.from_numpy(bernoulli_places(like.numel(), p, np.random.Generator(np.random.SFC64(seed))))
        )

    def of(self, x: Tensor) -> Tensor:
        """x with the dropped elements zero: x itself where nothing is dropped, else a copy."""
        return x if self.places is None else self.out_of_(x.clone(memory_format=torch.contiguous_format))

    def out_of_(self, x: Tensor) -> Tensor:
        """x (contiguous) with the dropped elements set to zero in place."""
        if self.places is not None:
            x.view(-1).index_fill_(0, self.places, 0.0)
        return x


def bernoulli_places(count: int, p: float, random: np.random.Generator) -> np.ndarray[Any, Any]:
    """Indices below `count`, each one in with probability p (0 < p < 1), ascending, int64."""
    step = -1.0 / math.log1p(-p)
    expected = count * p
    some = int(expected + 6.0 * math.sqrt(expected) + 16)
    places: np.ndarray[Any, Any] = np.empty(0, np.int64)
    last = -1
    while last < count:
        gaps = random.standard_exponential(some, dtype=np.float32)
        gaps *= step
        more = np.cumsum(gaps.astype(np.int64) + 1) + last
        places = more if not len(places) else np.concatenate([places, more])
        last = int(places[-1])
    return places[: np.searchsorted(places, count)]
