"""Adapters merged into their base, as a model folder."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuoling import console, environment, files
from tuoling.errors import ModelError, OutputError, UsageError
from tuoling.language import tr
from tuoling.models.licence import of_model, to_json, union, write_lineage
from tuoling.models.source import TEMPLATE_FILE
from tuoling.weights.companions import copy_code, copy_companions
from tuoling.weights.merge_card import merge_card
from tuoling.weights.merged import Merged, Weighted, open_merged
from tuoling.weights.safetensors_writer import SafetensorsWriter
from tuoling.weights.tensors import non_finite

RECORD = "tuoling.json"
"""What a folder of weights was made of and how: beside the weights of every merge."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_OF_THE_BASE = ("generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def stored_dtype(name: str | None) -> torch.dtype | None:
    """bf16, fp16 or fp32 → the torch dtype; None stays None. Raises UsageError for another name."""
    if name is not None and name not in _DTYPES:
        raise UsageError(
            tr(f"--dtype {name}: bf16, fp16 or fp32", f"--dtype {name}：应为 bf16、fp16 或 fp32"),
            where="--dtype",
        )
    return None if name is None else _DTYPES[name]


@dataclass(frozen=True)
class MergeReport:
    """What was written. changed: tensors that differ from the base's. checked: what the proof found."""

    out: Path
    tensors: int
    changed: int
    size_bytes: int
    notes: tuple[str, ...]
    checked: Mapping[str, Any]


def merge(
    adapters: Sequence[Weighted],
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    allow_remote_code: bool = False,
    verify: bool = True,
    step: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = console.note,
) -> MergeReport:
    """Write the merged model to the new folder `out`: weights, config, tokenizer, template, card and `tuoling.json`.

    verify: prove that the result computes what the adapters do (`merge_proof`); off is recorded.
    step:   called after every tensor with the count so far and the whole. say: what the proof found.
    Nothing is left behind where something fails. Raises OutputError where float16 is too small for a number.
    """
    from tuoling.weights.merge_proof import prove

    merged = open_merged(adapters, dtype=dtype, allow_remote_code=allow_remote_code)
    with files.atomic_folder(out) as place:
        with SafetensorsWriter(place, merged.infos) as writer:
            for number, name in enumerate(merged.infos, 1):
                tensor = merged.read(name)
                _require_finite(name, tensor, merged, out)
                writer.write(name, tensor)
                step(number, len(merged.infos))
        _write_beside(merged, place, allow_remote_code=allow_remote_code)
        checked = prove(merged.adapters, place, verify=verify, allow_remote_code=allow_remote_code, say=say)
        record = lineage(merged, checked)
        files.write_json(place / RECORD, record)
        with files.atomic_write(place / "README.md") as file:
            file.write(merge_card(out.name, record))
    return MergeReport(
        out,
        len(merged.infos),
        len(merged.changed),
        sum(info.size_bytes for info in merged.infos.values()),
        merged.notes,
        checked,
    )


def _require_finite(name: str, tensor: torch.Tensor, merged: Merged, out: Path) -> None:
    if not non_finite(tensor):
        return
    if not merged.base_is_finite(name):
        raise ModelError(
            tr(f"{name} of the base holds NaN or infinity", f"基座的 {name} 含有 NaN 或无穷大"),
            where=str(merged.adapters[0].source.weights_path),
        )
    raise OutputError(
        tr(
            f"{name} has numbers that are too large for {tensor.dtype}".replace("torch.", ""),
            f"{name} 中有超出 {tensor.dtype} 范围的数".replace("torch.", ""),
        ),
        where=str(out),
        remedy="--dtype bf16",
    )


def _write_beside(merged: Merged, place: Path, *, allow_remote_code: bool) -> None:
    """Everything `tuoling chat OUT` needs besides the weights: the adapter's files first, then the base's."""
    source = merged.adapters[0].source
    files.write_json(place / "config.json", merged.config)
    write_lineage(place, *(of_model(one.source) for one in merged.adapters))
    for folder in dict.fromkeys((source.path, source.run_folder)):
        copy_companions(folder, place)
    if any((place / name).is_file() for name in _TOKENIZER_FILES):  # files of two tokenizers are not mixed
        for pattern in _OF_THE_BASE:
            for file in source.weights_path.glob(pattern):
                if not (place / file.name).exists():
                    shutil.copyfile(file, place / file.name)
    else:
        copy_companions(source.weights_path, place)
    if allow_remote_code:
        copy_code(source.weights_path, place)
    record = {
        "template": source.template,
        "stops": list(source.stops) or None,
        "system": source.system,
        "max_seq_len": source.max_seq_len,
    }
    kept = {key: value for key, value in record.items() if value is not None}
    if kept:
        files.write_json(place / TEMPLATE_FILE, kept)


def lineage(merged: Merged, checked: Mapping[str, Any]) -> dict[str, Any]:
    """What went into the weights, with hashes: for whoever has to say where they come from."""
    source = merged.adapters[0].source
    assert source.base is not None
    return {
        "made_by": "tuoling merge",
        "made_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "base": {
            "path": str(source.weights_path.resolve()),
            "named": source.base.name,
            "config_sha256": files.sha256_file(source.weights_path / "config.json"),
            "family": source.family.name,
            "licence": source.family.licence,
        },
        "adapters": [_adapter_record(one) for one in merged.adapters],
        "lineage": to_json(union(*(of_model(one.source) for one in merged.adapters))),
        "dtypes": sorted({str(info.dtype).removeprefix("torch.") for info in merged.infos.values()}),
        "tensors": len(merged.infos),
        "changed": len(merged.changed),
        "notes": list(merged.notes),
        "versions": environment.versions(),
        **checked,
    }


def _adapter_record(one: Weighted) -> dict[str, Any]:
    from tuoling.models.adapter_reading import read_adapter

    source = one.source
    adapter = read_adapter(source.path, lora_alpha=source.lora_alpha)
    run = source.run or {}
    return {
        "path": str(source.path.resolve()),
        "named": source.name,
        "weight": one.weight,
        "weights_sha256": files.sha256_file(adapter.weights_file),
        "rank": adapter.config.get("r"),
        "lora_alpha": adapter.config.get("lora_alpha"),
        "targets": adapter.config.get("target_modules"),
        "trained_on": str(source.quantization) or None,
        "data": run.get("data"),
    }
