"""stories260K, a real pretrained LLaMA of 260 K parameters, as a Hugging Face folder built from llama2.c's files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np


def _rotary_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama2.c keeps the two numbers of a rotary pair side by side; Hugging Face keeps them half a head apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(0, 2, 1, 3).reshape(rows, columns)


def read_llama2c(path: Path) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Sizes and Hugging Face's tensors of a llama2.c version 0 file: 7 ints, then float32 tensors in its order."""
    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, seq_len = struct.unpack("<7i", data[:28])
    assert vocab > 0, "a negative size marks an untied head"
    floats = np.frombuffer(data, dtype="<f4", offset=28)
    position = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal position
        size = int(np.prod(shape))
        block = floats[position : position + size].reshape(shape)
        position += size
        return block

    kv_dim = dim // heads * kv_heads
    stacked = {
        "embed": take(vocab, dim),
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": take(layers, dim, dim),
        "self_attn.k_proj": take(layers, kv_dim, dim),
        "self_attn.v_proj": take(layers, kv_dim, dim),
        "self_attn.o_proj": take(layers, dim, dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, hidden, dim),
        "mlp.down_proj": take(layers, dim, hidden),
        "mlp.up_proj": take(layers, hidden, dim),
    }
    tensors = {"model.embed_tokens.weight": stacked.pop("embed"), "model.norm.weight": take(dim)}
    take(2, seq_len, dim // heads // 2)  # rotary tables, computed anew by everybody
    assert position == floats.size, "the file holds exactly these tensors"
    for name, weights in stacked.items():
        for layer in range(layers):
            weight = weights[layer]
            if name.endswith(("q_proj", "k_proj")):
                weight = _rotary_halves(weight, heads if name.endswith("q_proj") else kv_heads)
            tensors[f"model.layers.{layer}.{name}.weight"] = weight
    sizes = {
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": seq_len,
    }
    return sizes, tensors


def build_stories260k(shared_data: Path, folder: Path) -> Path:
    """Write `folder` as a Hugging Face LLaMA with its tokenizer, and return it."""
    from safetensors.numpy import save_file

    from tuoling.models.spm import bpe_from_pieces

    source = shared_data / "weights" / "stories260K"
    vocabulary = json.loads((source / "vocabulary.json").read_text(encoding="utf-8"))
    sizes, tensors = read_llama2c(source / "stories260K.bin")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "bos_token_id": vocabulary["bos_token_id"],
        "eos_token_id": vocabulary["eos_token_id"],
        "dtype": "float32",
        **sizes,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    pieces = vocabulary["pieces"]
    tokenizer = bpe_from_pieces(pieces, vocabulary["scores"], vocabulary["types"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": pieces[1], "eos_token": pieces[2], "unk_token": pieces[0], "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    return folder
