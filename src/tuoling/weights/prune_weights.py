"""The tensors of a model that have a row for every word, and the same weights with other rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tuoling.errors import ModelError
from tuoling.language import tr
from tuoling.models.shape import meta_model
from tuoling.weights.safetensors_writer import SHARD_SIZE_BYTES, SafetensorsWriter, tensor_bytes
from tuoling.weights.tensors import TensorInfo, TensorSource, require_finite

if TYPE_CHECKING:
    from tuoling.models.source import ModelSource

HASH_ROWS = 1 << 14
"""Rows hashed at once, so that a mapped embedding of gigabytes is never in memory as a whole."""


@dataclass(frozen=True)
class WordTensors:
    """Names in the files. embedding: of the input; head: of the output (weight and bias; empty where tied and left out).

    rows: how many words the model has.
    """

    embedding: str
    head: tuple[str, ...]
    rows: int

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (self.embedding, *self.head)


def word_tensors(
    source: ModelSource, weights: TensorSource, *, allow_remote_code: bool = False
) -> WordTensors:
    """Find them by the model's own input and output embeddings. Raises ModelError where that is not certain."""
    model = meta_model(source.path, allow_remote_code=allow_remote_code)
    model.tie_weights()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = int(embedding.weight.shape[0])
    others = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
        and module is not embedding
        and module.num_embeddings == rows
    ]
    if others:
        raise _unclear(
            source.path, tr(f"{others[0]} has a row for every word too", f"{others[0]} 也按词分行")
        )
    prefix = f"{model.base_model_prefix}."
    by_id: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        by_id.setdefault(id(tensor), []).append(name)
    found = _in_files(by_id[id(embedding.weight)], prefix, weights)
    heads = [name for tensor in _word_parameters(head, rows) for name in by_id.get(id(tensor), ())]
    in_head = [name for name in _in_files(heads, prefix, weights) if name not in found]
    if not found:
        raise _unclear(source.path, tr("the input embedding is not in the files", "文件中没有输入词嵌入"))
    names = WordTensors(found[0], tuple(dict.fromkeys([*found[1:], *in_head])), rows)
    for name in names.names:
        if weights.infos[name].shape[0] != rows or not weights.infos[name].dtype.is_floating_point:
            shape = list(weights.infos[name].shape)
            raise _unclear(
                source.path,
                tr(
                    f"{name} is {shape}, config.json says {rows} words",
                    f"{name} 的形状是 {shape}，config.json 写的是 {rows} 个词",
                ),
            )
    return names


def _word_parameters(head: Any, rows: int) -> list[torch.Tensor]:
    return [] if head is None else [tensor for tensor in head.parameters() if tensor.shape[0] == rows]


def _in_files(names: list[str], prefix: str, weights: TensorSource) -> list[str]:
    """The names under which tensors lie in the files: published ones often lack the base model's prefix."""
    candidates = [other for name in names for other in (name, name.removeprefix(prefix), prefix + name)]
    return list(dict.fromkeys(name for name in candidates if name in weights.infos))


def _unclear(folder: Path, detail: str) -> ModelError:
    return ModelError(
        tr(
            f"the rows of this model cannot be told apart: {detail}",
            f"无法确定该模型哪些张量按词分行：{detail}",
        ),
        where=str(folder),
    )


def rows_sha256(tensor_VD: torch.Tensor) -> str:
    """Hex SHA-256 of a tensor's bytes, some rows at a time."""
    digest = hashlib.sha256()
    for part in tensor_VD.split(HASH_ROWS):
        digest.update(tensor_bytes(part))
    return digest.hexdigest()


def write_rows(
    source: TensorSource,
    folder: Path,
    words: WordTensors,
    make: Callable[[str, torch.Tensor], torch.Tensor],
    rows: int,
    *,
    allow_nan: bool = False,
    progress: Callable[[int], None] | None = None,
    shard_size_bytes: int = SHARD_SIZE_BYTES,
) -> int:
    """Write the model with `make(name, tensor)` in place of every word tensor; all others as they are.

    Tensor by tensor: private memory is what `make` needs. Returns the bytes of the tensors written.
    """
    infos = {
        name: TensorInfo(info.dtype, (rows, *info.shape[1:])) if name in words.names else info
        for name, info in source.infos.items()
    }
    done = 0
    with SafetensorsWriter(folder, infos, shard_size_bytes=shard_size_bytes) as writer:
        for name, info in infos.items():
            tensor = source.read(name)
            require_finite(name, tensor, allow_nan=allow_nan, where=folder)
            writer.write(name, make(name, tensor) if name in words.names else tensor)
            done += info.size_bytes
            if progress is not None:
                progress(done)
    return done
