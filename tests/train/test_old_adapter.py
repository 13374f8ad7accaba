"""Training goes on from an adapter of 2023 as it lies, and leaves one of today."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.models.test_old_adapters import ALPHA, RANK, contents, grouped
from tests.tiny import tiny_model
from tests.train.test_loop import run

from tuoling.errors import ModelError
from tuoling.weights.convert import ConvertOptions, convert


@pytest.mark.slow
def test_training_goes_on_from_a_checkpoint_of_2023(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "bloom")
    old, _ = grouped(base, tmp_path / "checkpoint-9", "pytorch_model.bin")
    before = contents(old)
    plain = run(tmp_path / "plain", base, max_steps=1)
    with pytest.raises(ModelError, match="lora_alpha does not"):
        run(tmp_path / "refused", base, max_steps=1, adapter_name_or_path=str(old))
    result = run(tmp_path / "a", base, max_steps=1, adapter_name_or_path=str(old), lora_alpha=ALPHA)
    convert(old, tmp_path / "new", options=ConvertOptions(lora_alpha=ALPHA, base=str(base)))
    again = run(tmp_path / "b", base, max_steps=1, adapter_name_or_path=str(tmp_path / "new"))
    assert result.results["train_loss_first"] == again.results["train_loss_first"]
    assert result.results["train_loss_first"] != plain.results["train_loss_first"]
    config = json.loads((result.path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2 * RANK, 2 * ALPHA)
    assert contents(old) == before
