"""Checkpoints of transformers' Trainer: optimizer.pt, scheduler.pt and trainer_state.json, read as plain tensors only."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tuoling import files
from tuoling.errors import TrainingError
from tuoling.language import tr

STATE, OPTIMIZER, SCHEDULER = "trainer_state.json", "optimizer.pt", "scheduler.pt"


@dataclass(frozen=True, slots=True)
class Schedule:
    """Where a learning rate's line stands. learning_rate: its peak. warmup_steps, kind: as far as the log shows them."""

    step: int
    total_steps: int
    learning_rate: float
    warmup_steps: int
    kind: str


def is_trainer_checkpoint(folder: Path) -> bool:
    """Whether a folder holds all that going on along its schedule takes."""
    return all((folder / name).is_file() for name in (STATE, OPTIMIZER))


def trainer_schedule(folder: Path) -> Schedule:
    """The schedule of a Trainer checkpoint. Its kind and warm-up are found from the rates in its log.

    Raises TrainingError where the files do not say at which step it stands, or at which rate.
    """
    state = files.read_json(folder / STATE)
    step, total = state.get("global_step"), state.get("max_steps")
    if not isinstance(step, int) or not isinstance(total, int) or not step > 0:
        raise _unreadable(folder / STATE, tr("no global_step and max_steps", "没有 global_step 和 max_steps"))
    log = [
        (row["step"], float(row["learning_rate"]))
        for row in state.get("log_history", [])
        if isinstance(row, dict) and "learning_rate" in row and isinstance(row.get("step"), int)
    ]
    peaks = _load(folder / SCHEDULER).get("base_lrs", []) if (folder / SCHEDULER).is_file() else []
    peak = float(peaks[0]) if peaks else max((rate for _, rate in log), default=0.0)
    if peak <= 0.0:
        raise _unreadable(folder, tr("no learning rate", "没有学习率"))
    warmup = 0
    if len(log) > 1 and log[1][1] > log[0][1] > 0:  # the log begins while the rate rises, in a line from 0
        warmup = round(log[0][0] * peak / log[0][1])
    kind = _kind(log, peak, warmup, total)
    if (
        kind == "linear" and not warmup and log and 0.0 < log[-1][1] < peak
    ):  # over before the first logged step
        at, rate = log[-1]
        warmup = max(0, round(total - (total - at) * peak / rate))
    return Schedule(step, total, peak, warmup, kind)


def _kind(log: list[tuple[int, float]], peak: float, warmup: int, total: int) -> str:
    """The schedule whose line is nearest to the logged rates after the warm-up."""
    lines = {
        "linear": lambda done: 1.0 - done,
        "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
        "constant": lambda done: 1.0,
    }
    after = [(at, rate) for at, rate in log if at > warmup]

    def away(kind: str) -> float:
        points = (((at - warmup) / max(1, total - warmup), rate) for at, rate in after)
        return sum(abs(peak * lines[kind](done) - rate) for done, rate in points)

    return min(lines, key=away)


def trainer_optimizer(folder: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """AdamW's state of optimizer.pt by our model's names, `parameter's name.key` → tensor.

    The Trainer numbers parameters: those that are decayed (matrices) in the model's order, then the rest.
    Raises TrainingError where the numbers or shapes are of another model, or the optimizer is another one.
    """
    path = folder / OPTIMIZER
    if not path.is_file():
        raise _unreadable(folder, tr("no optimizer state", "没有优化器状态"))
    saved = _load(path)
    groups, states = saved.get("param_groups", []), saved.get("state", {})
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [(name, p) for name, p in trained if p.ndim >= 2]
    ordered = trained if len(groups) == 1 else decayed + [pair for pair in trained if pair[1].ndim < 2]
    numbers = [number for group in groups for number in group["params"]]
    sizes = [len(group["params"]) for group in groups if group["params"]]
    if len(numbers) != len(trained) or (len(sizes) == 2 and sizes[0] != len(decayed)):
        raise _unreadable(
            path,
            tr(
                f"the state of {len(numbers)} parameters, and {len(trained)} are trained here",
                f"有 {len(numbers)} 个参数的状态，而这里训练 {len(trained)} 个",
            ),
        )
    found: dict[str, torch.Tensor] = {}
    for number, (name, parameter) in zip(numbers, ordered, strict=True):
        state = states.get(number, {})
        if not {"exp_avg", "exp_avg_sq"} <= state.keys():
            raise _unreadable(
                path, tr(f"not AdamW's state: {sorted(state)}", f"不是 AdamW 的状态：{sorted(state)}")
            )
        for key in ("exp_avg", "exp_avg_sq"):
            if state[key].shape != parameter.shape:
                shapes = f"{tuple(state[key].shape)}, {tuple(parameter.shape)}"
                raise _unreadable(path, tr(f"{name}: shapes {shapes}", f"{name}：形状 {shapes}"))
            found[f"{name}.{key}"] = state[key].to(torch.float32)
        found[f"{name}.step"] = torch.tensor(float(state["step"]))
    return found


def _load(path: Path) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise _unreadable(path, str(error).splitlines()[0]) from error
    if not isinstance(found, dict):
        raise _unreadable(path, type(found).__name__)
    return found


def _unreadable(path: Path, why: str) -> TrainingError:
    return TrainingError(
        tr(f"this checkpoint's schedule cannot be kept: {why}", f"无法延续这个检查点的学习率计划：{why}"),
        where=str(path),
        remedy=tr(
            "without --keep-schedule its weights begin a new schedule",
            "去掉 --keep-schedule，用它的权重开始新的计划",
        ),
    )
