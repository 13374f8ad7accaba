from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.devices import NEEDS_A_GPU
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tuoling.kernels import norm
from tuoling.kernels.forwards import put_back

TINY = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = x.double(), weight.double()
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize("rows", [1, 5, 700])
@pytest.mark.parametrize("block_bytes", [norm.BLOCK_BYTES, 4 * 24 * 3])
def test_values_and_gradients_are_those_of_the_formula(
    rows: int, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm, "BLOCK_BYTES", block_bytes)
    torch.manual_seed(0)
    x = (torch.randn(1, rows, 24) * 3).requires_grad_()
    weight = torch.randn(24, requires_grad=True)
    y, wanted = norm.rms_norm(x, weight, 1e-5), reference(x, weight, 1e-5)
    weights = torch.randn_like(y)
    ours = torch.autograd.grad((y * weights).sum(), (x, weight))
    theirs = torch.autograd.grad((wanted * weights).sum(), (x, weight))
    for one, other in zip((y, *ours), (wanted, *theirs), strict=True):
        assert float((one - other).detach().norm() / other.detach().norm()) < 1e-6


def test_bf16_errs_no_more_than_transformers() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    module = LlamaRMSNorm(512, 1e-6)
    torch.nn.init.normal_(module.weight, 1.0, 0.2)
    module = module.bfloat16()
    x = (torch.randn(300, 512) * 2).bfloat16().requires_grad_()
    weights = torch.randn(300, 512)

    def error(y: Tensor) -> list[float]:
        (gradient,) = torch.autograd.grad((y.float() * weights).sum(), x)
        wanted = reference(x, module.weight, 1e-6)
        (exact,) = torch.autograd.grad((wanted * weights).sum(), x)
        return [float((y - wanted).detach().norm()), float((gradient - exact).float().norm())]

    ours, theirs = error(norm.rms_norm(x, module.weight, 1e-6)), error(module(x))
    assert ours[0] <= theirs[0] and ours[1] <= theirs[1]


@pytest.mark.parametrize(
    ("model", "norms"),
    [
        (LlamaForCausalLM(LlamaConfig(**TINY, num_attention_heads=4)), 5),
        (Qwen3ForCausalLM(Qwen3Config(**TINY, **HEADS)), 9),  # two a layer more, on the heads
        (GemmaForCausalLM(GemmaConfig(**TINY, **HEADS)), 0),  # 1 + weight: its own stays
        (BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=2)), 0),
    ],
    ids=["llama", "qwen3", "gemma", "bloom"],
)
def test_only_norms_that_compute_the_same_are_replaced(model: Any, norms: int) -> None:
    model.train()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    ids = torch.arange(12).unsqueeze(0)
    wanted = model(input_ids=ids, use_cache=False).logits
    changed = norm.install(model)
    assert len(changed) == norms
    assert float((model(input_ids=ids, use_cache=False).logits - wanted).detach().abs().max()) < 1e-5
    put_back(changed)
    assert not any("forward" in module.__dict__ for module in model.modules())


@NEEDS_A_GPU
def test_norms_on_a_gpu_are_transformers_own() -> None:
    model = LlamaForCausalLM(LlamaConfig(**TINY, **HEADS)).to("cuda")
    assert norm.install(model) == []
    assert not any("forward" in module.__dict__ for module in model.modules())
