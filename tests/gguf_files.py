"""GGUF files of tiny models, and llama.cpp's logits of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

TEXTS = [
    "你好，世界！Hello, world.  two  spaces\n\n新行 123 45",
    "用户:把下面的句子翻译成英文：今天天气很好。\n\n助手:",
    " leading space, and I'll don't",
    "<s>x</s> typed by a person",
    "\n\nabc \t tab",
    "emoji 😀👩‍👩‍👧 ü ½ ² e\u0301",
    "   ",
]
"""Chinese and English, spaces, characters of several bytes, special tokens typed as text."""


def write_gguf_of(folder: Path, out: Path, outtype: str = "f32", **options: Any) -> Any:
    """Write a model folder, run or adapter without the parity gate; returns the report."""
    from tuoling.models.source import find_model
    from tuoling.weights.gguf import GgufOptions, open_model, write_model

    source, weights = open_model(find_model(folder), outtype)
    return write_model(source, out, outtype, weights=weights, options=GgufOptions(**options))


def llama_logits(file: Path, ids: Sequence[int]) -> np.ndarray:
    """[T, V] by llama.cpp, keys and values in float32."""
    from tuoling.infer.llamacpp import LlamaModel

    model = LlamaModel(file, exact=True)
    try:
        return np.stack(model.logits_of(ids, range(len(ids))))
    finally:
        model.close()


def transformers_logits(folder: Path, ids: Sequence[int]) -> np.ndarray:
    """[T, V] by transformers in float32, adapter included."""
    import torch

    from tuoling.models.load import load_model
    from tuoling.models.source import find_model

    model: Any = load_model(find_model(folder), dtype="fp32", device="cpu")
    with torch.no_grad():
        return model(torch.tensor([list(ids)]), use_cache=False).logits[0].numpy()


def divergence(before_TV: np.ndarray, after_TV: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence over the positions, in nats."""

    def log_softmax(logits_TV: np.ndarray) -> np.ndarray:
        shifted = logits_TV.astype(np.float64) - logits_TV.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    before, after = log_softmax(before_TV), log_softmax(after_TV)
    return float((np.exp(before) * (before - after)).sum(-1).mean())


def adapter_of(base: Path, folder: Path, targets: list[str], **settings: Any) -> Path:
    """A random LoRA adapter on `base`, large enough to be seen."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tuoling.files import read_json, write_json

    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=targets, **{"r": 4, "lora_alpha": 8, **settings}
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    written = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", {**written, "base_model_name_or_path": str(base)})
    write_json(folder / "template.json", {"template": "domain_bloom", "stops": []})
    return folder
