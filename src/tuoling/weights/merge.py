"""Adapters merged into their base: as tensors that are computed when they are read, and as a model folder."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tuoling import console, environment, files
from tuoling.errors import ModelError, OutputError, UsageError
from tuoling.language import tr
from tuoling.models.adapters import some
from tuoling.models.licence import of_model, to_json, union, write_lineage
from tuoling.models.source import TEMPLATE_FILE, ModelSource
from tuoling.weights.changes import Change, Rows, Whole, apply_changes
from tuoling.weights.companions import copy_code, copy_companions
from tuoling.weights.deltas import Changes, changes_of, require_dora_alone, same_base
from tuoling.weights.merge_card import merge_card
from tuoling.weights.safetensors_writer import SafetensorsWriter
from tuoling.weights.tensors import TensorInfo, TensorSource, non_finite, open_weights

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
class Weighted:
    """An adapter with its base, and how much of it counts (1.0: as it was trained)."""

    source: ModelSource
    weight: float = 1.0


@dataclass(frozen=True)
class Merged:
    """Adapters in their base, as a TensorSource: a tensor is computed when it is read, and not kept.

    infos:  in the order of the base's files. config: config.json of the result.
    notes:  what the user should know of (inferred alphas, embeddings that came apart).
    """

    infos: Mapping[str, TensorInfo]
    config: dict[str, Any]
    adapters: tuple[Weighted, ...]
    notes: tuple[str, ...]
    base: TensorSource = field(repr=False)
    _origin: Mapping[str, str] = field(repr=False)
    _changes: Mapping[str, Sequence[Change]] = field(repr=False)

    @property
    def changed(self) -> Sequence[str]:
        """Names of the tensors that differ from the base's."""
        return list(self._changes)

    def read(self, name: str) -> torch.Tensor:
        """Computed in float32 and rounded once; unchanged tensors stay mapped where their dtype stays."""
        tensor = self.base.read(self._origin[name])
        changes = self._changes.get(name)
        dtype = self.infos[name].dtype
        return apply_changes(tensor, changes, dtype) if changes else tensor.to(dtype)


def open_merged(
    adapters: Sequence[Weighted] | ModelSource,
    *,
    dtype: torch.dtype | None = None,
    allow_remote_code: bool = False,
) -> Merged:
    """Adapters, all on one base, as the weights of one model. dtype: None keeps every tensor's own.

    Raises ModelError for an adapter that does not fit or cannot be merged, and for a base that is quantised itself.
    """
    weighted = (Weighted(adapters),) if isinstance(adapters, ModelSource) else tuple(adapters)
    folder = same_base([one.source for one in weighted])
    config = dict(weighted[0].source.config)
    _require_unquantised(folder, config)
    all_changes = [
        changes_of(one.source, one.weight, allow_remote_code=allow_remote_code) for one in weighted
    ]
    require_dora_alone(all_changes)
    base = open_weights(folder)
    notes = [line for changes in all_changes for line in changes.adapter.notes]
    first = all_changes[0]
    origin, changes, apart = _places(base, all_changes, folder)
    if apart:
        config["tie_word_embeddings"] = False
        notes.append(
            tr(
                "input and output embeddings were one tensor and are two now: the adapter treats them differently",
                "输入与输出嵌入原为同一张量，现在分开保存：适配器对两者的改动不同",
            )
        )
    infos = {
        name: _info(base.infos[from_name], changes.get(name, ()), dtype) for name, from_name in origin.items()
    }
    if first.rows != config.get("vocab_size", first.rows):
        _require_rows(infos, all_changes)
        config["vocab_size"] = first.rows
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(dtype).removeprefix("torch.")
    return Merged(infos, config, weighted, tuple(dict.fromkeys(notes)), base, origin, changes)


def _require_rows(infos: Mapping[str, TensorInfo], all_changes: Sequence[Changes]) -> None:
    """An adapter with another vocabulary than its base's brings all rows of embedding and head, or is refused."""
    first = all_changes[0]
    names = [name for name in (first.embedding, first.head) if name is not None]
    found = [_among(dict.fromkeys(infos, ""), name, first.prefix) for name in names]
    short = [name for name in found if name is not None and infos[name].shape[0] != first.rows]
    if short or len(all_changes) > 1:
        raise ModelError(
            tr(
                f"the adapter has {first.rows} words, another vocabulary than the base: it can be merged alone, and "
                f"with all rows in it ({some(short) or 'several adapters were given'})",
                f"适配器的词表有 {first.rows} 行，与基座不同：只能单独合并，且须带上全部行"
                f"（{some(short) or '给了多个适配器'}）",
            ),
            where=str(first.adapter.folder),
        )


def _require_unquantised(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("quantization_config"):
        raise ModelError(
            tr(
                "the base's weights are quantised: a sum cannot be stored in them",
                "基座权重是量化的，无法合并进去",
            ),
            where=str(folder / "config.json"),
            remedy=tr("name the base in 16 bits: --base PATH_OR_ID", "请指定 16 位的基座：--base 路径或编号"),
        )


def _places(
    base: TensorSource, all_changes: Sequence[Changes], folder: Path
) -> tuple[dict[str, str], dict[str, list[Change]], bool]:
    """(tensor of the result → tensor of the base, tensor of the result → changes, whether tied embeddings part).

    Files may leave out the model's prefix (`h.0…` for `transformer.h.0…`), and write tied embeddings once.
    """
    first = all_changes[0]
    collected: dict[str, list[Change]] = {}
    for found in all_changes:
        for name, changes in found.by_name.items():
            collected.setdefault(name, []).extend(changes)
    touched = [*collected.get(first.embedding, ()), *collected.get(str(first.head), ())]
    # PEFT trains single tokens of tied embeddings as one; LoRA and trained copies it keeps apart
    apart = first.tied and any(
        not isinstance(change, Rows) and not (isinstance(change, Whole) and change.of_base)
        for change in touched
    )
    origin = {name: name for name in base.infos}
    if apart:
        origin = _with_own_head(first, base)
    elif first.tied and touched:
        both = collected.get(first.embedding) or collected[str(first.head)]
        collected.pop(str(first.head), None)
        collected[first.embedding] = both
        if first.head in origin:
            collected[str(first.head)] = both
    places = {name: _among(origin, name, first.prefix) for name in collected}
    missing = sorted(name for name, place in places.items() if place is None)
    if missing:
        raise ModelError(
            tr(
                f"the adapter changes tensors that the base's files do not have: {some(missing)}",
                f"适配器要改动的张量在基座文件中不存在：{some(missing)}",
            ),
            where=str(folder),
        )
    return origin, {str(places[name]): changes for name, changes in collected.items()}, apart


def _with_own_head(first: Changes, base: TensorSource) -> dict[str, str]:
    """All tensors under the model's full names, and the head as a tensor of its own, taken from the embedding."""
    known = set(first.parameters)
    origin = {_model_name(name, known, first.prefix): name for name in base.infos if name != first.head}
    return {**origin, str(first.head): origin[first.embedding]}


def _among(origin: Mapping[str, str], name: str, prefix: str) -> str | None:
    return next((other for other in (name, name.removeprefix(prefix)) if other in origin), None)


def _model_name(name: str, known: set[str], prefix: str) -> str:
    return prefix + name if name not in known and prefix + name in known else name


def _info(info: TensorInfo, changes: Sequence[Change], dtype: torch.dtype | None) -> TensorInfo:
    shape = next((tuple(c.tensor.shape) for c in changes if isinstance(c, Whole)), info.shape)
    return TensorInfo(dtype if dtype is not None and info.dtype.is_floating_point else info.dtype, shape)


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
    if non_finite(merged.base.read(merged._origin[name])):
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
