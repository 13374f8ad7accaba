"""Base weights in 8 or 4 bits: what is asked for, whether this machine can do it, and how it is written down."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuoling import environment
from tuoling.errors import MissingPackage, ModelError, UsageError
from tuoling.language import tr

if TYPE_CHECKING:
    import torch

INT8_CAPABILITY = (7, 5)
"""Turing: the first cards with the int8 matmul that LLM.int8 needs. NF4 and FP4 are multiplied out and need none."""

KNOWN_BITS = (0, 4, 8)


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the linear layers of a base are kept in memory; false where they are not quantised.

    bits:   0 (as they are), 8 (LLM.int8) or 4. The head and the embeddings are never quantised.
    type:   nf4 or fp4, for 4 bits. double: their scales are quantised too.
    """

    bits: int = 0
    type: str = "nf4"
    double: bool = True

    def __bool__(self) -> bool:
        return self.bits > 0

    def __str__(self) -> str:
        if self.bits != 4:
            return f"int{self.bits}" if self else ""
        return self.type + (" double" if self.double else "")

    @property
    def bytes_per_weight(self) -> float:
        """Of quantised weights with their scales: at 4 bits one float32 for 64 numbers, which `double` makes one byte
        for 64 and one float32 for 64 x 256."""
        if self.bits != 4:
            return self.bits / 8
        return 0.5 + (1 / 64 + 4 / (64 * 256) if self.double else 4 / 64)

    def to_record(self) -> dict[str, Any]:
        """For template.json and run.json, in the config's own keys."""
        record: dict[str, Any] = {"quantization_bit": self.bits}
        if self.bits == 4:
            record |= {"quantization_type": self.type, "double_quantization": self.double}
        return record

    @staticmethod
    def from_record(record: Mapping[str, Any], where: str) -> Quantization:
        """The opposite. Raises ModelError for what this version does not know."""
        found = Quantization(
            record.get("quantization_bit", 0),
            record.get("quantization_type", "nf4"),
            record.get("double_quantization", True),
        )
        if found.bits not in KNOWN_BITS or found.type not in ("nf4", "fp4"):
            raise ModelError(
                tr(
                    f"the adapter was trained on a base quantised in a way unknown here: {dict(record)}",
                    f"该适配器训练时基座的量化方式在这里不认识：{dict(record)}",
                ),
                where=where,
            )
        return found


PLAIN = Quantization()
"""Weights as they are."""


def chosen(bits: int | None, saved: Quantization) -> Quantization:
    """What `--quantization-bit` asks for: None as the weights were trained, 0 not at all, 8 or 4.

    Raises UsageError for another number.
    """
    if bits not in (None, *KNOWN_BITS):
        raise UsageError(
            tr(f"quantization_bit={bits}: must be 0, 4 or 8", f"quantization_bit={bits}：只能是 0、4 或 8"),
            where="--quantization-bit",
        )
    return saved if bits is None or bits == saved.bits else Quantization(bits)


def require(quantization: Quantization, device: str) -> None:
    """Raise MissingPackage or ModelError now where `device` could not hold weights like these."""
    if not quantization:
        return
    unquantised = tr(
        "or leave the base as it is: quantization_bit=0 (train), --quantization-bit 0 (chat, predict)",
        "或者不量化基座：训练时写 quantization_bit=0，chat、predict 时加 --quantization-bit 0",
    )
    asked = f"quantization_bit={quantization.bits}"
    if importlib.util.find_spec("bitsandbytes") is None:
        purpose = tr(f"a base in {quantization.bits} bits", f"{quantization.bits} 位基座")
        raise MissingPackage("bitsandbytes", extra="quant", purpose=purpose, otherwise=unquantised)
    if device != "cpu" and not device.startswith("cuda"):
        raise ModelError(
            tr(
                f"8-bit and 4-bit weights are for CUDA and for the CPU, not for {device}",
                f"8 位、4 位权重只支持 CUDA 和 CPU，不支持 {device}",
            ),
            where=asked,
            remedy=f"device=cpu, --device cpu\n{unquantised}",
        )
    capability = environment.compute_capability(device)
    if quantization.bits == 8 and capability is not None and capability < INT8_CAPABILITY:
        has, needs = (".".join(map(str, version)) for version in (capability, INT8_CAPABILITY))
        raise ModelError(
            tr(
                f"int8 needs a card of compute capability {needs} or more (Turing); this one has {has}",
                f"int8 需要计算能力不低于 {needs} 的显卡（Turing 及以后）；这块卡是 {has}",
            ),
            where=asked,
            remedy=tr(
                "4 bits work on it: quantization_bit=4, --quantization-bit 4",
                "这块卡可以用 4 位：quantization_bit=4，--quantization-bit 4",
            )
            + f"\n{unquantised}",
        )


def transformers_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    """The BitsAndBytesConfig that `from_pretrained` takes; matmuls run in `dtype`."""
    from transformers import BitsAndBytesConfig

    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=dtype,
    )
