"""A merged model computes what the adapter on its base computes, and what PEFT's own merge gives."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import tiny_model, tiny_tokenizer

from tuoling.errors import ModelError, OutputError
from tuoling.files import manifest_problems, sha256_file, write_json
from tuoling.models.load import find_model, load_model, load_tokenizer
from tuoling.weights import changes as changes_module
from tuoling.weights.changes import LowRank, Rows, Whole, apply_changes
from tuoling.weights.merge import merge
from tuoling.weights.merged import Weighted, open_merged

IDS = torch.tensor([[5, 9, 200, 31, 77, 4, 1, 2]])

EVERY = {
    "bloom": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
EMBEDDING = {
    "bloom": "word_embeddings",
    "llama": "embed_tokens",
    "qwen2": "embed_tokens",
    "gpt2": "wte",
}
TIED = ("bloom", "gpt2")


def gpt2(folder: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, n_positions=64
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("merge")
    made = {family: tiny_model(folder / family, family) for family in ("bloom", "llama", "qwen2")}
    return {**made, "gpt2": gpt2(folder / "gpt2")}


def peft_adapter(base: Path, folder: Path, *, seed: int = 1, **options: Any) -> Path:
    """An adapter with every weight random, as PEFT itself writes it."""
    from peft import LoraConfig, get_peft_model

    model: Any = load_model(find_model(base), dtype="fp32", device="cpu", for_training=True)
    options = {"r": 4, "lora_alpha": 6, "target_modules": EVERY[base.name], **options}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                if "magnitude" in name:
                    parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder


def logits(folder: Path, dtype: str = "fp32", **options: Any) -> torch.Tensor:
    model: Any = load_model(find_model(folder, **options), dtype=dtype, device="cpu")
    with torch.no_grad():
        return model(IDS).logits.float()  # type: ignore[no-any-return]


def merged_folder(adapter: Path, out: Path, **options: Any) -> Path:
    merge([Weighted(find_model(adapter))], out, verify=False, **options)
    return out


OPTIONS: dict[str, dict[str, Any]] = {
    "every_target": {},
    "rank_and_alpha_patterns": {"rank_pattern": {"0": 2, r".*\.1\..*": 7}, "alpha_pattern": {".*": 3}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
}


# each kind of adapter once, and each family; DoRA in both orientations of a weight
USUAL = {
    ("bloom", "bias"),
    ("bloom", "every_target"),
    ("gpt2", "dora"),
    ("llama", "dora"),
    ("llama", "rank_and_alpha_patterns"),
    ("qwen2", "rslora"),
}


def cases(families: Iterable[str], kinds: Iterable[str], usual: set[tuple[str, str]]) -> list[Any]:
    """Every pair; those that are not usual are long."""
    return [
        pytest.param(family, kind, marks=() if (family, kind) in usual else pytest.mark.long)
        for family in sorted(families)
        for kind in sorted(kinds)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), cases(EVERY, OPTIONS, USUAL))
def test_merged_computes_what_the_adapter_computes(
    bases: dict[str, Path], tmp_path: Path, family: str, kind: str
) -> None:
    from peft import PeftModel

    base = bases[family]
    options = dict(OPTIONS[kind])
    if kind == "rank_and_alpha_patterns":
        first, second = EVERY[family][:2]
        options = {"rank_pattern": {first: 2}, "alpha_pattern": {second: 3}}
    adapter = peft_adapter(base, tmp_path / "a", **options)
    out = merged_folder(adapter, tmp_path / "out")
    expected = logits(adapter)
    torch.testing.assert_close(logits(out), expected, rtol=1e-5, atol=2e-5)
    assert not torch.allclose(expected, logits(base), atol=0.1), "the adapter does something"

    plain: Any = load_model(find_model(base), dtype="fp32", device="cpu")
    stock = PeftModel.from_pretrained(plain, adapter).merge_and_unload().state_dict()
    ours = load_file(out / "model.safetensors")
    assert ours.keys() == load_file(base / "model.safetensors").keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, stock[name], rtol=2e-6, atol=2e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bloom", "gpt2"])
def test_lora_bias(bases: dict[str, Path], tmp_path: Path, family: str) -> None:
    """The other two have linear layers without a bias."""
    adapter = peft_adapter(bases[family], tmp_path / "a", lora_bias=True)
    out = merged_folder(adapter, tmp_path / "out")
    torch.testing.assert_close(logits(out), logits(adapter), rtol=1e-5, atol=2e-5)


WHOLE = ("head_saved", "embedding_saved", "both_saved", "embedding_lora", "head_lora", "tokens")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"),
    cases(EVERY, WHOLE, {*itertools.product(["bloom"], WHOLE), ("llama", "both_saved"), ("llama", "tokens")}),
)
def test_embeddings_and_heads(bases: dict[str, Path], tmp_path: Path, family: str, kind: str) -> None:
    """Tied embeddings come apart where the adapter treats them differently; PEFT's own merge would change both."""
    base, embedding = bases[family], EMBEDDING[family]
    targets = EVERY[family]
    options: dict[str, Any] = {
        "head_saved": {"modules_to_save": ["lm_head"]},
        "embedding_saved": {"modules_to_save": [embedding]},
        "both_saved": {"modules_to_save": [embedding, "lm_head"]},
        "embedding_lora": {"target_modules": [*targets, embedding]},
        "head_lora": {"target_modules": [*targets, "lm_head"]},
        "tokens": {"trainable_token_indices": {embedding: [5, 31, 2]}},
    }[kind]
    adapter = peft_adapter(base, tmp_path / "a", **options)
    out = merged_folder(adapter, tmp_path / "out")
    expected = logits(adapter)
    torch.testing.assert_close(logits(out), expected, rtol=1e-5, atol=2e-5)
    config = json.loads((out / "config.json").read_text())
    apart = family in TIED and kind != "tokens"
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) is (apart or family not in TIED)
    if apart:
        assert config["tie_word_embeddings"] is False


def merged_like_the_adapter(model: Any, base: Path, folder: Path) -> Path:
    """Give a PEFT model other weights, save it, merge it; it has to compute the same saved and merged."""
    model.peft_config["default"].base_model_name_or_path = str(base)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder / "a")
    with torch.no_grad():
        expected = model.eval()(IDS).logits
    assert torch.equal(logits(folder / "a"), expected)
    out = merged_folder(folder / "a", folder / "out")
    torch.testing.assert_close(logits(out), expected, rtol=1e-5, atol=2e-5)
    return out


@pytest.mark.slow
def test_embeddings_that_grew(bases: dict[str, Path], tmp_path: Path) -> None:
    """Seven words were added before training: the adapter holds the larger embeddings, and the result has them."""
    from peft import LoraConfig, get_peft_model

    base = bases["llama"]
    model: Any = load_model(find_model(base), dtype="fp32", device="cpu", for_training=True)
    rows = model.get_input_embeddings().weight.shape[0] + 7
    model.resize_token_embeddings(rows)
    model = get_peft_model(
        model,
        LoraConfig(r=4, target_modules=EVERY["llama"], modules_to_save=["embed_tokens", "lm_head"]),
    )
    out = merged_like_the_adapter(model, base, tmp_path)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == rows


@pytest.mark.slow
def test_tied_embeddings_that_grew_stay_tied(bases: dict[str, Path], tmp_path: Path) -> None:
    """LoRA alone, on a model whose vocabulary was made larger before: PEFT saves the embeddings beside it."""
    from peft import LoraConfig, get_peft_model

    base = bases["bloom"]
    model: Any = load_model(find_model(base), dtype="fp32", device="cpu", for_training=True)
    rows = model.get_input_embeddings().weight.shape[0] + 7
    model.resize_token_embeddings(rows)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=EVERY["bloom"]))
    out = merged_like_the_adapter(model, base, tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == rows and config.get("tie_word_embeddings", True) is True
    with pytest.raises(ModelError, match="it can be merged alone"):
        open_merged([Weighted(find_model(tmp_path / "a"))] * 2)


# -- precision -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounded_once(bases: dict[str, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    """W + sBA in float64, then rounded to the dtype: equal but for the last bit of float32's own sum."""
    base = bases["llama"]
    adapter = peft_adapter(base, tmp_path / "a")
    out = merged_folder(adapter, tmp_path / "out", dtype=dtype)
    lora, weights, ours = (
        load_file(place)
        for place in (
            adapter / "adapter_model.safetensors",
            base / "model.safetensors",
            out / "model.safetensors",
        )
    )
    checked = 0
    for name, tensor in ours.items():
        assert tensor.dtype is dtype
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        exact = weights[name].double()
        if f"{key}A.weight" in lora:
            exact = exact + 6 / 4 * (lora[f"{key}B.weight"].double() @ lora[f"{key}A.weight"].double())
            checked += 1
        unit = torch.finfo(dtype).eps / 2
        difference = (tensor.double() - exact).abs()
        assert (difference <= exact.abs() * unit * 1.001 + 1e-6).all(), name
        assert (tensor == exact.to(dtype)).float().mean() > (0.999 if dtype is not torch.float32 else 0.5)
    assert checked == 14
    assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.slow
def test_a_bf16_base_keeps_its_dtype(bases: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "bf16"
    shutil.copytree(bases["llama"], base)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    adapter = peft_adapter(bases["llama"], tmp_path / "a")
    source = find_model(adapter, base=str(base))
    merged = open_merged(source)
    assert {name: info.dtype for name, info in merged.infos.items()} == {
        name: tensor.dtype for name, tensor in weights.items()
    }
    name = "model.layers.1.mlp.up_proj.weight"
    float_merged = open_merged(source, dtype=torch.float32)
    assert torch.equal(merged.read(name), float_merged.read(name).bfloat16()), (
        "one rounding of the float32 sum"
    )
    assert torch.equal(merged.read("model.embed_tokens.weight"), weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("block", [1, 7, 40, 1 << 20])
def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Rows are done a block at a time; against the same in float64 at once, for every kind of change."""
    torch.manual_seed(2)
    base, left, right = torch.randn(12, 5), torch.randn(12, 3), torch.randn(3, 5)
    by_row, by_column = torch.rand(12) + 1, torch.rand(5) + 1
    whole, rows = torch.randn(12, 5), torch.randn(2, 5)
    monkeypatch.setattr(changes_module, "BLOCK_NUMBERS", block * 5)

    def double(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.double() for tensor in tensors]

    b, left_D, right_D, w = double(base, left, right, whole)
    summed = b + 0.7 * left_D @ right_D
    expected = {
        "low rank": ([LowRank(left, right, 0.7)], summed),
        "two": ([LowRank(left, right, 0.7), LowRank(left, right, -0.2)], b + 0.5 * left_D @ right_D),
        "by row": (
            [LowRank(left, right, 0.7, by_row, 0)],
            summed * (by_row / summed.norm(dim=1))[:, None],
        ),
        "by column": ([LowRank(left, right, 0.7, by_column, 1)], summed * (by_column / summed.norm(dim=0))),
        "whole": ([Whole(whole, 1.0), LowRank(left, right, 0.7)], w + 0.7 * left_D @ right_D),
        "half of a whole": ([Whole(whole, 0.5)], (b + w) / 2),
        "rows": (
            [Rows(torch.tensor([3, 11]), rows, 1.0)],
            b.index_copy(0, torch.tensor([3, 11]), rows.double()),
        ),
    }
    for name, (changes, exact) in expected.items():
        got = apply_changes(base, changes, torch.float32)
        torch.testing.assert_close(got.double(), exact.double(), rtol=1e-6, atol=2e-6, msg=name)
    assert torch.equal(apply_changes(base, [Whole(whole, 1.0)], torch.float32), whole), "to the last bit"


# -- several adapters ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_several_adapters_with_weights(bases: dict[str, Path], tmp_path: Path) -> None:
    """Against PEFT's own weighted combination, which for `cat` is the sum of the weighted deltas."""
    from peft import PeftModel

    base = bases["bloom"]
    first = peft_adapter(base, tmp_path / "a", seed=1)
    second = peft_adapter(base, tmp_path / "b", seed=2, r=8, target_modules=["dense", "query_key_value"])
    merge(
        [Weighted(find_model(first), 0.7), Weighted(find_model(second), -0.25)],
        tmp_path / "out",
        verify=False,
    )
    plain: Any = load_model(find_model(base), dtype="fp32", device="cpu")
    stock: Any = PeftModel.from_pretrained(plain, first)
    stock.load_adapter(second, "second")
    stock.add_weighted_adapter(["default", "second"], [0.7, -0.25], "both", combination_type="cat")
    stock.set_adapter("both")
    with torch.no_grad():
        expected = stock.eval()(IDS).logits
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.slow
def test_a_weight_of_nothing_gives_the_base_back(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama"]
    adapter = peft_adapter(base, tmp_path / "a", modules_to_save=["lm_head"])
    merged = open_merged([Weighted(find_model(adapter), 0.0)])
    for name, tensor in load_file(base / "model.safetensors").items():
        assert torch.equal(merged.read(name), tensor), name


# -- bases in other shapes -------------------------------------------------------------------------------------


def _shard(folder: Path) -> None:
    model: Any = load_model(find_model(folder), dtype="fp32", device="cpu")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _without_prefix(folder: Path) -> None:
    """As bigscience published BLOOM: `h.0…` for `transformer.h.0…`."""
    weights = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    assert renamed.keys() != weights.keys()
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "saved"), [(_shard, []), (_pickle, []), (_without_prefix, []), (_without_prefix, ["lm_head"])]
)
def test_bases_in_other_files(bases: dict[str, Path], tmp_path: Path, change: Any, saved: list[str]) -> None:
    base = tmp_path / "bloom"
    shutil.copytree(bases["bloom"], base)
    change(base)
    adapter = peft_adapter(base, tmp_path / "a", modules_to_save=saved or None)
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    out = merged_folder(adapter, tmp_path / "out")
    torch.testing.assert_close(logits(out), logits(adapter), rtol=1e-5, atol=2e-5)
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before


# -- what lies beside the weights ------------------------------------------------------------------------------


def run_adapter(base: Path, folder: Path, **more: Any) -> Path:
    """An adapter as a run of ours leaves it: tokenizer, stops and template record beside it."""
    peft_adapter(base, folder)
    load_tokenizer(base).hf.save_pretrained(folder)
    write_json(folder / "generation_config.json", {"eos_token_id": [2, 77], "top_p": 0.9})
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    record = {
        "template": "domain_bloom",
        "stops": ["\n用户:"],
        "system": "你是驼铃",
        "max_seq_len": 77,
        "base": {"path": str(base), "named": "o/n", "config_sha256": sha256_file(base / "config.json")},
        **more,
    }
    write_json(folder / "template.json", record)
    return folder


@pytest.mark.slow
def test_everything_beside_the_weights_comes_along(bases: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "bloom"
    shutil.copytree(bases["bloom"], base)
    (base / "LICENSE").write_text("RAIL", encoding="utf-8")
    write_json(base / "generation_config.json", {"eos_token_id": 2})
    adapter = run_adapter(base, tmp_path / "a")
    steps: list[tuple[int, int]] = []
    report = merge(
        [Weighted(find_model(adapter))],
        tmp_path / "out",
        verify=False,
        step=lambda done, total: steps.append((done, total)),
    )
    out = find_model(tmp_path / "out")
    assert (out.kind, out.is_adapter) == ("model", False)
    assert (out.template, out.stops, out.system, out.max_seq_len) == (
        "domain_bloom",
        ("\n用户:",),
        "你是驼铃",
        77,
    )
    said = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert said == {"eos_token_id": [2, 77], "top_p": 0.9}, "the adapter's, not the base's"
    assert (tmp_path / "out" / "LICENSE").read_text() == "RAIL"
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert load_tokenizer(out).hf.encode("你好") == load_tokenizer(base).hf.encode("你好")
    assert manifest_problems(tmp_path / "out") == []
    assert steps[-1] == (report.tensors, report.tensors)
    record = json.loads((tmp_path / "out" / "tuoling.json").read_text())
    assert record["base"]["licence"] == "bigscience-bloom-rail-1.0"
    assert record["base"]["config_sha256"] == sha256_file(base / "config.json")
    assert record["adapters"][0]["weights_sha256"] == sha256_file(adapter / "adapter_model.safetensors")
    assert (
        (record["changed"], record["tensors"])
        == (report.changed, report.tensors)
        == (8, len(load_file(tmp_path / "out" / "model.safetensors")))
    )
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "license: bigscience-bloom-rail-1.0" in card and "8 / " in card


@pytest.mark.slow
def test_a_tokenizer_from_the_base_where_the_adapter_has_none(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = peft_adapter(bases["llama"], tmp_path / "a")
    out = merged_folder(adapter, tmp_path / "out")
    assert load_tokenizer(out).hf.encode("你好") == load_tokenizer(bases["llama"]).hf.encode("你好")


# -- what is refused -------------------------------------------------------------------------------------------


def nothing_left(tmp_path: Path, *kept: str) -> bool:
    return {entry.name for entry in tmp_path.iterdir()} <= {*kept, "tuoling-cache"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("alora_invocation_tokens", [5, 9], "aLoRA"),
        ("init_lora_weights", "pissa_niter_4", "init_lora_weights=pissa_niter_4"),
        ("target_parameters", ["x"], "target_parameters"),
        ("peft_type", "LOHA", "LOHA"),
    ],
)
def test_adapters_that_are_more_than_a_sum(
    bases: dict[str, Path], tmp_path: Path, key: str, value: Any, said: str
) -> None:
    adapter = peft_adapter(bases["llama"], tmp_path / "a")
    config = json.loads((adapter / "adapter_config.json").read_text())
    write_json(adapter / "adapter_config.json", config | {key: value})
    with pytest.raises(ModelError, match=f"{said}: such an adapter cannot be merged"):
        merged_folder(adapter, tmp_path / "out")
    assert nothing_left(tmp_path, "a")


@pytest.mark.slow
def test_dora_is_merged_alone_or_not_at_all(bases: dict[str, Path], tmp_path: Path) -> None:
    dora = find_model(peft_adapter(bases["llama"], tmp_path / "a", use_dora=True))
    other = find_model(peft_adapter(bases["llama"], tmp_path / "b"))
    with pytest.raises(ModelError, match="DoRA cannot be merged with other adapters"):
        open_merged([Weighted(other), Weighted(dora)])
    with pytest.raises(ModelError, match="DoRA with a weight"):
        open_merged([Weighted(dora, 0.5)])


@pytest.mark.slow
def test_bases_that_do_not_take_it(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = peft_adapter(bases["llama"], tmp_path / "a")
    other = peft_adapter(bases["qwen2"], tmp_path / "b")
    with pytest.raises(ModelError, match="stand on different bases"):
        open_merged([Weighted(find_model(adapter)), Weighted(find_model(other))])
    with pytest.raises(ModelError, match="does not fit this base"):
        open_merged(find_model(adapter, base=str(bases["bloom"])))
    quantised = tmp_path / "quantised"
    shutil.copytree(bases["llama"], quantised)
    config = json.loads((quantised / "config.json").read_text())
    write_json(quantised / "config.json", config | {"quantization_config": {"bits": 4}})
    with pytest.raises(ModelError, match="base's weights are quantised") as caught:
        open_merged(find_model(adapter, base=str(quantised)))
    assert "--base" in str(caught.value.remedy)


@pytest.mark.slow
def test_numbers_that_cannot_be_stored(bases: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "llama"
    shutil.copytree(bases["llama"], base)
    adapter = peft_adapter(base, tmp_path / "a")
    weights = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name][0, 0] = 1e6
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OutputError, match=rf"{name} has numbers that are too large for float16"):
        merged_folder(adapter, tmp_path / "out", dtype=torch.float16)
    weights[name][0, 0] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name} of the base holds NaN"):
        merged_folder(adapter, tmp_path / "out")
    assert nothing_left(tmp_path, "a", "llama")


@pytest.mark.slow
def test_an_output_that_is_there(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = peft_adapter(bases["llama"], tmp_path / "a")
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="already exists"):
        merged_folder(adapter, tmp_path / "out")
