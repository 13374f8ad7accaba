"""The end of a run: its weights at the top, its results, its card, its plot."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuoling import files
from tuoling.language import tr
from tuoling.train.card import model_card
from tuoling.train.checkpoint import SaveWeights
from tuoling.train.progress import Progress, results_of, trainer_state

if TYPE_CHECKING:
    from tuoling.train.prepare import Setup
    from tuoling.train.run_folder import RunFolder

_OF_A_CHECKPOINT = ("optimizer.safetensors", "rng.safetensors", "position.json", files.MANIFEST)


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
        _copy_from(run.path / best["checkpoint"], run.path)
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
    run.set_status(status, results=results)
    if setup.config.plot_loss:
        from tuoling.plots import loss_plot

        loss_plot(run.log_history, run.path / "training_loss.png")
    return merged


def _save_at_top(run: Path, save_weights: SaveWeights) -> None:
    """Save into a folder of its own first: a full disk leaves the run as it was."""
    staging = run / ".final"
    with files.atomic_folder(staging) as temporary:
        save_weights(temporary)
    for file in staging.iterdir():
        if file.name == files.MANIFEST:
            file.unlink()
        else:
            file.replace(run / file.name)
    staging.rmdir()


def _copy_from(checkpoint: Path, run: Path) -> None:
    for file in checkpoint.iterdir():
        if file.name not in _OF_A_CHECKPOINT:
            shutil.copyfile(file, run / file.name)
