"""Tiny models with a tokenizer, made in a moment and written as Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXT = [
    "用户:你好\n\n助手:你好，很高兴见到你。",
    "把下面的句子翻译成英文：今天天气很好。The weather is nice today.",
    "三加五等于八，十减四等于六。1 2 3 4 5 6 7 8 9 0",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
]


def tiny_tokenizer(text: list[str] | None = None, vocab_size: int = 320) -> Any:
    """A byte-level BPE with <unk> 0, <s> 1, </s> 2, <pad> 3, as BLOOM's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(text or TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def tiny_model(
    folder: Path, family: str = "bloom", *, layers: int = 2, hidden: int = 32, seed: int = 0
) -> Path:
    """Write a random model of `family` (bloom, llama, qwen2) with its tokenizer into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, Qwen2Config

    tokenizer = tiny_tokenizer()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "vocab_size": len(tokenizer)}
    llama = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": hidden * 2,
    }
    configs = {
        "bloom": lambda: BloomConfig(
            hidden_size=hidden, n_layer=layers, n_head=4, initializer_range=0.2, **ids
        ),
        "llama": lambda: LlamaConfig(**llama, initializer_range=0.2, **ids),
        "qwen2": lambda: Qwen2Config(**llama, initializer_range=0.2, **ids),
    }
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(configs[family]()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def sum_rows(count: int, start: int = 0) -> list[dict[str, str]]:
    """Distinct Alpaca rows with answers of different lengths."""
    return [
        {
            "instruction": f"{n} 加 {n + 1} 等于多少？",
            "input": "",
            "output": f"等于 {2 * n + 1}。" + "好" * (n % 5),
        }
        for n in range(start, start + count)
    ]


def settings_without_chance(folder: Path, model: Path, data: Path, keys: dict[str, Any]) -> dict[str, Any]:
    """A run in float32 on the CPU, its output in `folder`, with everything random switched off."""
    return {
        "model_name_or_path": str(model),
        "data": [str(data)],
        "output_dir": str(folder / "run"),
        "dtype": "fp32",
        "device": "cpu",
        "lora_dropout": 0.0,
        "learning_rate": 1e-2,
        "template": "domain_bloom",
        "plot_loss": False,
        **keys,
    }
