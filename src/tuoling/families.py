"""The table of model families: one row each, found by `model_type` in config.json.

A family that is not listed is used all the same, by what transformers says of it (`OTHER`): a row only adds
what cannot be read from the model's own files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tuoling.errors import ModelError
from tuoling.language import tr

Quirk = Literal["alibi", "prefix_attention", "own_code", "not_causal"]
"""alibi: positions are an attention bias, position_ids are ignored by transformers' own class.
prefix_attention: attends both ways over the prompt. own_code: transformers has no class of its own for the
published folders. not_causal: no next-token model, cannot be fine-tuned here."""

_LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NEOX_TARGETS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


@dataclass(frozen=True, slots=True)
class Family:
    """What is known of a family before its weights are read.

    lora_targets: linear modules of a block by their last name; "all" where they are found by module type.
    template:     id of the template its chat versions were trained with; None where the base has none.
    licence:      id of the licence of the family's published weights; None where it differs by size or release.
    gguf:         architecture name inside GGUF files; None where llama.cpp has none.
    """

    name: str
    model_types: tuple[str, ...]
    lora_targets: tuple[str, ...] | Literal["all"] = "all"
    template: str | None = None
    licence: str | None = None
    gguf: str | None = None
    quirks: tuple[Quirk, ...] = ()


FAMILIES: tuple[Family, ...] = (
    Family(
        "bloom", ("bloom",), _NEOX_TARGETS, "belle_card", "bigscience-bloom-rail-1.0", "bloom", ("alibi",)
    ),
    Family("llama", ("llama",), _LLAMA_TARGETS, None, None, "llama"),
    Family("llama4", ("llama4", "llama4_text"), "all", None, None, "llama4"),
    Family("qwen2", ("qwen2",), _LLAMA_TARGETS, "qwen", None, "qwen2"),
    Family("qwen2_moe", ("qwen2_moe",), "all", "qwen", None, "qwen2moe"),
    Family("qwen3", ("qwen3",), _LLAMA_TARGETS, "qwen3", "apache-2.0", "qwen3"),
    Family("qwen3_moe", ("qwen3_moe",), "all", "qwen3", "apache-2.0", "qwen3moe"),
    Family("mistral", ("mistral",), _LLAMA_TARGETS, None, None, "llama"),
    Family("mixtral", ("mixtral",), "all", None, "apache-2.0", "llama"),
    Family("falcon", ("falcon",), _NEOX_TARGETS, None, None, "falcon"),
    Family("gpt2", ("gpt2",), ("c_attn", "c_proj", "c_fc"), None, None, "gpt2"),
    Family("gpt_neo", ("gpt_neo",), "all", None, "mit", None),
    Family("gpt_neox", ("gpt_neox",), _NEOX_TARGETS, None, "apache-2.0", "gptneox"),
    Family("gptj", ("gptj",), "all", None, "apache-2.0", "gptj"),
    Family("opt", ("opt",), "all", None, None, None),
    Family("mpt", ("mpt",), "all", None, None, "mpt", ("alibi",)),
    Family("gemma", ("gemma",), _LLAMA_TARGETS, None, "gemma", "gemma"),
    Family("gemma2", ("gemma2",), _LLAMA_TARGETS, None, "gemma", "gemma2"),
    Family("gemma3", ("gemma3_text",), _LLAMA_TARGETS, None, "gemma", "gemma3"),
    Family("phi", ("phi",), "all", None, "mit", "phi2"),
    Family("phi3", ("phi3",), ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), None, "mit", "phi3"),
    Family("stablelm", ("stablelm",), _LLAMA_TARGETS, None, None, "stablelm"),
    Family("starcoder2", ("starcoder2",), "all", None, "bigcode-openrail-m", "starcoder2"),
    Family("gpt_bigcode", ("gpt_bigcode",), "all", None, "bigcode-openrail-m", "starcoder"),
    Family("olmo", ("olmo",), _LLAMA_TARGETS, None, "apache-2.0", "olmo"),
    Family("olmo2", ("olmo2",), _LLAMA_TARGETS, None, "apache-2.0", "olmo2"),
    Family("granite", ("granite",), _LLAMA_TARGETS, None, "apache-2.0", "granite"),
    Family("cohere", ("cohere",), _LLAMA_TARGETS, None, None, "command-r"),
    Family("glm", ("glm", "glm4"), "all", None, None, "glm4"),
    Family("smollm3", ("smollm3",), _LLAMA_TARGETS, None, "apache-2.0", "smollm3"),
    Family("xglm", ("xglm",), "all", None, "mit", None),
    Family(
        "baichuan",
        ("baichuan",),
        ("W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"),
        None,
        None,
        "baichuan",
        ("own_code",),
    ),
    Family(
        "chatglm",
        ("chatglm",),
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        "chatglm3",
        None,
        "chatglm",
        ("prefix_attention", "own_code"),
    ),
    Family("bert", ("bert", "roberta", "xlm-roberta"), quirks=("not_causal",)),
    Family("t5", ("t5", "mt5", "umt5"), quirks=("not_causal",)),
)

OTHER = Family("other", ())
"""Any family that has no row."""

_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def family_of(model_type: str | None) -> Family:
    """The row for config.json's `model_type`; `OTHER` where there is none."""
    return _BY_TYPE.get(model_type or "", OTHER)


def own_code_refused(folder: Path) -> ModelError:
    """For a folder whose model only its own Python code can build."""
    return ModelError(
        tr(
            "it brings its own Python code, which is not run unless you say so",
            "该目录自带 Python 代码，未经允许不会运行",
        ),
        where=str(folder),
        remedy=tr(
            "read the code, then allow it: --allow-remote-code (allow_remote_code=true)",
            "先读代码，再允许：--allow-remote-code（allow_remote_code=true）",
        ),
    )
