"""save∘load = identity, bit for bit, for models and adapters of every family here; and bad saves are caught."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import tiny_model

from tuoling.errors import ModelError, OutputError
from tuoling.files import atomic_folder, manifest_problems, sha256_file
from tuoling.models.adapters import attach_adapter, lora_target_names
from tuoling.models.load import find_model, load_model, load_tokenizer
from tuoling.models.save import save_adapter, save_model

FAMILIES = ("bloom", "llama", "qwen2")
IDS = torch.tensor([[5, 9, 200, 31, 77, 4]])


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("identity") / request.param, request.param)


def tuned(base: Path, seed: int = 1) -> Any:
    """A LoRA model whose every adapter weight is random."""
    from peft import LoraConfig, get_peft_model

    model: Any = load_model(find_model(base), dtype="fp32", device="cpu", for_training=True)
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=lora_target_names(model), task_type="CAUSAL_LM")
    model = get_peft_model(model, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    return model


def record(base: Path) -> dict[str, Any]:
    return {
        "template": "chatml",
        "stops": ["<|im_end|>", "</s>"],
        "base": {"path": str(base), "named": str(base), "config_sha256": sha256_file(base / "config.json")},
        "max_seq_len": 64,
    }


def save(model: Any, base: Path, folder: Path) -> None:
    with atomic_folder(folder) as place:
        save_adapter(model, place, tokenizer=load_tokenizer(base), template=record(base))


@pytest.mark.slow
def test_adapter_comes_back_bit_for_bit(base: Path, tmp_path: Path) -> None:
    model = tuned(base)
    save(model, base, tmp_path / "a")
    source = find_model(tmp_path / "a")
    again: Any = load_model(source, dtype="fp32", device="cpu")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        plain = load_model(find_model(base), dtype="fp32", device="cpu")(IDS).logits
        assert torch.equal(model(IDS).logits, again(IDS).logits)
        assert not torch.allclose(plain, again(IDS).logits, atol=1e-2), "the adapter does something"
    assert (source.template, source.stops, source.max_seq_len) == ("chatml", ("<|im_end|>", "</s>"), 64)
    assert manifest_problems(tmp_path / "a") == []


@pytest.mark.slow
def test_adapter_saved_twice_is_the_same_bytes(base: Path, tmp_path: Path) -> None:
    model = tuned(base)
    save(model, base, tmp_path / "a")
    again: Any = load_model(find_model(tmp_path / "a"), dtype="fp32", device="cpu", for_training=True)
    save(again, base, tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "template.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.slow
def test_adapter_loads_in_peft_itself(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model = tuned(base)
    save(model, base, tmp_path / "a")
    plain: Any = load_model(find_model(base), dtype="fp32", device="cpu")
    stock = PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, stock(IDS).logits)


@pytest.mark.slow
def test_trained_further_after_loading(base: Path, tmp_path: Path) -> None:
    save(tuned(base), base, tmp_path / "a")
    model: Any = load_model(find_model(tmp_path / "a"), dtype="bf16", device="cpu", for_training=True)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    assert all(p.dtype is torch.float32 for p in trainable.values()), "LoRA stays in float32 on a bf16 base"


@pytest.mark.slow
def test_model_comes_back_bit_for_bit(base: Path, tmp_path: Path) -> None:
    model: Any = load_model(find_model(base), dtype="fp32", device="cpu", for_training=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    template = {"template": "domain_bloom", "stops": ["\n用户:"], "max_seq_len": 32}
    with atomic_folder(tmp_path / "m") as place:
        save_model(model, place, tokenizer=load_tokenizer(base), template=template)
    source = find_model(tmp_path / "m")
    again: Any = load_model(source, dtype="fp32", device="cpu")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert source.template == "domain_bloom" and source.config["use_cache"] is True
    ids = [5, 9, 200]
    assert load_tokenizer(source).decode(ids) == load_tokenizer(base).decode(ids)


@pytest.mark.slow
def test_generation_config_holds_every_end_token(base: Path, tmp_path: Path) -> None:
    save(tuned(base), base, tmp_path / "a")
    said = json.loads((tmp_path / "a" / "generation_config.json").read_text())
    assert (said["eos_token_id"], said["bos_token_id"], said["pad_token_id"]) == (2, 1, 3)


# -- what must not be believed ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_not_a_number_is_not_saved(base: Path, tmp_path: Path) -> None:
    model = tuned(base)
    next(p for n, p in model.named_parameters() if "lora_A" in n).data[0, 0] = float("nan")
    with pytest.raises(OutputError, match="NaN"):
        save(model, base, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_adapter_of_zeros_is_not_saved(base: Path, tmp_path: Path) -> None:
    model = tuned(base)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.zero_()
    with pytest.raises(OutputError, match="every tensor is zero"):
        save(model, base, tmp_path / "a")


def _lose(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(sorted(tensors)[0])


def _alter(tensors: dict[str, torch.Tensor]) -> None:
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[-1] += 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "said"), [(_lose, "tensors are missing"), (_alter, "differs from memory")]
)
def test_what_was_written_is_read_back(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, said: str
) -> None:
    import safetensors.torch

    def lossy(tensors: dict[str, torch.Tensor], path: Path, metadata: Any = None) -> None:
        tensors = dict(tensors)
        damage(tensors)
        save_file(tensors, path, metadata=metadata)

    model = tuned(base)
    monkeypatch.setattr(safetensors.torch, "save_file", lossy)
    with pytest.raises(OutputError, match=said):
        save(model, base, tmp_path / "a")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    save(tuned(base), base, tmp_path / "a")
    return tmp_path / "a"


def change(adapter: Path, how: Any) -> None:
    path = adapter / "adapter_model.safetensors"
    state = load_file(path)
    how(state)
    save_file(state, path)


def load(adapter: Path) -> Any:
    return load_model(find_model(adapter), dtype="fp32", device="cpu")


@pytest.mark.slow
def test_an_adapter_with_too_little_too_much_or_the_wrong_shape(adapter: Path) -> None:
    name = sorted(load_file(adapter / "adapter_model.safetensors"))[0]
    good = (adapter / "adapter_model.safetensors").read_bytes()
    for how, said in (
        (lambda state: state.pop(name), r"does not fit this base: 1 missing"),
        (
            lambda state: state.update({"base_model.model.other.lora_A.weight": torch.ones(1)}),
            r"1 unknown: base_model\.model\.other",
        ),
        (lambda state: state.update({name: torch.ones(4, 3)}), r"is \[4, 3\], the base needs"),
    ):
        change(adapter, how)
        with pytest.raises(ModelError, match=said):
            load(adapter)
        (adapter / "adapter_model.safetensors").write_bytes(good)


@pytest.mark.slow
def test_an_adapter_for_another_base(adapter: Path, base: Path, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other", "llama" if base.name == "bloom" else "bloom")
    with pytest.raises(ModelError, match="does not fit this base"):
        load_model(find_model(adapter, base=str(other)), dtype="fp32", device="cpu")
    wider = tiny_model(tmp_path / "wider", base.name, hidden=64)
    with pytest.raises(ModelError, match="does not fit this base"):
        load_model(find_model(adapter, base=str(wider)), dtype="fp32", device="cpu")


@pytest.mark.slow
def test_the_empty_adapter_file_of_2023(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="adapter file is empty"):
        load(adapter)


@pytest.mark.slow
def test_bin_adapters_are_read(adapter: Path, base: Path) -> None:
    state = load_file(adapter / "adapter_model.safetensors")
    expected = load(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(state, adapter / "adapter_model.bin")
    with torch.no_grad():
        assert torch.equal(load(adapter)(IDS).logits, expected(IDS).logits)


@pytest.mark.slow
def test_a_cut_adapter_and_one_with_old_keys(adapter: Path, base: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    old = {
        key: config[key]
        for key in (
            "peft_type",
            "r",
            "lora_alpha",
            "target_modules",
            "task_type",
            "bias",
            "base_model_name_or_path",
        )
    }
    old |= {
        "enable_lora": None,
        "merge_weights": False,
        "fan_in_fan_out": False,
        "lora_dropout": 0.05,
        "modules_to_save": None,
    }
    (adapter / "adapter_config.json").write_text(json.dumps(old), encoding="utf-8")
    load(adapter)
    data = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(data[:-10])
    with pytest.raises(ModelError, match="damaged or cut short"):
        attach_adapter(load_model(find_model(base), dtype="fp32", device="cpu"), adapter, trainable=False)  # type: ignore[arg-type]
