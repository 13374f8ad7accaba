"""A LoRA adapter as a GGUF file of its own, which llama.cpp puts on top of its base's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuoling.errors import ModelError, UsageError
from tuoling.infer import gguf_keys
from tuoling.language import tr
from tuoling.models.adapter_reading import Adapter, read_adapter
from tuoling.models.adapters import some
from tuoling.models.licence import of_model, to_json, without_places
from tuoling.models.licence_answer import one_licence
from tuoling.models.source import find_model
from tuoling.weights.convert import ConvertOptions, Report
from tuoling.weights.gguf_families import GgufFamily, Sizes, gguf_family, gguf_module, read_sizes, row_order
from tuoling.weights.gguf_file import TensorPlan, TensorsInMemory, type_for, write_gguf

_NAME = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")


def convert_adapter(source: Path, out: Path, options: ConvertOptions) -> Report:
    """The entry of `tuoling convert ADAPTER OUT.gguf --to gguf-lora`.

    Raises ModelError for what llama.cpp cannot add to a base: DoRA, biases, whole modules, LoRA on embeddings.
    """
    outtype = options.outtype or "f32"
    if outtype not in ("f32", "f16"):
        raise UsageError(
            tr("an adapter is written as f32 or f16", "适配器只写成 f32 或 f16"),
            where="--outtype",
            remedy="f32 | f16",
        )
    found = find_model(source, base=options.base, lora_alpha=options.lora_alpha)
    family = gguf_family(found.config, str(found.weights_path))
    sizes = read_sizes(found.config, family)
    adapter = read_adapter(found.path, lora_alpha=options.lora_alpha)
    _require_lora_alone(adapter)
    plans = _plans(family, sizes, adapter, outtype)

    def metadata(writer: Any) -> None:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(adapter.config["lora_alpha"]))
        writer.add_name(found.run_folder.name)
        parts = of_model(found)
        if licence := one_licence(parts):
            writer.add_license(licence)
        record = {"lineage": to_json(without_places(parts))}
        writer.add_string(gguf_keys.PROVENANCE, json.dumps(record, ensure_ascii=False))

    size = write_gguf(
        out, family.arch, metadata, plans, TensorsInMemory(adapter.tensors), allow_nan=options.allow_nan
    )
    return Report(out, tensors=len(plans), size_bytes=size, notes=list(adapter.notes))


def _require_lora_alone(adapter: Adapter) -> None:
    settings = adapter.config
    wrong = [key for key in ("use_dora", "modules_to_save", "fan_in_fan_out") if settings.get(key)]
    if settings.get("bias", "none") != "none":
        wrong.append("bias")
    if wrong:
        raise ModelError(
            tr(
                f"llama.cpp cannot add an adapter with {', '.join(wrong)}",
                f"llama.cpp 无法加载带 {'、'.join(wrong)} 的适配器",
            ),
            where=str(adapter.folder),
            remedy=tr("merge it: --to gguf", "请合并后再写：--to gguf"),
        )


def _plans(family: GgufFamily, sizes: Sizes, adapter: Adapter, outtype: str) -> list[TensorPlan]:
    """A and B of every module. B's rows are the module's, in llama.cpp's order, and carry what alpha / r cannot say."""
    plans, unknown = [], []
    for name, tensor in adapter.tensors.items():
        match = _NAME.match(name)
        found = gguf_module(family, match["module"]) if match else None
        if match is None or found is None or found[0] in ("token_embd", "output"):
            unknown.append(name)
            continue
        gguf_name, inside = found
        rows, scale = None, 1.0
        if match["side"] == "B":
            rows = row_order(family, inside, tensor.shape[0], sizes)
            scale = _scale(adapter.config, match["module"], tensor.shape[1])
        shape = tuple(tensor.shape)
        plans.append(
            TensorPlan(
                f"{gguf_name}.weight.lora_{match['side'].lower()}",
                name,
                shape,
                type_for(shape, outtype),
                rows,
                None,
                scale,
            )
        )
    if unknown:
        raise ModelError(
            tr(f"llama.cpp has no place for {some(unknown)}", f"llama.cpp 中没有 {some(unknown)} 的位置"),
            where=str(adapter.folder),
            remedy=tr("merge it: --to gguf", "请合并后再写：--to gguf"),
        )
    return plans


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """PEFT's own scaling of a module over llama.cpp's, which is one alpha for all, divided by the rank."""
    alpha = _by_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"])
    peft = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    return float(peft * rank / settings["lora_alpha"])


def _by_pattern(pattern: Mapping[str, float] | None, module: str, usual: float) -> float:
    """PEFT's rule: a key names the end of a module, or is a regular expression for it."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return usual
