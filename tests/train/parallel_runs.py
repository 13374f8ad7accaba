"""The same run in one process and in several, and how far the two are apart."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tests.tiny import settings_without_chance, sum_rows, tiny_model, write_rows

import tuoling

STEPS = 20


@dataclass
class Curve:
    """Losses of the steps, the trained weights at the end, all_results.json."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    results: dict[str, Any]
    path: Path


def run(folder: Path, model: Path, nproc: int, **keys: Any) -> Curve:
    """STEPS steps over rows of very different lengths, in float32, without chance."""
    rows = [
        {**row, "output": row["output"] + "好" * (number * 7 % 40)} for number, row in enumerate(sum_rows(21))
    ]
    data = write_rows(folder / "rows.jsonl", rows)
    defaults = {
        "max_steps": STEPS,
        "batch_size": 4,
        "per_device_train_batch_size": 1,
        "adam_epsilon": 1e-1,  # a step is then nearly proportional to its gradient: an error in one is not hidden
        "learning_rate": 1e-1,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "timeout_s": 120,
        **keys,
    }
    settings = settings_without_chance(folder, model, data, defaults)
    result = tuoling.train(nproc=nproc, say=lambda _: None, **settings)
    lines = (result.path / "metrics.jsonl").read_text().splitlines()
    files = sorted([*result.path.glob("adapter_model.safetensors"), *result.path.glob("model*.safetensors")])
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return Curve([json.loads(line)["loss"] for line in lines], weights, result.results, result.path)


def apart(one: Curve, two: Curve, model: Path) -> tuple[float, float]:
    """(largest relative difference of a step's loss, relative distance of what training changed)."""
    losses = max(abs(a - b) / abs(a) for a, b in zip(one.losses, two.losses, strict=True))
    assert one.weights.keys() == two.weights.keys()
    base = load_file(model / "model.safetensors")
    difference = change = 0.0
    for name, tensor in one.weights.items():
        difference += float((tensor.double() - two.weights[name].double()).square().sum())
        change += float((tensor.double() - base[name].double() if name in base else tensor).square().sum())
    return losses, (difference / change) ** 0.5


def tiny(folder: Path, family: str, *, hidden: int = 32, layers: int = 2) -> Path:
    """A random model of `family`."""
    return tiny_model(folder / family, family, hidden=hidden, layers=layers)
