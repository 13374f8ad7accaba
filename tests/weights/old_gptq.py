"""GPTQ files as the tools of 2023 wrote them, made in plain numpy from a tiny model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tests.weights.test_gptq_packing import packed_bit_by_bit, wrapped_as_in_2023

Kind = Literal["belle", "vicuna", "groupless"]


def quantise(
    weight_NK: np.ndarray, bits: int, g_idx: np.ndarray, *, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round to nearest: integers [K, N], zero points [G, N], scales [G, N] (float32)."""
    top = 2**bits - 1
    groups = g_idx.max() + 1
    q = np.zeros(weight_NK.T.shape, dtype=np.int64)
    zero, scale = (np.zeros((groups, len(weight_NK)), dtype=kind) for kind in (np.int64, np.float32))
    for n, row in enumerate(weight_NK):
        for g in range(groups):
            part = row[g_idx == g]
            low, high = min(part.min(), 0.0), max(part.max(), 0.0)
            if symmetric:
                high = max(-low, high)
                low = -high
            scale[g, n] = np.float32((high - low) / top)
            zero[g, n] = (top + 1) // 2 if symmetric else round(-low / scale[g, n])
            q[g_idx == g, n] = np.clip(np.round(part / scale[g, n]) + zero[g, n], 0, top)
    return q, zero, scale


def write_old_gptq(
    model: torch.nn.Module,
    path: Path,
    kind: Kind,
    bits: int,
    group_size: int,
    *,
    permuted: bool = False,
    positive: bool = False,
) -> dict[str, np.ndarray]:
    """Write a file of one kind; returns the weights [N, K] that its integers stand for.

    permuted: inputs belong to groups in another order (act-order). positive: the first rows have no negative weight,
    so that their zero point is 0, which the packer of the time wrote wrong.
    """
    rng = np.random.default_rng(0)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    dense = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name.endswith("lm_head"):
            continue
        weight = state.pop(f"{name}.weight").float().numpy()
        if positive:
            weight[1:3] = np.abs(weight[1:3])
        outputs, inputs = weight.shape
        size = inputs if kind == "groupless" else group_size
        g_idx = np.arange(inputs) // size
        g_idx = rng.permutation(g_idx) if permuted else g_idx
        q, zero, scale = quantise(weight, bits, g_idx, symmetric=kind == "vicuna")
        scale = scale.astype(np.float16 if kind == "vicuna" else np.float32)
        dense[name] = (scale.astype(np.float32)[g_idx] * (q - zero[g_idx])).T
        state[f"{name}.qweight"] = _words(packed_bit_by_bit(q, bits))
        if kind == "groupless":
            state[f"{name}.scales"] = torch.from_numpy(scale.T.copy())
            state[f"{name}.zeros"] = torch.from_numpy((zero * scale).T.astype(np.float32))
        else:
            state[f"{name}.qzeros"] = _words(wrapped_as_in_2023(zero, bits))
            state[f"{name}.scales"] = torch.from_numpy(scale)
        if kind == "vicuna":
            state[f"{name}.g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
        if kind != "vicuna" and f"{name}.bias" not in state:
            state[f"{name}.bias"] = torch.zeros(outputs)
    torch.save(state, path)
    return dense


def _words(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int32))
