"""A GGUF file as a Hugging Face model: names, the order of rows, config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tuoling.errors import ModelError
from tuoling.language import tr
from tuoling.models.adapters import some
from tuoling.weights.gguf_families import GGUF_FAMILIES, Sizes, rope_factors, row_order
from tuoling.weights.gguf_reading import GgufFile
from tuoling.weights.tensors import TensorInfo

_TABLES = ("rope_freqs.weight",)
"""Tensors that say what config.json says."""

_CLASSES = {
    "bloom": "BloomForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""By llama.cpp's architecture, which is also transformers' model_type for these."""


class GgufModel:
    """Tensors by Hugging Face's names, in its order of rows. config: config.json.

    Raises ModelError for an architecture that is not known here, and for tensors that are missing or unknown.
    """

    def __init__(self, path: Path, *, blocks_as: torch.dtype = torch.float32) -> None:
        self.file = GgufFile(path, blocks_as=blocks_as)
        self.arch = str(self.file.metadata.get("general.architecture"))
        if self.arch not in _CLASSES or self._value("expert_count", 0):
            raise ModelError(
                tr(
                    f"GGUF files of the architecture {self.arch} cannot be turned into a folder here",
                    f"暂不支持把 {self.arch} 架构的 GGUF 转换成目录",
                )
                if self.arch not in _CLASSES
                else tr(
                    "a mixture of experts cannot be read from GGUF here", "暂不支持从 GGUF 读取混合专家模型"
                ),
                where=str(path),
                remedy=tr(f"there are: {', '.join(_CLASSES)}", f"支持：{', '.join(_CLASSES)}"),
            )
        self._family = GGUF_FAMILIES[self.arch]
        self._sizes = self._read_sizes()
        self._names = self._match()
        self.config = self._config()

    @property
    def infos(self) -> dict[str, TensorInfo]:
        stored = self.file.infos
        return {name: stored[there] for name, (there, _) in self._names.items()}

    def read(self, name: str) -> torch.Tensor:
        there, module = self._names[name]
        tensor = self.file.read(there)
        written = row_order(self._family, module, tensor.shape[0], self._sizes)
        return tensor if written is None else tensor[torch.argsort(written)]

    def _value(self, key: str, usual: Any = None) -> Any:
        """What the file says under `arch.key`. Raises ModelError where it says nothing and nothing is usual."""
        found = self.file.metadata.get(f"{self.arch}.{key}", usual)
        if found is None:
            raise ModelError(
                tr(f"it has no {self.arch}.{key}", f"其中没有 {self.arch}.{key}"), where=str(self.file.path)
            )
        return found

    def _read_sizes(self) -> Sizes:
        blocks, heads = int(self._value("block_count")), int(self._value("attention.head_count"))
        kv_heads = int(self._value("attention.head_count_kv", heads))
        hidden, context = int(self._value("embedding_length")), int(self._value("context_length"))
        usual = self._value("rope.dimension_count", hidden // heads if heads > 0 else 0)
        head_dim = int(self._value("attention.key_length", usual))
        sizes = (blocks, heads, kv_heads, head_dim, context, hidden)
        if min(sizes) < 1 or blocks > len(self.file.stored) or heads % kv_heads:
            raise ModelError(
                tr(f"its sizes make no model: {sizes}", f"其尺寸无法构成模型：{sizes}"),
                where=str(self.file.path),
            )
        return Sizes(blocks, heads, kv_heads, head_dim, context)

    def _match(self) -> dict[str, tuple[str, str]]:
        """Hugging Face's name → (GGUF's, the module inside a block or "")."""
        found, unknown = {}, []
        outer = {there: f"{self._family.prefix}{module}" for module, (there, _) in self._family.outer.items()}
        outer["output"] = "lm_head"
        inner = {there: module for module, (there, _) in self._family.block.items()}
        for name in self.file.stored:
            stem, _, part = name.rpartition(".")
            block, _, inside = stem.removeprefix("blk.").partition(".")
            if stem in outer:
                found[f"{outer[stem]}.{part}"] = (name, "")
            elif stem.startswith("blk.") and block.isdigit() and inside in inner:
                module = inner[inside]
                found[f"{self._family.prefix}{self._family.blocks}{block}.{module}.{part}"] = (name, module)
            elif name not in _TABLES:
                unknown.append(name)
        missing = sorted(self._required(outer, inner) - {there for there, _ in found.values()})
        for names, en, zh in (
            (unknown, "tensors that this architecture does not have", "该架构中没有的张量"),
            (missing, "tensors are missing", "缺少张量"),
        ):
            if names:
                raise ModelError(
                    tr(f"{len(names)} {en}: {some(names)}", f"{len(names)} 个{zh}：{some(names)}"),
                    where=str(self.file.path),
                )
        return found

    def _required(self, outer: Mapping[str, str], inner: Mapping[str, str]) -> set[str]:
        needed = {f"{there}.{part}" for there, parts in self._family.outer.values() for part in parts}
        for block in range(self._sizes.blocks):
            needed |= {
                f"blk.{block}.{there}.{part}"
                for there, parts in self._family.block.values()
                for part in parts
            }
        return needed

    def _config(self) -> dict[str, Any]:
        sizes, words = self._sizes, self.file.stored["token_embd.weight"].shape[0]
        hidden = int(self._value("embedding_length"))
        self._require_shapes(hidden)
        config: dict[str, Any] = {
            "architectures": [_CLASSES[self.arch]],
            "model_type": self.arch,
            "vocab_size": words,
            "tie_word_embeddings": "output.weight" not in self.file.stored,
            **self._token_ids(),
        }
        if self.arch == "bloom":
            return config | {
                "hidden_size": hidden,
                "n_layer": sizes.blocks,
                "n_head": sizes.heads,
                "layer_norm_epsilon": _rounded(self._value("attention.layer_norm_epsilon")),
                "seq_length": sizes.context,
                "attention_softmax_in_fp32": True,
            }
        config |= {
            "hidden_size": hidden,
            "intermediate_size": int(self._value("feed_forward_length")),
            "num_hidden_layers": sizes.blocks,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "head_dim": sizes.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": _rounded(self._value("attention.layer_norm_rms_epsilon")),
            "max_position_embeddings": sizes.context,
            "rope_theta": _rounded(self._value("rope.freq_base", 10000.0)),
        }
        if self.arch == "llama":
            config["attention_bias"] = "blk.0.attn_q.bias" in self.file.stored
            config["mlp_bias"] = "blk.0.ffn_up.bias" in self.file.stored
        scaling = self._rope_scaling(config)
        return config | ({"rope_scaling": scaling} if scaling else {})

    def _require_shapes(self, hidden: int) -> None:
        """Attention's rows are as many as the heads say."""
        sizes = self._sizes
        if self.arch == "bloom":
            expected = {"attn_qkv": 3 * hidden}
        else:
            expected = {"attn_q": sizes.heads * sizes.head_dim, "attn_k": sizes.kv_heads * sizes.head_dim}
        for inside, rows in expected.items():
            shape = self.file.stored[f"blk.0.{inside}.weight"].shape
            if shape != (rows, hidden):
                raise ModelError(
                    tr(
                        f"blk.0.{inside}.weight has the shape {list(shape)}, its sizes say {[rows, hidden]}",
                        f"blk.0.{inside}.weight 的形状是 {list(shape)}，按尺寸应为 {[rows, hidden]}",
                    ),
                    where=str(self.file.path),
                )

    def _rope_scaling(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        if "rope_freqs.weight" in self.file.stored:
            return self._llama3_scaling(config)
        linear = float(self._value("rope.scale_linear", 1.0))
        kind = self._value("rope.scaling.type", "linear" if linear != 1.0 else "none")
        if kind == "none":
            return None
        scaling = {"rope_type": kind, "factor": float(self._value("rope.scaling.factor", linear))}
        original = self._value("rope.scaling.original_context_length", 0)
        return scaling | ({"original_max_position_embeddings": int(original)} if original else {})

    def _llama3_scaling(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """LLaMA 3.1's numbers: the file has only their result, so Meta's own are tried and must give just that."""
        factors = self.file.read("rope_freqs.weight").float()
        scaling = {
            "rope_type": "llama3",
            "factor": round(float(factors.max()), 3),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        made = rope_factors({**config, "rope_scaling": scaling}, self._sizes.head_dim)
        if made is None or made.shape != factors.shape or not torch.allclose(made, factors, rtol=1e-3):
            raise ModelError(
                tr(
                    "rope_freqs.weight is not LLaMA 3.1's: config.json has no words for it",
                    "rope_freqs.weight 与 LLaMA 3.1 的不同：config.json 无法表示",
                ),
                where=str(self.file.path),
            )
        return scaling

    def _token_ids(self) -> dict[str, int]:
        names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
        keys = {name: f"tokenizer.ggml.{short}_token_id" for name, short in names.items()}
        return {name: int(self.file.metadata[key]) for name, key in keys.items() if key in self.file.metadata}


def _rounded(value: float) -> float:
    """A float32 of the file as the short decimal it was made from: 1e-05, not 9.999999747378752e-06."""
    return float(f"{value:.7g}")
