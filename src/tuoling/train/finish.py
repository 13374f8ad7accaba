"""The end of a run: its weights at the top, its results, its card, its plot."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuoling import files
from tuoling.language import tr
from tuoling.train.card import model_card
from tuoling.train.checkpoint import POSITION, SaveWeights
from tuoling.train.progress import Progress, results_of, trainer_state
from tuoling.train.run_folder import data_record

if TYPE_CHECKING:
    from tuoling.train.prepare import Setup
    from tuoling.train.run_folder import RunFolder

_OF_A_CHECKPOINT = ("optimizer.safetensors", "rng.safetensors", POSITION, files.MANIFEST)


def finish(
    run: RunFolder,
    setup: Setup,
    done: Progress,
    *,
    status: str,
    save_weights: SaveWeights,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write everything a finished (or interrupted) run leaves, and return all_results.json.

    If the best weights were asked for, those at the top are the checkpoint's with the lowest held-out loss.
    """
    best = done.best
    if best is not None:
        checkpoint = run.path / best["checkpoint"]
        _save_at_top(run.path, lambda folder: _copy_weights(checkpoint, folder))
        say(
            tr(
                f"best held-out loss {best['eval_loss']:.4f} at step {best['step']}: these weights are kept",
                f"验证损失最低 {best['eval_loss']:.4f}（第 {best['step']} 步）：保留这一步的权重",
            )
        )
    else:
        _save_at_top(run.path, save_weights)
    run.write_trainer_state(trainer_state(run, setup, done))
    results = results_of(done, setup)
    merged = run.add_results(results)
    with files.atomic_write(run.path / "README.md") as file:
        file.write(model_card(setup, merged))
    # of rows that were made meanwhile all are counted only now
    counted = {"data": data_record(setup)} if setup.streamed is not None else {}
    run.set_status(status, results=results, **counted)
    if setup.config.plot_loss:
        from tuoling.plots import loss_plot, read_history

        loss_plot(read_history(run.path), run.path / "training_loss.png")
    return merged


def _save_at_top(run: Path, save_weights: SaveWeights) -> None:
    """Save into a folder of its own first: a full disk leaves the run as it was.

    The weights are moved last, since a run that has them at the top counts as whole: killed before that, it has none.
    """
    staging = run / ".final"
    with files.atomic_folder(staging) as temporary:
        save_weights(temporary)
    (staging / files.MANIFEST).unlink()
    for file in sorted(staging.iterdir(), key=_order_of_moving):
        file.replace(run / file.name)
    staging.rmdir()


def _order_of_moving(file: Path) -> tuple[int, str]:
    """Small files, then shards of weights, then the one file without which there are none."""
    rank = {".safetensors": 1, ".bin": 1}.get(file.suffix, 0)
    alone = rank and "-of-" not in file.name
    return (2 if alone or file.name.endswith(".index.json") else rank, file.name)


def _copy_weights(checkpoint: Path, folder: Path) -> None:
    """A checkpoint without what only a checkpoint needs. Raises OutputError where it cannot be written."""
    for file in checkpoint.iterdir():
        if file.name not in _OF_A_CHECKPOINT and not file.name.startswith("rng-"):
            shutil.copyfile(file, folder / file.name)
