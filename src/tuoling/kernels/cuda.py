"""The varlen kernels of a GPU, where they are installed and take what is asked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tuoling.kernels.attention import Bias, Pack


def attend(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    pack: Pack,
    *,
    scale: float,
    dropout: float,
    bias: Bias | None,
) -> Tensor | None:
    """Block-diagonal causal attention in one launch, or None where no kernel here does just this.

    Order: flash-attn's varlen kernel (takes ALiBi slopes and dropout), PyTorch's own varlen kernel, and
    flex_attention for ALiBi without flash-attn. All want 16-bit numbers and one head size.
    """
    slopes_N = None if bias is None else bias.slopes_N
    window = None if bias is None else bias.window
    if q_TND.dtype not in (torch.float16, torch.bfloat16) or q_TND.shape[-1] != v_TKD.shape[-1]:
        return None
    if torch.cuda.get_device_capability(q_TND.device)[0] < 8:
        return None
    offsets = pack.cu_seqlens.to(q_TND.device, torch.int32)
    left = -1 if window is None else window - 1
    flash = _flash_attn()
    if flash is not None:
        out: Tensor = flash(
            q_TND,
            k_TKD,
            v_TKD,
            offsets,
            offsets,
            pack.longest,
            pack.longest,
            dropout_p=dropout,
            softmax_scale=scale,
            causal=True,
            window_size=(left, -1 if window is None else 0),
            alibi_slopes=None if slopes_N is None else slopes_N.to(q_TND.device, torch.float32),
        )
        return out
    if dropout > 0.0:
        return None
    if slopes_N is not None:
        return (
            None if window is not None else _flex(q_TND, k_TKD, v_TKD, pack, scale, slopes_N.to(q_TND.device))
        )
    varlen = _varlen_attn()
    if varlen is None:
        return None
    grouped = q_TND.shape[1] != k_TKD.shape[1]
    out = varlen(
        q_TND.contiguous(),
        k_TKD.contiguous(),
        v_TKD.contiguous(),
        offsets,
        offsets,
        pack.longest,
        pack.longest,
        scale=scale,
        window_size=(left, 0),
        enable_gqa=grouped,
    )
    return out


@functools.cache
def _flash_attn() -> Callable[..., Any] | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    function: Callable[..., Any] = flash_attn_varlen_func
    return function


@functools.cache
def _varlen_attn() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    function: Callable[..., Any] = varlen_attn
    return function


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex(q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, pack: Pack, scale: float, slopes_N: Tensor) -> Tensor:
    """ALiBi as a score modification in float32, documents as a block mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = q_TND.shape[0]
    lengths = torch.tensor(pack.lengths, device=q_TND.device)
    document_T = torch.repeat_interleave(torch.arange(len(lengths), device=q_TND.device), lengths)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document_T[query] == document_T[key]) & (query >= key)

    def alibi(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score - slopes_N[head] * (query - key)

    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_TND, k_TKD, v_TKD))
    mask = create_block_mask(seen, None, None, tokens, tokens, device=q_TND.device)
    out: Tensor = _compiled_flex()(q, k, v, score_mod=alibi, block_mask=mask, scale=scale)
    return out[0].transpose(0, 1)
