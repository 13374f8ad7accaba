"""Adapters in their base as tensors that are computed when they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tuoling.errors import ModelError
from tuoling.language import tr
from tuoling.models.adapters import some
from tuoling.models.source import ModelSource
from tuoling.weights.changes import Change, Rows, Whole, apply_changes
from tuoling.weights.deltas import Changes, changes_of, require_dora_alone, same_base
from tuoling.weights.tensors import TensorInfo, TensorSource, non_finite, open_weights


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

    def base_is_finite(self, name: str) -> bool:
        """Whether the base's tensor holds neither NaN nor infinity."""
        return not non_finite(self.base.read(self._origin[name]))


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
