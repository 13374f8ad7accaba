"""Which families train packed, which fall back, which are refused: tried on tiny random models.

    python benchmarks/families.py            writes docs/families.md
    python benchmarks/families.py llama      prints one family

Each model has 2 or more layers, float32 weights large enough that attention is far from uniform, and is asked
for the summed loss and the gradient of four rows, ours against transformers' own logits of each row alone.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

LENGTHS = (5, 1, 23, 12)
VOCAB = 128
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MHA = {"num_key_value_heads": 4}
HEAD = {"head_dim": 8}
WINDOW = {"sliding_window": 6}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA = {
    **MHA,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MAMBA = {"state_size": 8, "conv_kernel": 4, "expand": 2, "time_step_rank": 4}


@dataclass(frozen=True)
class Case:
    """A family: transformers' model_type and what its tiny config needs beside COMMON."""

    model_type: str
    extra: dict[str, Any] = field(default_factory=dict)
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.model_type} ({self.variant})" if self.variant else self.model_type


CASES = (
    Case("bloom", {"n_layer": 2, "n_head": 4}),
    Case("bloom", {"n_layer": 2, "n_head": 6, "hidden_size": 48}, "heads no power of two"),
    Case("llama"),
    Case("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, "tied, biases"),
    Case("qwen2"),
    Case("qwen2", {**MIXED, "use_sliding_window": True}, "sliding window"),
    Case("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 24}),
    Case("qwen3", HEAD),
    Case("qwen3_moe", {**HEAD, **EXPERTS}),
    Case(
        "qwen3_next",
        {
            **HEAD,
            **EXPERTS,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 24,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    Case("mistral", {**HEAD, **WINDOW}, "sliding window"),
    Case("ministral", {**HEAD, **MIXED}),
    Case("mixtral", {**EXPERTS, "head_dim": 8}),
    Case("gemma", HEAD),
    Case("gemma2", {**HEAD, **MIXED, "query_pre_attn_scalar": 8}, "soft caps"),
    Case("gemma3_text", {**HEAD, **MIXED, "query_pre_attn_scalar": 8}),
    Case("phi", {}),
    Case("phi3", {**WINDOW}),
    Case("phimoe", {**EXPERTS, "head_dim": 8}),
    Case("cohere", {"logit_scale": 0.25}, "logit scale"),
    Case("cohere2", {**HEAD, **MIXED, "logit_scale": 0.25}),
    Case("olmo"),
    Case("olmo2"),
    Case("olmo3", MIXED),
    Case("olmoe", EXPERTS),
    Case("stablelm"),
    Case("starcoder2", {"sliding_window": 6}),
    Case("granite", {"logits_scaling": 8.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}),
    Case("granitemoe", {**EXPERTS, "logits_scaling": 4.0}),
    Case(
        "granitemoehybrid",
        {
            **EXPERTS,
            "shared_intermediate_size": 24,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_expand": 2,
            "layer_types": ["mamba", "attention"],
            "layers_block_type": ["mamba", "attention"],
        },
        "hybrid",
    ),
    Case("deepseek_v2", MLA),
    Case("deepseek_v3", MLA),
    Case("glm", HEAD),
    Case("glm4", HEAD),
    Case(
        "glm4_moe",
        {
            **HEAD,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    Case("internlm3", HEAD),
    Case("minicpm3", {**MLA}),
    Case("smollm3"),
    Case("ernie4_5", HEAD),
    Case(
        "ernie4_5_moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 24,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": 1,
        },
    ),
    Case("hunyuan_v1_dense", HEAD),
    Case("seed_oss", HEAD),
    Case("exaone4", {**MIXED}),
    Case("nemotron"),
    Case("persimmon"),
    Case("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    Case(
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 6},
    ),
    Case("gpt_neox"),
    Case("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}),
    Case("gpt_bigcode", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    Case("gpt_oss", {**HEAD, **MIXED, **EXPERTS}, "attention sinks"),
    Case(
        "codegen", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64, "rotary_dim": 4}
    ),
    Case("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    Case("xglm", {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}),
    Case("biogpt"),
    Case("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    Case("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}, "40B shape"),
    Case("falcon", {"multi_query": True, "alibi": False}, "7B shape"),
    Case("falcon", {"multi_query": False, "alibi": True}, "ALiBi"),
    Case(
        "falcon_h1",
        {
            **HEAD,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    ),
    Case("falcon_mamba", MAMBA),
    Case("mamba", MAMBA),
    Case(
        "mamba2",
        {"num_heads": 4, "head_dim": 16, "state_size": 8, "expand": 2, "n_groups": 1, "chunk_size": 8},
    ),
    Case("rwkv", {"attention_hidden_size": 32, "context_length": 64}),
    Case("recurrent_gemma", {**HEAD, "lru_width": 32, "attention_window_size": 6, "num_hidden_layers": 3}),
    Case(
        "bamba",
        {
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
            "attn_layer_indices": [1],
        },
    ),
    Case(
        "jamba",
        {
            **EXPERTS,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    Case(
        "zamba2",
        {
            "mamba_ngroups": 1,
            "n_mamba_heads": 4,
            "mamba_d_state": 8,
            "chunk_size": 8,
            "num_mem_blocks": 1,
            "layers_block_type": ["mamba", "hybrid"],
        },
    ),
    Case("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    Case("bert", MHA, "masked language model"),
    Case(
        "t5", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}, "encoder and decoder"
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What a family does. `loss_gap`, `gradient_gap`: relative distance from rows alone, transformers' own logits."""

    case: Case
    result: str  # packed, unpacked or refused
    loss: str  # fused, stock or -
    reasons: tuple[str, ...]
    loss_gap: float = 0.0
    gradient_gap: float = 0.0


def build(case: Case) -> nn.Module:
    """The tiny model in float32, its linear and embedding weights drawn wide enough to tell positions apart."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(case.model_type, **{**COMMON, **case.extra})
    for key, value in config.to_dict().items():  # the comparison wants no chance in it
        if isinstance(value, float) and ("drop" in key or "jitter" in key):
            setattr(config, key, 0.0)
    model: nn.Module = AutoModelForCausalLM.from_config(config).float()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(0.0, 0.2)
    return model.train()


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, shifted labels (the first third of each row not learned), position_ids, cu_seqlens."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, VOCAB, (sum(LENGTHS),), generator=generator)
    labels, start = torch.full_like(input_ids, -100), 0
    for length in LENGTHS:
        first = start + length // 3
        labels[first : start + length - 1] = input_ids[first + 1 : start + length]
        start += length
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return input_ids, labels, positions, torch.tensor([0, *LENGTHS]).cumsum(0).int()


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def alone(model: Any) -> tuple[float, torch.Tensor]:
    """Summed loss and gradient of the rows one by one, transformers' own logits."""
    input_ids, labels, _, _ = rows()
    model.zero_grad(set_to_none=True)
    total = 0.0
    for ids, wanted in zip(input_ids.split(LENGTHS), labels.split(LENGTHS), strict=True):
        logits = model(input_ids=ids[None]).logits[0]
        loss = F.cross_entropy(logits.float(), wanted, reduction="sum")
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def examine(case: Case) -> Outcome:
    """Install the fast paths on the family's tiny model and compare it with itself."""
    from tuoling.errors import ModelError
    from tuoling.kernels.install import install

    try:
        model = build(case)
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            return Outcome(case, "refused", "-", ("transformers has no causal language model of it",))
        raise
    try:
        fast = install(model, say=lambda message: None)
    except ModelError as error:
        return Outcome(case, "refused", "-", (error.problem,))
    ours = fast.loss_sum(*rows())
    model.zero_grad(set_to_none=True)
    ours.backward()
    our_gradient = gradients(model)
    packed, fused = fast.packed, fast.fused_loss
    fast.uninstall()
    expected, gradient = alone(model)
    return Outcome(
        case,
        "packed" if packed else "unpacked",
        "fused" if fused else "stock",
        tuple(fast.reasons),
        abs(ours.item() - expected) / abs(expected),
        float((our_gradient - gradient).norm() / gradient.norm()),
    )


def table(outcomes: list[Outcome]) -> str:
    """docs/families.md."""
    counts = {name: sum(o.result == name for o in outcomes) for name in ("packed", "unpacked", "refused")}
    lines = [
        "# Model families · 模型家族",
        "",
        "Made by `python benchmarks/families.py`: every row is a tiny random model that was really run, its summed",
        "loss and gradient compared in float32 with transformers' own model, row by row.",
        "由 `python benchmarks/families.py` 生成：每一行都真实运行过一个随机初始化的小模型，",
        "并在 float32 下与 transformers 自己的逐条结果比较损失与梯度。",
        "",
        f"{len(outcomes)} rows: {counts['packed']} packed · 打包, {counts['unpacked']} one by one · 逐条, "
        f"{counts['refused']} refused · 拒绝.",
        "",
        "| family 家族 | rows 样本 | loss 损失 | loss gap 损失差 | gradient gap 梯度差 | why not 原因 |",
        "|---|---|---|---|---|---|",
    ]
    for o in outcomes:
        gaps = ("-", "-") if o.result == "refused" else (f"{o.loss_gap:.0e}", f"{o.gradient_gap:.0e}")
        why = "; ".join(o.reasons).replace("|", "/").replace("\n", " ")
        lines.append(f"| {o.case.name} | {o.result} | {o.loss} | {gaps[0]} | {gaps[1]} | {why} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    os.environ["TUOLING_LANG"] = "en"
    torch.set_num_threads(1)  # for models this small a second thread only waits
    names = sys.argv[1:]
    outcomes = [examine(case) for case in CASES if not names or case.model_type in names]
    if names:
        print(table(outcomes))
        return
    target = Path(__file__).resolve().parents[1] / "docs" / "families.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text(table(outcomes), encoding="utf-8")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
