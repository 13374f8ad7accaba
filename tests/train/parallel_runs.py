"""The same run in one process and in several, and how far the two are apart."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tests.tiny import settings_without_chance, sum_rows, tiny_model, write_rows

import tuoling

STEPS = 20
SERIES = Path(__file__).with_name("rank_of_series.py")


@dataclass
class Curve:
    """Losses of the steps, the trained weights at the end, all_results.json."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    results: dict[str, Any]
    path: Path


def run(folder: Path, model: Path, nproc: int, **keys: Any) -> Curve:
    """STEPS steps over rows of very different lengths, in float32, without chance."""
    return curve_of(tuoling.train(nproc=nproc, say=lambda _: None, **settings(folder, model, **keys)).path)


def run_series(folder: Path, runs: Mapping[str, tuple[Path, Mapping[str, Any]]]) -> dict[str, Curve]:
    """The same by two processes, for each name with its model and keys: all runs in one pair of processes."""
    configs = []
    for name, (model, keys) in runs.items():
        configs.append(folder / f"{name}.json")
        configs[-1].write_text(json.dumps(settings(folder / name, model, **keys)), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    place |= {"LOCAL_WORLD_SIZE": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [
        subprocess.Popen(
            [sys.executable, str(SERIES), *map(str, configs)],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    with ThreadPoolExecutor(max_workers=2) as listening:
        said = list(listening.map(lambda process: process.communicate()[0].decode(errors="replace"), started))
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    return {name: curve_of(folder / name / "run") for name in runs}


def settings(folder: Path, model: Path, **keys: Any) -> dict[str, Any]:
    """A config of STEPS steps, its rows and its run in `folder`."""
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
    return settings_without_chance(folder, model, data, defaults)


def curve_of(path: Path) -> Curve:
    """What a finished run left."""
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    files = sorted([*path.glob("adapter_model.safetensors"), *path.glob("model*.safetensors")])
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    results = json.loads((path / "all_results.json").read_text(encoding="utf-8"))
    return Curve([json.loads(line)["loss"] for line in lines], weights, results, path)


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
