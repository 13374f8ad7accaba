"""Random LLaMAs of real shapes, with a tokenizer and an adapter, made tensor by tensor for benchmarks/weights.py."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    wide: int
    words: int

    def config(self, dtype: str) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.dim,
            "intermediate_size": self.wide,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.words,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": dtype,
        }


SHAPES = {
    "llama-7b": Shape(4096, 32, 32, 32, 11008, 32000),
    "llama-1b": Shape(2048, 16, 32, 8, 8192, 32000),
    "llama-300mb": Shape(1024, 11, 16, 16, 2816, 8000),
    "small": Shape(256, 4, 8, 4, 704, 2000),
}


def build(
    folder: Path, shape: Shape, dtype: str = "float16", seed: int = 0, base: Path | None = None
) -> Path:
    """A random Hugging Face folder, every tensor drawn, written and dropped before the next.

    base: the result is this model a little further on, as a fine-tune is.
    """
    import torch

    from tuoling.weights.meta_layout import llama_shapes
    from tuoling.weights.safetensors_writer import SafetensorsWriter
    from tuoling.weights.tensors import TensorInfo, open_weights

    before = open_weights(base) if base else None
    kind = getattr(torch, dtype)
    config = shape.config(dtype)
    infos = {name: TensorInfo(kind, size) for name, size in llama_shapes(config).items()}
    chance = torch.Generator().manual_seed(seed)
    with SafetensorsWriter(folder, infos) as writer:
        for name, info in infos.items():
            if len(info.shape) == 1:
                tensor = torch.ones(info.shape, dtype=kind)
            else:
                spread = 0.02 if before is None else 1e-4
                tensor = torch.empty(info.shape, dtype=kind).normal_(0, spread, generator=chance)
            if before is not None and len(info.shape) > 1:
                tensor += before.read(name)
            writer.write(name, tensor)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _tokenizer(folder, shape.words)
    return folder


def _tokenizer(folder: Path, words: int) -> None:
    """A byte-level BPE of `words` words: bytes, then pairs of them, so that GGUF has something to write."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(left, right) for left in letters for right in letters][: words - len(special) - len(letters)]
    vocab = {token: index for index, token in enumerate([*special, *letters, *map("".join, pairs)])}
    inner = Tokenizer(BPE(vocab=vocab, merges=pairs))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)


def adapter(folder: Path, base: Path, shape: Shape, rank: int = 8) -> Path:
    """A random LoRA on every linear layer, as PEFT writes it."""
    import torch
    from safetensors.torch import save_file

    from tuoling.weights.meta_layout import llama_shapes

    torch.manual_seed(1)
    tensors = {}
    for name, size in llama_shapes(shape.config("float16")).items():
        if "_proj" in name:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, size[1]) * 0.01
            tensors[f"{stem}.lora_B.weight"] = torch.randn(size[0], rank) * 0.01
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-3] for name in tensors})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": 16,
        "target_modules": targets,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
