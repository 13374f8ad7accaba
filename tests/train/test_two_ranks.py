"""Two processes with DDP train what one does: the same losses, the same weights; under our launcher and torchrun."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.train.parallel_runs import apart, run, tiny

pytestmark = pytest.mark.slow
"""Two processes import torch and transformers: seconds each."""

LONG = pytest.mark.long
PLAIN = [
    ("bloom", "lora"),
    *(pytest.param(*pair, marks=LONG) for pair in [("llama", "full"), ("bloom", "full"), ("llama", "lora")]),
]


@pytest.mark.parametrize(("family", "finetuning_type"), PLAIN)
def test_two_ranks_are_one(tmp_path: Path, family: str, finetuning_type: str) -> None:
    model = tiny(tmp_path, family)
    keys = {"finetuning_type": finetuning_type, "val_size": 3, "eval_steps": 10, "save_steps": 12}
    one = run(tmp_path / "one", model, 1, **keys)
    two = run(tmp_path / "two", model, 2, **keys)
    losses, weights = apart(one, two, model)
    assert losses <= 1e-5 and weights <= 1e-5
    assert len(two.losses) == 20 and two.losses[-1] < 0.9 * two.losses[0]
    assert two.results["tokens"] == one.results["tokens"] and two.results["rows"] == one.results["rows"]
    assert two.results["eval_loss"] == pytest.approx(one.results["eval_loss"], rel=1e-5)
    assert len(two.results["peak_rss_gib_of_ranks"]) == 2
    saved = [load_file(curve.path / "checkpoint-12" / "optimizer.safetensors") for curve in (one, two)]
    for name, tensor in saved[0].items():
        assert torch.allclose(tensor, saved[1][name], rtol=1e-4, atol=1e-7), name
    assert (two.path / "checkpoint-12" / "rng-1.safetensors").is_file()


def test_under_torchrun_the_processes_join_by_themselves(tmp_path: Path) -> None:
    model = tiny(tmp_path, "bloom")
    one = run(tmp_path / "one", model, 1)
    config = json.loads((one.path / "run.json").read_text())["config"]
    config |= {"output_dir": str(tmp_path / "two" / "run"), "columns": None}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in config.items() if value not in (None, [])}))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "tuoling", "train", str(path), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(printed) == 1 and json.loads(printed[0])["train_loss_last"] == pytest.approx(
        one.losses[-1], rel=1e-5
    )
