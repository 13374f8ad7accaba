"""Checkpoints: safetensors and JSON in a folder that is renamed into place when it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tuoling import files
from tuoling.errors import TrainingError
from tuoling.language import tr

POSITION = "position.json"
SaveWeights = Callable[[Path], None]


def checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first; a folder without a manifest is none."""
    found = [
        path
        for path in run.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit() and (path / files.MANIFEST).is_file()
    ]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint's name says."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def pick_checkpoint(run: Path, *, named: str | None = None, skip_damaged: bool = False) -> Path | None:
    """The newest checkpoint of a run, or the one `named` (`checkpoint-40`, `40` or its path), every byte verified.

    None where there is none yet. skip_damaged: of those that are damaged the newest whole one before them.
    Raises TrainingError for one that is not there or is damaged, with the files that are.
    """
    found = checkpoints(run)
    if named is not None:
        name = Path(named).name
        wanted = run / (name if name.startswith("checkpoint-") else f"checkpoint-{name}")
        if wanted not in found:
            have = ", ".join(path.name for path in found) or tr("none", "没有")
            raise TrainingError(
                tr(f"the run has no whole {wanted.name}", f"该训练没有完整的 {wanted.name}"),
                where=str(run),
                remedy=tr(f"there are: {have}", f"现有：{have}"),
            )
        found = [wanted]
    for checkpoint in reversed(found):
        problems = files.manifest_problems(checkpoint)
        if not problems:
            return checkpoint
        if not skip_damaged:
            raise _damaged(checkpoint, problems, found)
    return None


def _damaged(checkpoint: Path, problems: list[str], found: list[Path]) -> TrainingError:
    before = [path.name for path in found if step_of(path) < step_of(checkpoint)]
    way = tr(
        "go on from the newest whole one: --skip-damaged"
        if before
        else "begin at step 0 in its place: --skip-damaged",
        "改用前一个完好的检查点：--skip-damaged" if before else "从第 0 步重新开始：--skip-damaged",
    )
    return TrainingError(
        tr(
            f"{checkpoint.name} is damaged: {'; '.join(problems)}",
            f"{checkpoint.name} 已损坏：{'；'.join(problems)}",
        ),
        where=str(checkpoint),
        remedy=way,
    )


def sweep(run: Path) -> None:
    """Remove what a killed process left half-written in a run. Only for the process that holds the run's lock."""
    for pattern in (".*.part", ".final"):
        for path in run.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def save_checkpoint(
    folder: Path,
    *,
    save_weights: SaveWeights,
    optimizer: dict[str, torch.Tensor],
    random: Sequence[dict[str, torch.Tensor]],
    trainer_state: str,
    position: dict[str, Any],
) -> None:
    """Write weights, optimizer, random state and position, or nothing.

    optimizer: as `optimizer_tensors` gives it. random: `random_state()` of every rank.
    position: the step, the rows taken, the schedule, the loss scaler, the trackers, and the loss of one batch with
    exactly these weights: the rows and rates that follow are a function of it and of run.json alone.
    """
    with files.atomic_folder(folder) as temporary:
        save_weights(temporary)
        save_file(optimizer, temporary / "optimizer.safetensors")
        for rank, state in enumerate(random):
            save_file(state, temporary / _random_file(rank))
        files.write_json(temporary / POSITION, position)
        with files.atomic_write(temporary / "trainer_state.json") as file:
            file.write(trainer_state)


def prune_checkpoints(run: Path, *, keep: int | None, best: str | None, every: int | None = None) -> None:
    """Delete the oldest checkpoints beyond `keep`, never the newest, the best or a multiple of `every`."""
    if keep is None:
        return
    for path in checkpoints(run)[: -max(1, keep)]:
        if path.name != best and not (every and step_of(path) % every == 0):
            going = path.with_name(f".{path.name}.pruned.part")  # what a kill leaves of it is no checkpoint
            path.rename(going)
            shutil.rmtree(going)


def put_aside(run: Path, after: int) -> list[str]:
    """Rename the checkpoints of later steps, which a run that goes on from step `after` will make again."""
    moved = []
    for path in sorted(run.glob("checkpoint-*")):
        number = path.name.removeprefix("checkpoint-")
        if not number.isdigit() or int(number) <= after:
            continue
        count = 1
        while (aside := run / f"old-{count}.{path.name}").exists():
            count += 1
        path.rename(aside)
        moved.append(f"{path.name} → {aside.name}")
    return moved


def load_optimizer(folder: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's optimizer state back, tensor by tensor, by the parameters' names."""
    put_optimizer(load_file(folder / "optimizer.safetensors"), model=model, optimizer=optimizer)


def put_optimizer(
    saved: dict[str, torch.Tensor], *, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """`parameter's name.key` → the optimizer's state. Raises TrainingError where the two are not of one model."""
    trained = _trained(model)
    require_same_model(saved, {name: parameter.shape for name, parameter in trained.items()})
    fused = {id(p) for group in optimizer.param_groups for p in group["params"] if group.get("fused")}
    for full_name, tensor in saved.items():
        name, _, key = full_name.rpartition(".")
        parameter = trained[name]
        if tensor.ndim and isinstance(parameter, DTensor):  # FSDP: each rank keeps its part of the state too
            whole = tensor.to(parameter.device_mesh.device_type)
            state = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            optimizer.state[parameter][key] = state
            continue
        device = parameter.device if key != "step" or id(parameter) in fused else torch.device("cpu")
        optimizer.state[parameter][key] = _as_it_was(key, tensor, device)


def require_same_model(saved: dict[str, torch.Tensor], shapes: dict[str, torch.Size]) -> None:
    """Raise TrainingError where an optimizer's state names other parameters than these, or is of other shapes."""
    for full_name, tensor in saved.items():
        name, _, key = full_name.rpartition(".")
        moments = key.startswith("exp_avg") and tensor.dtype.is_floating_point
        if name not in shapes or (moments and tensor.shape != shapes[name]):
            raise TrainingError(
                tr(
                    f"the optimizer's state is of another model: {full_name}",
                    f"优化器状态属于另一个模型：{full_name}",
                )
            )


def load_random_state(folder: Path, rank: int = 0) -> None:
    """Put a checkpoint's random state back (dropout goes on as it would have).

    A rank that did not exist then keeps the state it began with.
    """
    path = folder / _random_file(rank)
    if not path.is_file():
        return
    saved = load_file(path)
    torch.set_rng_state(saved["cpu"])
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, whole: Callable[[torch.Tensor], torch.Tensor] = _plain
) -> dict[str, torch.Tensor]:
    """The optimizer's state on the CPU: `parameter's name.key` → tensor. whole: puts parts of one together."""
    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, parameter in _trained(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensor = whole(torch.as_tensor(value).detach()).cpu().contiguous()
            if tensor.data_ptr() in storages:  # the code book that all 8-bit states look numbers up in
                tensor = tensor.clone()
            storages.add(tensor.data_ptr())
            tensors[f"{name}.{key}"] = tensor
    return tensors


def _as_it_was(key: str, tensor: torch.Tensor, device: torch.device) -> torch.Tensor | int:
    """A state as its optimizer keeps it: bitsandbytes counts steps in a Python int, torch in a tensor on the CPU."""
    if key == "step" and not tensor.is_floating_point():
        return int(tensor)
    return tensor.to(device)


def _random_file(rank: int) -> str:
    return f"rng-{rank}.safetensors" if rank else "rng.safetensors"


def random_state() -> dict[str, torch.Tensor]:
    """What torch's generators of this process would draw next."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
