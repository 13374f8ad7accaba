"""What an adapter changes in its base: for each tensor of the weight files, the changes in their own terms.

Which modules an adapter goes to, its scale there (rank and alpha patterns, rsLoRA) and the orientation of a weight are
read from PEFT itself, on a model of the base's shape that has no memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tuoling.errors import ModelError
from tuoling.language import tr
from tuoling.models.adapter_reading import Adapter, read_adapter
from tuoling.models.adapters import some, wrap
from tuoling.models.old_adapters import PREFIX
from tuoling.models.shape import meta_model
from tuoling.models.source import ModelSource
from tuoling.weights.changes import Added, Change, LowRank, Rows, Whole

_CANNOT = {
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "layer_replication": "layer_replication",
    "megatron_config": "Megatron",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "target_parameters",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QALoRA",
}
"""Keys of adapter_config.json that make an adapter more than a change of weights, or one not computed here."""

_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin (`init_lora_weights`) that subtract from the base: its own weights are not what was trained on."""


@dataclass(frozen=True)
class Changes:
    """Of one adapter.

    by_name: parameter of the model → its changes. parameters: all of the model's, prefix: of its base model's names.
    rows:    of the embeddings, as the adapter has them.
    tied:    input embedding and head are one parameter in the base, though both have a name.
    """

    adapter: Adapter
    by_name: Mapping[str, Sequence[Change]]
    rows: int
    tied: bool
    embedding: str
    head: str | None
    parameters: Sequence[str] = field(repr=False)
    prefix: str


def changes_of(source: ModelSource, weight: float, *, allow_remote_code: bool = False) -> Changes:
    """Read an adapter and find what it changes. Raises ModelError where it does not fit, or cannot be merged."""
    adapter = read_adapter(source.path, lora_alpha=source.lora_alpha)
    _require_mergeable(adapter)
    model = meta_model(source.weights_path, allow_remote_code=allow_remote_code)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    parameters = list(model.state_dict())
    tied = head is not None and head.weight is embedding.weight
    embedding_name = f"{names[id(embedding)]}.weight"
    head_name = None if head is None else f"{names[id(head)]}.weight"
    wrapped = wrap(model, adapter)
    by_name = _Collector(adapter, weight).collect(wrapped)
    return Changes(
        adapter=adapter,
        by_name=by_name,
        rows=_rows(wrapped),
        tied=tied,
        embedding=embedding_name,
        head=head_name,
        parameters=parameters,
        prefix=f"{model.base_model_prefix}.",
    )


def _rows(wrapped: Any) -> int:
    embedding = wrapped.get_base_model().get_input_embeddings()
    rows: int = getattr(embedding, "base_layer", embedding).weight.shape[0]
    return rows


def _require_mergeable(adapter: Adapter) -> None:
    config = adapter.config
    kind = str(config.get("peft_type"))
    init = str(config.get("init_lora_weights") or "").lower()
    why = [name for key, name in _CANNOT.items() if config.get(key)]
    why += [f"init_lora_weights={init}"] if init.startswith(_CHANGE_THE_BASE) else []
    why += [kind] if kind != "LORA" else []
    if not why:
        return
    raise ModelError(
        tr(
            f"{', '.join(why)}: such an adapter cannot be merged here",
            f"{'、'.join(why)}：这种适配器不能在这里合并",
        ),
        where=str(adapter.folder),
        remedy=tr(
            "chat, predict and train take it as it is; PEFT can save PiSSA, OLoRA and CorDA as plain LoRA "
            "(path_initial_model_for_weight_conversion)",
            "chat、predict、train 可直接使用它；PEFT 可把 PiSSA、OLoRA、CorDA 存成普通 LoRA"
            "（path_initial_model_for_weight_conversion）",
        ),
    )


def _second_copy(name: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    """With resized embeddings PEFT writes a trained module twice, and the one that it took the place of as well."""
    if ".original_module." in name:
        return True
    return ".modules_to_save." in name and name.replace(".modules_to_save.", ".") in tensors


class _Collector:
    """Goes through PEFT's modules and takes every tensor of the adapter exactly once."""

    def __init__(self, adapter: Adapter, weight: float) -> None:
        self._adapter, self._weight = adapter, weight
        self._left = dict(adapter.tensors)
        self._found: dict[str, list[Change]] = {}

    def collect(self, wrapped: Any) -> dict[str, list[Change]]:
        from peft.tuners.lora.layer import LoraLayer
        from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

        copies = set()
        for path, module in wrapped.get_base_model().named_modules():
            if isinstance(module, LoraLayer):
                self._low_rank(path, module)
            elif isinstance(module, TrainableTokensWrapper):
                self._token_rows(path, module)
            elif isinstance(module, ModulesToSaveWrapper):
                copies.add(path)
        for name in list(self._left):  # biases, modules_to_save, embeddings saved beside
            if _second_copy(name, self._adapter.tensors):
                del self._left[name]
            elif ".lora_" not in name:
                place = name.removeprefix(PREFIX).replace(".base_layer.", ".")
                of_base = place.rpartition(".")[0] not in copies
                self._add(place, Whole(self._left.pop(name), self._weight, of_base))
        if self._left:
            raise ModelError(
                tr(
                    f"{len(self._left)} tensors of the adapter have no place: {some(sorted(self._left))}",
                    f"适配器中有 {len(self._left)} 个张量无处可放：{some(sorted(self._left))}",
                ),
                where=str(self._adapter.folder),
            )
        return self._found

    def _add(self, name: str, change: Change) -> None:
        self._found.setdefault(name, []).append(change)

    def _take(self, name: str) -> torch.Tensor | None:
        return self._left.pop(PREFIX + name, None)

    def _low_rank(self, path: str, module: Any) -> None:
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        base = module.get_base_layer()
        scale = module.scaling["default"] * self._weight
        magnitude = self._take(f"{path}.lora_magnitude_vector")
        if isinstance(base, nn.Embedding):
            a, b = self._take(f"{path}.lora_embedding_A"), self._take(f"{path}.lora_embedding_B")
        else:
            a, b = self._take(f"{path}.lora_A.weight"), self._take(f"{path}.lora_B.weight")
        if a is None or b is None or not isinstance(base, nn.Linear | nn.Embedding | Conv1D):
            raise ModelError(
                tr(
                    f"{path}: an adapter on a {type(base).__name__} cannot be merged here",
                    f"{path}：{type(base).__name__} 上的适配器不能在这里合并",
                ),
                where=str(self._adapter.folder),
            )
        if magnitude is not None and self._weight != 1.0:
            raise self._dora_with_others()
        if isinstance(base, nn.Linear):  # [out, in]; the others lie the other way round
            change = LowRank(b, a, scale, magnitude, 0)
        else:
            change = LowRank(a.T, b.T, scale, magnitude, 1)
        self._add(f"{path}.weight", change)
        bias = self._take(f"{path}.lora_B.bias")
        if bias is not None:
            self._add(f"{path}.bias", Added(bias, scale))

    def _token_rows(self, path: str, module: Any) -> None:
        tensor = self._take(f"{path}.token_adapter.trainable_tokens_delta")
        if tensor is not None:
            indices = torch.tensor(module.token_adapter.token_indices["default"])
            self._add(f"{path}.weight", Rows(indices, tensor, self._weight))

    def _dora_with_others(self) -> ModelError:
        return ModelError(
            tr(
                "DoRA with a weight: its norms hold for the whole adapter only",
                "DoRA 不能带权重：它的范数只对完整的适配器成立",
            ),
            where=str(self._adapter.folder),
            remedy=tr("merge it alone, with weight 1", "请单独合并它，权重为 1"),
        )


def require_dora_alone(all_changes: Sequence[Changes]) -> None:
    """Raise ModelError where a DoRA adapter is to be merged with others: norms of a sum are no sum of norms."""
    for changes in all_changes:
        magnitudes = any(
            isinstance(change, LowRank) and change.magnitude is not None
            for found in changes.by_name.values()
            for change in found
        )
        if magnitudes and len(all_changes) > 1:
            raise ModelError(
                tr("DoRA cannot be merged with other adapters", "DoRA 不能与其他适配器一起合并"),
                where=str(changes.adapter.folder),
                remedy=tr(
                    "merge it alone, then the others into the result", "请先单独合并它，再把其他的合并进结果"
                ),
            )


def same_base(sources: Sequence[ModelSource]) -> Path:
    """The folder all adapters stand on. Raises ModelError where they name different ones."""
    for source in sources:
        if not source.is_adapter:
            raise ModelError(
                tr("not an adapter: its weights are whole already", "这不是适配器：权重已是完整的"),
                where=str(source.path),
            )
    folders = {source.weights_path.resolve() for source in sources}
    if len(folders) > 1:
        raise ModelError(
            tr(
                f"the adapters stand on different bases: {some(sorted(map(str, folders)))}",
                f"这些适配器的基座不同：{some(sorted(map(str, folders)))}",
            ),
            remedy=tr(
                "if one is right for all: --base PATH_OR_ID", "若同一基座对全部都合适：--base 路径或编号"
            ),
        )
    return sources[0].weights_path
