"""Meta's params.json of any era ↔ config.json: sizes, feed-forward width, rotary base, context, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuoling.errors import ModelError
from tuoling.files import read_json
from tuoling.language import tr

PARAMS = "params.json"

LLAMA3_WORDS = 128_000
"""From this vocabulary on the embedding is split by words and not by columns, and the tokenizer is tiktoken's."""

_KNOWN = {
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "hidden_dim",
    "vocab_size",
    "multiple_of",
    "ffn_dim_multiplier",
    "norm_eps",
    "rope_theta",
    "use_scaled_rope",
    "rope_scaling_factor",
    "rope_high_freq_factor",
    "max_seq_len",
    "max_batch_size",
}

_MULTIPLES = (256, 1024, 4096, 128, 64, 32, 16, 8, 4, 2, 1)
_MULTIPLIERS = (None, 1.3, 1.5, 1.0, 1.2, 1.4)
"""What Meta's own files use (LLaMA 70B: 4096 and 1.3; 3 8B: 1024 and 1.3; 3.2 1B: 256 and 1.5), then any other."""


_COUNTS = {"dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "hidden_dim", "head_dim"}


def read_params(folder: Path, dim: int) -> dict[str, Any]:
    """params.json of a folder whose tensors are `dim` wide.

    An exporter of 2023 wrote its whole table of sizes there; the entry that fits the tensors is taken. Raises
    ModelError where the file is missing, holds no sizes, or holds a key that would change the computation.
    """
    path = folder / PARAMS
    if not path.is_file():
        raise ModelError(
            tr(f"no {PARAMS} beside the weights", f"权重旁没有 {PARAMS}"),
            where=str(folder),
            remedy=tr("copy it from where the weights came from", "请从权重的来源处复制该文件"),
        )
    params = read_json(path)
    if isinstance(params, dict) and "dim" not in params:
        entries = [value for value in params.values() if isinstance(value, dict) and value.get("dim") == dim]
        params = entries[0] if len(entries) == 1 else params
    missing = [
        key for key in ("dim", "n_layers", "n_heads") if not isinstance(params, dict) or key not in params
    ]
    if missing:
        raise ModelError(tr(f"it lacks {', '.join(missing)}", f"缺少 {'、'.join(missing)}"), where=str(path))
    for key in _COUNTS & params.keys():
        if params[key] is not None and (type(params[key]) is not int or params[key] < 1):
            problem = tr(f"{key} is {params[key]!r}", f"{key} 是 {params[key]!r}")
            raise ModelError(problem, where=str(path), remedy=tr("copy it again", "请重新复制"))
    unknown = sorted(params.keys() - _KNOWN)
    if unknown:
        raise ModelError(
            tr(
                f"{', '.join(unknown)}: not a key of LLaMA 1, 2 or 3, so the model may compute something else",
                f"{'、'.join(unknown)}：不是 LLaMA 1、2、3 的键，模型的计算方式可能不同",
            ),
            where=str(path),
            remedy=tr("if it does not matter, take it out of a copy", "若无影响，请在副本中删去"),
        )
    return params


def feed_forward_size(dim: int, multiple_of: int, multiplier: float | None = None) -> int:
    """Meta's rule: two thirds of 4 x dim, times the multiplier, rounded up to a multiple."""
    size = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        size = int(multiplier * size)
    return multiple_of * ((size + multiple_of - 1) // multiple_of)


def rule_for(dim: int, size: int) -> tuple[int, float | None]:
    """A `multiple_of` and `ffn_dim_multiplier` that give `size` by Meta's rule."""
    for multiplier in _MULTIPLIERS:
        for multiple in _MULTIPLES:
            if feed_forward_size(dim, multiple, multiplier) == size:
                return multiple, multiplier
    exact = (size + 0.5) / int(2 * (4 * dim) / 3)  # half a unit above, so that int() comes down on it
    return 1, exact


def to_config(params: Mapping[str, Any], folder: Path, *, words: int, feed_forward: int) -> dict[str, Any]:
    """config.json for these sizes. words and feed_forward are those of the tensors in `folder`.

    Raises ModelError where params.json gives another feed-forward width than the tensors have.
    """
    dim, heads = int(params["dim"]), int(params["n_heads"])
    expected = params.get("hidden_dim") or feed_forward_size(
        dim, int(params.get("multiple_of", 256)), params.get("ffn_dim_multiplier")
    )
    if expected != feed_forward:
        raise mismatch(
            tr(
                f"multiple_of and ffn_dim_multiplier give a feed-forward width of {expected}, the tensors have "
                f"{feed_forward}",
                f"multiple_of 和 ffn_dim_multiplier 得到的前馈宽度是 {expected}，张量中是 {feed_forward}",
            ),
            folder,
        )
    said = params.get("vocab_size") or -1
    if said > 0 and said != words:
        raise mismatch(
            tr(
                f"vocab_size {said}, the tensors have {words} rows",
                f"vocab_size 为 {said}，张量有 {words} 行",
            ),
            folder,
        )
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": dim,
        "intermediate_size": feed_forward,
        "num_hidden_layers": int(params["n_layers"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(params.get("n_kv_heads") or heads),
        "head_dim": int(params.get("head_dim") or dim // heads),
        "rms_norm_eps": float(params.get("norm_eps", 1e-5)),
        "rope_theta": float(params.get("rope_theta", 10000.0)),
        "max_position_embeddings": _context(params),
        "vocab_size": words,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "use_cache": True,
    }
    if params.get("use_scaled_rope"):
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": float(params.get("rope_scaling_factor") or _scaling_factor(dim)),
            "low_freq_factor": 1.0,
            "high_freq_factor": float(params.get("rope_high_freq_factor") or 4.0),
            "original_max_position_embeddings": 8192,
        }
    return config


def _scaling_factor(dim: int) -> float:
    """LLaMA 3.1 (dim 4096 and more) stretches its context 8 times, 3.2 (1B and 3B) 32 times; the file does not say."""
    return 32.0 if dim < 4096 else 8.0


def _usual_scaling(rope: Mapping[str, Any]) -> bool:
    """Whether what params.json cannot say is as Meta's code has it."""
    return (rope.get("low_freq_factor"), rope.get("original_max_position_embeddings")) == (1.0, 8192)


def _context(params: Mapping[str, Any]) -> int:
    """Positions the model was trained for: the file seldom says, so by era."""
    theta = float(params.get("rope_theta", 10000.0))
    if params.get("max_seq_len"):
        return int(params["max_seq_len"])
    if params.get("use_scaled_rope"):
        return 131_072  # LLaMA 3.1 and 3.2
    if theta == 1e6:
        return 16_384  # Code Llama
    if theta >= 500_000:
        return 8192  # LLaMA 3
    second = "n_kv_heads" in params or (params.get("norm_eps") == 1e-5 and params["dim"] != 8192)
    return 4096 if second else 2048  # of LLaMA 1, 65B alone (dim 8192) has 1e-5 too


def mismatch(detail: str, folder: Path) -> ModelError:
    """params.json and the tensors say different things."""
    return ModelError(
        tr(f"{PARAMS} does not fit the tensors: {detail}", f"{PARAMS} 与张量不符：{detail}"),
        where=str(folder / PARAMS),
        remedy=tr(
            "it belongs to another size; take the one that came with these files",
            "它属于另一种规模；请使用随这些文件发布的那一份",
        ),
    )


def from_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """params.json for a Hugging Face config. Raises ModelError for what Meta's code does not compute."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    dim, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    reasons = [
        (config.get("model_type") != "llama", f"model_type {config.get('model_type')}"),
        (config.get("hidden_act", "silu") != "silu", f"hidden_act {config.get('hidden_act')}"),
        (bool(config.get("attention_bias") or config.get("mlp_bias")), "bias"),
        (int(config.get("head_dim") or dim // heads) * heads != dim, f"head_dim {config.get('head_dim')}"),
        (kind not in ("default", "llama3"), f"rope_type {kind}"),
        (kind == "llama3" and not _usual_scaling(rope), "low_freq_factor, original_max_position_embeddings"),
    ]
    found = [name for wrong, name in reasons if wrong]
    if found:
        raise ModelError(
            tr(f"Meta's layout has no place for {', '.join(found)}", f"Meta 格式不支持 {'、'.join(found)}"),
            where=where,
            remedy=tr("only LLaMA 1, 2 and 3 can be written so", "只有 LLaMA 1、2、3 可以这样写出"),
        )
    multiple, multiplier = rule_for(dim, int(config["intermediate_size"]))
    params: dict[str, Any] = {"dim": dim, "multiple_of": multiple}
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    params |= {"n_heads": heads, "n_layers": int(config["num_hidden_layers"])}
    kv_heads = int(config.get("num_key_value_heads") or heads)
    if kv_heads != heads:  # LLaMA 1's own code knows no such key
        params["n_kv_heads"] = kv_heads
    params |= {"norm_eps": float(config.get("rms_norm_eps", 1e-6)), "vocab_size": int(config["vocab_size"])}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if theta != 10000.0:
        params["rope_theta"] = theta
    if kind == "llama3":
        params["use_scaled_rope"] = True
        if float(rope["factor"]) != _scaling_factor(dim):
            params["rope_scaling_factor"] = float(rope["factor"])
        if float(rope.get("high_freq_factor", 4.0)) != 4.0:
            params["rope_high_freq_factor"] = float(rope["high_freq_factor"])
    return params
