"""Rounding to nearest: the plainest quantiser, needs no rows. What GPTQ must beat, and what `--method rtn` writes.

Shapes: K inputs, N outputs, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tuoling.weights.gptq_packing import PackedLinear, groups_of, pack, pack_zeros


def grid(weight_KN: Tensor, bits: int, group_size: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """(scales float16 [G, N], zero points int64 [G, N]): the range of each group cut into 2^b-1 equal steps.

    The range holds 0. symmetric: as wide below as above, zero point 2^(b-1); one step of the positive side is lost.
    Scales are rounded to float16 first, so that integers are found on the grid that will be read.
    """
    inputs, outputs = weight_KN.shape
    size = inputs if group_size == -1 else group_size
    groups = -(-inputs // size)
    padded = torch.zeros(groups * size, outputs, dtype=torch.float32)
    padded[:inputs] = weight_KN
    part_GSN = padded.view(groups, size, outputs)  # padding is 0, which every range holds
    low_GN, high_GN = part_GSN.amin(1).clamp(max=0), part_GSN.amax(1).clamp(min=0)
    top = 2**bits - 1
    if symmetric:
        high_GN = torch.maximum(high_GN, -low_GN)
        low_GN = -high_GN
    empty = low_GN == high_GN
    low_GN, high_GN = low_GN.masked_fill(empty, -1), high_GN.masked_fill(empty, 1)
    smallest = torch.finfo(torch.float16).smallest_normal
    scale_GN = ((high_GN - low_GN) / top).clamp(min=smallest).half()
    if symmetric:
        return scale_GN, torch.full_like(scale_GN, 2 ** (bits - 1), dtype=torch.int64)
    zero_GN = (-low_GN / scale_GN.float()).round().clamp(0, top)
    return scale_GN, zero_GN.to(torch.int64)


def quantise(
    weight_ON: Tensor, bits: int, group_size: int, *, symmetric: bool, minus_one: bool
) -> PackedLinear:
    """A layer's weight [outputs, inputs], each number on the nearest step of its group's grid."""
    weight_KN = weight_ON.t().float()
    scale_GN, zero_GN = grid(weight_KN, bits, group_size, symmetric=symmetric)
    g_idx = groups_of(len(weight_KN), group_size)
    group_K = g_idx.to(torch.int64)
    q_KN = (weight_KN / scale_GN.float()[group_K]).round() + zero_GN[group_K]
    q_KN = q_KN.clamp(0, 2**bits - 1).to(torch.int64)
    return PackedLinear(
        pack(q_KN, bits),
        pack_zeros(zero_GN, bits, minus_one=minus_one),
        scale_GN,
        g_idx,
        bits,
        minus_one,
    )
