"""Runs on a card: what has no counterpart on a CPU (fp16 and its loss scaling), and that both learn the same."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.devices import NEEDS_A_GPU, forget_determinism
from tests.tiny import sum_rows, tiny_model, write_rows
from tests.train.runs import column, edit_record, record, run

import tuoling
from tuoling import environment
from tuoling.config import RunConfig
from tuoling.train.memory_probe import probe_memory
from tuoling.train.parallel import make_engine
from tuoling.train.prepare import prepare
from tuoling.train.ranks import Ranks


@pytest.fixture
def as_torch_is() -> Iterator[None]:
    yield
    forget_determinism()


@NEEDS_A_GPU
@pytest.mark.parametrize("family", ["bloom", "llama", "qwen2"])
@pytest.mark.parametrize("finetuning_type", ["lora", "full"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_card_learns_what_a_cpu_learns(
    tmp_path: Path, family: str, finetuning_type: str, gradient_checkpointing: bool
) -> None:
    """float32, the same rows in the same order: the first losses differ by the order of sums alone."""
    model = tiny_model(tmp_path / "m", family)
    keys = {
        "finetuning_type": finetuning_type,
        "gradient_checkpointing": gradient_checkpointing,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-3,  # else Adam blows rounding noise up
    }
    there, here = (run(tmp_path / device, model, **keys, device=device).path for device in ("cuda", "cpu"))
    assert column(there, "loss") == pytest.approx(column(here, "loss"), rel=1e-5)
    assert column(there, "grad_norm") == pytest.approx(column(here, "grad_norm"), rel=1e-3)


@NEEDS_A_GPU
@pytest.mark.parametrize("finetuning_type", ["lora", "full"])
def test_bf16_on_a_card_learns_nearly_what_float32_does(tmp_path: Path, finetuning_type: str) -> None:
    model = tiny_model(tmp_path / "m", "bloom", hidden=64)
    keys = {"finetuning_type": finetuning_type, "max_steps": 12, "device": "cuda", "learning_rate": 1e-3}
    exact, short = (run(tmp_path / dtype, model, **keys, dtype=dtype).path for dtype in ("fp32", "bf16"))
    assert column(short, "loss") == pytest.approx(column(exact, "loss"), abs=0.05)


@NEEDS_A_GPU
@pytest.mark.usefixtures("as_torch_is")
@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_fp16_scales_its_loss_and_goes_on_with_that_scale(tmp_path: Path, optim: str) -> None:
    """It learns, its scale is in the checkpoints, and a run that was stopped ends as one that was not."""
    model = tiny_model(tmp_path / "m", "llama", hidden=64)
    keys = {"dtype": "fp16", "device": "cuda", "deterministic": True, "optim": optim, "max_steps": 12}
    path = run(tmp_path, model, **keys, save_steps=6, finetuning_type="full", learning_rate=1e-3).path
    losses = column(path, "loss")
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0]
    scale = json.loads((path / "checkpoint-6" / "position.json").read_text())["scaler"]["scale"]
    assert 1 <= scale <= 65536 and math.log2(scale).is_integer()
    weights = load_file(path / "model.safetensors")
    for name in ("model.safetensors", "all_results.json"):
        (path / name).unlink()
    edit_record(path, status="running")
    tuoling.resume(path, say=lambda _: None)
    assert column(path, "loss") == losses and record(path)["status"] == "finished"
    again = load_file(path / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


@NEEDS_A_GPU
@pytest.mark.long
def test_the_plan_of_a_card_is_near_what_it_takes(tmp_path: Path) -> None:
    """BLOOM 6 x 512 with 250,880 words in bf16, LoRA: the estimate from shapes within 20 % of the measured peak."""
    from transformers import BloomConfig, BloomForCausalLM

    model = tiny_model(tmp_path / "m", "bloom")
    torch.manual_seed(0)
    big = BloomForCausalLM(BloomConfig(vocab_size=250_880, hidden_size=512, n_layer=6, n_head=8))
    big.to(torch.bfloat16).save_pretrained(model)
    rows = write_rows(tmp_path / "rows.jsonl", [{**row, "output": "好" * 400} for row in sum_rows(8)])
    config = RunConfig(
        model_name_or_path=str(model),
        data=(str(rows),),
        template="alpaca",
        device="cuda",
        dtype="bf16",
        per_device_train_batch_size=8,
    )
    found = probe_memory(config)
    assert found.peak_bytes is not None
    assert prepare(config, say=lambda _: None).plan.memory.total == pytest.approx(found.peak_bytes, rel=0.2)


@pytest.mark.parametrize(("device", "wanted"), [("cuda:1", [1]), ("cuda", []), ("cpu", [])])
def test_a_card_of_ones_choice_is_the_one_that_is_meant(
    device: str, wanted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches, random states and memory peaks are of accelerate's `cuda`, the weights of `cuda:1`: one card.
    torch.cuda.set_device refuses `cuda` without a number."""
    chosen: list[int | None] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda card: chosen.append(torch.device(card).index))
    environment.use_card(device)
    assert chosen == wanted
    if not torch.cuda.is_available():
        keys = {"dtype": "fp32", "hidden": 8, "folder": tmp_path, "manifest": {}}
        make_engine(RunConfig(), Ranks(), device=device, **keys)
        assert chosen == wanted * 2


@NEEDS_A_GPU
def test_the_last_card_trains_and_is_measured(tmp_path: Path) -> None:
    last = torch.cuda.device_count() - 1
    before = torch.cuda.current_device()
    try:
        result = run(tmp_path, tiny_model(tmp_path / "m"), max_steps=2, device=f"cuda:{last}")
    finally:
        torch.cuda.set_device(before)
    assert result.results["peak_cuda_gib"] > 0


@NEEDS_A_GPU
def test_what_is_asked_of_a_card() -> None:
    properties = torch.cuda.get_device_properties(0)
    assert environment.compute_capability("cuda") == (properties.major, properties.minor)
    assert 0 < environment.memory_available_bytes("cuda") <= properties.total_memory
    assert environment.memory_available_bytes("cuda:0") <= properties.total_memory
    assert environment.pick_dtype("auto", "cuda") == ("bf16" if properties.major >= 8 else "fp16")
