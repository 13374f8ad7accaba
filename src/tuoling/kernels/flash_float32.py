"""torch's flash attention for a CPU in float32 for bf16 tokens, of which only bf16 is kept.

Its bf16 kernel is slower than its float32 one for documents of up to about 300 tokens, most of all backward: 16 heads
of 64, 350 tokens, forward and backward on two cores, 21 against 15 ms. Casting and calling it would keep float32
copies of queries, keys and values for the backward pass, twice the memory; here they are cast again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flash_in_float32(
    q_BNLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, *, bias: Tensor | None, scale: float
) -> Tensor:
    """softmax(scale * q k^T + bias) v in float32, returned in the dtype of q: [B, N, L, D].

    bias [1, N or 1, L, S] float32, -inf where a token is hidden, asks for no gradient; None: causal, L = S.
    K key heads serve N / K query heads each.
    """
    repeat = q_BNLD.shape[1] // k_BKSD.shape[1]
    if repeat > 1:
        k_BKSD, v_BKSD = (x.repeat_interleave(repeat, dim=1) for x in (k_BKSD, v_BKSD))
    out: Tensor = _FlashInFloat32.apply(q_BNLD, k_BKSD, v_BKSD, bias, scale)
    return out


class _FlashInFloat32(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        out, logsumexp = _FORWARD(
            q.float(), k.float(), v.float(), 0.0, bias is None, attn_mask=bias, scale=scale
        )
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, logsumexp, bias)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logsumexp, bias = ctx.saved_tensors
        grads = _BACKWARD(
            *(x.float() for x in (grad, q, k, v, out)),
            *(logsumexp, 0.0, bias is None),
            attn_mask=bias,
            scale=ctx.scale,
        )
        of_q, of_k, of_v = (found.to(q.dtype) for found in grads)
        return of_q, of_k, of_v, None, None
