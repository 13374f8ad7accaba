"""Checkpoints: safetensors and JSON in a folder that is renamed into place when it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tuoling import files

SaveWeights = Callable[[Path], None]


def checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first; a folder without a manifest is none."""
    found = [
        path
        for path in run.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit() and (path / files.MANIFEST).is_file()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def save_checkpoint(
    folder: Path,
    *,
    save_weights: SaveWeights,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    trainer_state: str,
    position: dict[str, Any],
) -> None:
    """Write weights, optimizer, random state and position, or nothing.

    position: {"step", "rows_seen", "seed"}: the rows that follow are a function of it alone.
    """
    with files.atomic_folder(folder) as temporary:
        save_weights(temporary)
        save_file(_optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
        save_file(_random_state(), temporary / "rng.safetensors")
        files.write_json(temporary / "position.json", position)
        with files.atomic_write(temporary / "trainer_state.json") as file:
            file.write(trainer_state)


def prune_checkpoints(run: Path, *, keep: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `keep`, never the newest and never the best."""
    if keep is None:
        return
    for path in checkpoints(run)[: -max(1, keep)]:
        if path.name != best:
            shutil.rmtree(path)


def load_optimizer(folder: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's optimizer state back, tensor by tensor, by the parameters' names."""
    saved = load_file(folder / "optimizer.safetensors")
    for name, parameter in _trained(model).items():
        for full_name, tensor in saved.items():
            owner, _, key = full_name.rpartition(".")
            if owner == name:
                optimizer.state[parameter][key] = _as_it_was(key, tensor, parameter.device)


def load_random_state(folder: Path) -> None:
    """Put a checkpoint's random state back (dropout goes on as it would have)."""
    saved = load_file(folder / "rng.safetensors")
    torch.set_rng_state(saved["cpu"])
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, parameter in _trained(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensor = torch.as_tensor(value).detach().cpu().contiguous()
            if tensor.data_ptr() in storages:  # the code book that all 8-bit states look numbers up in
                tensor = tensor.clone()
            storages.add(tensor.data_ptr())
            tensors[f"{name}.{key}"] = tensor
    return tensors


def _as_it_was(key: str, tensor: torch.Tensor, device: torch.device) -> torch.Tensor | int:
    """A state as its optimizer keeps it: bitsandbytes counts steps in a Python int, torch in a tensor on the CPU."""
    if key == "step":
        return tensor if tensor.is_floating_point() else int(tensor)
    return tensor.to(device)


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
