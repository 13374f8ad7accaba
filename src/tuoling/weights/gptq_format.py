"""Quantised model folders of today, GPTQ and AWQ, read as plain weights: each layer multiplied out when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuoling.errors import ModelError
from tuoling.files import read_json
from tuoling.language import tr
from tuoling.models.adapters import some
from tuoling.weights.gptq_packing import BITS, PackedLinear, dequantize_awq, groups_of
from tuoling.weights.tensors import TensorInfo, TensorSource, open_weights

QUANTIZE_CONFIG = "quantize_config.json"
PARTS = ("qweight", "qzeros", "scales", "g_idx")
"""Of a quantised layer, in place of its `weight`."""


@dataclass(frozen=True, slots=True)
class QuantizedFormat:
    """What a folder says of its quantised layers.

    minus_one: zero points are kept minus one (checkpoint_format `gptq`); False for `gptq_v2`.
    """

    method: str
    bits: int
    group_size: int
    desc_act: bool = False
    sym: bool = True
    minus_one: bool = True

    def to_config(self) -> dict[str, Any]:
        """For config.json's `quantization_config`, in the keys that transformers, gptqmodel and vLLM read."""
        kind = "gptq" if self.minus_one else "gptq_v2"
        return {
            "quant_method": self.method,
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": self.desc_act,
            "sym": self.sym,
            "lm_head": False,
            "checkpoint_format": kind,
            "format": kind,
            "pack_dtype": "int32",
        }


def quantized_format(folder: Path) -> QuantizedFormat | None:
    """What a model folder says of its quantisation; None for plain weights and other methods.

    Raises ModelError for a GPTQ or AWQ variant that is not known here.
    """
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    said: Mapping[str, Any] = config.get("quantization_config") or {}
    if not said and (folder / QUANTIZE_CONFIG).is_file():
        said = {"quant_method": "gptq", **read_json(folder / QUANTIZE_CONFIG)}
    method = said.get("quant_method")
    if method not in ("gptq", "awq"):
        return None
    form = str(said.get("checkpoint_format") or said.get("format") or said.get("version") or method).lower()
    bits = said.get("bits", said.get("w_bit"))
    known = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm", "awq")}[method]
    if form not in known or bits not in ((4,) if method == "awq" else BITS):
        raise ModelError(
            tr(
                f"{method} with {bits} bits in the layout {form!r} is not known here",
                f"这里不认识 {bits} 位、{form!r} 格式的 {method} 权重",
            ),
            where=str(folder / "config.json"),
            remedy=tr(
                f"known: {', '.join(known)}; GPTQ with 2, 3, 4 or 8 bits, AWQ with 4",
                f"已知：{'、'.join(known)}；GPTQ 为 2、3、4、8 位，AWQ 为 4 位",
            ),
        )
    return QuantizedFormat(
        method,
        int(bits),
        int(said.get("group_size", said.get("q_group_size", -1))),
        bool(said.get("desc_act", False)),
        bool(said.get("sym", True)),
        form != "gptq_v2",
    )


class QuantizedWeights:
    """A `TensorSource` of the plain weights behind a quantised folder: `X.qweight` and its siblings are `X.weight`."""

    def __init__(
        self,
        folder: Path,
        form: QuantizedFormat,
        *,
        dtype: torch.dtype = torch.float32,
        tensors: TensorSource | None = None,
    ) -> None:
        """dtype: of the weights that are multiplied out; all others stay as they are stored."""
        self.folder = folder
        self.format = form
        self.dtype = dtype
        self._stored = tensors or open_weights(folder)
        self.infos: dict[str, TensorInfo] = {}
        for name, info in self._stored.infos.items():
            layer, _, part = name.rpartition(".")
            if part not in PARTS:
                self.infos[name] = info
            elif part == "qweight":
                self.infos[f"{layer}.weight"] = TensorInfo(dtype, self._shape(layer))

    @property
    def layers(self) -> list[str]:
        """Names of the quantised layers, without `.weight`."""
        return [name.removesuffix(".qweight") for name in self._stored.infos if name.endswith(".qweight")]

    def read(self, name: str) -> torch.Tensor:
        layer = name.removesuffix(".weight")
        if f"{layer}.qweight" not in self._stored.infos or name in self._stored.infos:
            return self._stored.read(name)
        if self.format.method == "awq":
            weight_KN = dequantize_awq(*(self._stored.read(f"{layer}.{part}") for part in PARTS[:3]))
        else:
            weight_KN = self.packed(layer).dequantize()
        return weight_KN.t().to(self.dtype).contiguous()

    def packed(self, layer: str) -> PackedLinear:
        """The integers of one GPTQ layer as they are stored."""
        inputs = self._shape(layer)[1]
        g_idx = (
            self._stored.read(f"{layer}.g_idx")
            if f"{layer}.g_idx" in self._stored.infos
            else groups_of(inputs, self.format.group_size)
        )
        qweight, qzeros, scales = (self._stored.read(f"{layer}.{part}") for part in PARTS[:3])
        return PackedLinear(qweight, qzeros, scales, g_idx, self.format.bits, self.format.minus_one)

    def _shape(self, layer: str) -> tuple[int, int]:
        """[outputs, inputs] of a layer. Raises ModelError where its parts do not fit together."""
        infos = self._stored.infos
        missing = [part for part in PARTS[:3] if f"{layer}.{part}" not in infos]
        if missing:
            raise ModelError(
                tr(f"{layer} lacks {some(missing)}", f"{layer} 缺少 {some(missing)}"), where=str(self.folder)
            )
        rows, columns = infos[f"{layer}.qweight"].shape
        groups, outputs = infos[f"{layer}.scales"].shape
        if self.format.method == "awq":
            inputs, fits = rows, columns * 8 == outputs
        else:
            g_idx = infos.get(f"{layer}.g_idx")
            inputs = g_idx.shape[0] if g_idx else rows * 32 // self.format.bits
            size = inputs if self.format.group_size == -1 else self.format.group_size
            fits = columns == outputs and rows == -(-inputs * self.format.bits // 32)
            fits = fits and groups == -(-inputs // size)
        if not fits:
            raise ModelError(
                tr(
                    f"{layer}: the shapes are not those of {self.format.bits} bits in groups of {self.format.group_size}",
                    f"{layer}：形状与 {self.format.bits} 位、每组 {self.format.group_size} 不符",
                ),
                where=str(self.folder),
                remedy=tr(
                    "the config belongs to other weights, or a file is damaged",
                    "配置与权重不匹配，或文件已损坏",
                ),
            )
        return outputs, inputs
