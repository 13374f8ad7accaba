"""A GGUF file laid out first and filled tensor by tensor, a few megabytes of rows at a time.

What is written beside the rows (header, metadata, the table of tensors) comes from the `gguf` package; the rows are
ours, because its own writer wants every tensor whole and in numpy, which has no bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from tuoling.errors import MissingPackage, ModelError
from tuoling.files import atomic_write
from tuoling.language import tr
from tuoling.weights.tensors import TensorInfo, TensorSource

CHUNK_BYTES = 4 << 20
"""Float32 bytes of the rows that are converted at once; Q8_0 needs about ten times as much for its steps."""

BLOCK = 32
"""Numbers of a row that Q8_0 gives one scale."""

F16_LARGEST = 65504.0


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the file and where it comes from.

    type:   f32, f16, bf16 or q8_0.
    rows:   order in which the source's rows are written; None: as they are.
    values: the tensor itself, where it comes from no file.
    scale:  every number is multiplied by it.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    type: str
    rows: torch.Tensor | None = None
    values: torch.Tensor | None = None
    scale: float = 1.0

    @property
    def size_bytes(self) -> int:
        """Bytes in the file, without padding."""
        count = int(torch.Size(self.shape).numel())
        return count // BLOCK * (BLOCK + 2) if self.type == "q8_0" else count * _ITEM_BYTES[self.type]


_ITEM_BYTES = {"f32": 4, "f16": 2, "bf16": 2}


class TensorsInMemory:
    """Tensors that are loaded already, as a TensorSource."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.infos = {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}
        self.read = tensors.__getitem__


def type_for(shape: Sequence[int], wanted: str) -> str:
    """The type a tensor is written in: vectors stay f32, rows that are no multiple of a block become f16."""
    if len(shape) < 2:
        return "f32"
    return "f16" if wanted == "q8_0" and shape[-1] % BLOCK else wanted


def require_gguf() -> Any:
    """The `gguf` package. Raises MissingPackage where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise MissingPackage(
            "gguf", extra="gguf", purpose=tr("writing GGUF files", "写 GGUF 文件")
        ) from error
    return gguf


def write_gguf(
    out: Path,
    arch: str,
    metadata: Callable[[Any], None],
    plans: Sequence[TensorPlan],
    source: TensorSource,
    *,
    allow_nan: bool = False,
    step: Callable[[int], None] = lambda size_bytes: None,
) -> int:
    """Write `out` whole or not at all and return its size. `metadata` puts keys into a gguf.GGUFWriter.

    Raises ModelError where a tensor holds NaN or infinity, or numbers that float16 cannot hold. step: told of the
    bytes written.
    """
    gguf = require_gguf()
    from gguf.gguf_writer import WriterState

    writer = gguf.GGUFWriter(None, arch)
    metadata(writer)
    for plan in plans:
        kind = gguf.GGMLQuantizationType[plan.type.upper()]
        writer.add_tensor_info(plan.name, plan.shape, np.dtype("float32"), plan.size_bytes, raw_dtype=kind)
    with atomic_write(out, binary=True) as file:
        writer.fout, writer.state = [file], WriterState.EMPTY  # its own open() would not be atomic
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _pad(file, writer.data_alignment)
        for plan in plans:
            tensor = plan.values if plan.values is not None else source.read(plan.source)
            for rows in _converted_rows(tensor, plan, allow_nan):
                file.write(_bytes(rows))
                step(rows.nbytes)
            del tensor
            _pad(file, writer.data_alignment)
        return file.tell()


def _pad(file: IO[bytes], alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))


def _bytes(rows: torch.Tensor) -> memoryview:
    return memoryview(rows.contiguous().view(torch.uint8).reshape(-1).numpy())


def _converted_rows(tensor: torch.Tensor, plan: TensorPlan, allow_nan: bool) -> Iterable[torch.Tensor]:
    """The tensor in its written form, some rows at a time."""
    if tuple(tensor.shape) != plan.shape:
        raise ModelError(
            tr(
                f"{plan.source} is {list(tensor.shape)}, its header says {list(plan.shape)}",
                f"{plan.source} 的形状是 {list(tensor.shape)}，文件头写的是 {list(plan.shape)}",
            )
        )
    row_bytes = 4 * max(1, int(torch.Size(plan.shape[1:]).numel()))
    count = max(1, CHUNK_BYTES // row_bytes)
    for begin in range(0, plan.shape[0], count):
        rows = tensor[begin : begin + count]
        if plan.rows is not None:
            rows = tensor[plan.rows[begin : begin + count]]
        yield _converted(rows, plan, allow_nan)


def _converted(rows: torch.Tensor, plan: TensorPlan, allow_nan: bool) -> torch.Tensor:
    if not rows.is_floating_point():
        raise ModelError(
            tr(f"{plan.source} holds {rows.dtype}, not floats", f"{plan.source} 是 {rows.dtype}，不是浮点数")
        )
    low, high = torch.aminmax(rows)
    largest = float(torch.maximum(low.float().abs(), high.float().abs())) * plan.scale
    if not allow_nan and not largest < float("inf"):  # NaN is no smaller either
        raise ModelError(
            tr(f"{plan.source} holds NaN or infinity", f"{plan.source} 含有 NaN 或无穷大"),
            remedy=tr(
                "the weights are broken; to convert them all the same: --allow-nan",
                "权重已损坏；若仍要转换：--allow-nan",
            ),
        )
    if plan.scale != 1.0:
        rows = rows.float() * plan.scale
    if plan.type == "f32":
        return rows.float()
    if plan.type == "bf16":
        return rows.bfloat16()
    if largest > F16_LARGEST * (127 if plan.type == "q8_0" else 1):
        raise ModelError(
            tr(
                f"{plan.source} holds {largest:g}, more than float16 can",
                f"{plan.source} 含有 {largest:g}，超出 float16",
            ),
            remedy="--outtype bf16",
        )
    return quantize_q8_0(rows.float()) if plan.type == "q8_0" else rows.half()


def quantize_q8_0(x_RC: torch.Tensor) -> torch.Tensor:
    """Float32 rows → llama.cpp's Q8_0 blocks, byte for byte: a float16 scale, then 32 signed bytes.

    Rounds halves away from zero, as C's roundf; adding 0.5 instead would round 0.49999997 up.
    """
    blocks_NB = x_RC.reshape(-1, BLOCK)
    scale_N1 = blocks_NB.abs().amax(1, keepdim=True) / 127
    scaled_NB = blocks_NB * torch.where(scale_N1 == 0, 0.0, 1.0 / scale_N1)
    whole_NB = scaled_NB.abs().floor()
    whole_NB += (2 * (scaled_NB.abs() - whole_NB)).floor()
    values_NB = whole_NB.copysign(scaled_NB).to(torch.int8).view(torch.uint8)
    return torch.cat([scale_N1.half().view(torch.uint8), values_NB], 1).reshape(x_RC.shape[0], -1)
