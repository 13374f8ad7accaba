"""Checkpoints of transformers' Trainer: optimizer.pt, scheduler.pt and trainer_state.json, read as plain tensors only."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    """Where a learning rate's line stands. learning_rate: its peak.

    away: how far the logged rates are from this line on average, as a share of the peak, where it was found from them.
    """

    step: int
    total_steps: int
    learning_rate: float
    warmup_steps: int
    kind: str
    away: float | None = None

    def rate(self, step: float) -> float:
        """The line after `step` steps."""
        if step < self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.learning_rate * _FALLS[self.kind](done)


_FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "constant": lambda done: 1.0,
}


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
    saved = _load(folder / SCHEDULER) if (folder / SCHEDULER).is_file() else {}
    peak = float((saved.get("base_lrs") or [max((rate for _, rate in log), default=0.0)])[0])
    if peak <= 0.0:
        raise _unreadable(folder, tr("no learning rate", "没有学习率"))
    now = [(step, float(rate)) for rate in saved.get("_last_lr", [])[:1]]
    return _nearest(Schedule(step, total, peak, 0, "linear"), log, now)


def _nearest(begun: Schedule, log: Sequence[tuple[int, float]], now: Sequence[tuple[int, float]]) -> Schedule:
    """The line nearest to the rates in the log and to the next one. Where several are equally near, the simplest.

    The Trainer of 2023 logged the rate of the next step beside a step, today's logs the one the step was taken with.
    """
    found: list[tuple[float, int, int, Schedule]] = []
    for late in (0, 1):
        points = [(at - late, rate) for at, rate in log if at > 0] + list(now)
        for order, kind in enumerate(_FALLS):
            for warmup in _warmups(begun, kind, points):
                line = replace(begun, kind=kind, warmup_steps=warmup)
                away = sum(abs(line.rate(at) - rate) for at, rate in points)
                share = away / max(1, len(points)) / begun.learning_rate
                found.append((round(share, 6), order, warmup, replace(line, away=share)))
    return min(found, key=lambda each: each[:3])[3]


def _warmups(begun: Schedule, kind: str, points: Sequence[tuple[int, float]]) -> set[int]:
    """Lengths of the warm-up that put one of the first points on its rise, or the last one on the fall after it."""
    total, peak = begun.total_steps, begun.learning_rate
    rising = [round(at * peak / rate) for at, rate in points[:3] if at > 0 and rate > 0]
    falling = []
    for at, rate in points[-1:]:
        share = min(1.0, max(0.0, rate / peak))
        done = {"linear": 1.0 - share, "cosine": math.acos(2.0 * share - 1.0) / math.pi}.get(kind, 1.0)
        if done < 1.0:
            falling.append(round((at - done * total) / (1.0 - done)))
    return {0, *(steps for steps in (*rising, *falling) if 0 <= steps <= total)}


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
