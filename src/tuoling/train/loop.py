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
from tuoling.data.pack import Batch, collate
from tuoling.data.sampler import SampleOrder
from tuoling.errors import TrainingError
from tuoling.kernels.install import FastModel, install
from tuoling.language import tr
from tuoling.models.load import load_model
from tuoling.train.checkpoint import prune_checkpoints, save_checkpoint
from tuoling.train.finish import finish
from tuoling.train.interrupt import Interrupt
from tuoling.train.optim import learning_rate, make_optimizer, set_learning_rate
from tuoling.train.parallel import make_accelerator
from tuoling.train.prepare import Rows, Setup, manifest, prepare
from tuoling.train.run_folder import RunFolder, claim, default_run_folder
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


@dataclass
class Progress:
    """What the loop has done so far."""

    step: int = 0
    rows_seen: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    timed_tokens: int = 0
    seconds: float = 0.0
    first_loss: float | None = None
    last_loss: float | None = None
    eval_loss: float | None = None
    best: dict[str, Any] | None = None


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
    moved = claim(folder, overwrite=config.overwrite_output_dir)
    if moved:
        say(moved)
    setup.plan.require_disk(folder)
    if show_plan:
        show_plan(setup)
    record = manifest(setup, environment.versions(), environment.machine())
    run = RunFolder(folder, record)
    try:
        return _run(setup, run, record, say)
    except BaseException as error:
        run.set_status("failed", error=str(error) or type(error).__name__)
        raise


def _run(setup: Setup, run: RunFolder, record: dict[str, Any], say: Callable[[str], None]) -> RunResult:
    config, plan = setup.config, setup.plan
    accelerator = make_accelerator(
        device=setup.device, dtype=setup.dtype, trackers=config.report_to, folder=run.path, manifest=record
    )
    torch.manual_seed(config.seed)
    weights_dtype = "fp32" if config.finetuning_type == "full" else setup.dtype
    model = load_model(
        setup.source,
        dtype=weights_dtype,
        device=setup.device,
        for_training=True,
        allow_remote_code=config.allow_remote_code,
    )
    model = make_trainable(model, setup)
    fast = install(model, say=say)
    optimizer = accelerator.prepare_optimizer(make_optimizer(model, config))
    save_weights = weight_saver(model, setup)
    order = SampleOrder(len(setup.train), config.seed)
    done = Progress()
    model.train()

    with run.metrics() as metrics, Interrupt() as interrupt, console.progress() as bar:
        task = bar.add_task(tr("training", "训练中"), total=plan.total_steps, detail="")
        while done.step < plan.total_steps and not interrupt.asked:
            began = time.perf_counter()
            rate = learning_rate(
                done.step,
                base=config.learning_rate,
                total_steps=plan.total_steps,
                warmup_steps=plan.warmup_steps,
                schedule=config.lr_scheduler_type,
            )
            set_learning_rate(optimizer, rate)
            batches = batches_of_step(setup, order, done.step)
            loss, grad_norm = train_step(fast, optimizer, accelerator, batches, config.max_grad_norm)
            took = time.perf_counter() - began
            row = _note_step(done, setup, batches, loss, grad_norm, rate, took)
            if not math.isfinite(loss):
                raise _not_finite(run, setup, batches, row)
            bar.update(
                task, completed=done.step, detail=f"loss {loss:.4f} · {row['tokens_per_s']:,.0f} tokens/s"
            )
            last = done.step == plan.total_steps or interrupt.asked
            if setup.held_out and (last or done.step % plan.eval_steps == 0):
                row["eval_loss"] = done.eval_loss = evaluate_loss(fast, accelerator, setup, setup.held_out)
            files.append_jsonl(metrics, row)
            _log(run, accelerator, row, config.logging_steps, last, bar_shown=console.err.is_terminal)
            improved = _improved(done, config, row)
            if improved or (done.step % plan.save_steps == 0 and not last):
                save_checkpoint(
                    run.path / f"checkpoint-{done.step}",
                    save_weights=save_weights,
                    model=model,
                    optimizer=optimizer.optimizer,
                    trainer_state=_trainer_state(run, setup, done),
                    position={"step": done.step, "rows_seen": done.rows_seen, "seed": config.seed},
                )
                prune_checkpoints(
                    run.path,
                    keep=config.save_total_limit,
                    best=done.best["checkpoint"] if done.best else None,
                )
    fast.uninstall()
    accelerator.end_training()
    results = _results(done, setup)
    return RunResult(
        run.path,
        status := "interrupted" if done.step < plan.total_steps else "finished",
        finish(
            run,
            setup,
            status=status,
            results=results,
            save_weights=save_weights,
            best=done.best,
            trainer_state=_trainer_state(run, setup, done),
            say=say,
        ),
    )


def batches_of_step(setup: Setup, order: SampleOrder, step: int) -> list[Batch]:
    """The micro-batches of an optimizer step: a function of the seed and the step alone."""
    plan = setup.plan
    begin = step * plan.rows_per_step
    end = min(begin + plan.rows_per_step, plan.total_rows)
    rows = [int(setup.train.index[row]) for row in order.rows(begin, end)]
    size = plan.rows_per_micro_batch
    return [
        collate([setup.train.store[row] for row in rows[at : at + size]]) for at in range(0, len(rows), size)
    ]


def train_step(
    fast: FastModel,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    batches: Sequence[Batch],
    max_grad_norm: float,
) -> tuple[float, float]:
    """One optimizer step. Returns (mean loss in nats per learned token, gradient norm before clipping).

    Every micro-batch gives a sum; the sums are divided once, by the learned tokens of all of them, so that
    8 x 1 and 1 x 8 rows give the same gradient. A loss that is not finite changes no weight.
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
    if math.isfinite(mean):
        optimizer.step()
    optimizer.zero_grad()
    return mean, float(norm)


def batch_loss(fast: FastModel, batch: Batch, device: torch.device) -> torch.Tensor:
    """Summed cross entropy of a packed batch, in nats, on `device`."""
    here = batch.to(device)
    return fast.loss_sum(here.input_ids, here.labels, here.position_ids, here.cu_seqlens)


@torch.no_grad()
def evaluate_loss(fast: FastModel, accelerator: Accelerator, setup: Setup, rows: Rows) -> float:
    """Mean nats per learned token over held-out rows, dropout off."""
    size = setup.config.per_device_eval_batch_size
    was_training = fast.model.training
    fast.model.eval()
    total, learned = 0.0, 0
    for at in range(0, len(rows), size):
        batch = collate([rows.store[int(row)] for row in rows.index[at : at + size]])
        with accelerator.autocast():
            total += batch_loss(fast, batch, accelerator.device).item()
        learned += batch.num_learned
    fast.model.train(was_training)
    return total / learned


def _note_step(
    done: Progress, setup: Setup, batches: Sequence[Batch], loss: float, norm: float, rate: float, took: float
) -> dict[str, Any]:
    tokens = sum(batch.input_ids.numel() for batch in batches)
    learned = sum(batch.num_learned for batch in batches)
    if done.step > 0:  # the first step pays for warm-up: allocators, kernels, caches
        done.seconds += took
        done.timed_tokens += tokens
    done.step += 1
    done.rows_seen += sum(len(batch.rows) for batch in batches)
    done.tokens += tokens
    done.learned_tokens += learned
    done.first_loss = loss if done.first_loss is None else done.first_loss
    done.last_loss = loss
    return {
        "step": done.step,
        "epoch": round(done.rows_seen / setup.plan.rows, 4),
        "loss": loss,
        "learning_rate": rate,
        "grad_norm": norm,
        "tokens": tokens,
        "learned_tokens": learned,
        "seconds": round(took, 4),
        "tokens_per_s": round(tokens / took, 1),
        "peak_rss_gib": round(environment.peak_rss_gib(), 3),
    }


def _log(
    run: RunFolder, accelerator: Accelerator, row: dict[str, Any], every: int, last: bool, *, bar_shown: bool
) -> None:
    """Add the step to trainer_state's history and the trackers; print a line where no bar can be drawn."""
    step, epoch = row["step"], row["epoch"]
    due = step == 1 or step % every == 0 or last
    if due:
        shown = ("loss", "learning_rate", "grad_norm")
        run.log_history.append({"epoch": epoch, **{key: row[key] for key in shown}, "step": step})
        if not bar_shown:
            console.note(
                tr("step", "步") + f" {step}  loss {row['loss']:.4f}  lr {row['learning_rate']:.2e}"
                f"  {row['tokens_per_s']:,.0f} tokens/s"
            )
    if "eval_loss" in row:
        run.log_history.append({"epoch": epoch, "eval_loss": row["eval_loss"], "step": step})
        console.note(tr("step", "步") + f" {step}  eval loss {row['eval_loss']:.4f}")
    if accelerator.log_with:
        accelerator.log({key: row[key] for key in row if key not in ("step", "seconds")}, step=step)


def _improved(done: Progress, config: RunConfig, row: dict[str, Any]) -> bool:
    """Note a new lowest held-out loss, if the best weights are wanted at the end."""
    if not config.load_best_model_at_end or "eval_loss" not in row:
        return False
    if done.best is not None and row["eval_loss"] >= done.best["eval_loss"]:
        return False
    done.best = {"eval_loss": row["eval_loss"], "step": done.step, "checkpoint": f"checkpoint-{done.step}"}
    return True


def _trainer_state(run: RunFolder, setup: Setup, done: Progress) -> str:
    return run.trainer_state(
        step=done.step,
        total_steps=setup.plan.total_steps,
        epoch=round(done.rows_seen / setup.plan.rows, 4),
        best=done.best,
    )


def _results(done: Progress, setup: Setup) -> dict[str, Any]:
    cuda = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return {
        "train_loss_first": done.first_loss,
        "train_loss_last": done.last_loss,
        "eval_loss": done.eval_loss,
        "best_eval_loss": done.best["eval_loss"] if done.best else None,
        "rows": len(setup.train),
        "tokens": done.tokens,
        "learned_tokens": done.learned_tokens,
        "steps": done.step,
        "epochs": round(done.rows_seen / setup.plan.rows, 4),
        "seconds": round(done.seconds, 3),
        "tokens_per_s": round(done.timed_tokens / done.seconds, 1) if done.seconds else None,
        "peak_rss_gib": round(environment.peak_rss_gib(), 3),
        "peak_cuda_gib": round(cuda, 3),
    }


def _not_finite(run: RunFolder, setup: Setup, batches: Sequence[Batch], row: dict[str, Any]) -> TrainingError:
    """Save the rows of the step whose loss is not a number, and say where they are."""
    path = run.path / "nonfinite_rows.json"
    places = [setup.train.store.place(index) for batch in batches for index in batch.rows]
    files.write_json(path, {"step": row["step"], "loss": str(row["loss"]), "rows": places})
    return TrainingError(
        tr(
            f"the loss of step {row['step']} is {row['loss']}: the run stops before it spoils the weights",
            f"第 {row['step']} 步的损失是 {row['loss']}：在权重被破坏之前停止训练",
        ),
        where=str(path),
        remedy=tr(
            "look at these rows; lower learning_rate, or set dtype=fp32",
            "检查这些数据；调小 learning_rate，或设 dtype=fp32",
        ),
    )
