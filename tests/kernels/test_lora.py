from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.devices import DEVICES
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from tuoling.kernels import lora
from tuoling.kernels.forwards import put_back
from tuoling.kernels.install import install

LENGTHS = (5, 1, 17, 9)
TINY = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def tuned(family: str = "bloom", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    base: Any
    if family == "bloom":
        base = BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=4))
    else:
        base = LlamaForCausalLM(LlamaConfig(**TINY, intermediate_size=48, num_key_value_heads=2))
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear", **options}
    model = get_peft_model(base.to(dtype), LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if "lora_B" in name or "lora_magnitude" in name:
            nn.init.normal_(parameter, std=0.05)
    return model.train()


def batch(device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(60, (sum(LENGTHS),))
    ends = torch.tensor(LENGTHS).cumsum(0)
    labels = ids.roll(-1)
    labels[ends - 1] = -100
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), ends]).int()
    return ids.to(device), labels.to(device), positions.to(device), bounds.to(device)


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def rows_alone(model: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss sum and gradients of transformers and PEFT, one row after the other."""
    ids, labels, _, cu = batch(model.device.type)
    total = 0.0
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        logits = model(input_ids=ids[start:end].unsqueeze(0), use_cache=False).logits[0].float()
        loss = nn.functional.cross_entropy(logits, labels[start:end], reduction="sum")
        if end - start > 1:
            loss.backward()
            total += float(loss.detach())
    return total, gradients(model)


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys() and len(theirs) > 0
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_values_and_gradients_are_those_of_the_plain_formula(
    dtype: torch.dtype, bias: bool, device: str
) -> None:
    torch.manual_seed(0)
    place: dict[str, Any] = {"dtype": dtype, "device": device}
    x = torch.randn(2, 7, 12, requires_grad=True, **place)
    weight, shift = torch.randn(10, 12, **place), torch.randn(10, **place) if bias else None
    A, B = (torch.randn(*shape, requires_grad=True, **place) for shape in ((3, 12), (10, 3)))
    y = lora.lora_linear(x, weight, shift, A, B, scaling=2.5)
    wanted = lora.reference_lora_linear(x, weight, shift, A, B, scaling=2.5)
    weights = torch.randn_like(y)
    ours = torch.autograd.grad((y * weights).sum(), (x, A, B))
    theirs = torch.autograd.grad((wanted * weights).sum(), (x, A, B))
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for one, other in zip((y, *ours), (wanted, *theirs), strict=True):
        assert float((one - other).detach().norm() / other.detach().norm()) < tolerance


def dropped_places(x: Tensor, p: float) -> Tensor:
    """The elements that a layer drops which draws next: gaps on a CPU, a number an element elsewhere."""
    if x.device.type != "cpu":
        return (torch.rand(x.shape, device=x.device) < p).view(-1).nonzero().squeeze(1)
    seed = int(torch.randint(2**62, ()))
    return torch.from_numpy(lora.bernoulli_places(x.numel(), p, np.random.Generator(np.random.SFC64(seed))))


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_drops_the_inputs_of_the_adapter_alone_and_scales_the_rest(device: str) -> None:
    torch.manual_seed(0)
    place: dict[str, Any] = {"dtype": torch.float64, "device": device}
    x = torch.randn(40, 12, requires_grad=True, **place)
    weight = torch.randn(10, 12, **place)
    A, B = (torch.randn(*shape, requires_grad=True, **place) for shape in ((3, 12), (10, 3)))
    torch.manual_seed(5)
    y = lora.lora_linear(x, weight, None, A, B, scaling=2.0, dropout=0.3)
    torch.manual_seed(5)
    places = dropped_places(x, 0.3)
    kept = torch.ones(x.numel(), **place)
    kept[places] = 0.0
    wanted = x @ weight.T + 2.0 * (x * kept.view_as(x) / 0.7) @ A.T @ B.T
    weights = torch.randn_like(y)
    ours = torch.autograd.grad((y * weights).sum(), (x, A, B))
    theirs = torch.autograd.grad((wanted * weights).sum(), (x, A, B))
    assert 0 < len(places) < x.numel()
    for one, other in zip((y, *ours), (wanted, *theirs), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.95])
def test_every_place_is_drawn_with_the_same_probability_and_alone(p: float) -> None:
    random = np.random.Generator(np.random.SFC64(7))
    count, rounds = 40, 4000
    drawn = np.zeros((rounds, count))
    for row in drawn:
        places = lora.bernoulli_places(count, p, random)
        assert np.all(np.diff(places) > 0) and (not len(places) or 0 <= places[0] <= places[-1] < count)
        row[places] = 1
    sigma = (p * (1 - p) / rounds) ** 0.5
    assert np.all(np.abs(drawn.mean(0) - p) < 5 * sigma)
    neighbours = (drawn[:, 1:] * drawn[:, :-1]).mean(0)
    assert np.all(np.abs(neighbours - p * p) < 5 * (p * p * (1 - p * p) / rounds) ** 0.5 + 1e-9)
    assert abs(lora.bernoulli_places(10**6, p, random).size - 10**6 * p) < 5 * (10**6 * p * (1 - p)) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bloom", "llama"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_step_has_the_loss_and_every_gradient_of_peft(family: str, device: str) -> None:
    model = tuned(family).to(device)
    loss, theirs = rows_alone(model)
    fast = install(model)
    assert fast.reasons == [] and fast.packed and fast.fused_loss
    ours = fast.loss_sum(*batch(device))
    ours.backward()
    assert float(ours.detach()) == pytest.approx(loss, rel=1e-5)
    assert apart(gradients(model), theirs) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_bf16_errs_no_more_than_peft_under_autocast(device: str) -> None:
    exact = tuned().to(device)
    _, wanted = rows_alone(exact)
    model = tuned(dtype=torch.bfloat16).to(device)
    with torch.autocast(device, torch.bfloat16):
        _, theirs = rows_alone(copy.deepcopy(model))
        fast = install(model)
        loss = fast.loss_sum(*batch(device))
    loss.backward()
    ours = gradients(model)
    assert all(gradient.dtype == torch.float32 for gradient in ours.values())

    def error(found: dict[str, Tensor]) -> float:
        return sum(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)

    assert error(ours) <= 1.5 * error(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_gradient_checkpointing_draws_the_same_dropout_again(device: str) -> None:
    plain, saving = (tuned(lora_dropout=0.3).to(device) for _ in range(2))
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    saving.enable_input_require_grads()
    found = []
    for model in (plain, saving):
        fast = install(model)
        torch.manual_seed(3)
        fast.loss_sum(*batch(device)).backward()
        found.append(gradients(model))
    # on a GPU the embedding's gradient, and so the last bits, may be added up in another order
    assert apart(found[1], found[0]) <= (0.0 if device == "cpu" else 1e-6)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    fused = lora.lora_linear

    def counting(*args: Any, **options: Any) -> Tensor:
        calls.append(1)
        return fused(*args, **options)

    monkeypatch.setattr(lora, "lora_linear", counting)
    return calls


@pytest.mark.slow
def test_all_eight_layers_of_a_plain_adapter_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned()
    fast = install(model)
    calls = counted(monkeypatch)
    fast.loss_sum(*batch())
    assert len(calls) == 2 * 4


def dora(model: Any) -> Any:
    return tuned(use_dora=True)


def two_adapters(model: Any) -> Any:
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "other"])
    return model


def merged(model: Any) -> Any:
    model.merge_adapter()
    return model


def disabled(model: Any) -> Any:
    model.base_model.disable_adapter_layers()
    return model


def trained_bias(model: Any) -> Any:
    return tuned(bias="lora_only")


def hooked(model: Any) -> Any:
    for module in model.modules():
        if hasattr(module, "base_layer"):
            module.base_layer.register_forward_pre_hook(lambda layer, inputs: None)
    return model


@pytest.mark.parametrize("change", [dora, two_adapters, merged, disabled, trained_bias, hooked])
def test_what_is_not_plain_goes_pefts_own_way(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = change(tuned())
    ids, _, _, _ = batch()
    with torch.no_grad():
        wanted = model(input_ids=ids.unsqueeze(0)).logits
        changed = lora.install(model)
        calls = counted(monkeypatch)
        assert torch.equal(model(input_ids=ids.unsqueeze(0)).logits, wanted)
    assert len(changed) == 8 and calls == []
    put_back(changed)
    assert not any("forward" in module.__dict__ for module in changed)
