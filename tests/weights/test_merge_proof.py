"""The proof of a merge: passed and recorded, not passed and nothing left, the low-bit route measured and told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import tiny_model
from tests.weights.test_merge import peft_adapter

from tuoling.errors import TuolingError
from tuoling.files import sha256_file, write_json
from tuoling.models.load import find_model, load_model
from tuoling.weights import merged as merged_module
from tuoling.weights.merge import merge
from tuoling.weights.merge_proof import AsTrained
from tuoling.weights.merged import Weighted
from tuoling.weights.parity import Beside, Weights, gate

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("gate_here")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("proof") / "llama", "llama", hidden=64)


def test_passed_and_recorded(base: Path, tmp_path: Path) -> None:
    first = peft_adapter(base, tmp_path / "a")
    second = peft_adapter(base, tmp_path / "b", seed=2)
    report = merge(
        [Weighted(find_model(first)), Weighted(find_model(second), 0.5)],
        tmp_path / "out",
        dtype=torch.bfloat16,
    )
    record = json.loads((tmp_path / "out" / "tuoling.json").read_text())
    parity = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert record["verified"] is True and report.checked["verified"] is True
    assert parity["passed"] is True and parity["lossless"] is True
    assert 0 < parity["max_logit_difference"] <= parity["tolerance"], "rounded to bf16"


def test_each_adapter_is_proven_with_its_own_alpha(base: Path, tmp_path: Path) -> None:
    """Neither folder says its alpha: the merge and the proof are told, and a proof told otherwise does not pass."""
    sources = []
    for name, alpha in (("a", 1.0), ("b", 3.0)):
        adapter = peft_adapter(base, tmp_path / name, seed=len(sources), lora_alpha=alpha)
        (adapter / "adapter_config.json").unlink()
        sources.append(find_model(adapter, base=str(base), lora_alpha=alpha))
    report = merge([Weighted(source) for source in sources], tmp_path / "out", say=lambda _: None)
    assert report.checked["verified"] is True
    other = [Beside(source.path, lora_alpha=2.0) for source in sources]
    with pytest.raises(TuolingError, match="does not compute the same"):
        gate(Weights(base, tuple(other)), tmp_path / "out", lossless=True, say=lambda _: None)


def test_not_passed_and_nothing_left(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge that forgets alpha / r: the adapter beside its base says otherwise."""
    adapter = peft_adapter(base, tmp_path / "a", lora_alpha=32)
    right = merged_module.apply_changes

    def wrong(tensor: torch.Tensor, changes: Any, dtype: torch.dtype) -> torch.Tensor:
        from dataclasses import replace

        return right(tensor, [replace(change, scale=1.0) for change in changes], dtype)

    monkeypatch.setattr(merged_module, "apply_changes", wrong)
    with pytest.raises(TuolingError, match="does not compute the same") as caught:
        merge([Weighted(find_model(adapter))], tmp_path / "out")
    assert "--no-verify" in str(caught.value.remedy)
    assert {entry.name for entry in tmp_path.iterdir()} <= {"a", "tuoling-cache"}
    merge([Weighted(find_model(adapter))], tmp_path / "out", verify=False)
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["verified"] is False


def test_trained_on_four_bits(base: Path, tmp_path: Path) -> None:
    """Both routes measured on the same texts: the adapter on nf4 as trained, and merged into the unquantised base."""
    pytest.importorskip("bitsandbytes")
    adapter = peft_adapter(base, tmp_path / "a")
    write_json(
        adapter / "template.json",
        {
            "template": "domain_bloom",
            "stops": [],
            "base": {"path": str(base), "config_sha256": sha256_file(base / "config.json")},
            "quantization": {"quantization_bit": 4, "quantization_type": "nf4", "double_quantization": True},
        },
    )
    said: list[str] = []
    merge([Weighted(find_model(adapter))], tmp_path / "out", say=said.append)
    route = json.loads((tmp_path / "out" / "tuoling.json").read_text())["low_bit_route"]
    assert route["trained_on"] == "nf4 double"
    line = next(line for line in said if "loss on the probe texts" in line)
    assert f"{route['loss_as_trained']:.4f}" in line and f"{route['loss_merged']:.4f}" in line
    assert route["loss_as_trained"] != route["loss_merged"]
    parity = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert math.isclose(math.log(parity["perplexity_after"]), route["loss_merged"], rel_tol=1e-6)
    assert "探针文本损失" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")

    model: Any = load_model(find_model(adapter), dtype="fp32")
    ids = [1, 5, 9, 200, 31]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    got = AsTrained(str(adapter), str(base)).logits(ids)
    assert torch.equal(torch.from_numpy(got), expected)
    template = json.loads((tmp_path / "out" / "template.json").read_text())
    assert "quantization" not in template and not find_model(tmp_path / "out").quantization


def test_a_base_with_nan_is_refused_before_the_proof(base: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(base, tmp_path / "a")
    state = load_file(adapter / "adapter_model.safetensors")
    state[sorted(state)[0]][0, 0] = float("inf")
    save_file(state, adapter / "adapter_model.safetensors")
    with pytest.raises(TuolingError, match="holds NaN or infinity"):
        merge([Weighted(find_model(adapter))], tmp_path / "out")
