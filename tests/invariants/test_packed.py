"""Packed equals alone: the loss and every gradient, against transformers' own model, row by row, in float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tuoling.errors import ModelError
from tuoling.kernels.install import FastModel, install
from tuoling.kernels.loss import Extras

VOCAB = 160
FAMILIES = ("bloom", "llama", "qwen2")
ROWS = {
    "odd lengths": (5, 17, 1, 30, 2),
    "one token rows": (1, 1, 1, 6),
    "one document": (23,),
    "forty documents": tuple(1 + i * 7 % 11 for i in range(40)),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(family: str, **more: Any) -> Any:
    """2 layers, hidden 48, weights wide enough that attention is far from uniform; LLaMA and Qwen2 with grouped keys."""
    from transformers import (
        BloomConfig,
        BloomForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    torch.manual_seed(0)
    shape = {
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    }
    sizes = {"vocab_size": VOCAB, "hidden_size": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    if family == "bloom":
        model: Any = BloomForCausalLM(BloomConfig(n_layer=2, n_head=6, **sizes, **more))
    elif family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape, **sizes, **more))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**shape, **sizes, **more))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(0.0, 0.2)
            if getattr(module, "bias", None) is not None:
                module.bias.data.normal_(0.0, 0.1)
    return model


def with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:  # zero at birth, which would hide half of every gradient
            parameter.data.normal_(0.0, 0.1)
    return tuned


def batch(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    input_ids = torch.randint(4, VOCAB, (sum(lengths),), generator=generator)
    labels, start = torch.full_like(input_ids, -100), 0
    for length in lengths:
        labels[start + length // 3 : start + length - 1] = input_ids[start + length // 3 + 1 : start + length]
        start += length
    positions = torch.cat([torch.arange(length) for length in lengths])
    return input_ids, labels, positions, torch.tensor([0, *lengths]).cumsum(0).int()


def stock(model: Any, lengths: tuple[int, ...]) -> torch.Tensor:
    input_ids, labels, _, _ = batch(lengths)
    total = torch.zeros(())
    for ids, wanted in zip(input_ids.split(lengths), labels.split(lengths), strict=True):
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        total = total + F.cross_entropy(logits.float(), wanted, reduction="sum")
    return total


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], relative: float = 1e-5
) -> None:
    assert ours.keys() == theirs.keys() and len(ours) >= 8
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= relative * gradient.norm(), name


def fast(model: Any) -> FastModel:
    said: list[str] = []
    installed = install(model, say=said.append)
    assert installed.packed and installed.fused_loss and not said and not installed.reasons
    return installed


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS.keys())
def test_lora_loss_and_every_gradient(family: str, lengths: tuple[int, ...]) -> None:
    model = with_lora(make(family)).train()
    expected = stock(model, lengths)
    theirs = gradients(model, expected)
    loss = fast(model).loss_sum(*batch(lengths))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_equal(gradients(model, loss), theirs)
    assert all("lora" in name for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning_with_a_tied_head(family: str) -> None:
    model = make(family, tie_word_embeddings=True).train()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    expected = stock(model, ROWS["odd lengths"])
    theirs = gradients(model, expected)
    loss = fast(model).loss_sum(*batch(ROWS["odd lengths"]))
    assert_equal(gradients(model, loss), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_sees_its_own_pack(family: str, reentrant: bool) -> None:
    """Two losses first, then two backward passes: each is computed again with its own documents."""
    model = make(family).train()
    first, second = ROWS["odd lengths"], ROWS["forty documents"]
    theirs = gradients(model, stock(model, first) + 2 * stock(model, second))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    installed = fast(model)
    if reentrant:
        model.enable_input_require_grads()
    loss = installed.loss_sum(*batch(first)) + 2 * installed.loss_sum(*batch(second))
    assert_equal(gradients(model, loss), theirs)


def test_a_checkpoint_that_loses_the_pack_says_so() -> None:
    from tuoling.kernels.interface import pack_of

    with pytest.raises(ModelError, match="lost the packed mask") as error:
        pack_of(torch.empty(1, 1, 0, 0))
    assert "use_reentrant" in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_and_ordinary_forwards_are_untouched(family: str) -> None:
    model = make(family).eval()
    untouched = copy.deepcopy(model)
    prompt = torch.tensor([[3, 3, 17, 40, 9], [5, 6, 7, 8, 90]])
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    asked = {"input_ids": prompt, "attention_mask": padding, "max_new_tokens": 8, "do_sample": False}
    installed = fast(model)
    model.train()
    installed.loss_sum(*batch(ROWS["odd lengths"])).backward()
    model.eval()
    assert torch.equal(model.generate(**asked), untouched.generate(**asked))
    assert torch.equal(model.generate(**asked, num_beams=3), untouched.generate(**asked, num_beams=3))
    assert torch.equal(
        model(input_ids=prompt, attention_mask=padding).logits,
        untouched(input_ids=prompt, attention_mask=padding).logits,
    )
    installed.uninstall()
    assert model.config._attn_implementation == untouched.config._attn_implementation
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_install_leaves_no_trace(family: str) -> None:
    model = make(family).train()
    model.get_input_embeddings().eval()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fast(model)
    assert torch.equal(torch.rand(3), expected)
    assert model.training and not model.get_input_embeddings().training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "tuoling" not in str(model.config.to_dict())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_as_good_as_transformers_own(family: str) -> None:
    """Error against float32 on the same bf16 weights: at most 1.5 times that of the stock model, row by row."""
    model = make(family).train().bfloat16()
    exact_model = copy.deepcopy(model).float()
    lengths = (5, 60, 1, 130, 33)
    exact = gradients(exact_model, stock(exact_model, lengths))
    theirs = gradients(model, stock(model, lengths))
    ours = gradients(model, fast(model).loss_sum(*batch(lengths)))

    def error(found: dict[str, torch.Tensor]) -> float:
        off = sum(float((found[name] - exact[name]).square().sum()) for name in exact)
        return (off / sum(float(g.square().sum()) for g in exact.values())) ** 0.5

    assert error(ours) <= 1.5 * error(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_with_float32_lora_on_a_bf16_base(family: str) -> None:
    model = with_lora(make(family).bfloat16()).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    lengths = ROWS["odd lengths"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = stock(model, lengths)
        loss = fast(model).loss_sum(*batch(lengths))
    assert loss.item() == pytest.approx(theirs.item(), rel=5e-3)
    found = gradients(model, loss)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_still_happens(family: str) -> None:
    model = make(family, attention_dropout=0.5).train()
    installed = fast(model)
    one, two = (installed.loss_sum(*batch(ROWS["odd lengths"])).item() for _ in range(2))
    model.eval()
    three, four = (installed.loss_sum(*batch(ROWS["odd lengths"])).item() for _ in range(2))
    assert one != two and three == four
    assert three == pytest.approx(stock(model, ROWS["odd lengths"]).item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_learned_is_an_attached_zero(family: str) -> None:
    model = with_lora(make(family)).train()
    input_ids, labels, positions, bounds = batch(ROWS["odd lengths"])
    loss = fast(model).loss_sum(input_ids, torch.full_like(labels, -100), positions, bounds)
    found = gradients(model, loss)
    assert loss.item() == 0.0 and not any(gradient.any() for gradient in found.values())


def test_a_head_kept_whole_by_peft() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(make("llama"), config).train()
    expected = stock(model, ROWS["odd lengths"])
    theirs = gradients(model, expected)
    assert any("lm_head" in name for name in theirs)
    loss = fast(model).loss_sum(*batch(ROWS["odd lengths"]))
    ours = gradients(model, loss)
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-12, name


def test_lora_on_the_head_falls_back_to_stock_logits() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make("llama"), LoraConfig(r=4, target_modules=["q_proj", "lm_head"])).train()
    said: list[str] = []
    installed = install(model, say=said.append)
    assert installed.packed and not installed.fused_loss and len(said) == 1 and "plain linear" in said[0]
    expected = stock(model, ROWS["odd lengths"])
    assert installed.loss_sum(*batch(ROWS["odd lengths"])).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_mask_that_shows_its_shape_only_in_long_documents() -> None:
    """Packing is given up in the middle of a run, once, and the loss stays right."""
    from tuoling.kernels import install as module
    from tuoling.kernels.attention import Unpackable

    model = make("llama").train()
    installed = fast(model)
    said: list[str] = []
    installed._say = said.append
    original = FastModel._forward

    def refuse(self: FastModel, input_ids: Any, position_ids: Any = None, pack: Any = None) -> Any:
        if pack is not None and pack.longest > 20:
            raise Unpackable("its mask is odd")
        return original(self, input_ids, position_ids, pack)

    patch = pytest.MonkeyPatch()
    patch.setattr(module.FastModel, "_forward", refuse)
    try:
        for _ in range(2):
            loss = installed.loss_sum(*batch(ROWS["odd lengths"]))
            assert loss.item() == pytest.approx(stock(model, ROWS["odd lengths"]).item(), rel=1e-5)
    finally:
        patch.undo()
    assert not installed.packed and said == ["packing: off, rows run one by one, because its mask is odd"]


def test_nothing_learned_with_stock_logits() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make("llama"), LoraConfig(r=4, target_modules=["q_proj", "lm_head"])).train()
    installed = install(model, say=lambda message: None)
    input_ids, labels, positions, bounds = batch(ROWS["odd lengths"])
    loss = installed.loss_sum(input_ids, torch.full_like(labels, -100), positions, bounds)
    assert loss.item() == 0.0 and not any(g.any() for g in gradients(model, loss).values())


@pytest.mark.slow
@pytest.mark.parametrize("head", ["fused", "stock logits"])
def test_label_smoothing_and_z_loss_are_trained_and_not_validated(head: str) -> None:
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj"] if head == "fused" else ["q_proj", "lm_head"]
    model = get_peft_model(make("llama"), LoraConfig(r=4, target_modules=targets)).train()
    input_ids, labels, _, _ = batch(ROWS["odd lengths"])
    total = torch.zeros(())
    for ids, wanted in zip(
        input_ids.split(ROWS["odd lengths"]), labels.split(ROWS["odd lengths"]), strict=True
    ):
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        total = total + F.cross_entropy(logits, wanted, reduction="sum", label_smoothing=0.1)
        total = total + 1e-2 * logits[wanted != -100].logsumexp(1).square().sum()
    theirs = gradients(model, total)
    installed = install(model, say=lambda _: None)
    installed.extras = Extras(label_smoothing=0.1, z_loss=1e-2)
    assert installed.fused_loss == (head == "fused")
    loss = installed.loss_sum(*batch(ROWS["odd lengths"]))
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    ours = gradients(model, loss)
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-12, name
    model.eval()
    with torch.no_grad():
        plain = installed.loss_sum(*batch(ROWS["odd lengths"]))
    assert plain.item() == pytest.approx(stock(model, ROWS["odd lengths"]).item(), rel=1e-5)


def test_install_refuses_what_is_no_causal_model() -> None:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForMaskedLM(BertConfig(vocab_size=50, **sizes))
    with pytest.raises(ModelError, match=r"BertForMaskedLM \(bert\)") as error:
        install(model)
    assert "CausalLM" in str(error.value)
    assert not any("forward" in module.__dict__ for module in model.modules())
