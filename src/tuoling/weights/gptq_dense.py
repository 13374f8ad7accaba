"""A GPTQ or AWQ folder written as plain weights, for whatever cannot read quantised ones (GGUF, merging, training)."""

from __future__ import annotations

from pathlib import Path

import torch

from tuoling.errors import ModelError
from tuoling.files import atomic_folder, read_json, write_json
from tuoling.language import tr
from tuoling.weights.companions import copy_code, copy_companions
from tuoling.weights.convert import ConvertOptions, Report, prove
from tuoling.weights.gptq_format import QuantizedWeights, quantized_format
from tuoling.weights.parity import Weights
from tuoling.weights.rewrite import cast, number_type
from tuoling.weights.safetensors_writer import SafetensorsWriter
from tuoling.weights.tensors import TensorInfo


def convert_gptq(source: Path, out: Path, options: ConvertOptions) -> Report:
    """Multiply every quantised layer out, one at a time. What quantisation has lost does not come back."""
    form = quantized_format(source)
    if form is None:
        raise ModelError(
            tr(
                "quantize_config.json names a method that is not read",
                "quantize_config.json 中的量化方法不受支持",
            ),
            where=str(source),
        )
    dtype = number_type(options.outtype) or torch.float16  # the type of the scales
    weights = QuantizedWeights(source, form, dtype=torch.float32)
    infos = {
        name: TensorInfo(dtype, info.shape) if info.dtype.is_floating_point else info
        for name, info in weights.infos.items()
    }
    size = sum(info.size_bytes for info in infos.values())
    with atomic_folder(out) as folder:
        with SafetensorsWriter(folder, infos, shards=options.shards) as writer:
            for name in infos:
                tensor = weights.read(name)
                writer.write(name, cast(name, tensor, dtype, allow_nan=options.allow_nan, where=source))
        config = read_json(source / "config.json")
        config.pop("quantization_config", None)
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        write_json(folder / "config.json", config)
        copy_companions(source, folder)
        if options.allow_remote_code:
            copy_code(source, folder)
        parity = prove(Weights(source, multiply_out=True), folder, folder, options)
    count = len(weights.layers)
    notes = [
        tr(
            f"{count} layers of {form.bits} bits multiplied out; what quantising lost stays lost",
            f"还原了 {count} 个 {form.bits} 位的层；量化损失的精度不会恢复",
        )
    ]
    return Report(out, tensors=len(infos), size_bytes=size, notes=notes, parity=parity)
