from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from tests.devices import DEVICES
from torch import nn

from tuoling.errors import OutputError
from tuoling.train.checkpoint import (
    checkpoints,
    load_optimizer,
    load_random_state,
    optimizer_tensors,
    prune_checkpoints,
    random_state,
    save_checkpoint,
)


def save(run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    folder = run / f"checkpoint-{step}"
    save_checkpoint(
        folder,
        save_weights=lambda path: torch.save(model.state_dict(), path / "weights.pt"),
        optimizer=optimizer_tensors(model, optimizer),
        random=[random_state()],
        trainer_state="{}\n",
        position={"step": step},
    )
    return folder


def stepped(device: str = "cpu") -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for _ in range(3):
        model(torch.randn(5, 4, device=device)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("device", DEVICES)
def test_optimizer_and_random_state_come_back_bit_for_bit(tmp_path: Path, device: str) -> None:
    model, optimizer = stepped(device)
    folder = save(tmp_path, 3, model, optimizer)
    drawn = torch.rand(4), torch.rand(4, device=device)
    fresh = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    load_optimizer(folder, model=model, optimizer=fresh)
    load_random_state(folder)
    assert torch.equal(torch.rand(4), drawn[0]) and torch.equal(torch.rand(4, device=device), drawn[1])
    for parameter in model.parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            ours, theirs = fresh.state[parameter][key], optimizer.state[parameter][key]
            assert torch.equal(ours, theirs) and ours.device == theirs.device


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        Exception(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),  # safetensors'
    ],
)
def test_a_full_disk_leaves_no_checkpoint_and_is_called_by_its_name(tmp_path: Path, error: Exception) -> None:
    model, optimizer = stepped()

    def full(folder: Path) -> None:
        (folder / "weights.pt").write_bytes(b"half")
        raise error

    with pytest.raises(OutputError, match="the disk is full") as told:
        save_checkpoint(
            tmp_path / "checkpoint-1",
            save_weights=full,
            optimizer=optimizer_tensors(model, optimizer),
            random=[random_state()],
            trainer_state="{}",
            position={},
        )
    assert told.value.where == str(tmp_path / "checkpoint-1") and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    model, optimizer = stepped()
    save(tmp_path, 9, model, optimizer)
    save(tmp_path, 10, model, optimizer)
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-last").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


def test_nothing_is_left_of_a_save_that_fails(tmp_path: Path) -> None:
    model, optimizer = stepped()

    def fail(path: Path) -> None:
        (path / "half").write_text("x")
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError):
        save_checkpoint(
            tmp_path / "checkpoint-1",
            save_weights=fail,
            optimizer=optimizer_tensors(model, optimizer),
            random=[random_state()],
            trainer_state="{}\n",
            position={},
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(None, None, [1, 2, 3, 4]), (2, None, [3, 4]), (1, "checkpoint-2", [2, 4]), (9, None, [1, 2, 3, 4])],
)
def test_the_newest_and_the_best_are_kept(
    tmp_path: Path, keep: int | None, best: str | None, left: list[int]
) -> None:
    model, optimizer = stepped()
    for step in (1, 2, 3, 4):
        save(tmp_path, step, model, optimizer)
    prune_checkpoints(tmp_path, keep=keep, best=best)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]


def test_every_so_many_steps_one_is_kept_for_good(tmp_path: Path) -> None:
    model, optimizer = stepped()
    for step in range(1, 8):
        save(tmp_path, step, model, optimizer)
        prune_checkpoints(tmp_path, keep=2, best="checkpoint-1", every=3)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (1, 3, 6, 7)]
