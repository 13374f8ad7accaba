"""A Hugging Face folder written anew: pickles → safetensors, another number type, other shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tuoling.errors import ModelError, UsageError
from tuoling.files import atomic_folder, read_json, write_json
from tuoling.language import tr
from tuoling.models.source import weight_files
from tuoling.weights.checklists import verify_checksums
from tuoling.weights.companions import copy_code, copy_companions
from tuoling.weights.convert import ConvertOptions, Report, prove
from tuoling.weights.safetensors_writer import SafetensorsWriter
from tuoling.weights.tensors import TensorInfo, non_finite, open_weights, require_finite

NUMBER_TYPES = {
    "f32": torch.float32,
    "fp32": torch.float32,
    "float32": torch.float32,
    "f16": torch.float16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}


def number_type(outtype: str | None) -> torch.dtype | None:
    """The dtype an `--outtype` means; None for none. Raises UsageError for block types, which only GGUF has."""
    if outtype is None:
        return None
    if outtype not in NUMBER_TYPES:
        raise UsageError(
            tr(f"--outtype {outtype}: not a type of this format", f"--outtype {outtype}：该格式没有这种类型"),
            remedy="f32 | f16 | bf16",
        )
    return NUMBER_TYPES[outtype]


def cast(
    name: str, tensor: torch.Tensor, dtype: torch.dtype | None, *, allow_nan: bool, where: Path
) -> torch.Tensor:
    """Floating numbers as `dtype` (None: as they are). Raises ModelError for NaN, and for numbers too large for it."""
    require_finite(name, tensor, allow_nan=allow_nan, where=where)
    if dtype is None or dtype == tensor.dtype or not tensor.is_floating_point():
        return tensor
    made = tensor.to(dtype)
    if not allow_nan and non_finite(made):
        short = str(dtype).removeprefix("torch.")
        raise ModelError(
            tr(f"{name} holds numbers too large for {short}", f"{name} 中有超出 {short} 范围的数"),
            where=str(where),
            remedy="--outtype bf16",
        )
    return made


def convert_huggingface(source: Path, out: Path, options: ConvertOptions) -> Report:
    """Write `out` as safetensors with the config and tokenizer of `source`, tensor by tensor."""
    dtype = number_type(options.outtype)
    notes = verify_checksums(source, {path.name for path in weight_files(source)}, options)
    weights = open_weights(source)
    infos = {
        name: TensorInfo(dtype, info.shape) if dtype and info.dtype.is_floating_point else info
        for name, info in weights.infos.items()
    }
    size = sum(info.size_bytes for info in infos.values())
    with atomic_folder(out) as folder:
        with SafetensorsWriter(folder, infos, shards=options.shards) as writer:
            for name in infos:
                tensor = weights.read(name)
                writer.write(name, cast(name, tensor, dtype, allow_nan=options.allow_nan, where=source))
        write_json(folder / "config.json", with_dtype(read_json(source / "config.json"), dtype))
        copy_companions(source, folder)
        if options.allow_remote_code:
            copy_code(source, folder)
        parity = prove(source, folder, folder, options)
    return Report(out, tensors=len(infos), size_bytes=size, notes=notes, parity=parity)


def with_dtype(config: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """config.json after its weights were written as `dtype` (None: as they were)."""
    if dtype is None:
        return dict(config)
    kept = {key: value for key, value in config.items() if key != "torch_dtype"}
    return {**kept, "dtype": str(dtype).removeprefix("torch.")}
