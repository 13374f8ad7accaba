"""The parity gate: equal weights pass with a difference of exactly 0, one wrong tensor does not pass."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import tiny_model, tiny_tokenizer

from tuoling.errors import ModelError
from tuoling.files import read_json
from tuoling.weights import parity
from tuoling.weights.parity import PROBES, Beside, ParityError, Request, Weights, gate
from tuoling.weights.parity_child import Comparison, narrower, padded
from tuoling.weights.parity_figures import Bound, Parity, judge, table
from tuoling.weights.parity_sides import STREAMED, FolderSide

LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "head_dim": 8,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "gemma2": LLAMA,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64},
    "mixtral": {**LLAMA, "num_local_experts": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2},
}


def compare(before: Any, after: Any, *, lossless: bool = True, **more: Any) -> Parity:
    """The gate's work in this process, where no libraries are imported again."""
    bound = more.pop("bound", None)
    sides = [
        side if hasattr(side, "logits") or isinstance(side, Weights) else Weights(side)
        for side in (before, after)
    ]
    request = Request(sides[0], sides[1], more.pop("probes", PROBES), lossless, **more)
    return judge(Comparison(request).measure(), lossless=lossless, bound=bound, seconds=0.0)


def altered(model: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a model with something done to its tensors."""
    out.mkdir()
    for file in model.iterdir():
        if file.name != "model.safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: tiny_model(folder / family, family) for family in ("llama", "bloom", "qwen2")}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_model_answers_as_transformers_does(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    words = len(tokenizer)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family], vocab_size=words, pad_token_id=3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids_NT = torch.randint(4, words, (3, 9))
    with torch.no_grad():
        expected = model(ids_NT).logits
        text = model.generate(ids_NT, max_new_tokens=5, do_sample=False, eos_token_id=None)[:, 9:]

    side = FolderSide(Weights(tmp_path), None, {}, tick=lambda: None, before_drop=lambda: None)
    torch.testing.assert_close(side.logits(ids_NT), expected, rtol=0, atol=1e-6)
    assert torch.equal(side.greedy(ids_NT, 5, words), text)
    assert (side.how == STREAMED) == (family != "mixtral"), side.how  # its experts lie otherwise in the files


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bloom", "qwen2"])
def test_equal_weights_differ_by_exactly_nothing(models: Mapping[str, Path], family: str) -> None:
    from transformers import AutoModelForCausalLM

    found = compare(models[family], models[family])
    assert found.passed and found.greedy_equal
    assert found.max_logit_difference == found.tolerance == 0.0
    assert found.top1_agreement == 1.0
    assert found.streamed == {"before": STREAMED, "after": STREAMED}

    # the figures themselves, from the whole model and one probe at a time
    tokenizer = tiny_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(models[family], dtype=torch.float32).eval()
    nats, tokens, spreads = 0.0, 0, []
    for text in PROBES:
        ids = torch.tensor([tokenizer(text)["input_ids"][:32]])
        with torch.no_grad():
            logits = model(ids).logits[0]
        nats += float(torch.nn.functional.cross_entropy(logits[:-1].double(), ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
        spreads.append(logits.std(-1))
    assert found.perplexity_before == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert found.positions == tokens + len(PROBES)
    assert found.spread == pytest.approx(float(torch.cat(spreads).mean()), rel=1e-5)
    prompt = torch.tensor([tokenizer(PROBES[4])["input_ids"][:8]])
    written = model.generate(prompt, max_new_tokens=16, do_sample=False, eos_token_id=None)[0, 8:]
    assert found.greedy[4].before == tokenizer.decode(written, skip_special_tokens=True)


def _transpose(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = tensors[name].T


def _interleave_rotary(tensors: dict[str, torch.Tensor]) -> None:
    """The permutation between Meta's and Hugging Face's rotary halves, once too often, on the keys of one layer."""
    name = "model.layers.0.self_attn.k_proj.weight"
    rows, columns = tensors[name].shape
    tensors[name] = tensors[name].view(2, rows // 4, 2, columns).transpose(1, 2).reshape(rows, columns)


def _swap_gate_and_up(tensors: dict[str, torch.Tensor]) -> None:
    up, down = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj.weight"
    tensors[up], tensors[down] = tensors[down], tensors[up]


def _one_bit(tensors: dict[str, torch.Tensor]) -> None:
    weight = tensors["model.layers.0.mlp.down_proj.weight"]
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))


@pytest.mark.slow
@pytest.mark.parametrize("change", [_transpose, _interleave_rotary, _swap_gate_and_up])
@pytest.mark.parametrize("lossless", [True, False])
def test_one_wrong_tensor_fails(
    models: Mapping[str, Path], tmp_path: Path, change: Callable[..., None], lossless: bool
) -> None:
    wrong = altered(models["llama"], tmp_path / "wrong", change)
    strict = Bound(perplexity=1.01, top1=0.99)
    found = compare(models["llama"], wrong, lossless=lossless, bound=strict)
    assert not found.passed and found.reasons
    assert found.max_logit_difference > 0.05 * found.spread


@pytest.mark.slow
def test_the_last_bit_of_one_weight_is_seen(models: Mapping[str, Path], tmp_path: Path) -> None:
    found = compare(models["llama"], altered(models["llama"], tmp_path / "bit", _one_bit))
    assert not found.passed
    assert 0 < found.max_logit_difference < 1e-4


@pytest.mark.slow
def test_bloom_with_its_fused_queries_in_another_order_fails(
    models: Mapping[str, Path], tmp_path: Path
) -> None:
    def regroup(tensors: dict[str, torch.Tensor]) -> None:
        name = "transformer.h.0.self_attention.query_key_value.weight"
        tensors[name] = tensors[name].view(4, 3, 8, 32).transpose(0, 1).reshape(96, 32)

    assert not compare(models["bloom"], altered(models["bloom"], tmp_path / "wrong", regroup)).passed


def _cast(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], None]:
    def cast(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    return cast


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrower_type_is_exact_to_that_type(
    models: Mapping[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    narrow = altered(models["llama"], tmp_path / "narrow", _cast(dtype))
    found = compare(models["llama"], narrow)
    assert found.passed and found.max_logit_difference == 0.0
    assert found.rounding_difference is not None and 1e-4 < found.rounding_difference < 0.1
    assert found.perplexity_before != found.perplexity_after  # the weights before, as they are

    wide = altered(narrow, tmp_path / "wide", _cast(torch.float32))
    back = compare(narrow, wide)
    assert back.passed and back.max_logit_difference == 0.0 and back.rounding_difference is None


@pytest.mark.slow
def test_cutting_instead_of_rounding_fails(models: Mapping[str, Path], tmp_path: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            upper = tensor.contiguous().view(torch.int32) & ~0xFFFF
            tensors[name] = upper.view(torch.float32).to(torch.bfloat16)

    assert not compare(models["llama"], altered(models["llama"], tmp_path / "cut", cut)).passed


def test_narrower_types() -> None:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    assert narrower(bf16, fp32) and narrower(fp16, fp32) and narrower(bf16, fp16) and narrower(fp16, bf16)
    assert not (narrower(fp32, bf16) or narrower(fp32, fp16) or narrower(fp32, fp32))


@pytest.fixture(scope="module")
def adapter(models: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32)
    targets = ["q_proj", "v_proj", "down_proj"]
    tuned = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    )
    torch.manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(folder)
    return folder


def merged(model: Path, adapter: Path, out: Path, *, dtype: torch.dtype, weight: float = 1.0) -> Path:
    """W + weight * 2 B A by hand, in float64."""
    lora = load_file(adapter / "adapter_model.safetensors")

    def merge(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{stem}.lora_A.weight" in lora:
                delta = lora[f"{stem}.lora_B.weight"].double() @ lora[f"{stem}.lora_A.weight"].double()
                tensors[name] = tensors[name].double() + weight * 2 * delta
            tensors[name] = tensors[name].to(dtype)

    return altered(model, out, merge)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_adapter_answers_as_the_adapter_beside_its_base(
    models: Mapping[str, Path], adapter: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    before = Weights(models["llama"], (Beside(adapter),))
    found = compare(before, merged(models["llama"], adapter, tmp_path / "merged", dtype=dtype))
    assert found.passed and found.streamed["before"] == STREAMED
    assert found.tolerance is not None and found.rounding_difference is not None
    assert found.max_logit_difference <= found.tolerance < 0.01 * found.spread
    assert found.rounding_difference > 0
    assert not compare(before, models["llama"]).passed
    nearly = merged(models["llama"], adapter, tmp_path / "nearly", dtype=dtype, weight=0.98)
    assert not compare(before, nearly).passed


@pytest.mark.slow
def test_two_adapters_with_weights(models: Mapping[str, Path], adapter: Path, tmp_path: Path) -> None:
    twice = Weights(models["llama"], (Beside(adapter, 0.5), Beside(adapter, 0.25)))
    whole = merged(models["llama"], adapter, tmp_path / "merged", dtype=torch.float32, weight=0.75)
    assert compare(twice, whole).passed
    assert not compare(Weights(models["llama"], (Beside(adapter, 0.5),)), whole).passed


@pytest.mark.slow
def test_a_merge_that_forgets_one_layer_fails(
    models: Mapping[str, Path], adapter: Path, tmp_path: Path
) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    before = load_file(models["llama"] / "model.safetensors")[name]
    full = merged(models["llama"], adapter, tmp_path / "merged", dtype=torch.float32)
    wrong = altered(full, tmp_path / "wrong", lambda tensors: tensors.update({name: before}))
    assert not compare(Weights(models["llama"], (Beside(adapter),)), wrong).passed


def pruned(model: Path, out: Path, kept: list[int]) -> Path:
    """Rows of both embeddings by hand. The tokenizer stays: it is asked for by the map in these tests."""

    def slice_rows(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][kept]

    folder = altered(model, out, slice_rows)
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": len(kept)}), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_a_pruned_vocabulary_is_compared_on_the_words_it_kept(
    models: Mapping[str, Path], tmp_path: Path
) -> None:
    kept = [*range(4), *range(10, 300)]
    small = pruned(models["llama"], tmp_path / "small", kept)
    found = compare(models["llama"], small, vocabulary=tuple(kept))
    assert found.passed and found.max_logit_difference == 0.0 and found.columns == len(kept) == 294
    # all words before against the kept ones after: fewer words to be wrong with
    assert found.perplexity_after < found.perplexity_before

    shifted = (*kept[:50], kept[51], kept[50], *kept[52:])
    assert not compare(models["llama"], small, vocabulary=shifted).passed
    with pytest.raises(ModelError, match="294 words after, 320 expected"):
        compare(models["llama"], small)


@pytest.mark.slow
def test_a_grown_vocabulary_is_compared_on_the_words_it_had(
    models: Mapping[str, Path], tmp_path: Path
) -> None:
    kept = list(range(320))
    grown = pruned(models["llama"], tmp_path / "grown", [*kept, 7, 9])
    found = compare(models["llama"], grown, vocabulary=(*kept, -1, -1))
    assert found.passed and found.columns == 320 and found.max_logit_difference == 0.0


@dataclass
class TransformersEngine:
    """An engine for the tests: another route to logits, with an error of its choice."""

    folder: Path
    error: float = 0.0

    def logits(self, ids: Any) -> np.ndarray:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        with torch.no_grad():
            found = model(torch.tensor([list(ids)])).logits[0].numpy()
        return found + self.error * np.sin(np.arange(found.size, dtype=np.float32)).reshape(found.shape)


@pytest.mark.slow
def test_an_engine_may_round_but_not_be_wrong(models: Mapping[str, Path]) -> None:
    probes = PROBES[:2]
    near = compare(models["qwen2"], TransformersEngine(models["qwen2"], 1e-3), probes=probes)
    assert near.passed and near.max_logit_difference == pytest.approx(1e-3, rel=0.05)
    assert near.streamed["after"] != STREAMED
    assert not compare(models["qwen2"], TransformersEngine(models["qwen2"], 0.1), probes=probes).passed


@pytest.mark.slow
def test_a_lossy_step_passes_within_its_bound(models: Mapping[str, Path], tmp_path: Path) -> None:
    def coarse(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "proj" in name:
                step = tensor.abs().amax(-1, keepdim=True) / 127
                tensors[name] = (tensor / step).round() * step

    after = altered(models["llama"], tmp_path / "coarse", coarse)
    found = compare(models["llama"], after, lossless=False)
    assert found.passed and found.tolerance is None and found.bound == Bound()
    assert found.max_logit_difference > 0
    assert not compare(models["llama"], after).passed
    ratio = found.perplexity_after / found.perplexity_before
    refused = compare(models["llama"], after, lossless=False, bound=Bound(perplexity=ratio * 0.999, top1=0.0))
    assert not refused.passed and "perplexity" in refused.reasons[0]


@pytest.mark.slow
def test_weights_that_give_nan_are_told(models: Mapping[str, Path], tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = math.nan

    with pytest.raises(ModelError, match="after give logits that are NaN"):
        compare(models["llama"], altered(models["llama"], tmp_path / "nan", spoil))


@pytest.mark.slow
def test_a_tensor_of_another_shape_is_named(models: Mapping[str, Path], tmp_path: Path) -> None:
    def flatten(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].T

    with pytest.raises(ModelError, match=r"layers.0.mlp.up_proj.weight has the shape \[32, 64\]"):
        compare(models["llama"], altered(models["llama"], tmp_path / "wrong", flatten))


def test_rows_are_filled_up_on_the_right() -> None:
    assert padded([[5, 6, 7], [8]]).tolist() == [[5, 6, 7], [8, 0, 0]]


@pytest.mark.slow
@pytest.mark.usefixtures("gate_here")
def test_the_gate_refuses_and_leaves_no_record(models: Mapping[str, Path], tmp_path: Path) -> None:
    wrong = altered(models["llama"], tmp_path / "wrong", _transpose)
    with pytest.raises(ParityError, match="logits differ by") as caught:
        gate(models["llama"], wrong, lossless=True, say=lambda _: None)
    assert "--no-verify" in (caught.value.remedy or "")
    assert not (wrong / "parity.json").exists()


def test_a_child_that_dies_is_told(monkeypatch: pytest.MonkeyPatch, models: Mapping[str, Path]) -> None:
    import sys

    for command, told in (("import os; os.kill(os.getpid(), 9)", "memory"), ("raise OSError('x y')", "x y")):
        monkeypatch.setattr(parity, "CHILD", (sys.executable, "-c", command))
        with pytest.raises(ParityError, match=told):
            gate(models["llama"], models["llama"], lossless=True, say=lambda _: None)


def test_skipping_is_recorded(tmp_path: Path) -> None:
    parity.skipped(tmp_path)
    assert read_json(tmp_path / "parity.json") == {"verified": False, "why": "--no-verify"}
    (tmp_path / "x.gguf").write_bytes(b"")
    parity.skipped(tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf.parity.json").is_file()


@pytest.mark.slow
def test_the_gate_holds_one_layer_and_writes_its_figures_beside_the_output(tmp_path: Path) -> None:
    """Through the child process, as every command does it: 10 layers of 13 MiB and two tables of 8 MiB, and half of that
    on the other side. What it needs is less than the larger side alone (146 MiB)."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=8, vocab_size=4096
    )
    full = tmp_path / "full"
    AutoModelForCausalLM.from_config(config).save_pretrained(full)
    tiny_tokenizer().save_pretrained(full)
    half = altered(full, tmp_path / "half", _cast(torch.bfloat16))
    lines: list[str] = []
    found = gate(full, half, lossless=True, probes=PROBES[:2], say=lines.append)
    record = read_json(half / "parity.json")
    assert record["verified"] is True and record["passed"] is True
    assert record["max_logit_difference"] == 0.0 == found.max_logit_difference
    assert lines[0].startswith("parity passed: ") and lines == table(found)
    assert (full / "model.safetensors").stat().st_size > 140 << 20
    assert found.peak_gib is not None and record["peak_gib"] == found.peak_gib
    assert found.peak_gib * 2**30 < 140 << 20
