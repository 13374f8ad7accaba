"""How a pack reaches the attention of a transformers model.

The step makes it active while the model's forward builds its mask (`active_pack`); our mask function then
returns an empty tensor that carries the pack, and the model hands that "mask" to every attention layer itself.
A layer that is run again by gradient checkpointing gets the same object again, whatever other step has run
since. With no pack active both functions are the model's own, so generation on the same model is untouched.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from tuoling.errors import ModelError
from tuoling.kernels.attention import Bias, Pack, Unpackable
from tuoling.kernels.decode import DecodeStep
from tuoling.language import tr

NAME = "tuoling_packed"
Together = Pack | DecodeStep
"""What says which tokens of a row see each other."""
_ACTIVE: ContextVar[Together | None] = ContextVar("tuoling_active_pack", default=None)
_REFUSED = ("softcap", "s_aux", "sinks", "position_bias", "head_mask", "layer_head_mask", "cache")


@contextmanager
def active_pack(pack: Together | None) -> Iterator[None]:
    """Masks built inside are those of the pack."""
    token = _ACTIVE.set(pack)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def decoding() -> bool:
    """Whether a step of answers that grow is being computed."""
    return isinstance(_ACTIVE.get(), DecodeStep)


def pack_of(mask: Any) -> Together | None:
    """The pack a mask carries; None for an ordinary mask (generation, evaluation by others)."""
    pack: Together | None = getattr(mask, "tuoling_pack", None)
    if pack is None and isinstance(mask, Tensor) and mask.ndim == 4 and mask.numel() == 0:
        raise ModelError(
            tr("gradient checkpointing lost the packed mask", "梯度检查点丢失了打包掩码"),
            remedy=tr(
                'enable it with gradient_checkpointing_kwargs={"use_reentrant": False}',
                '启用时请设置 gradient_checkpointing_kwargs={"use_reentrant": False}',
            ),
        )
    return pack


def register(original: str) -> str:
    """Name of an attention implementation that packs while a pack is active and is `original` otherwise."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = NAME if original == "sdpa" else f"{NAME}_{original}"
    ALL_ATTENTION_FUNCTIONS.register(name, functools.partial(_attention_interface, original))
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, functools.partial(_mask_interface, original))
    return name


def _mask_interface(original: str, **arguments: Any) -> Any:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    pack = _ACTIVE.get()
    if pack is None:
        return ALL_MASK_ATTENTION_FUNCTIONS[original](**arguments)
    device = arguments.get("device") or pack.device
    mask = torch.empty(
        1, 1, 0, 0, device=device
    )  # empty: an attention that is not ours fails instead of using it
    mask.tuoling_pack = pack  # type: ignore[attr-defined]
    window = None
    if isinstance(pack, Pack) and pack.readable:
        window = _window_of(arguments["mask_function"], pack, device)
    mask.tuoling_bias = None if window is None else Bias(window=window)  # type: ignore[attr-defined]
    return mask


def _window_of(mask_function: Callable[..., Tensor], pack: Pack, device: torch.device) -> int | None:
    """Sliding window of transformers' own mask, read off three rows of the longest document.

    None where every token sees its whole past. Anything but "the last w tokens" is Unpackable.
    """
    length = pack.longest
    start = 0 if pack.head else sum(pack.lengths[: pack.lengths.index(length)])
    zero = torch.zeros((), dtype=torch.long, device=device)
    keys = torch.arange(start, start + length, device=device)
    counts = {}
    for row in {length - 1, max(length - 2, 0), length // 2}:
        seen = mask_function(zero, zero, torch.tensor(start + row, device=device), keys)
        counts[row] = int(seen.sum())
        if not bool(seen[row + 1 - counts[row] : row + 1].all()):
            raise Unpackable(tr("its mask is not causal", "它的掩码不是因果的"))
    window = counts[length - 1]
    if any(count != min(window, row + 1) for row, count in counts.items()):
        raise Unpackable(
            tr("its mask is neither causal nor a sliding window", "它的掩码既不是因果掩码也不是滑动窗口")
        )
    return None if window == length else window


def _attention_interface(
    original: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: query [1, N, T, D], key and value [1, K, T, D] → [1, T, N, D]."""
    pack = pack_of(attention_mask)
    if pack is None:
        if _ACTIVE.get() is not None:
            raise Unpackable(tr("an attention layer gets no mask", "有的注意力层没有收到掩码"))
        return _original_function(original, module)(
            module, query, key, value, attention_mask, *args, **options
        )
    refused = [name for name in _REFUSED if options.get(name) is not None]
    if refused or options.get("is_causal") is False or args:
        raise Unpackable(
            tr(
                f"its attention uses {', '.join(refused) or 'another mask'}",
                f"它的注意力使用了 {'、'.join(refused) or '其他掩码'}",
            )
        )
    scale = options.get("scaling")
    out_TND = pack.attend(
        module,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        dropout=options.get("dropout") or 0.0,
        bias=attention_mask.tuoling_bias,  # type: ignore[union-attr]
        window=options.get("sliding_window"),
    )
    return out_TND.unsqueeze(0), None


def _original_function(original: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # Eager attention is no entry of the table: each model file has its own.
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(original, eager)
