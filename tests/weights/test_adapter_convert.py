"""Old adapters converted: what is written is today's PEFT, reads there, and answers as the old one did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.models.test_old_adapters import (
    ALPHA,
    IDS,
    OLD_CONFIG,
    RANK,
    contents,
    grouped,
    logits,
    save_empty_of_2023,
)
from tests.tiny import tiny_model

from tuoling.errors import ModelError, UsageError
from tuoling.files import manifest_problems
from tuoling.models.load import find_model, load_model
from tuoling.weights.convert import ConvertOptions, convert


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("convert") / "bloom", "bloom")


@pytest.mark.slow
def test_the_old_bloom_layout_becomes_todays(bloom: Path, tmp_path: Path) -> None:
    """A Trainer checkpoint without config, grouped: read back by PEFT itself, with the old layer's outputs."""
    from peft import PeftModel

    old, expected = grouped(bloom, tmp_path / "checkpoint-400", "pytorch_model.bin")
    (old / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    before = contents(old)
    report = convert(old, tmp_path / "new", options=ConvertOptions(lora_alpha=ALPHA, base=str(bloom)))
    assert (report.kind, report.to, report.tensors) == ("adapter", "adapter", 4)
    assert contents(old) == before
    assert manifest_problems(tmp_path / "new") == []
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (2 * RANK, 2 * ALPHA, False)
    assert (config["target_modules"], config["base_model_name_or_path"]) == (["query_key_value"], str(bloom))
    assert "enable_lora" not in config and config["inference_mode"] is True
    assert (tmp_path / "new" / "tokenizer_config.json").is_file()

    plain: Any = load_model(find_model(bloom), dtype="fp32", device="cpu")
    stock = PeftModel.from_pretrained(plain, tmp_path / "new").eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(IDS).logits, expected, rtol=0, atol=2e-6)
    assert torch.equal(logits(tmp_path / "new"), logits(old, base=str(bloom), lora_alpha=ALPHA))


def test_without_its_base_it_is_converted_unchecked(bloom: Path, tmp_path: Path) -> None:
    old, _ = grouped(bloom, tmp_path / "old", "adapter_model.bin")
    config = OLD_CONFIG | {"base_model_name_or_path": "somebody/bloom"}
    (old / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    report = convert(old, tmp_path / "new", options=ConvertOptions())
    assert any("not checked against its base (somebody/bloom)" in note for note in report.notes)
    written = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "somebody/bloom"
    assert {
        tuple(tensor.shape) for tensor in load_file(tmp_path / "new" / "adapter_model.safetensors").values()
    } == {
        (2 * RANK, 32),
        (96, 2 * RANK),
    }


@pytest.mark.slow
def test_what_cannot_be_converted_leaves_nothing(bloom: Path, tmp_path: Path) -> None:
    old, _ = grouped(bloom, tmp_path / "old", "pytorch_model.bin")
    wider = tiny_model(tmp_path / "wider", "bloom", hidden=64)
    for options, said in (
        (ConvertOptions(), "lora_alpha does not"),
        (ConvertOptions(lora_alpha=ALPHA, base=str(wider)), "does not fit this base"),
    ):
        with pytest.raises(ModelError, match=said):
            convert(old, tmp_path / "new", options=options)
    with pytest.raises(UsageError, match="written as it is"):
        convert(old, tmp_path / "new", options=ConvertOptions(outtype="f16", lora_alpha=ALPHA))
    (tmp_path / "empty").mkdir()
    save_empty_of_2023(tmp_path / "empty" / "adapter_model.bin")
    with pytest.raises(ModelError, match="adapter file is empty"):
        convert(tmp_path / "empty", tmp_path / "new", options=ConvertOptions())
    assert not list(tmp_path.glob("*new*")) and not list(tmp_path.glob(".new*"))
