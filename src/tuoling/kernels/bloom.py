"""BLOOM, packed: transformers' weights and modules, our ALiBi attention.

transformers' BLOOM has eager attention only, ignores position_ids, and builds its bias from positions in the
whole row; its mask is [1, 1, T, T]. Here a document's bias comes from distances inside it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuoling.kernels.attention import Bias
from tuoling.kernels.forwards import replace_forward
from tuoling.kernels.interface import decoding, pack_of


def install(base: nn.Module) -> list[nn.Module]:
    """Give every BLOOM attention and activation in `base` a packed forward. Returns the changed modules.

    With an ordinary mask (generation, other people's evaluation) the attention is transformers' own.
    """
    from transformers.models.bloom.modeling_bloom import BloomAttention, BloomGelu

    changed: list[nn.Module] = []
    bias: Bias | None = None
    for module in base.modules():
        if isinstance(module, BloomAttention):
            bias = bias or Bias(_slopes(module.num_heads))
            replace_forward(module, _packed(module.forward, bias))
        elif isinstance(module, BloomGelu):
            replace_forward(module, _gelu)
        else:
            continue
        changed.append(module)
    return changed


def _slopes(num_heads: int) -> Tensor:
    """[N] float32: a geometric series, the factor from the next power of two where N is none (ALiBi paper)."""
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

    return _get_alibi_slopes(num_heads, torch.device("cpu"))


def _packed(original: Any, bias: Bias) -> Any:
    def forward(
        self: Any,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor,
        *args: Any,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        pack = pack_of(attention_mask)
        if pack is None:
            result: tuple[Tensor, Tensor | None] = original(
                hidden_states, residual, alibi, attention_mask, *args, **options
            )
            return result
        fused = self.query_key_value(hidden_states)[0]
        q_TND, k_TND, v_TND = fused.view(len(fused), self.num_heads, 3, self.head_dim).unbind(2)
        dropout = self.attention_dropout.p if self.training else 0.0
        out_TND = pack.attend(
            self, q_TND, k_TND, v_TND, scale=self.inv_norm_factor, dropout=dropout, bias=bias
        )
        out = self.dense(out_TND.flatten(1).unsqueeze(0))
        return F.dropout(out, p=self.hidden_dropout, training=self.training) + residual, None

    return forward


def _gelu(self: nn.Module, x: Tensor) -> Tensor:
    """The same tanh approximation in one kernel: the written-out one makes 8 passes forward, 14 backward. A step of
    16 answers in bf16 spent 17 % of its time in them."""
    if not self.training and not decoding():
        return type(self).forward(self, x)
    return F.gelu(x, approximate="tanh")
