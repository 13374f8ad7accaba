"""The run: one visible loop from rows to a saved model.

Read `train` for the order of things and `train_step` for the step itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tuoling import console, environment, files
from tuoling.data.batches import lay
from tuoling.data.pack import Batch, collate
from tuoling.kernels.install import FastModel, install
from tuoling.kernels.loss import Extras
from tuoling.language import tr
from tuoling.models.load import load_model
from tuoling.train.checkpoint import SaveWeights, prune_checkpoints, save_checkpoint
from tuoling.train.finish import finish
from tuoling.train.interrupt import Interrupt
from tuoling.train.memory import quantization_of
from tuoling.train.optim import make_optimizer, set_learning_rate
from tuoling.train.parallel import make_accelerator
from tuoling.train.prepare import Setup, prepare
from tuoling.train.progress import (
    Progress,
    improved,
    log_step,
    not_finite,
    note_step,
    trainer_state,
)
from tuoling.train.rows import Rows
from tuoling.train.run_folder import RunFolder, claim, default_run_folder, manifest
from tuoling.train.steps import Steps, make_steps
from tuoling.train.weights import make_trainable, weight_saver

if TYPE_CHECKING:
    from accelerate import Accelerator

    from tuoling.config import RunConfig


@dataclass(frozen=True, slots=True)
class RunResult:
    """Where a run lies and what all_results.json says of it."""

    path: Path
    status: str
    results: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Parts:
    """What computes: accelerate's engine, the model with its fast step, the optimizer, and how weights are saved."""

    accelerator: Accelerator
    model: Any
    fast: FastModel
    optimizer: Any
    save_weights: SaveWeights
    share_head: bool = False


def train(
    config: RunConfig,
    *,
    notes: Sequence[str] = (),
    say: Callable[[str], None] = console.note,
    show_plan: Callable[[Setup], None] | None = None,
) -> RunResult:
    """Train as `config` says and leave a run folder. Everything checkable is checked before the first step.

    Raises TuolingError; a run folder that was begun then says `"status": "failed"` and why.
    """
    setup = prepare(config, say=say, notes=notes)
    folder = Path(config.output_dir) if config.output_dir else default_run_folder(setup.source.name)
    setup.plan.require_disk(folder)
    if not config.ignore_memory_plan:
        setup.plan.require_memory()
    moved = claim(folder, overwrite=config.overwrite_output_dir)
    if moved:
        say(moved)
    if show_plan:
        show_plan(setup)
    record = manifest(setup, environment.versions(), environment.machine())
    run = RunFolder(folder, record)
    try:
        parts = assemble(setup, run, record, say)
        with Interrupt() as interrupt:
            done = fit(setup, run, parts, interrupt)
            parts.fast.uninstall()
            parts.accelerator.end_training()
            status = "interrupted" if done.step < setup.plan.total_steps else "finished"
            results = finish(run, setup, done, status=status, save_weights=parts.save_weights, say=say)
    except BaseException as error:
        run.fail(error)
        raise
    return RunResult(folder, status, results)


def assemble(setup: Setup, run: RunFolder, record: dict[str, Any], say: Callable[[str], None]) -> Parts:
    """Load the model, make its trained weights trainable, put the fast step on it, make the optimizer."""
    config = setup.config
    accelerator = make_accelerator(
        device=setup.device, dtype=setup.dtype, trackers=config.report_to, folder=run.path, manifest=record
    )
    torch.manual_seed(config.seed)
    model = load_model(
        setup.source,
        dtype="fp32" if config.finetuning_type == "full" else setup.dtype,
        device=setup.device,
        for_training=True,
        allow_remote_code=config.allow_remote_code,
        quantization=quantization_of(config),
    )
    model = make_trainable(model, setup)
    extras = Extras(config.label_smoothing_factor, config.z_loss)
    fast = install(model, extras=extras, say=say)
    optimizer = accelerator.prepare_optimizer(make_optimizer(model, config))
    share_head = config.share_head and can_share_head(fast, setup.device, say)
    return Parts(accelerator, model, fast, optimizer, weight_saver(model, setup), share_head)


def can_share_head(fast: FastModel, device: str, say: Callable[[str], None]) -> bool:
    """Whether rows may go on after one common head here; says so where they may not."""
    if fast.packed and device == "cpu":
        return True
    say(
        tr(
            "share_head: not used; rows that run one by one, or on a GPU, keep their own",
            "share_head：未使用；逐条计算或在 GPU 上时，每条数据各算各的开头",
        )
    )
    return False


def fit(setup: Setup, run: RunFolder, parts: Parts, interrupt: Interrupt) -> Progress:
    """Step until the plan is done or the user interrupts; evaluate, log and save on the way.

    Raises KeyboardInterrupt where nothing has been trained yet that could be saved.
    """
    config, plan, done = setup.config, setup.plan, Progress()
    steps = make_steps(config, setup.train.lengths)
    parts.model.train()
    with run.metrics() as metrics, console.progress() as bar:
        task = bar.add_task(tr("training", "训练中"), total=plan.total_steps, detail="")
        while done.step < plan.total_steps and not interrupt.asked:
            began = time.perf_counter()
            rate = plan.learning_rate(done.step, config)
            set_learning_rate(parts.optimizer, rate)
            batches = batches_of_step(setup.train, steps, done.step, share_head=parts.share_head)
            loss, grad_norm = train_step(
                parts.fast, parts.optimizer, parts.accelerator, batches, config.max_grad_norm
            )
            row = note_step(done, setup, batches, loss, grad_norm, rate, time.perf_counter() - began)
            if not step_is_finite(parts.accelerator, loss, grad_norm):
                raise not_finite(run, setup, batches, row)
            bar.update(
                task, completed=done.step, detail=f"loss {loss:.4f} · {row['tokens_per_s']:,.0f} tokens/s"
            )
            last = done.step == plan.total_steps or interrupt.asked
            if setup.held_out and (last or done.step % plan.eval_steps == 0):
                row["eval_loss"] = done.eval_loss = evaluate_loss(parts, setup, setup.held_out)
            files.append_jsonl(metrics, row)
            log_step(run, parts.accelerator, row, config.logging_steps, last)
            if improved(done, config, row) or (done.step % plan.save_steps == 0 and not last):
                _save(setup, run, parts, done)
    if done.step == 0:
        raise KeyboardInterrupt
    return done


def _save(setup: Setup, run: RunFolder, parts: Parts, done: Progress) -> None:
    save_checkpoint(
        run.path / f"checkpoint-{done.step}",
        save_weights=parts.save_weights,
        model=parts.model,
        optimizer=parts.optimizer.optimizer,
        trainer_state=trainer_state(run, setup, done),
        position={"step": done.step, "rows_seen": done.rows_seen, "seed": setup.config.seed},
    )
    best = done.best["checkpoint"] if done.best else None
    prune_checkpoints(run.path, keep=setup.config.save_total_limit, best=best)


def batches_of_step(train: Rows, steps: Steps, step: int, *, share_head: bool = False) -> list[Batch]:
    """The micro-batches of an optimizer step: a function of the seed and the step alone."""
    laid = steps.micro_batches(step)
    return [collate([train[row] for row in rows], share_head=share_head) for rows in laid]


def train_step(
    fast: FastModel,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    batches: Sequence[Batch],
    max_grad_norm: float,
) -> tuple[float, float]:
    """One optimizer step. Returns (mean loss in nats per learned token, gradient norm before clipping).

    Every micro-batch gives a sum; the sums are divided once, by the learned tokens of all of them, so that
    8 x 1 and 1 x 8 rows give the same gradient. A loss or a gradient that is not finite changes no weight.
    """
    learned = sum(batch.num_learned for batch in batches)
    total = 0.0
    for batch in batches:
        with accelerator.autocast():
            loss_sum = batch_loss(fast, batch, accelerator.device)
        accelerator.backward(loss_sum / learned)
        total += loss_sum.item()
    mean = total / learned
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = accelerator.clip_grad_norm_(parameters, max_grad_norm if max_grad_norm > 0 else math.inf)
    if step_is_finite(accelerator, mean, float(norm)):
        optimizer.step()
    optimizer.zero_grad()
    return mean, float(norm)


def step_is_finite(accelerator: Accelerator, loss: float, grad_norm: float) -> bool:
    """Whether a step may change the weights. A gradient that overflows under loss scaling is the scaler's to skip."""
    return math.isfinite(loss) and (accelerator.scaler is not None or math.isfinite(grad_norm))


def batch_loss(fast: FastModel, batch: Batch, device: torch.device) -> torch.Tensor:
    """Summed cross entropy of a packed batch, in nats, on `device`."""
    here = batch.to(device)
    return fast.loss_sum(
        here.input_ids, here.labels, here.position_ids, here.cu_seqlens, here.extra_labels, here.head
    )


@torch.no_grad()
def evaluate_loss(parts: Parts, setup: Setup, rows: Rows) -> float:
    """Mean nats per learned token over held-out rows, dropout off."""
    config = setup.config
    laid = lay(
        rows.lengths, rows_at_once=config.per_device_eval_batch_size, max_tokens=config.max_tokens_per_batch
    )
    was_training = parts.model.training
    parts.model.eval()
    total, learned = 0.0, 0
    for positions in laid:
        batch = collate([rows[position] for position in positions], share_head=parts.share_head)
        with parts.accelerator.autocast():
            total += batch_loss(parts.fast, batch, parts.accelerator.device).item()
        learned += batch.num_learned
    parts.model.train(was_training)
    return total / learned
