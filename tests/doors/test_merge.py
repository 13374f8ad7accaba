"""`tuoling merge` and `tuoling convert` of an old adapter, from the outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.models.test_old_adapters import ALPHA, grouped
from tests.tiny import tiny_model
from typer.testing import CliRunner

from tuoling.cli.main import app
from tuoling.cli.merge import split_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("door") / "bloom", "bloom")


def call(*words: object) -> Any:
    return CliRunner().invoke(app, list(map(str, words)))


@pytest.mark.slow
def test_from_an_old_checkpoint_to_a_model_that_answers(base: Path, tmp_path: Path) -> None:
    old, _ = grouped(base, tmp_path / "checkpoint-9", "pytorch_model.bin")
    told = ["--base", base, "--lora-alpha", ALPHA]
    assert call("convert", old, tmp_path / "new", *told).exit_code == 0
    result = call("merge", tmp_path / "new", tmp_path / "a", "--no-verify", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["out"], report["changed"], report["verified"]) == (str(tmp_path / "a"), 2, False)
    half = call(
        "merge",
        old,
        tmp_path / "b",
        "--weight",
        0.5,
        "--adapter",
        f"{tmp_path / 'new'}:0.5",
        *told,
        "--no-verify",
    )
    assert half.exit_code == 0, half.output
    once, in_halves = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert once.keys() == in_halves.keys()
    for name, weight in once.items():  # two halves may round the last bit otherwise
        torch.testing.assert_close(weight, in_halves[name], rtol=1e-6, atol=1e-7, msg=name)
    rows = tmp_path / "rows.json"
    rows.write_text('[{"instruction": "你好", "output": "你好"}]', encoding="utf-8")
    options = ["--data", rows, "--template", "domain_bloom", "--max-new-tokens", 8, "--dtype", "fp32"]
    answers = []
    for number, model in enumerate([[tmp_path / "a"], [old, *told]]):
        result = call("predict", *model, *options, "--out", tmp_path / f"{number}.json")
        assert result.exit_code == 0, result.output
        answers.append(json.loads((tmp_path / f"{number}.json").read_text(encoding="utf-8")))
    assert answers[0] == answers[1], "merged, and the old checkpoint as it lies"


@pytest.mark.slow
def test_each_adapter_has_an_alpha_of_its_own(base: Path, tmp_path: Path) -> None:
    """Two old checkpoints of one training, told different alphas: the changes of each are scaled by its own."""
    old, _ = grouped(base, tmp_path / "checkpoint-9", "pytorch_model.bin")
    before = load_file(base / "model.safetensors")

    def change(out: str, *words: object) -> torch.Tensor:
        result = call("merge", old, tmp_path / out, "--base", base, "--no-verify", "--dtype", "fp32", *words)
        assert result.exit_code == 0, result.output
        name = "transformer.h.1.self_attention.query_key_value.weight"
        return load_file(tmp_path / out / "model.safetensors")[name] - before[name]

    one = change("one", "--lora-alpha", 8)
    for word in ("0.5:alpha=32", "alpha=16:1"):  # 8 + 0.5 x 32, 8 + 16
        both = change(word[:3], "--lora-alpha", 8, "--adapter", f"{old}:{word}")
        torch.testing.assert_close(both, 3 * one, rtol=1e-5, atol=1e-6)


def test_bad_calls(base: Path, tmp_path: Path) -> None:
    assert call("merge", base, tmp_path / "out", "--dtype", "int8").exit_code == 2
    whole = call("merge", base, tmp_path / "out")
    assert whole.exit_code == 1 and "not an adapter" in whole.output
    assert call("merge", tmp_path / "nothing", tmp_path / "out").exit_code == 1
    assert call("merge", base, tmp_path).exit_code == 1
    assert not (tmp_path / "out").exists()


def test_weights_on_the_command_line() -> None:
    assert split_adapter("runs/a:0.5") == ("runs/a", 0.5, None)
    assert split_adapter("runs/a") == ("runs/a", 1.0, None)
    assert split_adapter("C:\\runs\\a:-2") == ("C:\\runs\\a", -2.0, None)
    assert split_adapter("C:\\runs\\a") == ("C:\\runs\\a", 1.0, None)
    for word in ("runs/a:0.5:alpha=16", "runs/a:alpha=16:0.5"):
        assert split_adapter(word) == ("runs/a", 0.5, 16.0)
    assert split_adapter("runs/a:alpha=8") == ("runs/a", 1.0, 8.0)
