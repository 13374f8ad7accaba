"""How each family's tensors and sizes are called in GGUF, and which rows llama.cpp wants in another order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from tuoling.errors import ModelError
from tuoling.language import tr
from tuoling.models.adapters import some
from tuoling.weights.gguf_file import TensorPlan, type_for

if TYPE_CHECKING:
    from tuoling.weights.tensors import TensorInfo

_WEIGHT = ("weight",)
_BOTH = ("weight", "bias")

_LLAMA_GLOBAL = {
    "model.embed_tokens": ("token_embd", _WEIGHT),
    "model.norm": ("output_norm", _WEIGHT),
}
_LLAMA_BLOCK = {
    "input_layernorm": ("attn_norm", _WEIGHT),
    "self_attn.q_proj": ("attn_q", _WEIGHT),
    "self_attn.k_proj": ("attn_k", _WEIGHT),
    "self_attn.v_proj": ("attn_v", _WEIGHT),
    "self_attn.o_proj": ("attn_output", _WEIGHT),
    "post_attention_layernorm": ("ffn_norm", _WEIGHT),
    "mlp.gate_proj": ("ffn_gate", _WEIGHT),
    "mlp.up_proj": ("ffn_up", _WEIGHT),
    "mlp.down_proj": ("ffn_down", _WEIGHT),
}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA_BIASED = (*_QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_BLOOM_GLOBAL = {
    "word_embeddings": ("token_embd", _WEIGHT),
    "word_embeddings_layernorm": ("token_embd_norm", _BOTH),
    "ln_f": ("output_norm", _BOTH),
}
_BLOOM_BLOCK = {
    "input_layernorm": ("attn_norm", _BOTH),
    "self_attention.query_key_value": ("attn_qkv", _BOTH),
    "self_attention.dense": ("attn_output", _BOTH),
    "post_attention_layernorm": ("ffn_norm", _BOTH),
    "mlp.dense_h_to_4h": ("ffn_up", _BOTH),
    "mlp.dense_4h_to_h": ("ffn_down", _BOTH),
}
_COMPUTED = ("rotary_emb.inv_freq", "masked_bias", "attention.bias")
"""Buffers that old files carry and that are computed now."""


@dataclass(frozen=True)
class GgufFamily:
    """One architecture of llama.cpp that we write.

    outer, block: Hugging Face's module → (GGUF's name, the parameters it must have).
    biased:   modules of a block that may have a bias as well.
    prefix:   in front of outer names; left out by some files. blocks: in front of a block's number.
    rotated:  modules whose rows llama.cpp wants with the two numbers of a rotary pair side by side.
    """

    arch: str
    outer: Mapping[str, tuple[str, tuple[str, ...]]]
    block: Mapping[str, tuple[str, tuple[str, ...]]]
    blocks: str
    prefix: str = ""
    biased: tuple[str, ...] = ()
    rotated: tuple[str, ...] = ()


_LLAMA = GgufFamily(
    "llama",
    _LLAMA_GLOBAL,
    _LLAMA_BLOCK,
    "model.layers.",
    biased=_LLAMA_BIASED,
    rotated=("self_attn.q_proj", "self_attn.k_proj"),
)
_QWEN2 = GgufFamily(
    "qwen2",
    _LLAMA_GLOBAL,
    {**_LLAMA_BLOCK, **{name: (_LLAMA_BLOCK[name][0], _BOTH) for name in _QKV}},
    "model.layers.",
)
_QWEN3 = GgufFamily(
    "qwen3",
    _LLAMA_GLOBAL,
    {
        **_LLAMA_BLOCK,
        "self_attn.q_norm": ("attn_q_norm", _WEIGHT),
        "self_attn.k_norm": ("attn_k_norm", _WEIGHT),
    },
    "model.layers.",
)
_BLOOM = GgufFamily("bloom", _BLOOM_GLOBAL, _BLOOM_BLOCK, "h.", prefix="transformer.")

GGUF_FAMILIES = {"bloom": _BLOOM, "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _QWEN2, "qwen3": _QWEN3}
"""By `model_type` in config.json."""


def gguf_family(config: Mapping[str, Any], where: str) -> GgufFamily:
    """The family of a model that can be written. Raises ModelError for another, or for a variant llama.cpp lacks."""
    kind = config.get("model_type")
    family = GGUF_FAMILIES.get(str(kind))
    if family is None:
        raise ModelError(
            tr(f"{kind} models cannot be written as GGUF here", f"暂不支持把 {kind} 模型写成 GGUF"),
            where=where,
            remedy=tr(f"there are: {', '.join(GGUF_FAMILIES)}", f"支持：{', '.join(GGUF_FAMILIES)}"),
        )
    wrong = []
    if config.get("apply_residual_connection_post_layernorm"):
        wrong.append("apply_residual_connection_post_layernorm")
    if config.get("use_sliding_window"):
        wrong.append("use_sliding_window")
    if family is not _BLOOM and config.get("hidden_act", "silu") != "silu":
        wrong.append(f"hidden_act={config['hidden_act']}")
    rope = rope_parameters(config)
    if rope.get("rope_type") not in (None, "default", "linear", "yarn", "llama3"):
        wrong.append(f"rope_type={rope['rope_type']}")
    if wrong:
        raise ModelError(
            tr(
                f"llama.cpp has no {', '.join(wrong)} for this family",
                f"llama.cpp 的这个系列不支持 {', '.join(wrong)}",
            ),
            where=where,
        )
    return family


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of today's configs, from the `rope_theta` and `rope_scaling` of older ones too."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type")
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    return rope


@dataclass
class Sizes:
    """What GGUF says of a model besides its tensors, by the keys below the architecture's name."""

    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    values: dict[str, int | float | str] = field(default_factory=dict)


def read_sizes(config: Mapping[str, Any], family: GgufFamily) -> Sizes:
    """Sizes by config.json, old names included. Raises ModelError where one is missing."""

    def first(*names: str) -> Any:
        found = next((config[name] for name in names if config.get(name) is not None), None)
        if found is None:
            raise ModelError(tr(f"config.json has no {names[0]}", f"config.json 中没有 {names[0]}"))
        return found

    hidden = first("hidden_size", "n_embed")
    heads = first("num_attention_heads", "n_head")
    blocks = first("num_hidden_layers", "n_layer")
    kv_heads = heads if family is _BLOOM else config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    if family is _BLOOM:
        # positions are an attention bias: the length it was trained with is no limit
        context = config.get("seq_length") or 2048
        values: dict[str, int | float | str] = {
            "feed_forward_length": 4 * hidden,
            "attention.layer_norm_epsilon": float(config.get("layer_norm_epsilon", 1e-5)),
        }
    else:
        context = first("max_position_embeddings")
        window = config.get("sliding_window")
        if isinstance(window, int) and family is _LLAMA:
            context = min(
                context, window
            )  # llama.cpp lets this family see everything: right up to the window
        values = {
            "feed_forward_length": first("intermediate_size"),
            "attention.layer_norm_rms_epsilon": float(first("rms_norm_eps")),
            "attention.key_length": head_dim,
            "attention.value_length": head_dim,
            "rope.dimension_count": head_dim,
            **_rope_values(rope_parameters(config)),
        }
    values |= {
        "context_length": context,
        "embedding_length": hidden,
        "block_count": blocks,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
    }
    return Sizes(blocks, heads, kv_heads, head_dim, context, values)


def _rope_values(rope: Mapping[str, Any]) -> dict[str, int | float | str]:
    values: dict[str, int | float | str] = {"rope.freq_base": float(rope["rope_theta"])}
    if rope.get("rope_type") in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
        if rope.get("original_max_position_embeddings"):
            values["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    return values


def rope_factors(config: Mapping[str, Any], head_dim: int) -> torch.Tensor | None:
    """LLaMA 3.1's stretching of long wavelengths as llama.cpp's divisors, one a pair; None for other models."""
    rope = rope_parameters(config)
    if rope.get("rope_type") != "llama3":
        return None
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    trained = rope["original_max_position_embeddings"]
    factors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * pair / head_dim)
        if wavelength < trained / high:
            factors.append(1.0)
        elif wavelength > trained / low:
            factors.append(factor)
        else:
            smooth = (trained / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)


def paired_rows(rows: int, heads: int) -> torch.Tensor:
    """Row order that puts the two numbers of a rotary pair side by side, from Hugging Face's two halves of a head."""
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def unfused_rows(rows: int, heads: int) -> torch.Tensor:
    """Row order [3, head, d] of BLOOM's fused query, key, value, from its [head, 3, d]."""
    return torch.arange(rows).view(heads, 3, rows // heads // 3).transpose(0, 1).reshape(-1)


def row_order(family: GgufFamily, module: str, rows: int, sizes: Sizes) -> torch.Tensor | None:
    """In which order a module's output rows are written; None: as they are. Raises ModelError for half a head."""
    fused = module == "self_attention.query_key_value"
    if not fused and module not in family.rotated:
        return None
    heads = sizes.kv_heads if module.endswith("k_proj") else sizes.heads
    if rows % (heads * (3 if fused else 2)):
        raise ModelError(
            tr(f"{module} has {rows} rows for {heads} heads", f"{module} 有 {rows} 行，却有 {heads} 个头"),
            where="config.json",
            remedy=tr("the weights belong to another config.json", "权重与 config.json 不属于同一模型"),
        )
    return unfused_rows(rows, heads) if fused else paired_rows(rows, heads)


def gguf_module(family: GgufFamily, module: str) -> tuple[str, str] | None:
    """Hugging Face's module name → (GGUF's, the name inside a block or ""); None where llama.cpp has no such one."""
    short = module.removeprefix(family.prefix)
    if short in family.outer:
        return family.outer[short][0], ""
    if module == "lm_head":
        return "output", ""
    number, _, inside = short.removeprefix(family.blocks).partition(".")
    if short.startswith(family.blocks) and number.isdigit() and inside in family.block:
        return f"blk.{number}.{family.block[inside][0]}", inside
    return None


def plan_tensors(
    family: GgufFamily,
    config: Mapping[str, Any],
    infos: Mapping[str, TensorInfo],
    wanted: str,
    where: str,
) -> list[TensorPlan]:
    """Every tensor of the file, in order of the source. Raises ModelError for one that is missing or unknown."""
    sizes = read_sizes(config, family)
    tied = bool(config.get("tie_word_embeddings", family is _BLOOM))
    plans, unknown = [], []
    for name, info in infos.items():
        module, _, parameter = name.rpartition(".")
        if name.endswith(_COMPUTED) or (module == "lm_head" and tied):
            continue  # llama.cpp takes the embedding for the head where there is none
        found = gguf_module(family, module)
        if found is None or parameter not in _BOTH:
            unknown.append(name)
            continue
        gguf_name, inside = found
        rows = row_order(family, inside, info.shape[0], sizes)
        kind = type_for(info.shape, wanted)
        plans.append(TensorPlan(f"{gguf_name}.{parameter}", name, info.shape, kind, rows))
    factors = rope_factors(config, sizes.head_dim)
    if factors is not None:
        plans.append(TensorPlan("rope_freqs.weight", "", tuple(factors.shape), "f32", values=factors))
    have = {plan.name for plan in plans}
    head = set() if tied else {"output.weight"}
    missing = sorted((_required(family, sizes.blocks) | head) - have)
    surplus = sorted(have - _allowed(family, sizes.blocks))
    for names, en, zh in (
        (unknown + surplus, "tensors that llama.cpp has no place for", "llama.cpp 中没有位置的张量"),
        (missing, "tensors are missing", "缺少张量"),
    ):
        if names:
            raise ModelError(
                tr(f"{len(names)} {en}: {some(names)}", f"{len(names)} 个{zh}：{some(names)}"), where=where
            )
    return plans


def _required(family: GgufFamily, blocks: int) -> set[str]:
    names = {f"{gguf}.{part}" for gguf, parts in family.outer.values() for part in parts}
    for number in range(blocks):
        names |= {f"blk.{number}.{gguf}.{part}" for gguf, parts in family.block.values() for part in parts}
    return names


def _allowed(family: GgufFamily, blocks: int) -> set[str]:
    names = _required(family, blocks) | {"output.weight", "rope_freqs.weight"}
    biased = [family.block[module][0] for module in family.biased]
    return names | {f"blk.{number}.{gguf}.bias" for number in range(blocks) for gguf in biased}


def write_sizes(sizes: Sizes, arch: str) -> Callable[[Any], None]:
    """Puts the sizes into a gguf.GGUFWriter."""

    def write(writer: Any) -> None:
        for key, value in sizes.values.items():
            name = f"{arch}.{key}"
            if isinstance(value, str):
                writer.add_string(name, value)
            elif isinstance(value, float):
                writer.add_float32(name, value)
            else:
                writer.add_uint32(name, value)

    return write
