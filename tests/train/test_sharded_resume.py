"""A run whose model or optimizer is cut into parts goes on from a checkpoint as if it had not been stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.train.parallel_runs import STEPS, apart, curve_of, run, tiny

from tuoling.errors import TrainingError
from tuoling.train.checkpoint import require_same_model
from tuoling.train.entry import resume

STOPPED = 12


def stopped_at(straight: Path, folder: Path, step: int) -> Path:
    """The run folder as it was when a kill came after the checkpoint of that step."""
    folder.mkdir(parents=True)
    shutil.copytree(straight / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    record = json.loads((straight / "run.json").read_text(encoding="utf-8"))
    (folder / "run.json").write_text(json.dumps({**record, "status": "running"}), encoding="utf-8")
    lines = (straight / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[: step + 2]), encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("parallel", ["fsdp", "zero2", "zero3"])
@pytest.mark.parametrize(("family", "finetuning_type"), [("llama", "lora"), ("bloom", "full")])
def test_a_run_in_parts_goes_on(tmp_path: Path, parallel: str, family: str, finetuning_type: str) -> None:
    if parallel.startswith("zero"):
        pytest.importorskip("deepspeed", reason="extra `dist`")
    model = tiny(tmp_path, family)
    keys = {"finetuning_type": finetuning_type, "parallel": parallel, "save_steps": STOPPED}
    # moments that matter: without them, or with their count of steps begun again, the curve parts at once
    keys |= {"adam_epsilon": 1e-8, "learning_rate": 1e-3}
    straight = run(tmp_path / "straight", model, 2, **keys)
    saved = load_file(straight.path / f"checkpoint-{STOPPED}" / "optimizer.safetensors")
    assert {float(value) for name, value in saved.items() if name.endswith(".step")} == {float(STOPPED)}
    folder = stopped_at(straight.path, tmp_path / "stopped", STOPPED)
    result = resume(folder, say=lambda _: None)
    assert result.status == "finished"
    again = curve_of(folder)
    assert len(again.losses) == STEPS
    losses, weights = apart(straight, again, model)
    assert losses <= 1e-6 and weights <= 1e-5


def test_a_state_of_another_model_is_refused() -> None:
    import torch

    saved = {"a.exp_avg": torch.zeros(2, 3), "a.step": torch.zeros(())}
    require_same_model(saved, {"a": torch.Size((2, 3))})
    for shapes in ({"a": torch.Size((3, 2))}, {"b": torch.Size((2, 3))}):
        with pytest.raises(TrainingError, match=r"of another model: a\.exp_avg"):
            require_same_model(saved, shapes)
