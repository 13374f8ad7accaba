"""The varlen kernels of a GPU, where they are installed and take what is asked."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tuoling.kernels.attention import Bias, Pack

LARGEST_HEAD = 256
"""What the flash kernels take."""
SMALLEST_FLEX_HEAD = 16
"""Triton multiplies no smaller tiles."""
_MASKS: weakref.WeakKeyDictionary[Pack, Any] = weakref.WeakKeyDictionary()
"""Block masks of flex_attention: made once a pack for all layers, as each looks at every pair of tokens."""


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
    size = q_TND.shape[-1]
    if q_TND.dtype not in (torch.float16, torch.bfloat16) or size != v_TKD.shape[-1] or size > LARGEST_HEAD:
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
            # it asks nobody: torch's setting reaches torch's own kernels alone
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return out
    if dropout > 0.0:
        return None
    if slopes_N is not None:
        if window is not None or size < SMALLEST_FLEX_HEAD:
            return None
        return _flex(q_TND, k_TKD, v_TKD, pack, scale, slopes_N.to(q_TND.device, torch.float32))
    varlen = _varlen_attn()
    if varlen is None or size % 8:
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

    def alibi(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score - slopes_N[head] * (query - key)

    if pack not in _MASKS:
        _MASKS[pack] = _block_mask(pack, q_TND.device)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_TND, k_TKD, v_TKD))
    grouped = q_TND.shape[1] != k_TKD.shape[1]
    out: Tensor = _compiled_flex()(
        q, k, v, score_mod=alibi, block_mask=_MASKS[pack], scale=scale, enable_gqa=grouped
    )
    return out[0].transpose(0, 1)


def _block_mask(pack: Pack, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = torch.tensor(pack.lengths, device=device)
    document_T = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document_T[query] == document_T[key]) & (query >= key)

    tokens = len(document_T)
    return create_block_mask(seen, None, None, tokens, tokens, device=device)
