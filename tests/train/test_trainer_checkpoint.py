"""Checkpoints of transformers' Trainer: its optimizer's state by our names, its schedule from its log, and a run from it."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import sum_rows, tiny_model, write_rows
from tests.train.runs import column, record
from tests.train.test_continuing import go_on

from tuoling.errors import TrainingError
from tuoling.train.trainer_checkpoint import trainer_optimizer, trainer_schedule


@dataclass(frozen=True)
class Trained:
    """What the Trainer left at step 4 of 12, and its state in memory by parameter name."""

    folder: Path
    base: Path
    model: Any
    states: dict[str, dict[str, torch.Tensor]]


def trained(folder: Path, *, lora: bool, **keys: Any) -> Trained:
    """The Trainer, 12 steps of one row each planned, stopped after the checkpoint at 4."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            control.should_training_stop = True

    base = tiny_model(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    if lora:
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["query_key_value"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    args = TrainingArguments(
        output_dir=str(folder / "theirs"),
        max_steps=12,
        save_steps=4,
        logging_steps=1,
        learning_rate=2e-3,
        per_device_train_batch_size=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **keys,
    )
    rows = [
        {"input_ids": torch.arange(5, 15) + row, "labels": torch.arange(5, 15) + row} for row in range(12)
    ]
    trainer = Trainer(model=model, args=args, train_dataset=rows, callbacks=[Stop()])
    trainer.train()
    optimizer = trainer.optimizer.optimizer if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer
    states = {
        name: {key: value.clone() for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return Trained(folder / "theirs" / "checkpoint-4", base, model, states)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    yield trained(tmp_path_factory.mktemp("lora"), lora=True, lr_scheduler_type="cosine", warmup_steps=2)


@pytest.mark.slow
def test_every_state_comes_to_its_own_parameter(lora: Trained, tmp_path: Path) -> None:
    full = trained(tmp_path, lora=False, warmup_steps=0)  # biases and norms are a group of their own
    for theirs in (lora, full):
        found = trainer_optimizer(theirs.folder, theirs.model)
        assert {name.rpartition(".")[0] for name in found} == theirs.states.keys()
        for name, state in theirs.states.items():
            assert float(found[f"{name}.step"]) == float(state["step"]) == 4.0
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(found[f"{name}.{key}"], state[key]), name
    line = trainer_schedule(full.folder)
    assert (line.kind, line.warmup_steps, line.step, line.total_steps) == ("linear", 0, 4, 12)


@pytest.mark.parametrize("late", [0, 1], ids=["of 2023", "of today"])
@pytest.mark.parametrize(("kind", "warmup"), [("linear", 30), ("linear", 0), ("cosine", 7), ("constant", 0)])
def test_a_schedule_is_found_from_a_log(tmp_path: Path, kind: str, warmup: int, late: int) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=500)
    rates = []
    for _ in range(120):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    log = [{"step": step, "learning_rate": rates[step - late]} for step in range(10, 120, 10)]
    state = {"global_step": 120, "max_steps": 500, "log_history": log}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    torch.save(scheduler.state_dict(), tmp_path / "scheduler.pt")
    line = trainer_schedule(tmp_path)
    assert (line.kind, line.warmup_steps, line.learning_rate) == (kind, warmup, 3e-4)
    assert line.away is not None and line.away < 1e-6


@pytest.mark.slow
def test_a_run_goes_on_along_the_trainers_schedule(lora: Trained, tmp_path: Path) -> None:
    line = trainer_schedule(lora.folder)
    assert (line.kind, line.warmup_steps, line.step, line.total_steps) == ("cosine", 2, 4, 12)
    assert line.learning_rate == 2e-3
    data = write_rows(tmp_path / "rows.jsonl", sum_rows(16))
    words = ("template=domain_bloom", "num_train_epochs=2")
    out, _ = go_on(lora.folder, data, tmp_path / "next", *words, keep_schedule=True)
    assert column(out, "step") == list(range(5, 13))
    expected = [2e-3 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 10)) for step in range(4, 12)]
    assert column(out, "learning_rate") == pytest.approx(expected, rel=1e-12)
    assert record(out)["continues"]["optimizer"] == str(lora.folder.resolve())
    assert record(out)["config"]["lora_rank"] is not None
    fresh, _ = go_on(lora.folder, data, tmp_path / "fresh", "max_steps=1", "template=domain_bloom")
    assert column(fresh, "step") == [1]


@pytest.mark.slow
def test_what_cannot_be_kept_is_told(lora: Trained, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="parameters, and 1 are trained here"):
        trainer_optimizer(lora.folder, torch.nn.Linear(3, 3, bias=False))

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "optimizer.pt").write_bytes(pickle.dumps({"state": Evil()}))
    with pytest.raises(TrainingError, match="cannot be kept"):
        trainer_optimizer(tmp_path, torch.nn.Linear(3, 3))
    assert not (tmp_path / "ran").exists()  # only plain tensors are read
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": []}))
    with pytest.raises(TrainingError, match="no global_step and max_steps"):
        trainer_schedule(tmp_path)
