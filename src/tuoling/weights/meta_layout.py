"""Meta's checkpoints (consolidated.00.pth, 01, ...; params.json) read with Hugging Face's names: LLaMA 1, 2 and 3.

Three things differ. Names. The rows of wq and wk: Meta keeps the two numbers of a rotary pair side by side, Hugging
Face half a head apart. And the cut: Meta's files each hold a slice of every matrix, some cut by rows, some by
columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tuoling.errors import DataError, ModelError
from tuoling.files import read_json
from tuoling.language import tr
from tuoling.models.adapters import some
from tuoling.weights.meta_params import from_config, mismatch, read_params, to_config
from tuoling.weights.tensors import PickledFile, TensorInfo

HUGGINGFACE_CONFIG = "huggingface_config.json"
"""Beside Meta's files that we wrote: the config.json they came from, so that the way back loses nothing."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Part:
    """A tensor's two names. axis: along which Meta's files cut it; None: every file holds the whole."""

    meta: str
    hf: str
    axis: int | None


_TOP = (
    Part("tok_embeddings.weight", EMBEDDING, 1),
    Part("norm.weight", "model.norm.weight", None),
    Part("output.weight", HEAD, 0),
)
_LAYER = (
    Part("attention.wq.weight", "self_attn.q_proj.weight", 0),
    Part("attention.wk.weight", "self_attn.k_proj.weight", 0),
    Part("attention.wv.weight", "self_attn.v_proj.weight", 0),
    Part("attention.wo.weight", "self_attn.o_proj.weight", 1),
    Part("feed_forward.w1.weight", "mlp.gate_proj.weight", 0),
    Part("feed_forward.w2.weight", "mlp.down_proj.weight", 1),
    Part("feed_forward.w3.weight", "mlp.up_proj.weight", 0),
    Part("attention_norm.weight", "input_layernorm.weight", None),
    Part("ffn_norm.weight", "post_attention_layernorm.weight", None),
)
"""In the order of Meta's own files."""

COMPUTED = re.compile(r"^rope\.freqs$|\.inner_attention\.rope\.freqs$|rotary_emb\.inv_freq$")
"""Tables that old files carry and every program computes anew."""


def parts_of(layers: int, *, by_word: bool = False) -> list[Part]:
    """Every tensor of a model, in the order of Meta's files. by_word: the embedding is cut as LLaMA 3 cuts it."""
    embedding, *others = _TOP
    found = [replace(embedding, axis=0) if by_word else embedding, *others]
    for layer in range(layers):
        found += [
            Part(f"layers.{layer}.{part.meta}", f"model.layers.{layer}.{part.hf}", part.axis)
            for part in _LAYER
        ]
    return found


def pairs_apart(rows_RK: torch.Tensor, heads: int) -> torch.Tensor:
    """Meta's row order of wq and wk → Hugging Face's: in each head, first the even rows, then the odd ones."""
    rows, columns = rows_RK.shape
    pairs_HP2K = rows_RK.view(heads, rows // heads // 2, 2, columns)
    return pairs_HP2K.transpose(1, 2).reshape(rows, columns)


def pairs_together(rows_RK: torch.Tensor, heads: int) -> torch.Tensor:
    """The way back from `pairs_apart`."""
    rows, columns = rows_RK.shape
    halves_H2PK = rows_RK.view(heads, 2, rows // heads // 2, columns)
    return halves_H2PK.transpose(1, 2).reshape(rows, columns)


def rotary_heads(name: str, config: Mapping[str, Any]) -> int | None:
    """Heads of a tensor whose rows are rotary pairs; None for every other."""
    if name.endswith("q_proj.weight"):
        return int(config["num_attention_heads"])
    return int(config["num_key_value_heads"]) if name.endswith("k_proj.weight") else None


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face's name → shape of every tensor that config.json asks for, in transformers' order, lm_head too."""
    dim, wide, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    kv_dim = dim // heads * (config.get("num_key_value_heads") or heads)
    layer = {
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv_dim, dim),
        "self_attn.v_proj": (kv_dim, dim),
        "self_attn.o_proj": (dim, dim),
        "mlp.gate_proj": (wide, dim),
        "mlp.up_proj": (wide, dim),
        "mlp.down_proj": (dim, wide),
        "input_layernorm": (dim,),
        "post_attention_layernorm": (dim,),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (words, dim)}
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return {**shapes, "model.norm.weight": (dim,), HEAD: (words, dim)}


class MetaCheckpoint:
    """A folder of Meta's files as one source with Hugging Face's names, joined and turned as they are read.

    config: config.json of the model: the one that the files were written from, where it lies beside them and fits
    them (`kept`), else made from params.json, without token ids. A head that equals the embedding is left out of
    `infos`, as Hugging Face leaves it out: LLaMA 3.2's small models store the tied matrix twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards = [PickledFile(path) for path in shard_files(folder)]
        first = self._shards[0].infos
        if "norm.weight" not in first or "tok_embeddings.weight" not in first:
            raise ModelError(
                tr("not the tensors of a LLaMA of Meta's", "不是 Meta 的 LLaMA 张量"),
                where=str(self._shards[0].path),
                remedy=tr(f"it holds {some(sorted(first))}", f"其中有 {some(sorted(first))}"),
            )
        dim = first["norm.weight"].shape[0]
        self.params = read_params(folder, dim)
        self._parts = {part.hf: part for part in self._checked_parts(dim)}
        self.config = self._config()
        shapes = llama_shapes(self.config)
        self.infos = {name: self._info(self._parts[name]) for name in shapes if name in self._parts}
        self._require_shapes(shapes)
        self.config["tie_word_embeddings"] = HEAD not in self.infos or self._head_is_embedding()
        self.kept, self.notes = False, list[str]()
        self._take_kept_config()
        if self.config["tie_word_embeddings"]:
            self.infos.pop(HEAD, None)

    def _take_kept_config(self) -> None:
        path = self.folder / HUGGINGFACE_CONFIG
        if not path.is_file():
            return
        try:
            config = read_json(path)
            fits = from_config(config, str(path)) == from_config(self.config, str(self.folder))
            tied = bool(config.setdefault("tie_word_embeddings", False))
        except (DataError, ModelError, KeyError, TypeError, ValueError, AttributeError):
            fits = tied = False
        if fits and (self.config["tie_word_embeddings"] or not tied):
            self.config, self.kept = config, True
            return
        self.notes.append(
            tr(
                f"{HUGGINGFACE_CONFIG} does not fit params.json and the tensors, and is not used",
                f"{HUGGINGFACE_CONFIG} 与 params.json 及张量不符，不予采用",
            )
        )

    def _checked_parts(self, dim: int) -> Iterator[Part]:
        """The parts of this model, with the embedding's axis as the files have it; nothing missing, nothing over."""
        if self.params["dim"] != dim:
            raise mismatch(
                tr(
                    f"dim {self.params['dim']}, the tensors have {dim}",
                    f"dim 为 {self.params['dim']}，张量为 {dim}",
                ),
                self.folder,
            )
        wanted = parts_of(int(self.params["n_layers"]))
        first = self._shards[0].infos
        for shard in self._shards:
            names = {name for name in shard.infos if not COMPUTED.search(name)}
            optional = {"output.weight"} - set(first)
            missing = sorted({part.meta for part in wanted} - names - optional)
            over = sorted(names - {part.meta for part in wanted})
            if missing or over:
                detail = tr(f"missing: {some(missing)}", f"缺少：{some(missing)}") if missing else ""
                detail += tr(f" not expected: {some(over)}", f" 多出：{some(over)}") if over else ""
                raise ModelError(
                    tr(
                        f"the tensors are not those of n_layers {self.params['n_layers']}; {detail.strip()}",
                        f"张量与 n_layers {self.params['n_layers']} 不符；{detail.strip()}",
                    ),
                    where=str(shard.path),
                )
        by_word = first["tok_embeddings.weight"].shape[-1] == dim
        for part in parts_of(int(self.params["n_layers"]), by_word=by_word):
            if part.meta in first:
                yield part

    def _config(self) -> dict[str, Any]:
        count = len(self._shards)
        dim = int(self.params["dim"])
        inner = self._shards[0].infos["layers.0.attention.wo.weight"].shape[-1]
        needed = dim // inner if inner else 0
        if needed != count:
            raise ModelError(
                tr(
                    f"the tensors are cut for {needed} files, and {count} are here",
                    f"张量按 {needed} 个文件切分，而这里有 {count} 个",
                ),
                where=str(self.folder),
                remedy=tr(
                    "put every consolidated.*.pth of the model here",
                    "请把该模型全部 consolidated.*.pth 放在这里",
                ),
            )
        embedding = self._info(self._parts[EMBEDDING])
        wide = self._info(self._parts["model.layers.0.mlp.gate_proj.weight"]).shape[0]
        config = to_config(self.params, self.folder, words=embedding.shape[0], feed_forward=wide)
        config["dtype"] = str(embedding.dtype).removeprefix("torch.")
        return config

    def _info(self, part: Part) -> TensorInfo:
        info = self._shards[0].infos[part.meta]
        shape = list(info.shape)
        if part.axis is not None:
            shape[part.axis] = sum(shard.infos[part.meta].shape[part.axis] for shard in self._shards)
        return TensorInfo(info.dtype, tuple(shape))

    def _require_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name, info in self.infos.items():
            meta = self._parts[name].meta
            if info.shape != shapes[name]:
                raise mismatch(
                    tr(
                        f"{meta} is {list(info.shape)}, should be {list(shapes[name])}",
                        f"{meta} 的形状是 {list(info.shape)}，应为 {list(shapes[name])}",
                    ),
                    self.folder,
                )
            if len({(shard.infos[meta].dtype, shard.infos[meta].shape) for shard in self._shards}) > 1:
                raise ModelError(
                    tr(
                        f"{meta} differs in shape or type between the files",
                        f"{meta} 在各文件中形状或类型不同",
                    ),
                    where=str(self.folder),
                )

    def _head_is_embedding(self) -> bool:
        """Compared block by block as the files cut them, so that nothing is joined."""
        heads = [shard.read("output.weight") for shard in self._shards]
        tables = [shard.read("tok_embeddings.weight") for shard in self._shards]
        if self._parts[EMBEDDING].axis == 0:
            return all(torch.equal(head, table) for head, table in zip(heads, tables, strict=True))
        rows, columns = heads[0].shape[0], tables[0].shape[1]
        return all(
            torch.equal(head[:, j * columns : (j + 1) * columns], table[i * rows : (i + 1) * rows])
            for i, head in enumerate(heads)
            for j, table in enumerate(tables)
        )

    def read(self, name: str) -> torch.Tensor:
        part = self._parts[name]
        heads = rotary_heads(name, self.config)
        slices = [shard.read(part.meta) for shard in self._shards]
        if part.axis is None:
            self._require_replicas(part, slices)
            return slices[0]
        if heads is not None:
            slices = [pairs_apart(rows_RK, heads // len(slices)) for rows_RK in slices]
        return slices[0] if len(slices) == 1 else torch.cat(slices, dim=part.axis)

    def _require_replicas(self, part: Part, copies: Sequence[torch.Tensor]) -> None:
        if not all(torch.equal(copies[0], copy) for copy in copies[1:]):
            raise ModelError(
                tr(f"{part.meta} differs between the files", f"{part.meta} 在各文件中不相同"),
                where=str(self.folder),
                remedy=tr("they belong to different models", "它们属于不同的模型"),
            )


def shard_files(folder: Path) -> list[Path]:
    """consolidated.00.pth, 01, ... without a gap."""
    files = sorted(folder.glob("consolidated.*.pth"))
    numbers = [path.suffixes[0].removeprefix(".") for path in files]
    wanted = [f"{number:02d}" for number in range(len(files))]
    missing = sorted(set(wanted) - set(numbers))
    if not files or missing:
        names = [f"consolidated.{number}.pth" for number in missing or ["00"]]
        raise ModelError(
            tr(f"weight files are missing: {some(names)}", f"缺少权重文件：{some(names)}"), where=str(folder)
        )
    return files
