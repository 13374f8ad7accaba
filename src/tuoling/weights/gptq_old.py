"""GPTQ files of 2023: one `.pt` or `.safetensors` of tensors that says neither its bits nor its group size.

Three kinds are read: BELLE's (float32 scales, no g_idx), Chinese-Vicuna's (float16 scales, g_idx), and the first
one's without groups (`scales` and `zeros` [N, 1], where zeros = zero point * scale). Bits and group size follow
from shapes: N*b/32 columns of qzeros, K inputs by the model's config, ceil(K/group) rows of scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuoling.errors import ModelError
from tuoling.language import tr
from tuoling.models.adapters import some
from tuoling.models.shape import linear_shapes
from tuoling.weights.gptq_packing import BITS, groups_of, unpack, unpack_zeros, wrapped_zeros
from tuoling.weights.tensors import TensorInfo, TensorSource, open_weights

_SMALL_GROUPS = (16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class OldLayer:
    """One layer's shape and quantisation, found in the shapes of its tensors."""

    name: str
    inputs: int
    outputs: int
    bits: int
    group_size: int
    grouped: bool


def layers_of(tensors: TensorSource, shapes: Mapping[str, tuple[int, int]], where: Path) -> list[OldLayer]:
    """Every quantised layer. shapes: [outputs, inputs] of the linear layers by the model's config.

    Raises ModelError where a layer is not of the model, or layers differ in bits or group size.
    """
    names = [name.removesuffix(".qweight") for name in tensors.infos if name.endswith(".qweight")]
    strange = [name for name in names if name not in shapes]
    if strange:
        raise ModelError(
            tr(
                f"quantised layers that the model of --base does not have: {some(strange)}",
                f"--base 的模型中没有这些量化层：{some(strange)}",
            ),
            where=str(where),
            remedy=tr("name the model it was made from", "请给出它的原始模型"),
        )
    layers = [_layer(tensors, name, *shapes[name], where) for name in names]
    candidates = {layer.name: _group_sizes(tensors, layer) for layer in layers}
    shared = set.intersection(*(set(sizes) for sizes in candidates.values())) if layers else set()
    if len({layer.bits for layer in layers}) != 1 or not shared:
        found = sorted({(layer.bits, *candidates[layer.name]) for layer in layers})
        raise ModelError(
            tr(
                f"layers differ in bits and group size: {found}",
                f"各层的位数与分组大小不一致：{found}",
            ),
            where=str(where),
        )
    size = -1 if -1 in shared else min(shared, key=lambda size: (size not in _SMALL_GROUPS, size))
    return [replace(layer, group_size=size) for layer in layers]


def _layer(tensors: TensorSource, name: str, outputs: int, inputs: int, where: Path) -> OldLayer:
    infos = tensors.infos
    rows, columns = infos[f"{name}.qweight"].shape
    grouped = f"{name}.qzeros" in infos
    wanted = ("qzeros", "scales") if grouped else ("zeros", "scales")
    missing = [part for part in wanted if f"{name}.{part}" not in infos]
    bits = rows * 32 // inputs
    fits = columns == outputs and bits in BITS and rows == -(-inputs * bits // 32) and not missing
    if fits and grouped:
        groups = infos[f"{name}.scales"].shape[0]
        fits = infos[f"{name}.qzeros"].shape == (groups, -(-outputs * bits // 32))
        fits = fits and infos[f"{name}.scales"].shape == (groups, outputs)
    if not fits:
        got = {part: infos[f"{name}.{part}"].shape for part in ("qweight", *wanted) if part not in missing}
        raise ModelError(
            tr(
                f"{name}: {got} is no GPTQ layer of {inputs} inputs and {outputs} outputs",
                f"{name}：{got} 不是 {inputs} 输入、{outputs} 输出的 GPTQ 层",
            ),
            where=str(where),
            remedy=tr(
                "the model of --base has other sizes, or the file is damaged",
                "--base 的模型尺寸不同，或文件已损坏",
            ),
        )
    return OldLayer(name, inputs, outputs, bits, -1, grouped)


def _group_sizes(tensors: TensorSource, layer: OldLayer) -> list[int]:
    """Group sizes that fit a layer's number of groups; one group is -1, and any size that is large enough."""
    if not layer.grouped:
        return [-1]
    groups = tensors.infos[f"{layer.name}.scales"].shape[0]
    if f"{layer.name}.g_idx" in tensors.infos:
        count = torch.bincount(tensors.read(f"{layer.name}.g_idx").to(torch.int64), minlength=groups)
        return [-1, *(s for s in _SMALL_GROUPS if s >= layer.inputs)] if groups == 1 else [int(count[0])]
    found = [size for size in _SMALL_GROUPS if -(-layer.inputs // size) == groups]
    if layer.inputs % groups == 0 and layer.inputs // groups not in found:
        found.append(layer.inputs // groups)
    return [-1, *found] if groups == 1 else found


@dataclass(frozen=True)
class Unpacked:
    """A layer's numbers: zero points [G, N], scales [G, N], g_idx [K]. repaired: zero points of 0 that had been
    written wrong; lost: those that had to be guessed."""

    zero_GN: Tensor
    scale_GN: Tensor
    g_idx: Tensor
    repaired: int
    lost: int


def read_layer(tensors: TensorSource, layer: OldLayer, where: Path) -> Unpacked:
    """Zero points and scales of a layer, in today's shapes.

    Lost zero points (`wrapped_zeros`) become the median of the layer's others.
    """
    scales = tensors.read(f"{layer.name}.scales").float()
    if not layer.grouped:
        zeros = tensors.read(f"{layer.name}.zeros").float()
        scale_GN, zero_GN = scales.reshape(1, -1), (zeros / scales).round().reshape(1, -1)
        top = 2**layer.bits - 1
        if not bool(((zero_GN >= 0) & (zero_GN <= top)).all()):
            raise ModelError(
                tr(
                    f"{layer.name}: zero points outside 0 to {top}",
                    f"{layer.name}：零点超出 0 到 {top} 的范围",
                ),
                where=str(where),
            )
        return Unpacked(zero_GN.to(torch.int64), scale_GN, groups_of(layer.inputs, -1), 0, 0)
    words = tensors.read(f"{layer.name}.qzeros")
    zero_GN = unpack_zeros(words, layer.bits, layer.outputs, minus_one=True).clone()
    nought_GN, lost_GN = wrapped_zeros(words, layer.bits, layer.outputs)
    zero_GN[nought_GN] = 0
    if bool(lost_GN.any()):
        zero_GN[lost_GN] = zero_GN[~lost_GN].median()
    named = f"{layer.name}.g_idx"
    g_idx = (
        tensors.read(named).to(torch.int32)
        if named in tensors.infos
        else groups_of(layer.inputs, layer.group_size)
    )
    return Unpacked(zero_GN, scales, g_idx, int(nought_GN.sum()), int(lost_GN.sum()))


class OldQuantizedWeights:
    """A `TensorSource` of the plain weights behind an old file, as today's folder keeps them: scales in float16."""

    def __init__(self, path: Path, model: Any) -> None:
        """model: without weights, for names and shapes. Raises ModelError where the file is not of this model."""
        self._path, self._stored = path, open_weights(path)
        layers = layers_of(self._stored, linear_shapes(model), path)
        self._layers = {f"{layer.name}.weight": layer for layer in layers}
        known = model.state_dict().keys()
        self.infos = {name: info for name, info in self._stored.infos.items() if name in known}
        for name, layer in self._layers.items():
            self.infos[name] = TensorInfo(torch.float32, (layer.outputs, layer.inputs))

    def read(self, name: str) -> Tensor:
        layer = self._layers.get(name)
        if layer is None:
            return self._stored.read(name)
        found = read_layer(self._stored, layer, self._path)
        q_KN = unpack(self._stored.read(f"{layer.name}.qweight"), layer.bits, layer.inputs)
        group_K = found.g_idx.to(torch.int64)
        weight_KN = found.scale_GN.half().float()[group_K] * (q_KN - found.zero_GN[group_K])
        return weight_KN.t().contiguous()


@dataclass
class Survey:
    """What all layers together say, before anything is written."""

    symmetric: bool = True
    act_order: bool = False
    noughts: int = 0
    repaired: int = 0
    lost: int = 0
    scale_rounding: float = 0.0
    """Largest relative change of a scale by float16, the type that today's readers have."""

    def add(self, layer: OldLayer, found: Unpacked, where: Path) -> None:
        self.symmetric &= bool((found.zero_GN == 2 ** (layer.bits - 1)).all())
        self.act_order |= not torch.equal(found.g_idx, groups_of(layer.inputs, layer.group_size))
        self.noughts += int((found.zero_GN == 0).sum())
        self.repaired += found.repaired
        self.lost += found.lost
        rounded = found.scale_GN.half().float()
        if not bool(torch.isfinite(rounded).all()):
            raise ModelError(
                tr(
                    f"{layer.name}: scales that are no numbers, or too large for float16",
                    f"{layer.name}：缩放系数不是有效数值，或超出 float16 范围",
                ),
                where=str(where),
            )
        size = found.scale_GN.abs().clamp(min=1e-30)
        self.scale_rounding = max(self.scale_rounding, float(((rounded - found.scale_GN).abs() / size).max()))
