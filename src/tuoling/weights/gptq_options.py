"""What the user of `tuoling quantize` may choose, and what is told afterwards."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tuoling.errors import UsageError
from tuoling.language import tr
from tuoling.weights.gptq_packing import BITS

Method = Literal["gptq", "awq", "rtn"]

GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)
"""Those of gptqmodel's kernels; vLLM's have -1, 32, 64 and 128."""


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """What the user may choose. rows: how many to calibrate on. device: where layers are computed."""

    bits: int = 4
    group_size: int = 128
    act_order: bool = False
    true_sequential: bool = True
    symmetric: bool = True
    method: Method = "gptq"
    rows: int = 256
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    verify: bool = True
    allow_remote_code: bool = False

    def check(self) -> None:
        """Raise UsageError for what no quantiser here can do."""
        for name, value, known in (
            ("--bits", self.bits, (4,) if self.method == "awq" else BITS),
            ("--group-size", self.group_size, GROUP_SIZES),
        ):
            if value not in known:
                raise UsageError(
                    tr(f"{name} {value} is not among them", f"{name} {value} 不在可选值内"),
                    where=name,
                    remedy=" | ".join(map(str, known)),
                )
        if self.act_order and self.method != "gptq":
            raise UsageError(
                tr("--act-order belongs to --method gptq", "--act-order 只用于 --method gptq"),
                where="--act-order",
            )


@dataclass
class QuantizeReport:
    """What was written and what it cost. before, rtn, after: perplexity of held-out answers."""

    out: Path
    options: QuantizeOptions
    layers: int
    size_bytes: int
    size_before_bytes: int
    seconds: float = 0.0
    peak_gib: float | None = None
    before: float | None = None
    rtn: float | None = None
    after: float | None = None
    tokens_per_s_before: float | None = None
    tokens_per_s: float | None = None
    memory_before_gib: float | None = None
    memory_gib: float | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For scripts and for the record beside the weights."""
        return asdict(self) | {"out": str(self.out)}
